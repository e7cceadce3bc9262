"""A small CheXpert with the published columns, file names and quirks."""

import numpy as np
import pytest
from PIL import Image

from medmerge_jax.data import official_data_set
from medmerge_jax.data.official.chexpert import CLASSES, LAYOUT, read_chexpert
from medmerge_jax.errors import UserError

OBSERVATIONS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS]
TEST_HEADER = ["Path", *OBSERVATIONS]

# Values as in the published files; the first column is "No Finding".
TRAIN = [
    ("train/patient00001/study1/view1_frontal.jpg", "1.0,,,,,,,,,0.0,,,,1.0"),
    ("train/patient00002/study2/view1_frontal.jpg", ",,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,"),
    ("train/patient00002/study1/view1_frontal.jpg", ",,,1.0,,0.0,,,,0.0,1.0,,,1.0"),
    ("train/patient00002/study1/view2_lateral.jpg", ",,,1.0,,0.0,,,,0.0,1.0,,,1.0"),
    ("train/patient00003/study1/view1_frontal.jpg", ",-1.0,0.0,,1.0,,,1.0,,1.0,,1.0,,"),
]
VALID = [
    ("valid/patient64541/study1/view1_frontal.jpg", "0.0,1.0,1.0,1.0" + ",0.0" * 10),
    ("valid/patient64541/study1/view2_lateral.jpg", "0.0,1.0,1.0,1.0" + ",0.0" * 10),
]
TEST = [
    ("test/patient64741/study1/view1_frontal.jpg", "0.0,1.0" + ",0.0" * 11 + ",1.0"),
    ("test/patient64741/study1/view2_lateral.jpg", "0.0,1.0" + ",0.0" * 11 + ",1.0"),
]

EXPECTED = {  # without "No Finding"; u is uncertain
    "train/patient00001/study1/view1_frontal.jpg": "0000000000001",
    "train/patient00002/study2/view1_frontal.jpg": "0u10uu0u0u010",
    "train/patient00002/study1/view1_frontal.jpg": "0010000001001",
    "train/patient00003/study1/view1_frontal.jpg": "u001001010100",
    "valid/patient64541/study1/view1_frontal.jpg": "1110000000000",
    "test/patient64741/study1/view1_frontal.jpg": "1000000000001",
}


def lines(rows, header=HEADER, prefix="CheXpert-v1.0-small/"):
    text = [",".join(header)]
    for path, values in rows:
        view = "Frontal" if "frontal" in path else "Lateral"
        person = ["Male", "61", view, "AP" if view == "Frontal" else ""]
        text.append(",".join([prefix + path, *(person if header == HEADER else []), values]))
    return text


