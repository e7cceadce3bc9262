"""Every way in which a published layout may be damaged: one error, with file and row."""

import re

import pytest
from helpers import small_layouts

from medmerge_jax.data import official_data_set
from medmerge_jax.errors import UserError

TRAINING = "ISIC2018_Task3_Training_GroundTruth"

# Per layout: what writes it; its tables, each with the column of the image, a column of the label,
# and the suffix of its images.
LAYOUTS = {
    "aptos2019": (small_layouts.aptos2019, {"train.csv": ("id_code", "diagnosis")}),
    "eyepacs": (
        small_layouts.eyepacs,
        {"trainLabels.csv": ("image", "level"), "retinopathy_solution.csv": ("image", "level")},
    ),
    "ham10000": (
        small_layouts.ham10000_challenge,
        {
            f"{TRAINING}/{TRAINING}.csv": ("image", "AKIEC"),
            f"{TRAINING}/{TRAINING}.csv".replace("Training", "Test"): ("image", "MEL"),
        },
    ),
    "ham10000 (Dataverse)": (
        small_layouts.ham10000_dataverse,
        {"HAM10000_metadata.csv": ("image_id", "dx")},
    ),
    "isic2019": (
        small_layouts.isic2019,
        {"ISIC_2019_Training_GroundTruth.csv": ("image", "SCC")},
    ),
}
CASES = [(name, table) for name, (_, tables) in LAYOUTS.items() for table in tables]


class Copy:
    """A small copy of a layout, and one of its tables as cells."""

    def __init__(self, name, table, root):
        write, tables = LAYOUTS[name]
        self.name, self.root = name.split()[0], root
        write(root)
        self.table = root / table
        self.image, self.label = tables[table]
        text = self.table.read_text(encoding="utf-8")
        self.rows = [line.split(",") for line in text.splitlines()]

    def column(self, name):
        return self.rows[0].index(name)

    def cell(self, line, column):
        """Of a line from 1, which is the header."""
        return self.rows[line - 1][self.column(column)]

    def change(self, line, column, value):
        self.rows[line - 1][self.column(column)] = value

    def save(self, delimiter=",", encoding="utf-8"):
        text = "\n".join([*(delimiter.join(row) for row in self.rows), ""])
        self.table.write_bytes(text.encode(encoding))

    def file(self, line):
        """The image that a line names."""
        (path,) = self.root.rglob(f"{self.cell(line, self.image)}.*")
        return path

    def read(self):
        return official_data_set(self.name, self.root)

    def error(self, message):
        """Reads, and checks that the error begins with the table and matches."""
        with pytest.raises(UserError, match=message) as caught:
            self.read()
        assert str(caught.value).startswith(str(self.table)), caught.value
        assert len(str(caught.value)) < 700
        return str(caught.value)


@pytest.fixture(params=CASES, ids=[f"{name}-{table}" for name, table in CASES])
def copy(request, tmp_path):
    return Copy(*request.param, tmp_path)


def test_undamaged(copy):
    copy.save()
    assert sum(map(len, copy.read().splits.values())) > 20


@pytest.mark.parametrize("which", ["image", "label"])
def test_a_column_is_missing(copy, which):
    name = getattr(copy, which)
    copy.rows[0][copy.column(name)] = "something"
    copy.save()
    copy.error(f"the columns are .*'something'.*{name!r} is wanted")


def test_a_column_is_there_twice(copy):
    copy.rows = [[*row, row[copy.column(copy.label)]] for row in copy.rows]
    copy.save()
    copy.error(f"{copy.label!r} is wanted, once each")


def test_an_image_has_two_rows(copy):
    copy.change(7, copy.image, copy.cell(4, copy.image))
    copy.save()
    copy.error(f"line 7: .*{copy.cell(4, copy.image)}.* has a row already, at line 4")


def test_an_image_has_no_name(copy):
    copy.change(5, copy.image, "")
    copy.save()
    copy.error(f"line 5: column {copy.image!r} is empty")


@pytest.mark.parametrize("text", ["severe", "", "9", "-1", "0.5", "nan", "1,0"])
def test_a_label_is_not_what_it_must_be(copy, text):
    copy.change(6, copy.label, text)
    copy.save()
    if "," in text:
        copy.error(f"line 6: has {len(copy.rows[0]) + 1} fields, the header has")
    else:
        copy.error(f"line 6: column {copy.label!r} holds '{re.escape(text)}'; one of .* is wanted")


def test_a_file_is_missing(copy):
    path = copy.file(5)
    path.unlink()
    copy.error(f"line 5: there is no image .*{path.name}")


