"""Tables as people have them: columns, spellings and labels are found and said, or asked for."""

import numpy as np
import pytest

from medmerge_jax.data import image_table
from medmerge_jax.data.columns import choose_columns
from medmerge_jax.data.sheets import read_any_sheet
from medmerge_jax.errors import UserError


@pytest.fixture
def make(tmp_path):
    """Writes a table and empty files, and reads them."""

    def run(text, *images, **options):
        (tmp_path / "labels.csv").write_text(text)
        (tmp_path / "images").mkdir(exist_ok=True)
        for name in images:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return image_table(tmp_path / "labels.csv", tmp_path / "images", **options)

    return run


@pytest.fixture
def choose(tmp_path):
    """Chooses the columns of a table; no cell is an image but those that end in .png."""

    def run(text, multilabel=False, **given):
        (tmp_path / "labels.csv").write_text(text)
        sheet = read_any_sheet(tmp_path / "labels.csv")
        names = {"image": "", "labels": (), "split": "", "group": "", **given}
        return choose_columns(
            sheet, **names, multilabel=multilabel, names_image=lambda cell: cell.endswith(".png")
        )

    return run


def said(dataset):
    return "\n".join(dataset.notes)


def table(header, row, number=24):
    return "\n".join([header, *(row(i) for i in range(number)), ""])


def images(number=24):
    return [f"{i}.png" for i in range(number)]


def labels_by_id(dataset):
    return {
        one: label
        for split in dataset.splits.values()
        for one, label in zip(split.ids, split.labels.tolist(), strict=True)
    }


@pytest.mark.parametrize(
    "name",
    ["patientId", "PatientID", "Patient ID", "patient-id", "subject_id", "patient_code", "case_id",
     "StudyInstanceUID", "participant_id", "lesion", "SubjectID", "Lesion ID", "PATIENT"],
)  # fmt: skip
def test_groups_by_any_spelling(make, name):
    text = table(f"image,label,{name}", lambda i: f"{i},{i % 2},p{i // 3}")
    dataset = make(text, *images(), fractions=(0.5, 0.25, 0.25))
    homes = {}
    for split, part in dataset.splits.items():
        for group in part.groups:
            assert homes.setdefault(group, split) == split
    assert f"the group {name!r}" in said(dataset)
    without = make(text, group_column="none")
    assert without.splits["train"].groups is None
    assert "the group not known" in said(without)


def test_persons_come_before_their_lesions(choose):
    header = "lesion_id,image,label,PatientID"
    text = table(header, lambda i: f"l{i // 2},{i},{i % 2},p{i // 4}")
    assert choose(text).group == "PatientID"
    assert choose(text, group="lesion_id").group == "lesion_id"


