"""How well and how fast the audit tells copies of a picture from other pictures.

    python benchmarks/image_hashes.py FOLDER [FOLDER ...]

Each folder holds JPEG files anywhere below it and `split.csv` with the columns `id` (the file's
stem) and `group` (patient or lesion). Prints, for each folder, how far apart the hashes of pictures
of different groups are, and how far those of changed copies; then the seconds that hashing and a
search of 25,000 images among 10,000 take.
"""

import argparse
import csv
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from medmerge_jax.data.hashing import NEAR, nearest, perceptual_hashes
from medmerge_jax.images.decode import read_image, resize_pixels

SIZE, COPIES, THREADS, ROWS = 224, 1500, 2, 128
LIMITS = (16, 20, 24, 28, 32, 36, 40, 44)


def main():
    """Measures all folders, then the speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        measure(folder)
    measure_speed()


def measure(folder):
    """Distances between pictures of different groups, and between a picture and its copies."""
    with (folder / "split.csv").open() as table:
        groups = {row["id"]: row["group"] for row in csv.DictReader(table)}
    paths = sorted(folder.rglob("*.jp*g"))
    with ThreadPoolExecutor(THREADS) as pool:
        images = np.stack(list(pool.map(lambda path: read_image(path, SIZE), paths)))
    hashes = in_chunks(images)
    pairs = distances_between_groups(hashes, np.asarray([groups[path.stem] for path in paths]))
    print(f"\n{folder.name}: {len(paths)} images, {pairs.sum() / 1e6:.1f} million pairs of groups")
    print(f"least distance {np.flatnonzero(pairs)[0]} bits; pairs within", end=" ")
    print(", ".join(f"{limit}: {pairs[: limit + 1].sum()}" for limit in LIMITS))
    chosen = np.random.default_rng(0).permutation(len(images))[:COPIES]
    for name, change in CHANGES.items():
        copies = np.stack([changed(images[row], change) for row in chosen])
        bits = np.bitwise_count(hashes[chosen] ^ in_chunks(copies)).sum(axis=1)
        found = np.mean(bits <= NEAR)
        print(f"  {name}: median {np.median(bits):.0f}, most {bits.max()}, found {found:.1%}")


def distances_between_groups(hashes, groups):
    """Number of pairs by distance (257,)."""
    counts = np.zeros(257, np.int64)
    for start in range(0, len(hashes), ROWS):
        rows = slice(start, start + ROWS)
        bits = np.bitwise_count(hashes[rows, None] ^ hashes[None]).sum(axis=-1)
        later = np.arange(len(hashes)) > np.arange(len(hashes))[rows, None]
        counts += np.bincount(bits[later & (groups[rows, None] != groups)], minlength=257)
    return counts


def in_chunks(images):
    """Hashes of many images."""
    return np.concatenate(
        [perceptual_hashes(images[i : i + 32]) for i in range(0, len(images), 32)]
    )


def changed(pixels, change):
    """A copy, at the size again."""
    image = Image.fromarray(pixels)
    return resize_pixels(np.asarray(change(image).convert("RGB")), SIZE)


def as_jpeg(image):
    """At quality 75."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file)


def cropped(image):
    """Without 2 % of the width and height."""
    edge = round(0.01 * SIZE)
    return image.crop((edge, edge, SIZE - edge, SIZE - edge))


CHANGES = {
    "JPEG at quality 75": as_jpeg,
    "resized by 0.8": lambda image: image.resize((round(0.8 * SIZE),) * 2),
    "resized by 1.25": lambda image: image.resize((round(1.25 * SIZE),) * 2),
    "10 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "10 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "2 % cut off": cropped,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def measure_speed():
    """Of hashing on one thread, and of the search."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (512, SIZE, SIZE, 3), np.uint8)
    started = time.perf_counter()
    in_chunks(images)
    rate = len(images) / (time.perf_counter() - started)
    ours, known = (rng.integers(0, 2**64, (n, 4), np.uint64) for n in (25_000, 10_000))
    started = time.perf_counter()
    nearest(ours, known, NEAR)
    seconds = time.perf_counter() - started
    print(f"\nhashing: {rate:.0f} images of {SIZE} px per second and thread")
    print(f"25,000 images searched among 10,000: {seconds:.2f} s")


if __name__ == "__main__":
    main()
