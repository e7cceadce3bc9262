import numpy as np
import pytest

from medmerge_jax.data import image_table
from medmerge_jax.errors import UserError


@pytest.fixture
def make(tmp_path, write_images):
    """Writes a table and images, and reads them."""

    def run(text, *images, encoding="utf-8", **options):
        (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
        (tmp_path / "images").mkdir(exist_ok=True)
        write_images(*(tmp_path / "images" / name for name in images))
        return image_table(tmp_path / "labels.csv", tmp_path / "images", **options)

    return run


def labels_by_id(dataset):
    return {
        one: label
        for split in dataset.splits.values()
        for one, label in zip(split.ids, split.labels.tolist(), strict=True)
    }


SPLIT_TABLE = "image,label,split\na,cat,train\nb,ant,train\nc,cat,val\nd,ant,test\n"
FOUR = ("a.png", "b.png", "c.png", "d.png")


def test_one_label_column(make, tmp_path):
    dataset = make(SPLIT_TABLE, *FOUR)
    assert (dataset.name, dataset.classes, dataset.multilabel) == ("labels", ("ant", "cat"), False)
    train = dataset.splits["train"]
    assert train.ids == ("a", "b")
    assert train.paths == (tmp_path / "images/a.png", tmp_path / "images/b.png")
    assert train.labels.dtype == np.int32
    assert labels_by_id(dataset) == {"a": 1, "b": 0, "c": 1, "d": 0}
    assert train.groups is None
    dataset.check()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_dialects(make, encoding, newline):
    text = SPLIT_TABLE.replace("cat", '"Löwe, alt"').replace("\n", newline) + newline
    assert make(text, *FOUR, encoding=encoding).classes == ("Löwe, alt", "ant")


@pytest.mark.parametrize(
    "image", ["filename", "file", "Image", "image_id", "ID", "id_code", "Path"]
)
@pytest.mark.parametrize("label", ["label", "Class", "diagnosis", "level", "target"])
def test_usual_names_are_found(make, image, label):
    dataset = make(SPLIT_TABLE.replace("image,label", f"{image},{label}"), *FOUR)
    assert labels_by_id(dataset) == {"a": 1, "b": 0, "c": 1, "d": 0}


def test_columns_by_name(make):
    text = SPLIT_TABLE.replace("image,label,split", "scan,opinion,portion")
    named = {"image_column": "scan", "label_columns": ("opinion",), "split_column": "portion"}
    assert len(make(text, *FOUR, **named).splits["train"]) == 2
    with pytest.raises(UserError, match=r"set data\.image_column to one of the columns \['scan'"):
        make(text)
    with pytest.raises(UserError, match=r"set data\.label_columns to one of"):
        make(text, image_column="scan")
    with pytest.raises(
        UserError, match=r"labels\.csv: data\.split_column names 'potion'.*'portion'"
    ):
        make(text, **{**named, "split_column": "potion"})


def test_numbers_sort_by_value(make):
    text = "id_code,diagnosis,split\na,10,train\nb,2,val\nc,2,test\n"
    dataset = make(text, *FOUR[:3])
    assert dataset.classes == ("2", "10")
    with_gaps = text.replace("10,", "10.0,").replace("2,", "2.0,")
    assert make(with_gaps).classes == ("2", "10")
    assert make(with_gaps, classes=("0", "2", "10")).classes == ("0", "2", "10")


def test_classes_fix_names_and_order(make):
    dataset = make(SPLIT_TABLE, *FOUR, classes=("dog", "cat", "ant"))
    assert labels_by_id(dataset) == {"a": 1, "b": 2, "c": 1, "d": 2}
    with pytest.raises(UserError, match=r"labels\.csv, line 3: the label 'ant'.*\['dog', 'cat'\]"):
        make(SPLIT_TABLE, classes=("dog", "cat"))


def test_empty_label(make):
    with pytest.raises(
        UserError, match=r"labels\.csv: 1 of 4 rows have no label in column 'label': line 4 ''"
    ):
        make(SPLIT_TABLE.replace("c,cat", "c,"), *FOUR)


ONE_HOT = "image,MEL,NV,BCC,split\na,0.0,1.0,0.0,train\nb,1,0,0,val\nc,0,0,1,test\n"


def test_one_column_per_class(make):
    dataset = make(ONE_HOT, *FOUR, label_columns=("MEL", "NV", "BCC"))
    assert dataset.classes == ("MEL", "NV", "BCC")
    assert labels_by_id(dataset) == {"a": 1, "b": 0, "c": 2}
    reordered = make(ONE_HOT, label_columns=("MEL", "NV", "BCC"), classes=("NV", "BCC", "MEL"))
    assert labels_by_id(reordered) == {"a": 0, "b": 2, "c": 1}
    with pytest.raises(UserError, match=r"data\.classes \['x'\] and data\.label_columns"):
        make(ONE_HOT, label_columns=("MEL", "NV", "BCC"), classes=("x",))


@pytest.mark.parametrize("row, count", [("1,1,0", 2), ("0,0,0", 0)])
def test_not_one_hot(make, row, count):
    text = ONE_HOT.replace("b,1,0,0", f"b,{row}")
    with pytest.raises(
        UserError, match=rf"line 3: {count} of the columns .* exactly one is wanted"
    ):
        make(text, *FOUR, label_columns=("MEL", "NV", "BCC"))


def test_several_labels(make):
    text = "Path,A,B,split\na,1.0,,train\nb,0,1,train\nc,1,nan,val\nd,,0,test\n"
    dataset = make(text, *FOUR, label_columns=("A", "B"), multilabel=True)
    assert dataset.multilabel
    assert dataset.splits["train"].labels.dtype == np.float32
    np.testing.assert_array_equal(dataset.splits["train"].labels, [(1, np.nan), (0, 1)])
    np.testing.assert_array_equal(dataset.splits["test"].labels, [(np.nan, 0)])
    single = make(text, label_columns=("A",), multilabel=True)
    assert single.splits["train"].labels.shape == (2, 1)
    with pytest.raises(UserError, match=r"set data\.label_columns"):
        make(text, multilabel=True)


@pytest.mark.parametrize("value", ["-1", "0.5", "yes", "inf"])
def test_neither_zero_nor_one(make, value):
    text = f"image,A,B,split\na,1,0,train\nb,{value},1,val\n"
    message = rf"line 3: column 'A' holds '{value}'; one of 0, 1, or nothing where it is"
    with pytest.raises(UserError, match=message):
        make(text, *FOUR, label_columns=("A", "B"), multilabel=True)
    with pytest.raises(UserError, match=rf"line 3: column 'A' holds '{value}'; one of 0, 1 is"):
        make(text, label_columns=("A", "B"))


@pytest.mark.parametrize(
    "value, file",
    [
        ("a", "a.png"),
        ("a.png", "a.png"),
        ("a", "deep/er/a.JPEG"),
        ("a.JPEG", "deep/er/a.JPEG"),
        ("deep/a", "deep/a.jpg"),
        ("deep/a.jpg", "deep/a.jpg"),
        ("./deep/a.jpg", "deep/a.jpg"),
        ("deep\\a.jpg", "deep/a.jpg"),
        ("images/deep/a.jpg", "deep/a.jpg"),
        ("images/a.jpg", "a.jpg"),
        ("1.2.840.7", "1.2.840.7.png"),
    ],
)
def test_how_an_image_may_be_named(make, tmp_path, value, file):
    write = f"image,label,split\n{value},x,train\n"
    dataset = make(write, file, "other.png", "deep/other.png")
    assert dataset.splits["train"].paths == (tmp_path / "images" / file,)
    assert dataset.splits["train"].ids == (value,)


@pytest.mark.parametrize(
    "value, files",
    [("a", ("a.png", "a.jpg")), ("a.png", ("x/a.png", "y/a.png")), ("x/a", ("x/a.png", "x/a.jpg"))],
)
def test_ambiguous_image(make, value, files):
    with pytest.raises(UserError) as error:
        make(f"image,label,split\n{value},x,train\n", *files)
    assert f"line 2: '{value}' could be" in str(error.value)
    assert all(name in str(error.value) for name in files)


def test_an_exact_path_is_preferred(make, tmp_path):
    dataset = make("image,label,split\na.png,x,train\n", "a.png", "x/a.png")
    assert dataset.splits["train"].paths == (tmp_path / "images/a.png",)


def test_rows_without_files(make, tmp_path):
    with pytest.raises(UserError) as error:
        make(SPLIT_TABLE.replace("c,", ",").replace("d,", "other/a,"), "a.png")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'labels.csv'}: 3 of 4 rows have no image file below")
    assert "line 3 'b', line 4 '', line 5 'other/a'" in message
    assert str(tmp_path / "images") in message


