"""What `synthetic` draws: retinas and spots on skin, before a camera has seen them."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

Drawing: TypeAlias = Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]
"""Of labels (n,), size in pixels, view and what decides the rest: float32 (n, size, size, 3)."""

FINDINGS: dict[str, tuple[tuple[float, float], ...]] = {
    "drusen": ((0.5, 1), (0.5, 0)),
    "retinopathy": ((0, 0.5), (1, 0.5)),
    "retina": ((1, 1), (0, 1), (0, 0), (1, 0)),
}
"""How probably an image of each class has haemorrhages (of retinopathy), and drusen."""


class Spots(NamedTuple):
    """How lesions of a retina look: least and largest radius, flattening, colour."""

    smallest: float
    largest: float
    flat: float
    colour: tuple[float, float, float]


class Canvas:
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


def fundus(labels: np.ndarray, size: int, view: float, rng: np.random.Generator) -> np.ndarray:
    """Retinas (n, size, size, 3) of the grades 0 to 3."""
    return _retina(len(labels), size, view, rng, lambda canvas: _grades(canvas, labels))


def findings(kind: str) -> Drawing:
    """Draws retinas with or without haemorrhages and drusen, as the classes of the kind say."""
    shown = np.array(FINDINGS[kind])

    def draw(labels: np.ndarray, size: int, view: float, rng: np.random.Generator) -> np.ndarray:
        return _retina(len(labels), size, view, rng, lambda canvas: _found(canvas, shown[labels]))

    return draw


def _retina(
    n: int,
    size: int,
    view: float,
    rng: np.random.Generator,
    disease: Callable[["Canvas"], None],
) -> np.ndarray:
    canvas = Canvas(n, size, view, rng)
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
    disease(canvas)
    canvas.shade(canvas.inside(radius - 0.95))
    return canvas.pixels


def _grades(canvas: Canvas, labels: np.ndarray) -> None:
    # A patient's severity varies about the grade's, so that neighbouring grades overlap.
    severity = labels + canvas.rng.normal(0, 0.3, canvas.n)
    # Each has its mean number at grades 0 to 3, and how it looks.
    for means, look in (
        ((0.3, 5.0, 9.0, 12.0), Spots(0.025, 0.045, 0.2, (0.36, 0.05, 0.05))),
        ((0.0, 0.2, 4.5, 7.0), Spots(0.06, 0.11, 0.5, (0.38, 0.07, 0.06))),
        ((0.2, 0.3, 1.0, 8.0), Spots(0.035, 0.08, 0.4, (1.0, 0.92, 0.5))),
    ):
        _scatter(canvas, np.interp(severity, range(4), means), look)


def _found(canvas: Canvas, shares: np.ndarray) -> None:
    """`shares` (n, 2): how probably an image has haemorrhages, and drusen."""
    there = canvas.rng.uniform(size=shares.shape) < shares
    # A healthy eye may have a spot and an ill one few: no classifier is right on all images.
    number = np.where(there, canvas.rng.uniform(2, 8, shares.shape), 0.3)
    _scatter(canvas, number[:, 0], Spots(0.06, 0.12, 0.5, (0.36, 0.06, 0.05)))
    _scatter(canvas, number[:, 1], Spots(0.05, 0.10, 0.3, (0.95, 0.80, 0.45)))


def _scatter(canvas: Canvas, mean: np.ndarray, look: Spots) -> None:
    """Lays spots on each retina, `mean` (n,) of them on the average."""
    number = canvas.rng.poisson(mean)
    mask = np.zeros((canvas.n, canvas.size, canvas.size), np.float32)
    for index in range(int(number.max())):
        active = np.flatnonzero(number > index)
        angle = canvas.rng.uniform(0, 2 * np.pi, (4, canvas.n))[:, active]
        reach = 0.85 * np.sqrt(canvas.rng.uniform(0.02, 1, canvas.n))[active]
        radius = canvas.rng.uniform(look.smallest, look.largest, canvas.n)[active]
        x, y = reach * np.cos(angle[0]), reach * np.sin(angle[0])
        stretch = 1 + look.flat * np.stack([np.cos(angle[1]), np.sin(angle[1])])
        canvas.stamp(mask, active, (x, y, *(radius * stretch)))
    canvas.lay(0.9 * mask, canvas.colour(look.colour, 0.03))


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


def lesion(labels: np.ndarray, size: int, view: float, rng: np.random.Generator) -> np.ndarray:
    """Skin spots (n, size, size, 3): keratosis, melanoma, naevus, vascular."""
    canvas = Canvas(len(labels), size, view, rng)
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


def _blob(canvas: Canvas, irregularity: np.ndarray) -> np.ndarray:
    """Signed distance, about, to a closed curve with a wavy border."""
    x, y = canvas.x - canvas.uniform(-0.15, 0.15), canvas.y - canvas.uniform(-0.15, 0.15)
    angle = np.arctan2(y, x)
    border = np.ones_like(angle)
    for waves in range(2, 7):
        phase, height = canvas.uniform(0, 2 * np.pi), canvas.uniform(0.3, 1.3)
        border += irregularity * height * np.sin(waves * angle + phase) * 2 / waves**0.5
    return np.hypot(x, y) - canvas.uniform(0.35, 0.65) * border


def _skin_dots(canvas: Canvas, labels: np.ndarray, mask: np.ndarray) -> None:
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


def _hairs(canvas: Canvas) -> None:
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
