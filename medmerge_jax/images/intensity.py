"""Which value of 16-bit images is white: a whole data set decides, never a single image."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.images.cache import Images, UnreadableError, state_of
from medmerge_jax.images.decode import has_more_frames, stored_numbers
from medmerge_jax.models.preprocessing import DEEPEST, Rendering
from medmerge_jax.runtime.cpu import usable_cores
from medmerge_jax.storage import atomic

WHITES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, DEEPEST)
"""What is taken for white: the greatest values of 8, 10, 12, 14 and 16 bits."""

_FORMAT = 2
"""Raised whenever the same files would be measured in another way."""

_ANIMATED = (b"GIF8", b"WEBPVP8X", b"acTL")
"""Near the beginning of GIF, WebP and PNG files that may be animated."""

_RARE = 1e-3
"""A share of the pixels that may be marks or defects, above the range of the picture."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the files of a data set hold.

    Attributes:
      images: How many there are.
      deep: How many are grey with 16 bits, none of them negative.
      cut: How many have 16 bits in several channels, of which the upper 8 are read.
      transparent: How many PNG files have an alpha channel.
      paged: How many have several pages or frames.
      most: The greatest value of the deep ones, and of those that are cut in their upper 8 bits.
      pixels: Of the deep ones, all, and those above each of `WHITES`.
    """

    images: int = 0
    deep: int = 0
    cut: int = 0
    transparent: int = 0
    paged: int = 0
    most: tuple[int, int] = (0, 0)
    pixels: tuple[int, ...] = (0,) * (1 + len(WHITES))

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.images + other.images,
            self.deep + other.deep,
            self.cut + other.cut,
            self.transparent + other.transparent,
            self.paged + other.paged,
            (max(self.most[0], other.most[0]), max(self.most[1], other.most[1])),
            tuple(map(sum, zip(self.pixels, other.pixels, strict=True))),
        )


def measure(splits: Iterable[Images], cache_dir: Path, *, values: bool = True) -> Measured:
    """What the files of the splits hold; measured once and kept in the cache.

    Args:
      splits: Of one data set.
      cache_dir: See `cache.cached_pixels`.
      values: Whether pixels are looked at, instead of headers alone.
    """
    total = Measured()
    for split in splits:
        if split.pixels is None and len(split):
            total += _measured_split(split, cache_dir, values)
    return total


def choose(measured: Measured, rendering: Rendering, *, automatic: bool) -> Rendering:
    """The rendering, with the white of the data set if it is to be found.

    Raises:
      UserError: Colours of 16 bits are so dark that their upper 8 bits hold almost nothing.
    """
    if not automatic:
        return rendering
    if measured.cut and measured.most[1] < 64:
        raise UserError(
            f"{measured.cut} of {measured.images} images have 16 bits in each of several channels, "
            f"of which the upper 8 are read, and these are {measured.most[1]} at most of 255: "
            "nearly all is lost. Save them with 8 bits in each channel"
        )
    white = next(white for white in WHITES if white >= measured.most[0])
    return dataclasses.replace(rendering, white=white) if measured.deep else rendering


def notes(measured: Measured, rendering: Rendering, *, automatic: bool) -> Iterator[str]:
    """What was inferred, a sentence each."""
    if measured.deep and automatic:
        place = WHITES.index(rendering.white)
        rest = measured.pixels[place] if place else measured.pixels[0]
        text = (
            f"{measured.deep} of {measured.images} images are grey with 16 bits, their greatest "
            f"value is {measured.most[0]}: {rendering.white} is taken for white; data.intensity "
            "says another value, data.window = (low, high) the whole range"
        )
        if 0 < rest <= _RARE * measured.pixels[0]:
            text += (
                f". But only {rest / measured.pixels[0]:.2g} of the pixels are above "
                f"{WHITES[place - 1]}: if these are marks or defects, data.window = "
                f"(0, {WHITES[place - 1]}) keeps the contrast of the picture"
            )
        yield text
    if measured.paged:
        yield (
            f"{measured.paged} of {measured.images} images have several pages or frames, of which "
            "the first is read; save each that is wanted as a file by itself"
        )
    if measured.transparent:
        other = "white" if rendering.background == "black" else "black"
        yield (
            f"{measured.transparent} of {measured.images} images have an alpha channel: what is "
            f"transparent becomes {rendering.background}; data.background = {other!r} makes it "
            f"{other}"
        )


def _measured_split(split: Images, cache_dir: Path, values: bool) -> Measured:
    with contextlib.suppress(UnreadableError):  # Decoding will say what is wrong.
        described = json.dumps([_FORMAT, values, state_of(split)])
        kept = cache_dir / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.values.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return _from_json(atomic.read_json(kept))
        with ThreadPoolExecutor(usable_cores(), thread_name_prefix="measure") as pool:
            parts = pool.map(lambda path: _measured_file(path, values), split.paths, chunksize=1)
            measured = sum(parts, Measured())
        with contextlib.suppress(OSError):  # Decoding will say that the cache cannot be written.
            cache_dir.mkdir(parents=True, exist_ok=True)
            atomic.write_json(kept, dataclasses.asdict(measured))
        return measured
    return Measured()


def _from_json(fields: dict[str, Any]) -> Measured:
    numbers = {name: fields[name] for name in ("images", "deep", "cut", "transparent", "paged")}
    low, high = fields["most"]
    return Measured(**numbers, most=(low, high), pixels=tuple(fields["pixels"]))


def _measured_file(path: Path, values: bool) -> Measured:
    one = Measured(images=1)
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except OSError:
        return one
    is_tiff = beginning[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    depth, colours = (beginning[24], beginning[25]) if _is_png(beginning) else (0, 0)
    may_have_pages = is_tiff or any(mark in beginning for mark in _ANIMATED)
    paged = int(may_have_pages and has_more_frames(path))
    one = dataclasses.replace(one, transparent=int(colours in (4, 6)), paged=paged)
    if not values or not (is_tiff or depth == 16):
        return one
    try:
        numbers, cut = stored_numbers(path)
    except UserError:
        return one
    if cut:
        return dataclasses.replace(one, cut=1, most=(0, int(numbers.max())))
    if numbers.dtype.kind not in "iu" or numbers.dtype.itemsize == 1 or numbers.min() < 0:
        return one
    above = (np.count_nonzero(numbers > white) for white in WHITES)
    pixels = (numbers.size, *map(int, above))
    return dataclasses.replace(one, deep=1, most=(int(numbers.max()), 0), pixels=pixels)


def _is_png(beginning: bytes) -> bool:
    return beginning.startswith(b"\x89PNG\r\n\x1a\n") and beginning[12:16] == b"IHDR"