def test_a_file_has_no_bytes(copy):
    path = copy.file(5)
    path.write_bytes(b"")
    copy.error(rf"line 5: the image {re.escape(str(path))} is empty \(0 bytes\)")


@pytest.mark.parametrize(("delimiter", "spoken"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_delimiters(copy, delimiter, spoken):
    copy.save(delimiter)
    copy.error(f"separated by {spoken}; save it with commas")


def test_a_byte_order_mark_is_no_part_of_the_first_column(copy):
    plain = copy.read().fingerprint()
    copy.save(encoding="utf-8-sig")
    assert copy.table.read_bytes()[:3] == b"\xef\xbb\xbf"
    assert copy.read().fingerprint() == plain


def test_the_encoding_of_windows_programs(copy):
    copy.save(encoding="utf-16")
    copy.error("is not a UTF-8 text file")


def test_lines_of_windows_programs_and_empty_lines(copy):
    plain = copy.read().fingerprint()
    text = copy.table.read_text(encoding="utf-8")
    copy.table.write_bytes(text.replace("\n", "\r\n\r\n").encode())
    assert copy.read().fingerprint() == plain


def test_a_row_is_cut_short(copy):
    copy.rows[-1] = copy.rows[-1][:1]
    copy.save()
    copy.error(f"line {len(copy.rows)}: has 1 fields, the header has {len(copy.rows[0])}")


def test_a_table_without_rows(copy):
    copy.rows = copy.rows[:1]
    copy.save()
    copy.error("has a header but no rows")


@pytest.mark.parametrize("name", ["ham10000", "isic2019"])
def test_several_columns_or_none_are_1(name, tmp_path):
    copy = Copy(name, next(iter(LAYOUTS[name][1])), tmp_path)
    line = next(
        number
        for number in range(2, len(copy.rows))
        if copy.cell(number, "MEL") == "0.0" and copy.cell(number, "NV") == "1.0"
    )
    copy.change(line, "MEL", "1.0")
    copy.save()
    copy.error(f"line {line}: 2 of the columns MEL, NV, .* are 1; exactly one")
    copy.change(line, "MEL", "0.0")
    copy.change(line, "NV", "0.0")
    copy.save()
    copy.error(f"line {line}: 0 of the columns")


def test_isic2019_knows_no_unknown_class(tmp_path):
    copy = Copy("isic2019", "ISIC_2019_Training_GroundTruth.csv", tmp_path)
    copy.change(2, "MEL", "0.0")
    copy.change(2, "UNK", "1.0")
    copy.save()
    copy.error("line 2: image ISIC_0000000 is of the class UNK")


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("isic2019", "ISIC_2019_Training_Metadata.csv"),
        ("ham10000", "ISIC2018_Task3_Training_LesionGroupings.csv"),
    ],
)
def test_tables_of_lesions(name, table, tmp_path):
    LAYOUTS[name][0](tmp_path)
    path = tmp_path / table
    lines = path.read_text().splitlines()
    for damaged, message in (
        ([*lines[:4], *lines[5:]], f"no row for the image {lines[4].split(',')[0]!r}"),
        ([*lines, lines[3]], rf"line {len(lines) + 1}: .* has a row already, at line 4"),
        ([lines[0].replace("lesion_id", "lesion"), *lines[1:]], "'lesion_id' is wanted"),
    ):
        path.write_text("\n".join([*damaged, ""]))
        with pytest.raises(UserError, match=message) as caught:
            official_data_set(name, tmp_path)
        assert str(caught.value).startswith(str(path))


def test_ham10000_without_its_lesion_table(tmp_path):
    small_layouts.ham10000_challenge(tmp_path)
    (tmp_path / "ISIC2018_Task3_Training_LesionGroupings.csv").unlink()
    split = official_data_set("ham10000", tmp_path).splits["train"]
    assert split.groups == tuple(f"(unknown lesion of {name})" for name in split.ids)


def test_ham10000_without_an_extension(tmp_path):
    """The Dataverse's file has none, and commas or tabs."""
    prints = set()
    for number, (table, delimiter) in enumerate(
        [("HAM10000_metadata", ","), ("HAM10000_metadata", "\t"), ("HAM10000_metadata.tab", "\t")]
    ):
        root = tmp_path / str(number)
        small_layouts.ham10000_dataverse(root, table, delimiter, '"')
        prints.add(official_data_set("ham10000", root).fingerprint())
    assert len(prints) == 1


