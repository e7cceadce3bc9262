"""Layouts of image folders as people have them: read and said, or refused with a question."""

import itertools
import os

import pytest

from medmerge_jax.data import image_folder, image_table
from medmerge_jax.data.files import find_images
from medmerge_jax.errors import UserError


def fill(root, *folders, number=2, name="{}.png"):
    """Empty files: their names are all that is read."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            (root / folder / name.format(i)).touch()


def grid(*parts):
    return ["/".join(names) for names in itertools.product(*parts)]


def said(dataset):
    return "\n".join(dataset.notes)


def counts(dataset):
    return {name: len(split) for name, split in dataset.splits.items()}


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Validation", "Testing"),
        ("train_set", "val_set", "test_set"),
        ("TRAIN", "valid", "holdout"),
        ("trn", "dev", "TestSet"),
        ("Train images", "eval", "test-data"),
        ("training_data", "validate", "held_out"),
        ("images_train", "imgs_val", "dataset.test"),
    ],
)
def test_spellings_of_splits(tmp_path, names):
    fill(tmp_path, *grid(names, ("glioma", "pituitary")))
    dataset = image_folder(tmp_path)
    assert dataset.classes == ("glioma", "pituitary")
    for name, folder in zip(("train", "val", "test"), names, strict=True):
        assert dataset.splits[name].ids[0].startswith(f"{folder}/glioma/")
        if folder != name:
            assert f"the folder {folder} is read as the split {name}" in said(dataset)


def test_the_brain_tumour_set(tmp_path):
    fill(tmp_path, *grid(("Training", "Testing"), ("glioma", "meningioma")), number=20)
    dataset = image_folder(tmp_path)
    assert dataset.classes == ("glioma", "meningioma")
    assert all(one.startswith("Testing/") for one in dataset.splits["test"].ids)
    assert all(one.startswith("Training/") for one in dataset.splits["val"].ids)
    assert counts(dataset) == {"train": 36, "val": 4, "test": 40}


@pytest.mark.parametrize("name", ["trainval", "train_val", "train+val", "TrainValid"])
def test_train_and_val_together_are_split(tmp_path, name):
    fill(tmp_path, *grid((name, "test"), "ab"), number=10)
    dataset = image_folder(tmp_path)
    assert counts(dataset) == {"train": 18, "val": 2, "test": 20}
    assert "no val split is given; taken from train" in said(dataset)
    fill(tmp_path, "val/a")
    with pytest.raises(UserError, match="hold validation images; leave one of them"):
        image_folder(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("part_1", "part_2"), ("fold1", "fold2"), ("Fold A", "Fold B"), ("cv-0", "cv-1"),
        ("images_001", "images_002"), ("HAM_images_part_1", "HAM_images_part_2"),
        ("batch1", "batch2"), ("test2", "cat"), ("chest_xray_train", "chest_xray_val"),
        ("labeled", "unlabeled"), ("set_a", "set_b"), ("images", "masks"), ("imgs", "lesion_masks"),
        ("images", "labels"), ("trainA", "testA", "trainB", "testB"),
    ],
)  # fmt: skip
def test_what_looks_like_no_class_is_a_question(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(UserError, match=r"is '.* a class, or .*\?") as error:
        image_folder(tmp_path)
    assert "data.classes" in str(error.value)
    assert image_folder(tmp_path, classes=names).classes == names


@pytest.mark.parametrize("names", [("Grade 1", "Grade 2"), ("contest", "parts"), ("set", "cv")])
def test_what_looks_like_a_class_is_one(tmp_path, names):
    fill(tmp_path, *names)
    assert set(image_folder(tmp_path).classes) == set(names)


def test_a_split_that_is_named_as_a_class_is_a_class(tmp_path):
    fill(tmp_path, "train", "bus")
    assert image_folder(tmp_path, classes=("bus", "train")).classes == ("bus", "train")


def test_one_folder_around_the_splits(tmp_path):
    fill(tmp_path, *grid(("chest_xray",), ("train", "val", "test"), "ab"))
    dataset = image_folder(tmp_path)
    assert counts(dataset) == {"train": 4, "val": 4, "test": 4}
    assert dataset.splits["val"].ids[0] == "chest_xray/val/a/0.png"
    assert "looked for in the only folder, chest_xray" in said(dataset)


def test_classes_above_splits(tmp_path):
    fill(tmp_path, *grid(("cat", "ant"), ("train", "Test")), number=10)
    dataset = image_folder(tmp_path)
    assert dataset.classes == ("ant", "cat")
    assert all("/Test/" in one for one in dataset.splits["test"].ids)
    assert not any("/Test/" in one for one in dataset.splits["train"].ids)
    assert dataset.counts()["test"] == {"ant": 10, "cat": 10}
    assert "the splits are folders inside the folder of each class" in said(dataset)
    fill(tmp_path, "dog/x")
    with pytest.raises(UserError, match="dog has none; give all classes the same splits"):
        image_folder(tmp_path)


@pytest.mark.parametrize("inner", ["train/cat/test", "cat/images/train"])
def test_a_split_further_down_is_a_question(tmp_path, inner):
    fill(tmp_path, inner, "train/ant" if inner.startswith("train") else "ant")
    with pytest.raises(UserError, match=r"is the folder '(test|train)' inside of it a split\?"):
        image_folder(tmp_path)


def test_litter_of_disk_stations_and_editors(tmp_path):
    litter = ("@eaDir", "__MACOSX", "lost+found", ".ipynb_checkpoints", "$RECYCLE.BIN")
    fill(tmp_path, "a", "b", *(f"a/{name}" for name in litter), *litter, number=10)
    fill(tmp_path, "a", name="._{}.png")
    dataset = image_folder(tmp_path)
    assert dataset.classes == ("a", "b")
    assert sum(counts(dataset).values()) == 20
    assert (
        "8 folders are left out that computers leave for themselves: $RECYCLE.BIN, @eaDir, "
        "__MACOSX, lost+found"
    ) in dataset.notes


@pytest.mark.parametrize(
    "mask",
    ["a/{}_mask.png", "a/{}_mask_1.png", "a/{}-segmentation.png", "a/mask_{}.png", "a/{} gt.png",
     "a/masks/{}.png", "a/sub/ground_truth/{}.png"],
)  # fmt: skip
def test_masks_beside_images_are_a_question(tmp_path, mask):
    fill(tmp_path, "a", "b", number=10)
    for i in range(10):
        path = tmp_path / mask.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(UserError, match=r"10 of 30 images are named like masks .*data\.exclude"):
        image_folder(tmp_path)
    patterns = ("*_MASK*", "*segmentation*", "mask*", "* gt.*", "*/ground_truth")
    dataset = image_folder(tmp_path, exclude=patterns)
    assert sum(counts(dataset).values()) == 20
    assert "left out by data.exclude, for instance a/" in said(dataset)
    kept = image_folder(tmp_path, exclude=("nothing",))
    assert "10 images are named like the mask of another" in said(kept)


def test_masks_need_an_image(tmp_path):
    fill(tmp_path, "with_mask", "without_mask", name="{}_mask.png")
    assert image_folder(tmp_path).classes == ("with_mask", "without_mask")


def test_links_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    fill(root, "a", "b", number=10)
    fill(elsewhere, "more", number=15, name="more{}.png")
    (root / "a/0link").symlink_to(elsewhere)
    (root / "a/1link").symlink_to(elsewhere / "more")
    (elsewhere / "loop").symlink_to(elsewhere)
    (root / "b/up").symlink_to(root)
    (root / "b/itself").symlink_to(root / "b/itself")
    (root / "b/0.jpg").symlink_to(root / "b/0.png")
    dataset = image_folder(root)
    assert sum(sum(part.values()) for part in dataset.counts().values()) == 35
    ids = {one for split in dataset.splits.values() for one in split.ids}
    assert "a/0link/more/more0.png" in ids
    assert "b/0.png" in ids
    assert "4 links are left out: what they lead to is there already" in said(dataset)
    assert "links are followed to a folder" in said(dataset)


def test_a_link_gives_no_second_class(tmp_path):
    fill(tmp_path, "a", "b")
    (tmp_path / "b/x.png").symlink_to(tmp_path / "a/0.png")
    with pytest.raises(UserError, match=r"b/x\.png: is the same file as .*a/0\.png, .* class 'a'"):
        image_folder(tmp_path)


def test_without_links_the_paths_are_as_ever(tmp_path):
    fill(tmp_path, "x/b", "x/a/c", "x")
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)[0]] == [
        "x/0.png", "x/1.png", "x/a/c/0.png", "x/a/c/1.png", "x/b/0.png", "x/b/1.png",
    ]  # fmt: skip


def test_dicom_files_need_no_suffix(tmp_path):
    """As scanners name them; of other files without a suffix nothing is taken for an image."""
    start = b"\0" * 128 + b"DICM"
    contents = {
        "a/IM000001": start,
        "a/1.2.840.113619.2.55": start,
        "a/notes.txt": start,
        "a/DICOMDIR": start,
        "a/LICENSE": b"a text",
        "a/empty": b"",
        "b/IM000001": start,
        "b/series/IM000002": start + b"more",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "b" / "pipe")  # which reading would wait for
    wanted = ["a/1.2.840.113619.2.55", "a/IM000001", "b/IM000001", "b/series/IM000002"]
    files, (note,) = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == wanted
    assert note.startswith("5 files are left out: ") and "nor is it DICOM" in note

    assert sum(len(split) for split in image_folder(tmp_path).splits.values()) == 4
    rows = ["id,label", "1.2.840.113619.2.55,x", "a/IM000001.dcm,y", "b/IM000001,x", "IM000002,y"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    table = image_table(tmp_path / "labels.csv", tmp_path, fractions=(0.5, 0.25, 0.25))
    assert sorted(path for split in table.splits.values() for path in split.paths) == files


@pytest.mark.parametrize("folder", ["", "a", "a/deep"])
def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, folder):
    fill(tmp_path, "a/deep", "b")
    listing = os.scandir

    def scandir(path):
        if os.fspath(path) == os.fspath(tmp_path / folder):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"the folder cannot be listed \(Permission denied\)"):
        image_folder(tmp_path)


def test_images_without_a_class(tmp_path):
    fill(tmp_path, "nv")
    with pytest.raises(UserError, match=rf"nv: holds 2 images but no classes.*{tmp_path}"):
        image_folder(tmp_path / "nv")
    fill(tmp_path, "nv/extra")
    with pytest.raises(UserError, match="holds 2 images beside the only class 'extra'"):
        image_folder(tmp_path / "nv")
    fill(tmp_path, "flat/train", "flat/test")
    with pytest.raises(UserError, match="flat: holds 4 images but no classes"):
        image_folder(tmp_path / "flat")
    fill(tmp_path, "some/a", "some/b", "some", number=10)
    note = "10 images are left out, in the folder of no class, for instance 0.png"
    assert note in image_folder(tmp_path / "some").notes


def test_classes_that_differ_by_case_or_spaces(tmp_path):
    fill(tmp_path, "train/NV", "train/MEL", "test/nv", "test/Mel ")
    with pytest.raises(UserError, match="'MEL' and 'Mel '; 'NV' and 'nv'; spell each class one"):
        image_folder(tmp_path)
    names = ("NV", "MEL", "nv", "Mel ")
    assert image_folder(tmp_path, classes=names).classes == names


def test_classes_in_the_only_folder(tmp_path):
    fill(tmp_path, "data/a", "data/b")
    with pytest.raises(UserError, match=r"the only folder is 'data'; .* data\.root = .*/data"):
        image_folder(tmp_path)


def test_the_same_folders_in_all_classes_are_said(tmp_path):
    fill(tmp_path, *grid(("patient 1", "patient 2"), "01"))
    note = "each class has the same folders inside (0, 1): their names are not the classes"
    assert note in said(image_folder(tmp_path))


def test_natural_order_of_classes_and_what_it_means(tmp_path):
    fill(tmp_path, "Grade 10", "Grade 2", "Grade 1", "0")
    dataset = image_folder(tmp_path)
    assert dataset.classes == ("0", "Grade 1", "Grade 2", "Grade 10")
    assert not dataset.ordered  # words, of which kappa would make numbers
    fill(tmp_path / "numbers", "10", "9")
    assert image_folder(tmp_path / "numbers").ordered
