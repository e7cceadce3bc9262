"""Drawn images of eyes and of skin, for the quickstart and the tests. They resemble, no more."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

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
}
"""Class names and their proportions."""

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
    """Writes drawn images as `root/<split>/<class>/<number>.png`, or leaves those that are there.

    "fundus": a retina with optic disc and vessels; classes are grades 0 to 3, by the number and
    size of red dots, haemorrhages and exudates. "lesion": a spot on skin; classes by its border,
    texture and colours. The classes overlap: no classifier is right on all images.

    The folder appears whole or not at all. The same arguments give the same pixels.

    Args:
      root: The folder to make.
      kind: "fundus" or "lesion".
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
      kind: "fundus" or "lesion".
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
    scene = {"fundus": _fundus, "lesion": _lesion}[kind](labels, 2 * size, look.view, rng)
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
    for start in range(0, count, _CHUNK):
        chunk = labels[start : start + _CHUNK]
        for number, pixels in enumerate(draw(kind, chunk, size, rng, entropy[-1]), start):
            path = folder / names[labels[number]] / f"{number:05d}.png"
            Image.fromarray(pixels).save(path, compress_level=1)


def _labels(count: int, proportions: tuple[float, ...]) -> np.ndarray:
    """`count` labels in these proportions, at least one of each."""
    spare = count - len(proportions)
    ends = np.round(np.cumsum(proportions) * spare).astype(int)
    ends[-1] = spare
    return np.repeat(np.arange(len(proportions)), np.diff(ends, prepend=0) + 1)


class _Canvas:
    """(n, size, size) fields over x and y in [-1, 1], and colours (n, 3) laid over each other."""

    def __init__(self, n: int, size: int, view: float, rng: np.random.Generator):
        self.n, self.size, self.view, self.rng = n, size, view, rng
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
        self.y, self.x = axis[None, :, None] / view, axis[None, None, :] / view
        self.edge = 2.0 / size / view
        self.pixels = np.zeros((n, size, size, 3), np.float32)

    def uniform(self, low: float, high: float) -> np.ndarray:
        """(n, 1, 1), float32."""
        return self.rng.uniform(low, high, (self.n, 1, 1)).astype(np.float32)

    def colour(self, rgb: tuple[float, float, float], spread: float) -> np.ndarray:
        """(n, 1, 1, 3) around `rgb`."""
        shift = self.rng.normal(0, spread, (self.n, 1, 1, 3)) * (1, 0.6, 0.4)
        return (np.asarray(rgb) + shift).astype(np.float32)

    def texture(self, cells: int) -> np.ndarray:
        """Smooth noise (n, size, size) in about [-1, 1], with `cells` bumps across."""
        coarse = self.rng.uniform(-1.5, 1.5, (self.n, cells + 1, cells + 1)).astype(np.float32)
        position = np.linspace(0, cells, self.size, dtype=np.float32)
        left = np.minimum(position.astype(int), cells - 1)
        weight = position - left
        rows = coarse[:, left] * (1 - weight)[:, None] + coarse[:, left + 1] * weight[:, None]
        return rows[:, :, left] * (1 - weight) + rows[:, :, left + 1] * weight

    def inside(self, distance: np.ndarray, softness: np.ndarray | float = 0.0) -> np.ndarray:
        """1 where the signed distance is negative, with an edge of a pixel plus `softness`."""
        return np.clip(0.5 - distance / (self.edge + softness), 0, 1)

    def lay(self, mask: np.ndarray, colour: np.ndarray) -> None:
        """Blends a colour in."""
        mask = mask[..., None]
        self.pixels += mask * (colour - self.pixels)

    def shade(self, factor: np.ndarray) -> None:
        """Multiplies all channels."""
        self.pixels *= factor[..., None]

    def stamp(self, mask: np.ndarray, active: np.ndarray, ellipses: tuple[np.ndarray, ...]) -> None:
        """Adds an ellipse to each of the active masks, touching only the window around it.

        `ellipses` are the centres' x and y, the width and the height, (active,) each.
        """
        x, y, width, height = ellipses
        half = int(np.ceil(max(width.max(), height.max()) / self.edge)) + 1
        offsets = np.arange(-half, half + 1)
        scale, middle = self.size / 2 * self.view, self.size / 2
        column = np.floor(x * scale + middle).astype(int)[:, None] + offsets
        row = np.floor(y * scale + middle).astype(int)[:, None] + offsets
        dx = ((column + 0.5 - middle) / scale - x[:, None]) / width[:, None]
        dy = ((row + 0.5 - middle) / scale - y[:, None]) / height[:, None]
        reach = np.hypot(dx[:, None, :], dy[:, :, None])
        spot = self.inside((reach - 1) * np.minimum(width, height)[:, None, None])
        rows = np.clip(row, 0, self.size - 1)[:, :, None]
        columns = np.clip(column, 0, self.size - 1)[:, None, :]
        np.maximum.at(mask, (active[:, None, None], rows, columns), spot.astype(np.float32))


