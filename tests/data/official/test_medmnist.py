"""MedMNIST files, small copies with the published keys, shapes and types."""

import pickle
import zipfile

import numpy as np
import pytest

from medmerge_jax.data.official.medmnist import LAYOUT, read_medmnist
from medmerge_jax.errors import UserError

COUNTS = {"train": 6, "val": 2, "test": 3}


def arrays(size=28, channels=(), num_classes=2, columns=1, seed=0, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    content = {}
    for split, count in COUNTS.items():
        content[f"{split}_images"] = rng.integers(0, 256, (count, size, size, *channels), np.uint8)
        labels = rng.integers(0, num_classes, (count, columns)).astype(dtype)
        content[f"{split}_labels"] = labels
    return content


def save(path, content, compressed=True):
    (np.savez_compressed if compressed else np.savez)(path, **content)
    return path


def check(records, content, path):
    """Every label, split and pixel."""
    assert records.groups is None
    row = 0
    for split, count in COUNTS.items():
        rows = slice(row, row + count)
        labels = content[f"{split}_labels"]
        expected = labels[:, 0] if labels.shape[1] == 1 else labels
        np.testing.assert_array_equal(records.labels[rows], expected)
        images = content[f"{split}_images"]
        np.testing.assert_array_equal(records.pixels[rows], images, strict=True)
        assert records.splits[rows] == (split,) * count
        assert records.paths[rows] == (path,) * count
        assert records.ids[rows] == tuple(f"{split}_{number:06d}" for number in range(count))
        row += count
    assert len(records.ids) == len(records.pixels) == row


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("size", [28, 64, 128, 224])
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "rgb"])
def test_sizes_and_channels(tmp_path, size, channels, compressed):
    content = arrays(size, channels)
    suffix = "" if size == 28 else f"_{size}"
    path = save(tmp_path / f"pneumoniamnist{suffix}.npz", content, compressed)
    records = LAYOUT.read(tmp_path, "")
    check(records, content, path)
    assert records.classes == ("normal", "pneumonia")
    assert np.issubdtype(records.labels.dtype, np.integer)


def test_several_labels_per_image(tmp_path):
    content = arrays(columns=14)
    path = save(tmp_path / "chestmnist.npz", content)
    records = read_medmnist(tmp_path)
    check(records, content, path)
    assert records.labels.shape == (11, 14)
    assert np.issubdtype(records.labels.dtype, np.floating)
    assert records.classes[0] == "atelectasis"
    assert records.classes[13] == "hernia"


def test_grades_are_classes(tmp_path):
    content = arrays(channels=(3,), num_classes=5, dtype=np.int64)
    content["train_labels"][:5, 0] = range(5)
    path = save(tmp_path / "retinamnist.npz", content)
    records = read_medmnist(path)
    check(records, content, path)
    assert records.classes == ("0", "1", "2", "3", "4")


def test_unknown_names_are_numbers_and_every_split_counts(tmp_path):
    content = arrays()
    content["test_labels"][1, 0] = 6
    path = save(tmp_path / "mine.npz", content)
    assert read_medmnist(tmp_path).classes == ("0", "1", "2", "3", "4", "5", "6")
    check(read_medmnist(tmp_path), content, path)
    save(path, arrays(columns=3))
    assert read_medmnist(tmp_path).classes == ("0", "1", "2")