@pytest.mark.parametrize(
    "name, cell, asked",
    [
        ("exam_number", lambda i: f"e{i // 2}", True),
        ("case", lambda i: ("benign", "cancer")[i % 2], True),  # a label, perhaps
        ("patient_age", lambda i: str(20 + i // 2), False),
        ("Patient Gender", lambda i: "MF"[i % 2], False),
        ("participant", lambda i: str(i), False),  # nothing repeats
        ("camera", lambda i: str(i // 2), False),
    ],
)
def test_what_could_be_a_group_is_asked(choose, name, cell, asked):
    columns = choose(table(f"image,label,{name}", lambda i: f"{i},{i % 2},{cell(i)}"))
    assert columns.group is None
    question = f"should it be data.group_column = {name!r}?"
    assert any(question in note for note in columns.notes) == asked


def test_columns_are_always_said(make):
    dataset = make(table("image,label", lambda i: f"{i},{i % 2}"), *images())
    assert dataset.notes[0].startswith(
        "the image is the column 'image', the label 'label', the split made, the group not known"
    )


@pytest.mark.parametrize("name", ["partition", "Set", "fold", "subset", "data_split", "Phase"])
def test_columns_that_hold_splits_are_used(make, name):
    cells = ("Training", "valid", "TEST")
    text = table(f"image,label,{name}", lambda i: f"{i},{i // 3 % 2},{cells[i % 3]}")
    dataset = make(text, *images())
    assert [len(dataset.splits[one]) for one in ("train", "val", "test")] == [8, 8, 8]
    assert f"the split {name!r}" in said(dataset)


@pytest.mark.parametrize(
    "name, cells",
    [("fold", "01234"), ("partition", "012"), ("set", ("train", "extra")), ("is_valid", "01"),
     ("Fold", ("train", ""))],
)  # fmt: skip
def test_columns_that_may_be_splits_are_a_question(make, name, cells):
    text = table(f"image,label,{name}", lambda i: f"{i},{i // 3 % 2},{cells[i % len(cells)]}")
    with pytest.raises(UserError, match=f"is the column '{name}' the split.*split_column = 'none'"):
        make(text, *images())
    assert len(make(text, split_column="none").splits["test"]) == 2


def test_a_set_of_something_else_is_no_split(choose):
    assert choose(table("image,label,set", lambda i: f"{i},{i % 2},{'AB'[i % 2]}")).split is None


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "N/A", "unknown", "-1", "-1.0", "?", "NULL"])
def test_missing_labels(make, cell):
    text = table("image,label", lambda i: f"{i},{cell if i in (3, 5) else i % 2}")
    with pytest.raises(UserError, match=r"2 of 24 rows have no label .* line 5 .*, line 7 "):
        make(text, *images())
    dropped = make(text, missing_labels="drop")
    assert dropped.classes == ("0", "1")
    assert len(labels_by_id(dropped)) == 22
    assert "2 rows are left out for want of a label: line 5" in said(dropped)
    if cell == "unknown":
        named = make(text, classes=("0", "1", cell))
        assert labels_by_id(named)["3"] == 2
    every = table("image,label", lambda i: f"{i},{cell}")
    with pytest.raises(UserError, match="24 of 24 rows have no label"):
        make(every, missing_labels="drop")


def test_missing_labels_of_one_column_per_class(make):
    text = table("image,A,B", lambda i: f"{i},," if i == 4 else f"{i},{i % 2},{1 - i % 2}")
    with pytest.raises(UserError, match="1 of 24 rows have no label"):
        make(text, *images(), label_columns=("A", "B"))
    dataset = make(text, label_columns=("A", "B"), missing_labels="drop")
    assert len(labels_by_id(dataset)) == 23


@pytest.mark.parametrize("other", ["nv", "N V", "Nv"])
def test_classes_that_differ_by_case_or_spaces(make, other):
    text = table("image,label", lambda i: f"{i},{('NV', other, 'MEL')[i % 3]}")
    with pytest.raises(UserError, match=f"case or spaces alone: .*'NV'.*|.*'{other}'"):
        make(text, *images())
    assert make(text, classes=("NV", other, "MEL")).classes == ("NV", other, "MEL")


NIH = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"


def test_the_table_of_nih(make):
    cells = ("No Finding", "Edema|Effusion", "Effusion", "Mass|Edema")
    text = table(NIH, lambda i: f"{i}.png,{cells[i % 4]},0,{i // 3},05{i}Y,M,")
    dataset = make(text, *images(), multilabel=True)
    assert dataset.classes == ("Edema", "Effusion", "Mass")
    labels = labels_by_id(dataset)
    assert [labels[f"{i}.png"] for i in range(4)] == [[0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert "the group 'Patient ID'" in said(dataset)
    assert "'No Finding' is no label" in said(dataset)
    with pytest.raises(UserError, match=r"12 cells .* hold several labels.*data.multilabel"):
        make(text)
    names = ("Mass", "No Finding", "Edema", "Effusion")
    assert labels_by_id(make(text, multilabel=True, classes=names))["0.png"] == [0, 1, 0, 0]
    with pytest.raises(UserError, match=r"the label 'Mass' .* is none of the classes"):
        make(text, multilabel=True, classes=("Edema", "Effusion"))


def test_one_label_in_each_cell_is_a_list_too(make):
    text = table("image,label", lambda i: f"{i},{('Edema', 'Mass')[i % 2]}")
    dataset = make(text, *images(), multilabel=True)
    assert (dataset.multilabel, dataset.classes) == (True, ("Edema", "Mass"))
    assert labels_by_id(dataset)["1"] == [0, 1]


def test_the_table_of_ham10000(make):
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"
    text = table(header, lambda i: f"HAM_{i // 2},{i},{('nv', 'mel')[i % 2]},histo,5.0,male,,v")
    dataset = make(text, *(f"{i}.jpg" for i in range(24)))
    assert dataset.classes == ("mel", "nv")
    assert "the label 'dx'" in said(dataset)
    assert "the group 'lesion_id'" in said(dataset)


def test_the_table_of_isic_2020(make):
    header = "image_name,patient_id,sex,age_approx,diagnosis,benign_malignant,target"
    text = table(header, lambda i: f"{i},IP_{i // 2},male,4.0,unknown,benign,{i % 2}")
    dataset = make(text, *images())
    assert dataset.classes == ("0", "1")
    assert "the label 'target'" in said(dataset)
    assert "the label could be another column: 'diagnosis'" in said(dataset)


RSNA = "patientId,x,y,width,height,Target\na,1,2,3,4,1\na,5,6,7,8,1\nb,,,,,0\nc,,,,,0\nd,,,,,1\n"


def test_the_table_of_rsna(make):
    names = ("a.png", "b.png", "c.png", "d.png")
    with pytest.raises(UserError, match=r"Perhaps --config\.data\.image_column=patientId"):
        make(RSNA, *names)
    dataset = make(RSNA, image_column="patientId")
    assert labels_by_id(dataset) == {"a": 1, "b": 0, "c": 0, "d": 1}
    assert "1 row is left out: the image has one before that says the same" in dataset.notes
    with pytest.raises(UserError, match=r"line 3: the image 'a' .* line 2, .* says '1' .* one '0'"):
        make(RSNA.replace("7,8,1", "7,8,0"), image_column="patientId")


def test_a_proposal_for_unknown_columns(choose):
    text = table("scan,opinion", lambda i: f"{i}.png,{'xy'[i % 2]}")
    with pytest.raises(UserError) as error:
        choose(text)
    assert "Perhaps --config.data.image_column=scan" in str(error.value)
    assert "--config.data.label_columns=(" in str(error.value)
    assert "opinion" in str(error.value).rpartition("Perhaps")[2]


@pytest.mark.parametrize("one, zero", [("1", "0"), ("1.0", "0.0"), ("True", "False")])
def test_one_column_per_class_without_naming_them(make, one, zero):
    def row(i):
        cells = [one if i % 3 == column else zero for column in range(4)]
        return ",".join([str(i), *cells, "text"])

    dataset = make(table("image,MEL,NV,BCC,UNK,site", row), *images())
    assert dataset.classes == ("MEL", "NV", "BCC")
    assert labels_by_id(dataset) == {str(i): i % 3 for i in range(24)}
    assert "the columns MEL, NV, BCC are read as classes" in said(dataset)
    assert "columns that are never 1 are no classes: UNK" in said(dataset)


def test_true_and_false_of_several_labels(make):
    text = "image,A,B,split\na,True,,train\nb,FALSE,1,val\nc,1,true,test\n"
    names = ("a.png", "b.png", "c.png")
    dataset = make(text, *names, label_columns=("A", "B"), multilabel=True)
    np.testing.assert_array_equal(dataset.splits["train"].labels, [[1, np.nan]])
    np.testing.assert_array_equal(dataset.splits["val"].labels, [[0, 1]])


@pytest.mark.parametrize(
    "uncertain, blank, expected",
    [("zero", "", [[0, np.nan]]), ("one", "zero", [[1, 0]]), ("unknown", "one", [[np.nan, 1]])],
)
def test_uncertain_and_blank_labels(make, uncertain, blank, expected):
    text = "image,A,B,split\na,-1,,train\nb,0,1,val\nc,1,1,test\n"
    names = ("a.png", "b.png", "c.png")
    options = {"label_columns": ("A", "B"), "multilabel": True}
    dataset = make(text, *names, **options, uncertain=uncertain, blank=blank)
    np.testing.assert_array_equal(dataset.splits["train"].labels, expected)
    assert f"1 blank label counts as {blank or 'unknown'}" in said(dataset)
    with pytest.raises(UserError, match="line 2: column 'A' holds '-1'"):
        make(text, **options)


@pytest.mark.parametrize(
    "value, file, how",
    [
        ("A", "a.png", "upper and lower case"),
        ("A.PNG", "deep/a.png", "upper and lower case"),
        ("Deep/A.png", "deep/a.PNG", "upper and lower case"),
        ("a.jpeg", "a.png", "another type"),
        ("a.tif", "deep/a.jpg", "another type"),
        ("DEEP/a.dcm", "deep/a.png", "another type"),
        ("C:\\data\\scans\\a.png", "a.png", "by name alone"),
        ("/home/me/x/a.png", "y/a.png", "by name alone"),
        ("old/train/a.JPG", "new/train/a.jpg", "by name alone"),
    ],
)
def test_images_that_are_spelled_differently(make, tmp_path, value, file, how):
    dataset = make(f"image,label,split\n{value},x,train\n", file, "other.png", "deep/other.png")
    assert dataset.splits["train"].paths == (tmp_path / "images" / file,)
    assert dataset.splits["train"].ids == (value,)
    assert f"1 image is found {how}" in said(dataset) or f"{how}, for instance" in said(dataset)


def test_an_exact_spelling_is_preferred(make, tmp_path):
    dataset = make("image,label,split\na.jpg,x,train\n", "a.jpg", "A.jpg", "a.png")
    assert dataset.splits["train"].paths == (tmp_path / "images/a.jpg",)
    with pytest.raises(UserError, match=r"'a\.JPG' could be"):
        make("image,label,split\na.JPG,x,train\n")


def test_other_folders_are_those_of_all_rows(make):
    """Otherwise the image of one patient could stand for that of another who has none."""
    text = "image,label,split\np1/1.png,x,train\np2/2.png,x,train\n"
    with pytest.raises(UserError, match=r"1 of 2 rows have no image file .* line 3 'p2/2.png'"):
        make(text, "p1/1.png", "p3/2.png")
    with pytest.raises(UserError, match="1 of 1 rows have no image file"):
        make("image,label,split\ntrain/9.png,x,train\n", "test/9.png")


def test_python_s_none_is_said(make):
    dataset = make(table("image,label", lambda i: f"{i},{('None', 'Mild')[i % 2]}"), *images())
    assert "'None' is read as a class" in dataset.notes


def test_delimiters_of_excel_and_of_uneven_rows(make):
    names = ("a.png", "b.png")
    text = "image;label;split\na;x;train\nb;y;val\n"
    assert make(f"sep=;\n{text}", *names).classes == ("x", "y")
    with pytest.raises(UserError, match="line 4: has 2 fields, the header has 3"):
        make(text + "c;x\n")


def test_the_column_that_names_images_is_said(make):
    with pytest.raises(UserError, match="the column 'where' names images that are there"):
        make("id,label,split,where\n7,x,train,a.png\n", "a.png")


def test_hidden_and_excluded_files_are_no_images(make):
    with pytest.raises(UserError, match="no image file"):
        make("image,label,split\n._a,x,train\n", "._a.png", "@eaDir/._a.png")
    text = "image,label,split\na,x,train\n"
    dataset = make(text, "a.png", "thumbs/a.png", exclude=("Thumbs",))
    assert "1 path is left out by data.exclude, for instance thumbs" in dataset.notes