def _fundus(labels: np.ndarray, size: int, view: float, rng: np.random.Generator) -> np.ndarray:
    """Retinas (n, size, size, 3)."""
    canvas = _Canvas(len(labels), size, view, rng)
    radius = np.hypot(canvas.x, canvas.y)
    canvas.lay(np.ones((canvas.n, size, size), np.float32), canvas.colour((0.72, 0.36, 0.17), 0.08))
    canvas.shade(1.1 - 0.35 * radius**2 + 0.08 * canvas.texture(5))
    side = np.where(canvas.uniform(-1, 1) > 0, 1, -1).astype(np.float32)
    disc_x, disc_y = side * canvas.uniform(0.4, 0.6), canvas.uniform(-0.12, 0.12)
    macula = np.hypot(canvas.x + side * 0.15, canvas.y - disc_y)
    canvas.shade(1 - 0.3 * np.exp(-((macula / 0.2) ** 2)))
    vessels = _vessels(size, view, disc_x.ravel(), disc_y.ravel(), rng)
    canvas.lay(0.75 * vessels, canvas.colour((0.42, 0.12, 0.08), 0.03))
    disc = np.hypot(canvas.x - disc_x, (canvas.y - disc_y) / 1.15) - canvas.uniform(0.13, 0.19)
    canvas.lay(0.9 * canvas.inside(disc, 0.06), canvas.colour((0.98, 0.85, 0.55), 0.04))
    _retinal_lesions(canvas, labels)
    canvas.shade(canvas.inside(radius - 0.95))
    return canvas.pixels


def _retinal_lesions(canvas: _Canvas, labels: np.ndarray) -> None:
    # A patient's severity varies about the grade's, so that neighbouring grades overlap.
    severity = labels + canvas.rng.normal(0, 0.3, canvas.n)
    kinds = (
        # Each has its mean number at grades 0 to 3, least and largest radius, flattening, colour.
        ((0.3, 5.0, 9.0, 12.0), 0.025, 0.045, 0.2, (0.36, 0.05, 0.05)),
        ((0.0, 0.2, 4.5, 7.0), 0.06, 0.11, 0.5, (0.38, 0.07, 0.06)),
        ((0.2, 0.3, 1.0, 8.0), 0.035, 0.08, 0.4, (1.0, 0.92, 0.5)),
    )
    for means, smallest, largest, flat, rgb in kinds:
        number = canvas.rng.poisson(np.interp(severity, range(4), means))
        mask = np.zeros((canvas.n, canvas.size, canvas.size), np.float32)
        for index in range(int(number.max())):
            active = np.flatnonzero(number > index)
            angle = canvas.rng.uniform(0, 2 * np.pi, (4, canvas.n))[:, active]
            reach = 0.85 * np.sqrt(canvas.rng.uniform(0.02, 1, canvas.n))[active]
            spot = canvas.rng.uniform(smallest, largest, canvas.n)[active]
            x, y = reach * np.cos(angle[0]), reach * np.sin(angle[0])
            stretch = 1 + flat * np.stack([np.cos(angle[1]), np.sin(angle[1])])
            canvas.stamp(mask, active, (x, y, *(spot * stretch)))
        canvas.lay(0.9 * mask, canvas.colour(rgb, 0.03))