def test_the_variant_picks_the_file(tmp_path):
    small, large = arrays(28), arrays(64, seed=1)
    path = save(tmp_path / "breastmnist.npz", small)
    other = save(tmp_path / "breastmnist_64.npz", large)
    check(read_medmnist(tmp_path, "breastmnist"), small, path)
    check(read_medmnist(tmp_path, "breastmnist_64"), large, other)
    check(read_medmnist(tmp_path, "breastmnist_64.npz"), large, other)
    check(read_medmnist(other), large, other)
    with pytest.raises(UserError, match=r"holds breastmnist\.npz, breastmnist_64\.npz; name one"):
        read_medmnist(tmp_path)
    with pytest.raises(UserError, match=r"octmnist\.npz: there is no such file; .* holds breast"):
        read_medmnist(tmp_path, "octmnist")
    with pytest.raises(UserError, match="no such file"):
        read_medmnist(tmp_path / ".", "../breastmnist")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.npz file"):
        read_medmnist(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_medmnist(tmp_path / "other")


def changed(key, value):
    content = arrays()
    content[key] = value(content[key]) if callable(value) else value
    return content


def wrong_label(value, dtype=np.int64):
    def change(labels):
        labels = labels.astype(dtype)
        labels[1, 0] = value
        return labels

    return change


MALFORMED = {
    "volumes": (changed("train_images", np.zeros((6, 28, 28, 28), np.uint8)), "volumes"),
    "coloured volumes": (changed("val_images", np.zeros((2, 8, 8, 8, 3), np.uint8)), "volumes"),
    "flat": (changed("train_images", np.zeros((6, 784), np.uint8)), r"shape \(6, 784\)"),
    "float": (changed("test_images", np.zeros((3, 28, 28))), "test_images is float64; uint8"),
    "other size": (changed("val_images", np.zeros((2, 64, 64), np.uint8)), r"val_images .*\(64,"),
    "too few": (changed("val_images", np.zeros((1, 28, 28), np.uint8)), "1 images.* 2 labels"),
    "text": (changed("val_labels", np.array([["normal"], ["x"]])), "val_labels is <U6"),
    "real": (changed("val_labels", np.zeros((2, 1))), "val_labels is float64"),
    "no images": (changed("val_images", np.zeros((0, 28, 28), np.uint8)), "val_images"),
    "no labels": (changed("val_labels", np.zeros((0, 1), np.uint8)), "val_labels"),
    "negative": (changed("test_labels", wrong_label(-1)), r"test_labels, row 1: .*\[-1\]; .*0 to"),
    "no class": (changed("test_labels", wrong_label(2)), r"test_labels, row 1: .*\[2\]; .*0 to 1"),
    "columns": (changed("val_labels", np.zeros((2, 3), int)), r"\[1, 3\] labels per image"),
    "objects": (
        changed("val_labels", np.array([[{}], [{}]], object)), "val_labels holds pickled objects",
    ),
    "columns first": (
        changed("train_images", np.asfortranarray), "train_images is stored column by column",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path, case):
    content, message = MALFORMED[case]
    path = save(tmp_path / "pneumoniamnist.npz", content)
    with pytest.raises(UserError, match=message) as caught:
        read_medmnist(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_keys(tmp_path):
    content = arrays()
    del content["val_images"], content["test_labels"]
    save(tmp_path / "a.npz", content)
    with pytest.raises(UserError, match=r"a\.npz: lacks val_images, test_labels"):
        read_medmnist(tmp_path)


def test_several_labels_are_zero_or_one(tmp_path):
    content = arrays(columns=14)
    content["val_labels"][1, 3] = 2
    save(tmp_path / "chestmnist.npz", content)
    with pytest.raises(UserError, match=r"val_labels, row 1: .*; 0 or 1 is wanted"):
        read_medmnist(tmp_path)
    save(tmp_path / "chestmnist.npz", arrays(columns=5))
    with pytest.raises(UserError, match="5 labels per image; 14 are wanted"):
        read_medmnist(tmp_path)


def test_every_truncation_is_one_user_error(tmp_path):
    path = save(tmp_path / "a.npz", arrays())
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.npz: is damaged"):
            read_medmnist(tmp_path)


@pytest.mark.parametrize("split", COUNTS)
def test_a_flipped_bit_is_found(tmp_path, split):
    path = save(tmp_path / "a.npz", arrays(), compressed=False)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"{split}_images.npy").header_offset
    data[start + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npz: is damaged.*CRC"):
        read_medmnist(tmp_path)


class Attack:
    def __reduce__(self):
        return pytest.fail, ("code of the file has run",)


def test_pickles_never_run(tmp_path):
    content = arrays()
    del content["val_labels"]
    path = save(tmp_path / "a.npz", content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("val_labels.npy", pickle.dumps(Attack()))
    with pytest.raises(UserError, match=r"a\.npz: is damaged"):
        read_medmnist(tmp_path)
    save(path, content | {"val_labels": np.array([[Attack()], [1]], object)})
    with pytest.raises(UserError, match="pickled objects"):
        read_medmnist(tmp_path)


def test_an_invented_shape_is_refused_before_memory_is_asked_for(tmp_path):
    content = arrays()
    del content["train_images"]
    path = save(tmp_path / "a.npz", content)
    with zipfile.ZipFile(path, "a") as archive, archive.open("train_images.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (6, 10**7, 10**7)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UserError, match="has 0 bytes; 600000000000000 are wanted"):
        read_medmnist(tmp_path)


def test_the_layout_lists_the_files_of_2d_images():
    assert len(LAYOUT.variants) == 1 + 12 * 4
    assert LAYOUT.variants[0] == ""
    assert {"pathmnist", "organsmnist_224"} <= set(LAYOUT.variants)
    assert "@article{medmnistv2" in LAYOUT.citation