@pytest.mark.parametrize("name", ["HAM10000_metadata", "HAM10000_metadata.tab"])
def test_ham10000_whose_table_is_in_a_folder_of_its_own_name(tmp_path, name):
    small_layouts.ham10000_dataverse(tmp_path, name, "\t", '"')
    wanted = official_data_set("ham10000", tmp_path).fingerprint()
    (tmp_path / name).rename(tmp_path / "table")
    (tmp_path / "HAM10000_metadata").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        official_data_set("ham10000", tmp_path)
    (tmp_path / "table").rename(tmp_path / "HAM10000_metadata" / name)
    assert official_data_set("ham10000", tmp_path).fingerprint() == wanted


def test_a_tab_file_with_commas(tmp_path):
    small_layouts.ham10000_dataverse(tmp_path, "HAM10000_metadata.tab", ",")
    with pytest.raises(UserError, match=r"\.tab: .*separated by commas; save it with tabs"):
        official_data_set("ham10000", tmp_path)


def test_ham10000_in_one_folder(tmp_path):
    expected = small_layouts.ham10000_dataverse(tmp_path)
    for part in (1, 2):
        folder = tmp_path / f"HAM10000_images_part_{part}"
        for path in folder.iterdir():
            home = tmp_path / "HAM10000_images" / path.name
            home.parent.mkdir(exist_ok=True)
            path.rename(home)
        folder.rmdir()
    dataset = official_data_set("ham10000", tmp_path)
    assert sum(map(len, dataset.splits.values())) == len(expected)


def test_ham10000_from_the_dataverse_with_the_challenges_test_table(tmp_path):
    expected = small_layouts.ham10000_challenge(tmp_path)
    for part in ("Training", "Validation"):
        folder = tmp_path / f"ISIC2018_Task3_{part}_GroundTruth"
        for path in folder.iterdir():
            path.unlink()
    training = small_layouts.ham10000_dataverse(tmp_path)
    dataset = official_data_set("ham10000", tmp_path)
    test = {name for name, one in expected.items() if one.split == "test"}
    assert set(dataset.splits["test"].ids) == test
    assert set(dataset.splits["train"].ids) | set(dataset.splits["val"].ids) == set(training)


def test_images_of_a_test_table_are_missing(tmp_path):
    small_layouts.ham10000_challenge(tmp_path)
    (tmp_path / "ISIC2018_Task3_Test_Input").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"Test_Input: is not there; add it, or remove .*Test"):
        official_data_set("ham10000", tmp_path)
    official_data_set("ham10000", tmp_path, variant="training")


def test_an_image_is_in_two_tables(tmp_path):
    copy = Copy("eyepacs", "retinopathy_solution.csv", tmp_path)
    copy.change(4, "image", "13_left")
    copy.save()
    copy.error("line 4: image '13_left' has a row already in .*trainLabels.csv, at line 4")
    copy = Copy("ham10000", f"{TRAINING}/{TRAINING}.csv".replace("Training", "Test"), tmp_path)
    source = tmp_path / "ISIC2018_Task3_Training_Input" / "ISIC_0024308.jpg"
    (tmp_path / "ISIC2018_Task3_Test_Input" / source.name).write_bytes(source.read_bytes())
    copy.change(3, "image", "ISIC_0024308")
    copy.save()
    copy.error(
        "line 3: image 'ISIC_0024308' has a row already in .*Training_GroundTruth.csv, at line 4"
    )


def test_eyepacs_names(tmp_path):
    copy = Copy("eyepacs", "trainLabels.csv", tmp_path)
    copy.change(4, "image", "13_middle")
    copy.save()
    copy.error("line 4: the image is '13_middle'; a name like 10_left is wanted")


def test_eyepacs_without_test_labels(tmp_path):
    small_layouts.eyepacs(tmp_path)
    (tmp_path / "retinopathy_solution.csv").unlink()
    dataset = official_data_set("eyepacs", tmp_path)
    assert sum(map(len, dataset.splits.values())) == 32
    with pytest.raises(UserError, match=r"retinopathy_solution\.csv: there is no such file"):
        official_data_set("eyepacs", tmp_path, variant="kaggle")


@pytest.mark.parametrize("name", ["aptos2019", "ham10000", "isic2019"])
def test_names_do_not_leave_the_folder(name, tmp_path):
    copy = Copy(name, next(iter(LAYOUTS[name][1])), tmp_path)
    copy.change(3, copy.image, "../secret")
    copy.save()
    copy.error("line 3: column .* holds '../secret'; a name without folders")


@pytest.mark.parametrize("value", ["a\0b", "x" * 300, "..", "../a", "~"])
def test_an_image_has_a_name_that_no_file_can_have(copy, value):
    copy.change(5, copy.image, value)
    copy.save()
    with pytest.raises(UserError, match=r"line 5: |has no row for the image"):
        copy.read()
