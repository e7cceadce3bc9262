"""How well and how fast the audit tells copies of a picture from other pictures.

    python benchmarks/image_hashes.py FOLDER [FOLDER ...]

Each folder holds JPEG files anywhere below it and `split.csv` with the columns `id` (the file's
stem) and `group` (patient or lesion). Prints, for each folder, how far apart the hashes of pictures
of different groups are, and how far those of changed copies; then how fast images are hashed, and
how long a search of 25,000 images among 10,000 takes.
"""

import argparse
import csv
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measuring import seconds
from PIL import Image, ImageEnhance
from results import output_option, write_table

from medmerge_jax.data.hashing import NEAR, nearest, perceptual_hashes
from medmerge_jax.images.decode import read_image, resize_pixels

SIZE, COPIES, THREADS, ROWS = 224, 1500, 2, 128
LIMITS = (16, 20, 24, 28, 32, 36, 40, 44)
QUESTION = "How well and how fast does the audit tell copies of a picture from other pictures?"


def main():
    """Measures all folders, then the speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    output_option(parser, "image_hashes")
    options = parser.parse_args()
    rows, copies = [], {}
    for folder in options.folders:
        row, copies[f"Copies of {folder.name}"] = measure(folder)
        rows.append(row)
    rate, took = measure_speed()
    answer = (
        f"{rate:,.0f} images of {SIZE} px hashed per second, 25,000 searched among 10,000 in "
        f"{took:.2f} s; "
    )
    if rows:
        answer += f"pairs of other groups within {NEAR} bits: " + ", ".join(
            f"{row[f'within {NEAR}']} of {row['pairs of other groups']}" for row in rows
        )
    else:
        answer += "copies were not looked for"
    write_table(options.output, QUESTION, f"{answer}.", rows, more=copies)


def measure(folder):
    """Distances between pictures of different groups, and between a picture and its copies."""
    with (folder / "split.csv").open() as table:
        groups = {row["id"]: row["group"] for row in csv.DictReader(table)}
    paths = sorted(folder.rglob("*.jp*g"))
    with ThreadPoolExecutor(THREADS) as pool:
        images = np.stack(list(pool.map(lambda path: read_image(path, SIZE), paths)))
    hashes = in_chunks(images)
    pairs = distances_between_groups(hashes, np.asarray([groups[path.stem] for path in paths]))
    row = {
        "folder": folder.name,
        "images": len(paths),
        "pairs of other groups": f"{pairs.sum():,}",
        "least distance, bits": np.flatnonzero(pairs)[0],
        **{f"within {limit}": pairs[: limit + 1].sum() for limit in LIMITS},
    }
    chosen = np.random.default_rng(0).permutation(len(images))[:COPIES]
    rows = []
    for name, change in CHANGES.items():
        copies = np.stack([changed(images[row], change) for row in chosen])
        bits = np.bitwise_count(hashes[chosen] ^ in_chunks(copies)).sum(axis=1)
        rows.append(
            {
                "copy": name,
                "median bits": f"{np.median(bits):.0f}",
                "most bits": bits.max(),
                "recognised": f"{np.mean(bits <= NEAR):.1%}",
            }
        )
    return row, rows


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
    """Images hashed per second, and the seconds of a search."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (512, SIZE, SIZE, 3), np.uint8)
    rate = len(images) / seconds(lambda: in_chunks(images))
    ours, others = (rng.integers(0, 2**64, (n, 4), np.uint64) for n in (25_000, 10_000))
    return rate, seconds(lambda: nearest(ours, others, NEAR))


if __name__ == "__main__":
    main()
