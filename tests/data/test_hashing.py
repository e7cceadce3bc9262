"""That copies of a picture are found, and other pictures are not."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmerge_jax.data.dataset import DataSet, Split
from medmerge_jax.data.hashing import (
    NAMELESS,
    NEAR,
    ImageHashes,
    find_hashes,
    find_overlap,
    hash_images,
    load_hashes,
    nearest,
    perceptual_hashes,
)
from medmerge_jax.data.synthetic import draw
from medmerge_jax.errors import UserError
from medmerge_jax.images.decode import resize_pixels
from medmerge_jax.weights.layout import HASHES_FILE, write_hashes

SIZE = 96


@functools.cache
def pictures(count, seed=0, kind="lesion", size=SIZE):
    images = draw(kind, np.arange(count) % 4, size, np.random.default_rng(seed), 1)
    images.flags.writeable = False  # the same for all tests
    return images


def distances(ours, theirs):
    return np.bitwise_count(perceptual_hashes(ours) ^ perceptual_hashes(theirs)).sum(axis=1)


def as_jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(image, factor):
    side = round(len(image) * factor)
    return resize_pixels(np.asarray(Image.fromarray(image).resize((side, side))), len(image))


@pytest.mark.parametrize("kind", ["fundus", "lesion"])
@pytest.mark.parametrize(
    "change",
    [
        lambda image: as_jpeg(image, 75),
        lambda image: resized(image, 0.8),
        lambda image: resized(image, 1.25),
        lambda image: (image * 0.9).astype(np.uint8),
        lambda image: np.clip(image.astype(int) + 6, 0, 255).astype(np.uint8),
    ],
    ids=["jpeg", "smaller", "larger", "darker", "brighter"],
)
def test_a_copy_is_near(kind, change):
    images = pictures(24, kind=kind, size=192)
    copies = np.stack([change(image) for image in images])
    assert np.mean(copies != images) > 0.1
    assert distances(images, copies).max() <= NEAR


def test_the_size_does_not_matter():
    images = pictures(12, size=192)
    smaller = np.stack([resize_pixels(image, 64) for image in images])
    assert distances(images, smaller).max() <= NEAR


def test_grey_images_with_and_without_channels():
    grey = pictures(4)[..., 0]
    assert distances(grey, np.repeat(grey[..., None], 3, axis=-1)).max() <= 4


def test_noise_is_far():
    rng = np.random.default_rng(0)
    hashes = perceptual_hashes(rng.integers(0, 256, (300, 64, 64, 3), np.uint8))
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=-1)
    other = bits[np.triu_indices(300, 1)]
    # Each bit is a fair coin: 128 ± 8.
    assert abs(other.mean() - 128) < 1
    assert other.min() > 80


def test_an_image_of_one_colour_has_no_rounding_bits():
    flat = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 7, 130, 255)])
    assert np.bitwise_count(perceptual_hashes(flat)).sum(axis=1).max() <= 1


def test_nearest_equals_a_plain_search():
    rng = np.random.default_rng(1)
    known = rng.integers(0, 2**64, (5000, 4), np.uint64)
    ours = rng.integers(0, 2**64, (600, 4), np.uint64)
    for row in range(200):  # with 0 to 49 bits turned
        ours[row] = known[20 * row]
        for bit in rng.choice(256, row % 50, replace=False).tolist():
            ours[row, bit // 64] ^= np.uint64(1 << (bit % 64))
    ours[300], known[17] = known[4000], known[4000]  # of two that are equally near, the first
    index, distance = nearest(ours, known, 40)
    for row in range(len(ours)):
        bits = np.bitwise_count(ours[row] ^ known).sum(axis=1)
        best = int(bits.argmin())
        assert (index[row], distance[row]) == ((best, bits[best]) if bits[best] <= 40 else (-1, 41))
    assert index[300] == 17


def split(ids, labels=None):
    labels = np.zeros(len(ids), np.int32) if labels is None else labels
    return Split(tuple(ids), tuple(ids), labels)


def dataset(**ids):
    return DataSet("d", ("a", "b"), False, {name: split(ids[name]) for name in ids})


@pytest.fixture
def hashed():
    images = pictures(40)
    parts = {"train": images[:20], "val": images[20:30], "test": images[30:]}
    ids = {name: [f"{name}/{row:02}.png" for row in range(len(parts[name]))] for name in parts}
    return dataset(**ids), parts, hash_images(dataset(**ids), parts, "squash")


def test_hashes_of_a_data_set(hashed):
    data, parts, hashes = hashed
    assert len(hashes) == 40
    assert hashes.scale == "96 px, squash"
    for name in parts:
        part = hashes.of(name)
        assert part.ids == data.splits[name].ids
        np.testing.assert_array_equal(part.perceptual, perceptual_hashes(parts[name]))
    assert len(np.unique(hashes.exact, axis=0)) == 40
    assert len(hashes.training()) == 20


def test_overlap_by_looks_and_by_pixels(hashed):
    _, parts, hashes = hashed
    others = np.concatenate([parts["test"][:4], pictures(10, seed=9)])
    others[1] = as_jpeg(others[1], 75)
    names = {"train": [f"x{row}" for row in range(14)], "val": ["y"], "test": ["z"]}
    more = pictures(2, seed=11)
    images = {"train": others, "val": more[:1], "test": more[1:]}
    known = hash_images(dataset(**names), images, "squash")
    overlap = find_overlap(hashes.of("test"), known)
    assert overlap.by_hash.tolist() == [True] * 4 + [False] * 6
    assert overlap.exact.tolist() == [True, False, True, True] + [False] * 6
    assert overlap.match.tolist() == [0, 1, 2, 3] + [-1] * 6
    assert not overlap.by_id.any()
    found = overlap.summary(hashes.of("test"), known)
    assert (found["images"], found["exact"]) == (4, 3)
    assert found["examples"][0] == ["test/00.png", "x0"]
    # Pixels of another size are never the same, whatever their digests are.
    other_scale = ImageHashes(known.ids, known.splits, known.perceptual, known.exact, "32 px, crop")
    overlap = find_overlap(hashes.of("test"), other_scale)
    assert overlap.by_hash.sum() == 4
    assert not overlap.exact.any()


def with_bits_turned(hashes, count):
    turned = hashes.perceptual.copy()
    for bit in range(count):
        turned[:, bit // 64] ^= np.uint64(1 << (bit % 64))
    ids = tuple(f"other/{row}" for row in range(len(hashes)))
    return ImageHashes(ids, hashes.splits, turned, ~hashes.exact, hashes.scale)


def test_copies_differ_in_up_to_32_bits(hashed):
    """25 is what JPEG, resizing and brightness take; the nearest strangers differ in 38."""
    _, _, hashes = hashed
    hashes = hashes.of("test")
    assert find_overlap(hashes, with_bits_turned(hashes, 32)).by_hash.all()
    assert not find_overlap(hashes, with_bits_turned(hashes, 33)).any.any()


@pytest.mark.parametrize(
    "place", [(0, 0, 0), (0, 0, 2), (SIZE // 2, 3, 1), (SIZE - 1, SIZE - 1, 2)]
)
def test_one_number_of_an_image_makes_it_another(hashed, place):
    data, parts, hashes = hashed
    changed = {name: images.copy() for name, images in parts.items()}
    changed["test"][(slice(None), *place)] ^= 1
    overlap = find_overlap(hashes.of("test"), hash_images(data, changed, "squash").of("test"))
    assert overlap.by_hash.all()
    assert not overlap.exact.any()


def test_overlap_by_name():
    images = pictures(6, seed=3)
    ours = hash_images(
        dataset(train=["a/ISIC_0000001.jpg", "b/1.png", "c/2.png"], val=["v"], test=["t"]),
        {"train": images[:3], "val": images[3:4], "test": images[4:5]},
        "squash",
    )
    # An image of the same name that looks a little alike; and one that does not.
    alike = np.roll(images[1], 2, axis=1)
    theirs = hash_images(
        dataset(train=["ISIC_0000001", "x/1.jpg", "2"], val=["v"], test=["t"]),
        {"train": np.stack([images[5], alike, images[0]]), "val": images[3:4], "test": images[4:5]},
        "squash",
    )
    bits = distances(images[1:2], alike[None])
    assert NEAR < bits[0] <= 80
    overlap = find_overlap(ours.of("train"), theirs.of("train"))
    # The archive's number is believed; "1" where the pictures are alike; "2" is any name.
    assert overlap.by_id.tolist() == [True, True, False]


def test_files(hashed, tmp_path):
    _, _, hashes = hashed
    run = tmp_path / "run"
    model = run / "medmerge" / "seed0" / "model" / "model.safetensors"
    model.parent.mkdir(parents=True)
    hashes.save(run / "image_hashes.npz", "f00d")
    found = find_hashes(model, "f00d")
    assert found.ids == hashes.ids
    assert found.splits == hashes.splits
    assert found.scale == hashes.scale
    np.testing.assert_array_equal(found.perceptual, hashes.perceptual)
    np.testing.assert_array_equal(found.exact, hashes.exact)
    assert find_hashes(model, "beef") is None
    assert find_hashes(model, None) is None
    (run / "image_hashes.npz").write_bytes(b"PK\3\4 cut short")
    with pytest.raises(UserError, match=r"image_hashes\.npz: cannot be read .* Delete it"):
        load_hashes(run / "image_hashes.npz")


def test_what_a_model_inherits_from_its_parents(hashed):
    _, _, hashes = hashed
    other = ImageHashes(
        ("p/1", "p/2"), ("train", "test"), hashes.perceptual[30:32], hashes.exact[30:32], "64 px"
    )
    model = hashes.inheriting([other])
    assert model.training().ids == (*hashes.of("train").ids, "p/1")
    assert model.training().splits[-1] == "parent"
    grandchild = hashes.inheriting([model])
    assert len(grandchild.training()) == 20 + 21
    overlap = find_overlap(hashes.of("test"), model.training())
    assert overlap.by_hash.tolist() == [True] + [False] * 9
    assert not overlap.exact.any()


def test_rows_that_are_left_out(hashed):
    _, _, hashes = hashed
    rows = {"val": np.arange(10) < 3, "test": np.zeros(10, bool)}
    kept = hashes.without(rows)
    assert kept.of("val").ids == hashes.of("val").ids[3:]
    assert len(kept) == 37


def test_hashes_in_a_model_directory_have_no_names_and_no_order(hashed, tmp_path):
    _, _, hashes = hashed
    theirs = hashes.training()
    run, other = tmp_path / "run", tmp_path / "copy"
    for folder, rows in ((run / "model", theirs.perceptual), (other, theirs.perceptual[::-1])):
        folder.mkdir(parents=True)
        write_hashes(folder / HASHES_FILE, rows, "f00d")
    # Whatever order the images had, the file is the same to the byte.
    told = [(folder / HASHES_FILE).read_bytes() for folder in (run / "model", other)]
    assert told[0] == told[1]
    assert not any(Path(one).name.encode() in told[0] for one in theirs.ids)
    alone = find_hashes(other / "model.safetensors", "f00d")
    assert set(alone.ids) == {""} and len(alone.training()) == len(theirs)
    assert find_hashes(other / "model.safetensors", "beef") is None
    overlap = find_overlap(theirs, alone.training())
    assert overlap.by_hash.all() and not overlap.by_id.any() and not overlap.exact.any()
    assert overlap.summary(theirs, alone)["examples"][0] == [theirs.ids[0], NAMELESS]
    # The run's own file, with names, is preferred.
    hashes.save(run / HASHES_FILE, "f00d")
    assert find_hashes(run / "model" / "model.safetensors", "f00d").ids == hashes.ids
    # And who inherits them can be saved and read again.
    heir = hashes.inheriting([alone])
    heir.save(tmp_path / HASHES_FILE, "cafe")
    assert load_hashes(tmp_path / HASHES_FILE)[0].ids == heir.ids


def test_hashes_of_many_images_are_small(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2**64, (35_000, 4), np.uint64)
    write_hashes(tmp_path / HASHES_FILE, rows, "f00d")
    assert (tmp_path / HASHES_FILE).stat().st_size < 1.2e6