def _vessels(
    size: int, view: float, disc_x: np.ndarray, disc_y: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Random walks out of the optic disc, (n, size, size) in [0, 1]."""
    walks, steps = 6, 14
    n = len(disc_x)
    toward = np.where(disc_x > 0, np.pi, 0.0)[:, None]
    start = toward + np.array([-1.2, -0.8, -1.9, 1.2, 0.8, 1.9]) + rng.normal(0, 0.15, (n, walks))
    # Vessels leave upwards and downwards and bend around the macula.
    bend = np.array([0.09, 0.05, -0.05, -0.09, -0.05, 0.05])[:, None] * np.ones(steps)
    heading = start[..., None] + np.cumsum(bend + rng.normal(0, 0.16, (n, walks, steps)), axis=-1)
    x = disc_x[:, None, None] + 0.11 * np.cumsum(np.cos(heading), axis=-1)
    y = disc_y[:, None, None] + 0.11 * np.cumsum(np.sin(heading), axis=-1)
    points = (np.stack([x, y], axis=-1) * view + 1) * size / 2
    centres = (np.stack([disc_x, disc_y], axis=-1) * view + 1) * size / 2
    masks = np.empty((n, size, size), np.float32)
    for index in range(n):
        picture = Image.new("L", (size, size))
        pen = ImageDraw.Draw(picture)
        for walk in range(walks):
            path = [tuple(centres[index]), *map(tuple, points[index, walk])]
            middle = len(path) // 2
            pen.line(path[: middle + 1], fill=255, width=max(1, round(size * 0.03)))
            pen.line(path[middle:], fill=200, width=max(1, round(size * 0.017)))
        masks[index] = np.asarray(picture)
    return masks / 255


def _lesion(labels: np.ndarray, size: int, view: float, rng: np.random.Generator) -> np.ndarray:
    """Skin spots (n, size, size, 3): keratosis, melanoma, naevus, vascular."""
    canvas = _Canvas(len(labels), size, view, rng)
    canvas.lay(np.ones((canvas.n, size, size), np.float32), canvas.colour((0.86, 0.66, 0.55), 0.05))
    canvas.shade(1 + 0.04 * canvas.texture(12))

    def per_class(values: tuple[float, ...], spread: float) -> np.ndarray:
        drawn = np.asarray(values)[labels] + rng.normal(0, spread, canvas.n)
        return drawn.astype(np.float32)[:, None, None]

    distance = _blob(canvas, irregularity=np.abs(per_class((0.08, 0.16, 0.05, 0.08), 0.05)))
    mask = canvas.inside(distance, np.abs(per_class((0.02, 0.10, 0.16, 0.10), 0.05)))
    colours = np.array(
        [(0.50, 0.36, 0.27), (0.34, 0.21, 0.17), (0.45, 0.27, 0.19), (0.62, 0.24, 0.24)]
    )
    body = colours[labels][:, None, None] + canvas.colour((0, 0, 0), 0.08)
    mottle = np.abs(per_class((0.16, 0.22, 0.08, 0.12), 0.06))[..., None]
    shade, hue = canvas.texture(4), canvas.texture(4)
    tint = np.stack([shade + 0.5 * hue, 0.7 * shade, 0.6 * shade - 0.4 * hue], axis=-1)
    canvas.lay(0.92 * mask, body + mottle * tint)
    # The pigment network is a grid of brown lines, strongest in naevi.
    angle = canvas.uniform(0, np.pi)
    along = np.cos(angle) * canvas.x + np.sin(angle) * canvas.y
    across = np.cos(angle) * canvas.y - np.sin(angle) * canvas.x
    pitch = canvas.uniform(16, 24)
    network = np.maximum(np.sin(pitch * along), np.sin(pitch * across)) ** 2
    canvas.shade(1 - mask * network * np.clip(per_class((0.05, 0.18, 0.28, 0.0), 0.10), 0, 1))
    _skin_dots(canvas, labels, mask)
    _hairs(canvas)
    return canvas.pixels


def _blob(canvas: _Canvas, irregularity: np.ndarray) -> np.ndarray:
    """Signed distance, about, to a closed curve with a wavy border."""
    x, y = canvas.x - canvas.uniform(-0.15, 0.15), canvas.y - canvas.uniform(-0.15, 0.15)
    angle = np.arctan2(y, x)
    border = np.ones_like(angle)
    for waves in range(2, 7):
        phase, height = canvas.uniform(0, 2 * np.pi), canvas.uniform(0.3, 1.3)
        border += irregularity * height * np.sin(waves * angle + phase) * 2 / waves**0.5
    return np.hypot(x, y) - canvas.uniform(0.35, 0.65) * border


def _skin_dots(canvas: _Canvas, labels: np.ndarray, mask: np.ndarray) -> None:
    """Milia-like pale dots in keratoses, red lagoons in vascular lesions, few elsewhere."""
    kinds = (
        ((7.0, 1.0, 0.5, 0.5), 0.03, 0.06, (0.92, 0.84, 0.68)),
        ((0.3, 0.7, 0.3, 5.0), 0.06, 0.13, (0.60, 0.08, 0.16)),
    )
    for means, smallest, largest, rgb in kinds:
        number = canvas.rng.poisson(np.asarray(means)[labels])
        dots = np.zeros((canvas.n, canvas.size, canvas.size), np.float32)
        for index in range(int(number.max())):
            active = np.flatnonzero(number > index)
            x, y = canvas.rng.uniform(-0.5, 0.5, (2, canvas.n))[:, active]
            radius = canvas.rng.uniform(smallest, largest, canvas.n)[active]
            canvas.stamp(dots, active, (x, y, radius, radius))
        canvas.lay(0.7 * dots * mask, canvas.colour(rgb, 0.04))


def _hairs(canvas: _Canvas) -> None:
    """Up to four dark hairs, in half of the images."""
    size = canvas.size
    number = canvas.rng.integers(0, 5, canvas.n) * canvas.rng.integers(0, 2, canvas.n)
    ends = canvas.rng.uniform(0, size, (canvas.n, 4, 4))
    hairs = np.zeros((canvas.n, size, size), np.float32)
    for index in np.flatnonzero(number):
        picture = Image.new("L", (size, size))
        pen = ImageDraw.Draw(picture)
        for end in ends[index, : number[index]]:
            pen.line(tuple(end), fill=255, width=max(1, round(size * 0.012)))
        hairs[index] = np.asarray(picture)
    canvas.lay(hairs / 255 * 0.7, canvas.colour((0.15, 0.1, 0.08), 0.02))


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
