"""Hashes by which an image is recognised in another split or in another data set.

Two images count as the same if at most `NEAR` of the 256 bits of their perceptual hashes differ.
`benchmarks/image_hashes.py` on 13,269 dermoscopic images and chest X-rays: of 41.8 million pairs of
other patients or lesions three are within, and are indeed copies; the next differ in 38 bits. JPEG
at quality 75, resizing by 0.8 or 1.25 and 10 % of brightness change 25 bits at most; of images
with 2 % of their sides cut off 99.9 % are found, mirrored or turned ones never. (With the usual
64 bits X-rays are too much alike to be told apart.)
"""

import dataclasses
import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy import fft

from medmerge_jax.data.dataset import DataSet
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.errors import UserError
from medmerge_jax.runtime.cpu import usable_cores
from medmerge_jax.storage import atomic
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.weights.layout import HASHES_FILE

NEAR = 32
"""Bits of 256 in which the hashes of two copies of a picture differ at most."""

_SAME_NAME = 80
"""Likewise for images of one name, of which there are few enough pairs to allow more."""

# Nobody gives these names twice: the numbers of the ISIC archive, and UUIDs.
_UNIQUE_NAME = re.compile(r"ISIC_\d{7}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_SUFFIX = re.compile(r"(_downsampled)?\.(jpe?g|png|dcm|tiff?|bmp)$|_downsampled$", re.IGNORECASE)

NAMELESS = "an image without a name"
"""In examples: of those that a model directory has hashes of."""

_INHERITED = "parent"
"""In place of a split: an image that a parent of the model was trained on."""

_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_THUMBNAIL, _FREQUENCIES = 32, 16
_CHUNK = 32
_BLOCK = (256, 4096)
_EXAMPLES = 5
_LEVELS = 4
"""Folders between a weight file and the run directory of its comparison, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageHashes:
    """What is left of images when they are to be recognised.

    Attributes:
      ids: Of the images, as in the data set; empty where a model directory tells no names.
      splits: "train", "val" or "test"; "parent" for images that a parent was trained on.
      perceptual: uint64 (n, 4), see `perceptual_hashes`.
      exact: uint64 (n, 2), half of the sha256 of the pixels.
      scale: Size and resize of the pixels; `exact` means nothing between different ones.
    """

    ids: tuple[str, ...]
    splits: tuple[str, ...]
    perceptual: np.ndarray
    exact: np.ndarray
    scale: str

    def __post_init__(self) -> None:
        if len(self.splits) != len(self):
            raise ValueError(f"{len(self.splits)} splits of {len(self)} images")
        for array, columns in ((self.perceptual, 4), (self.exact, 2)):
            if array.dtype != np.uint64 or array.shape != (len(self), columns):
                raise ValueError(f"hashes of {len(self)} images are {array.dtype} {array.shape}")

    def __len__(self) -> int:
        return len(self.ids)

    def _take(self, mask: np.ndarray) -> "ImageHashes":
        return ImageHashes(
            tuple(itertools.compress(self.ids, mask)),
            tuple(itertools.compress(self.splits, mask)),
            self.perceptual[mask],
            self.exact[mask],
            self.scale,
        )

    def of(self, *splits: str) -> "ImageHashes":
        """The images of these splits."""
        return self._take(np.isin(np.asarray(self.splits, str), splits))

    def without(self, rows: Mapping[str, np.ndarray]) -> "ImageHashes":
        """Without some images: bool (n,) for each split that loses images, those it loses."""
        keep = np.ones(len(self), bool)
        for name, leave in rows.items():
            keep[np.asarray(self.splits, str) == name] = ~leave
        return self._take(keep)

    def training(self) -> "ImageHashes":
        """The images that the model or a model before it was trained on."""
        return self.of("train", _INHERITED)

    def inheriting(self, parents: Sequence["ImageHashes"]) -> "ImageHashes":
        """With the images that the parents, and theirs, were trained on."""
        inherited = [parent.training() for parent in parents]
        everything = [self, *inherited]
        # Digests of another scale are zeroed: they would be equal by mistake only.
        exact = [one.exact * np.uint64(one.scale == self.scale) for one in everything]
        return ImageHashes(
            tuple(example for one in everything for example in one.ids),
            (*self.splits, *(_INHERITED for one in inherited for _ in one.ids)),
            np.concatenate([one.perceptual for one in everything]),
            np.concatenate(exact),
            self.scale,
        )

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes a `.npz` file; `fingerprint` of the data is for `find_hashes`."""
        arrays: dict[str, Any] = {
            "ids": np.asarray(self.ids, str),
            "splits": np.asarray(self.splits, str),
            "perceptual": self.perceptual,
            "exact": self.exact,
            "scale": np.asarray(self.scale),
            "fingerprint": np.asarray(fingerprint),
        }
        atomic.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def perceptual_hashes(pixels: np.ndarray) -> np.ndarray:
    """Hashes that differ in few bits between copies of one picture (pHash, with 256 bits).

    A bit for each of the 16 × 16 lowest frequencies of the 32 × 32 grey image: whether its
    coefficient in the discrete cosine transform is above the median of all.

    Args:
      pixels: uint8 (n, h, w, 3) or (n, h, w), from any squares of 16 pixels or more.

    Returns:
      uint64 (n, 4).

    >>> pictures = np.random.default_rng(0).integers(0, 200, (2, 64, 64, 3), np.uint8)
    >>> brighter = pictures + np.uint8(20)
    >>> np.bitwise_count(perceptual_hashes(pictures) ^ perceptual_hashes(brighter)).sum(axis=1) < 9
    array([ True,  True])
    """
    down, across = _resampler(pixels.shape[1]), _resampler(pixels.shape[2])
    values = pixels.astype(np.float32)
    if pixels.ndim == 4:
        flat = values.reshape(*values.shape[:2], -1)
        values = (down @ flat).reshape(len(values), _THUMBNAIL, -1, pixels.shape[3])
        thumbnails = (values @ _GREY) @ across.T
    else:
        thumbnails = down @ values @ across.T
    spectrum = fft.dctn(thumbnails, axes=(1, 2), norm="ortho")[:, :_FREQUENCIES, :_FREQUENCIES]
    # Coefficients that are rounding errors only must not become bits.
    coefficients = np.round(spectrum.reshape(len(pixels), -1), 2)
    bits = coefficients > np.median(coefficients, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)


def _resampler(size: int) -> np.ndarray:
    """(32, size): bilinear with antialiasing."""
    scale = size / _THUMBNAIL
    centres = (np.arange(_THUMBNAIL) + 0.5) * scale - 0.5
    distances = np.abs(np.arange(size) - centres[:, None]) / max(scale, 1.0)
    weights = np.clip(1 - distances, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def hash_images(dataset: DataSet, pixels: Mapping[str, np.ndarray], resize: str) -> ImageHashes:
    """Hashes of all images, on all usable cores.

    Args:
      dataset: The data set.
      pixels: uint8 (n, h, w, 3) of each of its splits; may be mapped from the disk.
      resize: How the pixels were made, see `images.read_image`.
    """

    def work(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(rows)  # The file is read once, although the pixels are used twice.
        digests = b"".join(hashlib.sha256(row.tobytes()).digest()[:16] for row in rows)
        return perceptual_hashes(rows), np.frombuffer(digests, np.uint64).reshape(-1, 2)

    names = [name for name in SPLITS if name in dataset.splits]
    with ThreadPoolExecutor(usable_cores()) as pool:
        chunks = (
            pixels[name][start : start + _CHUNK]
            for name in names
            for start in range(0, len(dataset.splits[name]), _CHUNK)
        )
        results = list(pool.map(work, chunks))
    return ImageHashes(
        tuple(example for name in names for example in dataset.splits[name].ids),
        tuple(name for name in names for _ in dataset.splits[name].ids),
        np.concatenate([perceptual for perceptual, _ in results]),
        np.concatenate([exact for _, exact in results]),
        f"{next(iter(pixels.values())).shape[1]} px, {resize}",
    )


def nearest(hashes: np.ndarray, others: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of the other hashes to each hash, in bounded memory.

    Args:
      hashes: uint64 (n, 4).
      others: uint64 (m, 4).
      limit: Largest distance of interest, in bits; less than 192.

    Returns:
      Index into `others` int (n,), -1 where none is within the limit, and distance int (n,).
    """
    index, distance = np.full(len(hashes), -1), np.full(len(hashes), limit + 1)
    corners = (range(0, len(one), step) for one, step in zip((hashes, others), _BLOCK, strict=True))
    for top, start in itertools.product(*corners):
        ours, theirs = hashes[top : top + _BLOCK[0]], others[start : start + _BLOCK[1]]
        # Three of four words are enough to leave few pairs, and their sum fits into a byte.
        partial = np.bitwise_count(ours[:, None, 0] ^ theirs[None, :, 0])
        partial += np.bitwise_count(ours[:, None, 1] ^ theirs[None, :, 1])
        partial += np.bitwise_count(ours[:, None, 2] ^ theirs[None, :, 2])
        left, right = np.nonzero(partial <= limit)
        if not len(left):
            continue
        bits = np.bitwise_count(ours[left] ^ theirs[right]).sum(axis=1, dtype=np.int64)
        order = np.lexsort((right, bits, left))
        left, right, bits = left[order], right[order], bits[order]
        first = np.flatnonzero(np.diff(left, prepend=-1))
        left, right, bits = left[first] + top, right[first] + start, bits[first]
        better = bits < distance[left]
        index[left[better]], distance[left[better]] = right[better], bits[better]
    return index, distance


@dataclasses.dataclass(frozen=True, eq=False)
class Overlap:
    """Which images of a set are in another set too.

    Attributes:
      by_id: bool (n,): an image of that name is, and shows the same unless the name is one that
        nobody gives twice.
      by_hash: bool (n,): an image is that looks the same.
      exact: bool (n,): an image of equal pixels is.
      match: int (n,): an image that matches; -1 without.
    """

    by_id: np.ndarray
    by_hash: np.ndarray
    exact: np.ndarray
    match: np.ndarray

    @property
    def any(self) -> np.ndarray:
        """Bool (n,): any of these."""
        return self.by_id | self.by_hash | self.exact

    def summary(self, ours: ImageHashes, others: ImageHashes) -> dict[str, Any]:
        """Counts and a few examples, for JSON."""
        rows = np.flatnonzero(self.any)[:_EXAMPLES]
        return {
            "images": int(self.any.sum()),
            "by_id": int(self.by_id.sum()),
            "by_hash": int(self.by_hash.sum()),
            "exact": int(self.exact.sum()),
            "examples": [
                [ours.ids[row], others.ids[self.match[row]] or NAMELESS] for row in rows.tolist()
            ],
        }


def find_overlap(ours: ImageHashes, others: ImageHashes, *, names: bool = True) -> Overlap:
    """Which of our images are among the others.

    Args:
      ours: n images.
      others: m images.
      names: Whether a common name counts; not inside a data set, where names are unique.
    """
    match, _ = nearest(ours.perceptual, others.perceptual, NEAR)
    by_hash = match >= 0
    exact = np.zeros(len(ours), bool)
    if ours.scale == others.scale:
        places = {tuple(pair): row for row, pair in enumerate(others.exact.tolist())}
        for row, pair in enumerate(ours.exact.tolist()):
            if tuple(pair) in places:
                exact[row], match[row] = True, places[tuple(pair)]
    by_id = np.zeros(len(ours), bool)
    if names:
        homes = defaultdict(list)
        for row, example in enumerate(others.ids):
            homes[_name(example)].append(row)
        for row, example in enumerate(ours.ids):
            name = _name(example)
            for home in homes.get(name, ()):
                bits = int(np.bitwise_count(ours.perceptual[row] ^ others.perceptual[home]).sum())
                if bits <= _SAME_NAME or _UNIQUE_NAME.fullmatch(name):
                    by_id[row] = True
                    match[row] = home if match[row] < 0 else match[row]
    return Overlap(by_id, by_hash, exact, match)


def _name(example: str) -> str:
    return _SUFFIX.sub("", example.replace("\\", "/").rpartition("/")[2])


def find_hashes(weight_file: Path, fingerprint: str | None) -> ImageHashes | None:
    """What a run left of the images that a model was trained on, above or in the model's folder.

    Args:
      weight_file: Of the model.
      fingerprint: Of its data, from its card: another model's images are not taken.

    Raises:
      UserError: The file is there and cannot be read.
    """
    own, *above = weight_file.absolute().parents[:_LEVELS]
    for folder in (*above, own) if fingerprint else ():  # a run's have names, a model's have none
        path = folder / HASHES_FILE
        if path.is_file():
            hashes, of_data = load_hashes(path)
            if of_data == fingerprint:
                return hashes
    return None


def load_hashes(path: Path) -> tuple[ImageHashes, str]:
    """The hashes of a file and the fingerprint of the data.

    Raises:
      UserError: The file cannot be read.
    """
    try:
        arrays = read_npz(path)
        if "ids" not in arrays:
            return _without_names(arrays["perceptual"]), str(arrays["fingerprint"])
        hashes = ImageHashes(
            tuple(arrays["ids"].tolist()),
            tuple(arrays["splits"].tolist()),
            arrays["perceptual"],
            arrays["exact"],
            str(arrays["scale"]),
        )
        if not arrays["ids"].dtype.kind == arrays["splits"].dtype.kind == "U":
            raise ValueError("the names are no texts")
        return hashes, str(arrays["fingerprint"])
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); it holds the hashes of a parent's images. Delete "
            "it to do without the comparison with them"
        ) from error


def _without_names(perceptual: np.ndarray) -> ImageHashes:
    """Of training images, as a model directory has them, see `Model.image_hashes`."""
    count, exact = len(perceptual), np.zeros((len(perceptual), 2), np.uint64)
    return ImageHashes(("",) * count, ("train",) * count, perceptual, exact, "")
