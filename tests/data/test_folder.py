import numpy as np
import pytest

from medmerge_jax.data import image_folder
from medmerge_jax.errors import UserError


def fill(write_images, root, counts, suffix=".png"):
    """`counts`: "train/cat" -> number of images."""
    return write_images(
        *(root / folder / f"{i:03d}{suffix}" for folder, n in counts.items() for i in range(n))
    )


def test_splits_and_classes_are_the_folders(tmp_path, write_images):
    fill(write_images, tmp_path, {"train/cat": 2, "train/ant": 1, "val/cat": 1, "test/ant": 3})
    dataset = image_folder(tmp_path)
    assert dataset.name == tmp_path.name
    assert dataset.classes == ("ant", "cat")
    assert not dataset.multilabel
    train = dataset.splits["train"]
    assert train.ids == ("train/ant/000.png", "train/cat/000.png", "train/cat/001.png")
    assert train.paths == tuple(tmp_path / one for one in train.ids)
    assert train.labels.dtype == np.int32
    np.testing.assert_array_equal(train.labels, [0, 1, 1])
    assert dataset.counts()["test"] == {"ant": 3, "cat": 0}


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_names_of_splits_and_suffixes(tmp_path, write_images, val):
    names = ("a.jpg", "b.JPG", "c.jpeg", "d.Png")
    write_images(
        *(tmp_path / split / "x" / name for split in ("Train", val, "TEST") for name in names)
    )
    dataset = image_folder(tmp_path)
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [4, 4, 4]


def notes(dataset):
    return "\n".join(dataset.notes)


def test_litter_is_ignored_and_other_files_are_counted(tmp_path, write_images):
    fill(write_images, tmp_path, {"train/x": 2, "train/y": 1, "val/x": 1, "test/x": 1})
    fill(write_images, tmp_path, {"__MACOSX/x": 1, "train/__MACOSX": 1, "train/.git": 1})
    for name in (".DS_Store", "Thumbs.db", "._000.png"):
        (tmp_path / "train/x" / name).write_bytes(b"")
    assert len(image_folder(tmp_path).splits["train"]) == 3
    assert image_folder(tmp_path).notes == (
        "2 folders are left out that computers leave for themselves: __MACOSX",
    )
    for name in ("notes.txt", "a.gif"):
        (tmp_path / "train/x" / name).write_bytes(b"")
    assert len(image_folder(tmp_path).splits["train"]) == 3
    assert "2 files are left out: no name ends in .jpg" in notes(image_folder(tmp_path))
    assert ", for instance train/x/a.gif" in notes(image_folder(tmp_path))


def test_other_folders_beside_the_splits_are_named(tmp_path, write_images):
    fill(write_images, tmp_path, {"train/x": 1, "val/x": 1, "test/x": 1, "labels/x": 1})
    assert image_folder(tmp_path).classes == ("x",)
    assert "1 folder is left out beside the splits, for instance labels" in notes(
        image_folder(tmp_path)
    )


def test_images_may_lie_deeper(tmp_path, write_images):
    fill(write_images, tmp_path, {"train/x/patient1": 2, "train/x": 1, "val/x": 1, "test/x": 1})
    assert "train/x/patient1/000.png" in image_folder(tmp_path).splits["train"].ids


def test_order_of_classes(tmp_path, write_images):
    fill(write_images, tmp_path, {f"train/{name}": 10 for name in ("2", "10", "1")})
    assert image_folder(tmp_path).classes == ("1", "2", "10")
    assert image_folder(tmp_path, ("10", "2", "1", "0")).classes == ("10", "2", "1", "0")
    with pytest.raises(UserError, match=r"train.10: the class '10' is none of \['1', '2'\]"):
        image_folder(tmp_path, ("1", "2"))
    with pytest.raises(UserError, match="a class occurs twice"):
        image_folder(tmp_path, ("1", "2", "10", "10"))


def test_without_splits_they_are_made(tmp_path, write_images):
    fill(write_images, tmp_path, {"x": 30, "y": 10})
    dataset = image_folder(tmp_path, fractions=(0.6, 0.2, 0.2), seed=1)
    assert dataset.counts() == {
        "train": {"x": 18, "y": 6},
        "val": {"x": 6, "y": 2},
        "test": {"x": 6, "y": 2},
    }
    assert dataset.fingerprint() == image_folder(tmp_path, None, (0.6, 0.2, 0.2), 1).fingerprint()
    assert dataset.fingerprint() != image_folder(tmp_path, None, (0.6, 0.2, 0.2), 2).fingerprint()


@pytest.mark.parametrize("given", [("val",), ("test",), ()])
def test_missing_splits_are_taken_from_train(tmp_path, write_images, given):
    fill(write_images, tmp_path, {"train/x": 40, "train/y": 40})
    for name in given:
        fill(write_images, tmp_path, {f"{name}/x": 3, f"{name}/y": 2})
    dataset = image_folder(tmp_path)
    dataset.check()
    for name in ("val", "test"):
        split = dataset.splits[name]
        assert all(one.startswith(name if name in given else "train") for one in split.ids)
        assert len(split) == (5 if name in given else 8)
    assert sum(map(len, dataset.splits.values())) == 80 + 5 * len(given)
    missing = " and ".join(name for name in ("val", "test") if name not in given)
    assert f"no {missing} split is given; taken from train (stratified, seed 0)" in dataset.notes


def test_nothing_is_taken_where_the_fraction_is_zero(tmp_path, write_images):
    fill(write_images, tmp_path, {"train/x": 10, "test/x": 2})
    dataset = image_folder(tmp_path, fractions=(1.0, 0.0, 0.0))
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [10, 0, 2]


def test_what_is_not_an_image_folder(tmp_path, write_images):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file; the folder of the images is wanted"):
        image_folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"no images found; .*/train/<class>/\*\.jpg"):
        image_folder(tmp_path)
    fill(write_images, tmp_path, {"a/test/x": 1, "b/train/x": 1, "b/val/x": 1, "b/valid/x": 1})
    with pytest.raises(UserError, match=r"there are \['test'\] but no train"):
        image_folder(tmp_path / "a")
    with pytest.raises(UserError, match="both val and valid are val splits"):
        image_folder(tmp_path / "b")