def test_rows_without_files_are_not_all_listed(make):
    rows = "".join(f"m{number},x,train\n" for number in range(40))
    with pytest.raises(UserError, match=r"40 of 40 rows .* line 6 'm4', \.\.\.; 0 images"):
        make("image,label,split\n" + rows)


def test_images_without_a_row_are_counted(make):
    dataset = make(SPLIT_TABLE, *FOUR, "e.png", "f.png")
    assert "2 images are left out: without a row" in dataset.notes


@pytest.mark.parametrize("again", ["a", "a.png"])
def test_two_rows_for_an_image(make, again):
    with pytest.raises(
        UserError, match=f"line 6: the image '{again}' has a row already, at line 2"
    ):
        make(SPLIT_TABLE + f"{again},cat,test\n", *FOUR)


def test_names_of_splits(make):
    text = "image,label,split\na,x,Train\nb,y,valid\nc,x,VALIDATION\nd,y,test\n"
    dataset = make(text, *FOUR)
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [1, 2, 1]
    for value in ("elsewhere", ""):
        with pytest.raises(
            UserError, match=f"line 5: the split in column 'split' is '{value}'; one"
        ):
            make(text.replace("test", value))


def many(columns, row):
    return columns + "\n" + "".join(row(number) + "\n" for number in range(60))


