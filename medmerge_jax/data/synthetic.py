"""Drawn images of eyes and of skin, for the quickstart and the tests. They resemble, no more."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from medmerge_jax.data import drawing
from medmerge_jax.errors import UserError
from medmerge_jax.storage import atomic

_VERSION = 1
_CHUNK = 64
_MARKER = ".synthetic.json"


@dataclasses.dataclass(frozen=True)
class Appearance:
    """How the pictures of one clinic look, whatever they show.

    Attributes:
      cast: Gain of red, green and blue.
      illumination: Relative difference of brightness across the image.
      blur: Standard deviation in hundredths of the image size.
      noise: Standard deviation, with pixels in [0, 1].
      view: Size of what is seen relative to the image.
    """

    cast: tuple[float, float, float]
    illumination: float
    blur: float
    noise: float
    view: float


APPEARANCES = (
    Appearance((1.0, 1.0, 1.0), illumination=0.1, blur=0.0, noise=0.02, view=1.0),
    Appearance((1.05, 0.95, 0.85), illumination=0.2, blur=0.5, noise=0.02, view=1.0),
    Appearance((0.85, 1.05, 1.15), illumination=0.35, blur=1.2, noise=0.035, view=0.88),
    Appearance((1.1, 0.85, 1.05), illumination=0.5, blur=0.8, noise=0.05, view=1.12),
)
"""Of the clinics 0 to 3."""

KINDS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "fundus": (("0", "1", "2", "3"), (0.34, 0.24, 0.22, 0.20)),
    "lesion": (("keratosis", "melanoma", "naevus", "vascular"), (0.22, 0.22, 0.34, 0.22)),
    "drusen": (("drusen", "none"), (0.5, 0.5)),
    "retinopathy": (("none", "retinopathy"), (0.5, 0.5)),
    "retina": (("both", "drusen", "none", "retinopathy"), (0.25, 0.25, 0.25, 0.25)),
}
"""Class names, in the order of their folders, and their proportions."""

_DRAWINGS: dict[str, drawing.Drawing] = {
    "fundus": drawing.fundus,
    "lesion": drawing.lesion,
    **{kind: drawing.findings(kind) for kind in drawing.FINDINGS},
}

TITLES = {"fundus": {"0": "none", "1": "mild", "2": "moderate", "3": "severe"}}
"""What is to be seen of the disease, where the names of the classes are but numbers."""


def write_synthetic(
    root: str | os.PathLike[str],
    kind: str,
    counts: Mapping[str, int],
    *,
    size: int,
    seed: int = 0,
    appearance: int = 0,
) -> None:
    """Writes drawn images as `root/<split>/<class>/….png`, or leaves those that are there.

    "fundus": a retina with optic disc and vessels; classes are grades 0 to 3, by the number and
    size of red dots, haemorrhages and exudates. "lesion": a spot on skin; classes by its border,
    texture and colours. "retinopathy": a retina by its haemorrhages, whether it has drusen or not;
    "drusen": the other way round; "retina": by both. The classes overlap: no classifier is right on
    all images.

    The folder appears whole or not at all. The same arguments give the same pixels.

    Args:
      root: The folder to make.
      kind: One of `KINDS`.
      counts: Images in each split, {"train": …, "val": …, "test": …}.
      size: Height and width in pixels.
      seed: Of everything that is drawn.
      appearance: Index into `APPEARANCES`: colours, light, sharpness, noise and field of view.

    Raises:
      UserError: An unknown kind or appearance, fewer images than classes in a split, or `root`
        holds something else.
    """
    root = Path(root)
    _check(kind, counts, size, appearance)
    marker = {
        "version": _VERSION,
        "kind": kind,
        "counts": dict(counts),
        "size": size,
        "seed": seed,
        "appearance": appearance,
    }
    if root.exists():
        _check_same(root, marker)
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    try:
        temporary.chmod(0o755)
        for index, (split, count) in enumerate(counts.items()):
            _write_split(temporary / split, kind, count, size, (seed, index, appearance))
        (temporary / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        try:
            temporary.rename(root)
        except OSError:
            if not root.exists():
                raise
            _check_same(root, marker)  # Another process has made the folder meanwhile.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def draw(
    kind: str, labels: np.ndarray, size: int, rng: np.random.Generator, appearance: int = 0
) -> np.ndarray:
    """Draws an image for each label, at twice the size, and halves it.

    Args:
      kind: One of `KINDS`.
      labels: int (n,), indices into the classes of the kind.
      size: Height and width in pixels.
      rng: Decides everything else.
      appearance: Index into `APPEARANCES`.

    Returns:
      uint8 (n, size, size, 3).

    >>> draw("lesion", np.array([0, 2]), 32, np.random.default_rng(0)).shape
    (2, 32, 32, 3)
    """
    look = APPEARANCES[appearance]
    scene = _DRAWINGS[kind](labels, 2 * size, look.view, rng)
    scene = scene.reshape(len(labels), size, 2, size, 2, 3).mean(axis=(2, 4), dtype=np.float32)
    return _photograph(scene, look, rng)


def _check(kind: str, counts: Mapping[str, int], size: int, appearance: int) -> None:
    if kind not in KINDS:
        raise UserError(f"synthetic kind {kind!r}: one of {', '.join(KINDS)} is wanted")
    if not 0 <= appearance < len(APPEARANCES):
        raise UserError(f"synthetic appearance {appearance}: 0 to {len(APPEARANCES) - 1} is wanted")
    if size < 8:
        raise UserError(f"synthetic size {size}: 8 pixels or more are wanted")
    classes = len(KINDS[kind][0])
    if not counts or min(counts.values()) < classes:
        raise UserError(
            f"synthetic counts {dict(counts)}: at least one image per class, {classes}, is wanted "
            "in every split"
        )


def _check_same(root: Path, marker: dict[str, object]) -> None:
    try:
        existing = atomic.read_json(root / _MARKER)
    except (OSError, ValueError):
        existing = None
    if existing != marker:
        what = f"synthetic images of other settings, {existing}" if existing else "something else"
        raise UserError(
            f"{root}: holds {what}; {marker} is wanted. Remove it or name another folder"
        )


def _write_split(folder: Path, kind: str, count: int, size: int, entropy: tuple[int, ...]) -> None:
    names, proportions = KINDS[kind]
    for name in names:
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng([list(KINDS).index(kind), *(part % 2**32 for part in entropy)])
    labels = rng.permutation(_labels(count, proportions))
    # Small retinas look alike: under one name the audit takes those of two sets for copies.
    prefix = f"{kind}{entropy[0]}-" if kind in drawing.FINDINGS else ""
    for start in range(0, count, _CHUNK):
        chunk = labels[start : start + _CHUNK]
        for number, pixels in enumerate(draw(kind, chunk, size, rng, entropy[-1]), start):
            path = folder / names[labels[number]] / f"{prefix}{number:05d}.png"
            Image.fromarray(pixels).save(path, compress_level=1)


def _labels(count: int, proportions: tuple[float, ...]) -> np.ndarray:
    """`count` labels in these proportions, at least one of each."""
    spare = count - len(proportions)
    ends = np.round(np.cumsum(proportions) * spare).astype(int)
    ends[-1] = spare
    return np.repeat(np.arange(len(proportions)), np.diff(ends, prepend=0) + 1)


def _photograph(scene: np.ndarray, look: Appearance, rng: np.random.Generator) -> np.ndarray:
    """uint8 images of what is there, as this clinic's camera takes them."""
    n, size = scene.shape[:2]
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    slope = np.cos(angle) * axis[None, :, None] + np.sin(angle) * axis[None, None, :]
    light = (1 + look.illumination / 2 * slope) * rng.normal(1, 0.05, (n, 1, 1))
    image = scene * light.astype(np.float32)[..., None] * np.array(look.cast, np.float32)
    if look.blur:
        sigma = look.blur / 100 * size
        image = ndimage.gaussian_filter(image, (0, sigma, sigma, 0), truncate=3)
    image = image + look.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
