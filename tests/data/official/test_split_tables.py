"""External split tables, and how the splits of a published layout are made."""

import collections

import numpy as np
import pytest
from helpers import small_layouts

from medmerge_jax.data import official_data_set
from medmerge_jax.errors import UserError


@pytest.fixture
def root(tmp_path):
    small_layouts.aptos2019(tmp_path / "aptos")
    return tmp_path / "aptos"


@pytest.fixture
def rows(root):
    """As published for APTOS: shuffled, with the file's extension."""
    lines = (root / "train.csv").read_text().split()[1:]
    rows = [[f"{line.split(',')[0]}.png", line.split(",")[1]] for line in lines]
    names = ["train"] * 15 + ["val"] * 4 + ["test"] * 6
    order = np.random.default_rng(0).permutation(len(rows))
    return [[*rows[row], split] for row, split in zip(order, names, strict=True)]


def write(path, rows, header="filename,class,split"):
    path.write_text("\n".join([header, *(",".join(row) for row in rows), ""]))
    return path


def homes(dataset):
    return {name: home for home, split in dataset.splits.items() for name in split.ids}


def test_a_table_is_honoured_exactly(root, rows, tmp_path):
    dataset = official_data_set("aptos2019", root, split_table=write(tmp_path / "s.csv", rows))
    assert homes(dataset) == {name.removesuffix(".png"): split for name, _, split in rows}
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [15, 4, 6]


def test_nothing_is_added_to_an_empty_split_of_a_table(root, rows, tmp_path):
    rows = [[name, grade, "train" if split == "val" else split] for name, grade, split in rows]
    dataset = official_data_set("aptos2019", root, split_table=write(tmp_path / "s.csv", rows))
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [19, 0, 6]


def test_other_forms_of_the_same_table(root, rows, tmp_path):
    """An index without a name, ids, folders, class indices as programs write them."""
    expected = homes(official_data_set("aptos2019", root, split_table=write(tmp_path / "s", rows)))
    forms = {
        ",id_code,other,class,split": lambda number, name: [str(number), name[:-4], "x"],
        "image,class,split": lambda number, name: [f"train_images/{name}"],
        "filename,class,split,fold": lambda number, name: [f"C:\\aptos\\{name}"],
    }
    for header, cells in forms.items():
        lines = []
        for number, (name, grade, split) in enumerate(rows):
            lines.append([*cells(number, name), f"{grade}.0", split.upper()])
            lines[-1] += ["1"] if header.endswith("fold") else []
        table = write(tmp_path / "other.csv", lines, header)
        assert homes(official_data_set("aptos2019", root, split_table=table)) == expected


def test_grades_have_their_meaning(root):
    dataset = official_data_set("aptos2019", root)
    assert dataset.shown_classes[::4] == ("0 none", "4 proliferative")
    assert dataset.ordered


def test_class_names_in_a_table(tmp_path):
    expected = small_layouts.rsna_pneumonia(tmp_path / "rsna")
    names = ("Normal", "Lung Opacity")
    splits = ("train", "train", "train", "val", "test")
    rows = [
        [str(row), name, names[one.label], ",,,", str(one.label), splits[row % 5]]
        for row, (name, one) in enumerate(expected.items())
    ]
    table = write(tmp_path / "s.csv", rows, ",patientId,class,x,y,width,height,Target,split")
    dataset = official_data_set("rsna_pneumonia", tmp_path / "rsna", split_table=table)
    assert homes(dataset) == {row[1]: row[-1] for row in rows}


def test_labels_of_several_classes_are_not_compared(tmp_path):
    expected = small_layouts.chexpert(tmp_path / "chexpert")
    rows = [[f"CheXpert-v1.0-small/{name}", "test"] for name in expected]
    table = write(tmp_path / "s.csv", rows, "Path,split")
    dataset = official_data_set("chexpert", tmp_path / "chexpert", split_table=table)
    assert set(dataset.splits["test"].ids) == set(expected)


def change(rows, row, column, value):
    changed = [list(one) for one in rows]
    changed[row][column] = value
    return changed


@pytest.mark.parametrize(
    ("damage", "header", "message"),
    [
        (lambda rows: change(rows, 3, 0, "nobody.png"), None, "line 5: 'nobody.png'.*no such im"),
        (lambda rows: change(rows, 3, 1, "7"), None, "line 5: the class is '7'; one of 0, 1, 2"),
        (lambda rows: change(rows, 3, 1, "mild"), None, "line 5: the class is 'mild'"),
        (
            lambda rows: change(rows, 3, 1, str((int(rows[3][1]) + 1) % 5)),
            None,
            "line 5: the class of .* but the data set says",
        ),
        (
            lambda rows: change(rows, 3, 2, "elsewhere"),
            None,
            "line 5: the split in column 'split' is 'elsewhere'",
        ),
        (lambda rows: change(rows, 3, 2, ""), None, "line 5: the split in column 'split' is ''"),
        (lambda rows: [*rows, rows[0]], None, "line 27: .* has a row already, at line 2"),
        (lambda rows: rows[2:], None, "gives no split to 2 of the 25 images"),
        (lambda rows: rows, "filename,label,split", "'class' is wanted"),
        (lambda rows: rows, "name,class,split", "'filename' .*is wanted"),
        (lambda rows: rows, "filename,class,fold", "'split' is wanted"),
        (lambda rows: [], None, "no rows"),
    ],
)
def test_malformed_tables(root, rows, tmp_path, damage, header, message):
    table = write(tmp_path / "s.csv", damage(rows), header or "filename,class,split")
    with pytest.raises(UserError, match=message) as caught:
        official_data_set("aptos2019", root, split_table=table)
    assert str(caught.value).startswith(str(table))


def test_patients_stay_together_unless_images_are_split(tmp_path):
    small_layouts.eyepacs(tmp_path)
    for split_by, crosses in (("group", False), ("image", True)):
        dataset = official_data_set("eyepacs", tmp_path, split_by=split_by)
        where = collections.defaultdict(set)
        for home, split in dataset.splits.items():
            assert split.groups == tuple(name.split("_")[0] for name in split.ids)
            for group in split.groups:
                where[group].add(home)
        assert any(len(one) > 1 for one in where.values()) == crosses


def test_fractions_and_seed(root):
    sizes, orders = [], []
    for seed in (0, 0, 1):
        dataset = official_data_set("aptos2019", root, fractions=(0.6, 0.2, 0.2), seed=seed)
        sizes.append([len(split) for split in dataset.splits.values()])
        orders.append(dataset.splits["test"].ids)
    assert sizes == [[15, 5, 5]] * 3
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("aptos", {}, "'aptos' is unknown; did you mean 'aptos2019'"),
        ("aptos2019", {"variant": "x"}, "aptos2019 has no variant 'x'; it has none"),
        ("eyepacs", {"variant": "pool"}, "did you mean 'pooled'"),
        ("aptos2019", {"split_by": "patient"}, "split_by is 'patient'; one of group, image"),
        ("aptos2019", {"fractions": (0.5, 0.2, 0.2)}, "fractions"),
    ],
)
def test_unusable_options(root, name, options, message):
    with pytest.raises(UserError, match=message):
        official_data_set(name, root, **options)


@pytest.mark.parametrize("name", ["aptos2019", "eyepacs", "ham10000", "isic2019", "chexpert"])
def test_what_to_download_is_said_where_nothing_is(tmp_path, name):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match=r"so that the folder holds|unpack\nit, so that"):
            official_data_set(name, folder)