def test_grouped_splits_are_made(make):
    text = many("image,label,patient_id", lambda i: f"{i},{i % 2},p{i // 4}")
    names = [f"{i}.png" for i in range(60)]
    dataset = make(text, *names, fractions=(0.6, 0.2, 0.2), seed=3)
    dataset.check()
    homes = {}
    for name, split in dataset.splits.items():
        assert len(split.groups) == len(split) > 0
        for group in split.groups:
            assert homes.setdefault(group, name) == name
    other = make(text, fractions=(0.6, 0.2, 0.2), seed=4)
    assert dataset.fingerprint() != other.fingerprint()
    by_name = make(
        text.replace("patient_id", "eye"), group_column="eye", fractions=(0.6, 0.2, 0.2), seed=3
    )
    assert by_name.fingerprint() == dataset.fingerprint()


def test_an_image_without_a_group_is_its_own_group(make):
    text = many("image,label,group", lambda i: f"{i},{i % 2},")
    dataset = make(text, *(f"{i}.png" for i in range(60)))
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [48, 6, 6]


def test_a_missing_split_is_taken_from_train_by_group(make):
    text = many(
        "image,label,group,split", lambda i: f"{i},{i % 2},{i // 2},{'test' if i < 6 else 'train'}"
    )
    dataset = make(text, *(f"{i}.png" for i in range(60)))
    dataset.check()
    assert dataset.splits["test"].ids == tuple(map(str, range(6)))
    assert not set(dataset.splits["val"].groups) & set(dataset.splits["train"].groups)
    assert len(dataset.splits["val"]) == 6


@pytest.mark.parametrize("delimiter, name", [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_delimiters_are_found_and_said(make, delimiter, name):
    dataset = make(SPLIT_TABLE.replace(",", delimiter), *FOUR)
    assert dataset.fingerprint() == make(SPLIT_TABLE).fingerprint()
    assert f"labels.csv is separated by {name}" in dataset.notes


@pytest.mark.parametrize(
    "encoding, name",
    [
        ("latin-1", "Latin-1"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
    ],
)
def test_other_encodings_are_found_and_said(make, encoding, name):
    dataset = make(SPLIT_TABLE.replace("cat", "Löwe"), *FOUR, encoding=encoding)
    assert dataset.classes == ("Löwe", "ant")
    assert f"labels.csv is not UTF-8 but read as {name}" in dataset.notes


def test_not_a_table(make, tmp_path):
    with pytest.raises(UserError, match=r"line 3: has 4 fields, the header has 3"):
        make(SPLIT_TABLE.replace("b,ant", "b,ant,old"), *FOUR)
    with pytest.raises(UserError, match="has a header but no rows"):
        make("image,label\n")
    with pytest.raises(UserError, match="is empty"):
        make("")
    with pytest.raises(UserError, match="is not a text file in UTF-8"):
        make("PK\x03\x04\xff", encoding="latin-1")
    with pytest.raises(UserError, match="is not a CSV file"):
        make('image,label\na,"x\n')
    with pytest.raises(UserError, match="2 columns are called 'image'"):
        make("image,image,label\na,a,x\n")
    with pytest.raises(UserError, match=r"nothing\.csv: there is no such file"):
        image_table(tmp_path / "nothing.csv", tmp_path)
    make(SPLIT_TABLE)
    with pytest.raises(UserError, match="nowhere: does not exist"):
        image_table(tmp_path / "labels.csv", tmp_path / "nowhere")


def test_a_table_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        image_table(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "value",
    ["../secret", "../secret.png", "a/../../secret.png", "/etc/passwd", "{root}/../secret.png",
     "..\\secret.png", "..", "/", "images/../../secret.png", "a\0.png", "x" * 300],
)  # fmt: skip
def test_paths_that_leave_the_root_find_nothing(tmp_path, write_images, value):
    root = tmp_path / "images"
    write_images(root / "a.png", root / "sub/b.png", tmp_path / "secret.png")
    value = value.replace("{root}", str(root))
    (tmp_path / "a.csv").write_text(f"image,label\na,0\nb,1\n{value},1\n")
    with pytest.raises(UserError, match=r"1 of 3 rows have no image file below .*line 4"):
        image_table(tmp_path / "a.csv", root)


def test_classes_of_any_number_of_digits(tmp_path, write_images):
    """Python makes no number of more than 4300."""
    names = ["10", "9", "1" * 5000, "2" * 5000]
    write_images(*(tmp_path / "images" / f"{row}.png" for row in range(4)))
    rows = [f"{row},{name}" for row, name in enumerate(names)]
    (tmp_path / "a.csv").write_text("\n".join(["image,label", *rows]))
    assert image_table(tmp_path / "a.csv", tmp_path / "images").classes == (
        "9",
        *names[:1],
        *names[2:],
    )