def write(root, name, text):
    (root / name).write_text("\n".join(text) + "\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    """The data set without a test table, under another name than the tables give it."""
    root = tmp_path / "chexpert"
    for number, (path, _) in enumerate([*TRAIN, *VALID, *TEST]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9), 20 * number, np.uint8)).save(root / path)
    write(root, "train.csv", lines(TRAIN))
    write(root, "valid.csv", lines(VALID))
    return root


def labels_of(expected, uncertain):
    values = {"0": 0.0, "1": 1.0, "u": uncertain}
    return [values[letter] for letter in expected]


@pytest.mark.parametrize(
    ("variant", "uncertain"), [("", 0.0), ("zeros", 0.0), ("ones", 1.0), ("ignore", np.nan)]
)
def test_every_label(root, variant, uncertain):
    write(root, "test.csv", lines(TEST, TEST_HEADER, prefix=""))
    records = LAYOUT.read(root, variant)
    assert records.classes == CLASSES == OBSERVATIONS[1:]
    assert sorted(records.ids) == sorted(EXPECTED)
    expected = [labels_of(EXPECTED[image], uncertain) for image in records.ids]
    np.testing.assert_array_equal(records.labels, np.array(expected, np.float32))
    assert np.issubdtype(records.labels.dtype, np.floating)
    for image, path, group, split in zip(
        records.ids, records.paths, records.groups, records.splits, strict=True
    ):
        folder, patient = image.split("/")[:2]
        assert path == root / image
        assert path.is_file()
        assert group == patient
        assert split == {"train": "train", "valid": "val", "test": "test"}[folder]


VALUES = {"": None, "zero": 0.0, "one": 1.0, "unknown": np.nan}


@pytest.mark.parametrize("uncertain", VALUES)
@pytest.mark.parametrize("blank", VALUES)
def test_uncertain_and_blank_labels(root, uncertain, blank):
    records = read_chexpert(root, uncertain=uncertain, blank=blank)
    row = list(records.ids).index(TRAIN[1][0])
    values = {"u": VALUES[uncertain] or 0.0, "b": VALUES[blank] or 0.0, "0": 0.0, "1": 1.0}
    expected = [values[letter] for letter in "bu1buububub1b"]
    np.testing.assert_array_equal(records.labels[row], np.array(expected, np.float32))
    # "No Finding" makes the others 0 where they are blank, but for support devices.
    row = list(records.ids).index(TRAIN[0][0])
    np.testing.assert_array_equal(records.labels[row], [0.0] * 12 + [1.0])
    (note,) = records.notes
    assert f"uncertain labels count as {uncertain or 'zero'} and" in note
    assert f"blank ones as {blank or 'zero'};" in note


def test_support_devices_stay_blank_without_a_finding(root):
    write(root, "train.csv", changed(1, "0.0,,,,1.0", "0.0,,,,"))
    labels = read_chexpert(root, blank="unknown").labels[0]
    np.testing.assert_array_equal(labels, [0.0] * 12 + [np.nan])


def test_one_split_for_all_variants(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(1, 81):
        image = f"train/patient{patient:05d}/study1/view1_frontal.jpg"
        rows.append((image, "," + ",".join(rng.choice(["", "1.0", "0.0", "-1.0"], 13))))
    for path in [path for path, _ in rows] + [path for path, _ in VALID]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"image")
    write(tmp_path, "train.csv", lines(rows))
    write(tmp_path, "valid.csv", lines(VALID))
    options = [{"variant": name} for name in ("", "zeros", "ones", "ignore")]
    options += [{"uncertain": one, "blank": "unknown"} for one in ("zero", "one", "unknown")]
    sets = [official_data_set("chexpert", tmp_path, **chosen) for chosen in options]
    assert len(sets[0].splits["test"]) > 5
    for dataset in sets:
        for name, split in dataset.splits.items():
            assert split.ids == sets[0].splits[name].ids
    assert not np.array_equal(sets[0].splits["train"].labels, sets[2].splits["train"].labels)


def test_contradicting_options(root):
    with pytest.raises(UserError, match=r"data\.variant = 'ones' and data\.uncertain = 'zero' say"):
        official_data_set("chexpert", root, variant="ones", uncertain="zero")
    with pytest.raises(UserError, match="aptos2019 has no labels that are uncertain"):
        official_data_set("aptos2019", root, blank="zero")


def test_the_pixels_are_those_of_the_row(root):
    records = read_chexpert(root)
    numbers = {path: number for number, (path, _) in enumerate([*TRAIN, *VALID])}
    for image, path in zip(records.ids, records.paths, strict=True):
        assert abs(int(np.asarray(Image.open(path))[0, 0]) - 20 * numbers[image]) <= 1


def test_without_a_test_table(root):
    records = read_chexpert(root)
    assert records.splits == ("train",) * 4 + ("val",)


@pytest.mark.parametrize("prefix", ["", "CheXpert-v1.0/", "CheXpert-v1.0_224/", "./a/b/"])
def test_the_first_folder_of_a_path_may_be_any(root, prefix):
    write(root, "train.csv", lines(TRAIN, prefix=prefix))
    assert read_chexpert(root).ids[0] == TRAIN[0][0]


def test_the_test_table_may_have_views(root):
    rows = [(path, f"{values},Frontal") for path, values in TEST]  # the column decides
    write(root, "test.csv", lines(rows, [*TEST_HEADER, "Frontal/Lateral"], prefix=""))
    assert read_chexpert(root).ids[-2:] == tuple(path for path, _ in TEST)


def test_labels_without_a_point(root):
    text = [line.replace("1.0,", "1,").replace("0.0,", "0,") for line in lines(TRAIN, prefix="")]
    assert text != lines(TRAIN, prefix="")
    before = read_chexpert(root)
    write(root, "train.csv", text)
    np.testing.assert_array_equal(read_chexpert(root).labels, before.labels)


def test_a_byte_order_mark_is_no_part_of_the_first_column(root):
    before = read_chexpert(root)
    write(root, "train.csv", ["\ufeff" + lines(TRAIN)[0], *lines(TRAIN)[1:]])
    assert read_chexpert(root).ids == before.ids


def changed(row, old, new):
    text = lines(TRAIN)
    assert old in text[row]
    text[row] = text[row].replace(old, new, 1)
    return text


MALFORMED = {
    "missing column": ([line.replace("Edema", "Oedema") for line in lines(TRAIN)], "Edema"),
    "semicolons": ([line.replace(",", ";") for line in lines(TRAIN)], "semicolon"),
    "tabs": ([line.replace(",", "\t") for line in lines(TRAIN)], "tab"),
    "duplicate": ([*lines(TRAIN), lines(TRAIN)[2]], "line 7.*line 3"),
    "duplicate under another folder": (
        [*lines(TRAIN), *lines(TRAIN[1:2], prefix="other/")[1:]], "line 7.*line 3",
    ),
    "label text": (changed(2, ",-1.0,1.0,", ",yes,1.0,"), "line 3.*'Cardiomegaly'.*'yes'"),
    "label 2": (changed(3, ",1.0,", ",2.0,"), "line 4.*'Lung Opacity'.*'2.0'"),
    "label nan": (changed(3, ",1.0,", ",nan,"), "line 4.*'Lung Opacity'.*'nan'"),
    "view": (changed(1, "Frontal", "Oblique"), "line 2.*'Oblique'"),
    "no view": (changed(1, "Frontal,AP", ","), "line 2"),
    "no path": (changed(1, "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", ""),
                "line 2"),
    "path outside": (changed(1, "patient00001", "../.."), r"line 2.*the Path is .*\.\./\.\."),
    "missing image": (changed(1, "patient00001", "patient00009"), "line 2.*patient00009"),
    "a field too few": (changed(5, ",1.0,,1.0,,", ",1.0,,1.0,"), "line 6"),
    "empty": ([""], "empty"),
    "no rows": (lines([]), "no rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tables(root, case):
    text, message = MALFORMED[case]
    write(root, "train.csv", text)
    with pytest.raises(UserError, match=message) as caught:
        read_chexpert(root)
    assert str(root / "train.csv") in str(caught.value)


def test_an_image_of_zero_bytes(root):
    (root / TRAIN[2][0]).write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.csv.*line 4") as caught:
        read_chexpert(root)
    assert TRAIN[2][0] in str(caught.value)


def test_lateral_images_need_not_be_there(root):
    (root / TRAIN[3][0]).unlink()
    assert len(read_chexpert(root).ids) == 5


@pytest.mark.parametrize("name", ["train.csv", "valid.csv"])
def test_missing_tables(root, name):
    (root / name).unlink()
    with pytest.raises(UserError, match=name):
        read_chexpert(root)


def test_unknown_variants(root):
    with pytest.raises(UserError, match="'twos'; one of zeros, ones, ignore is wanted"):
        official_data_set("chexpert", root, variant="twos")
