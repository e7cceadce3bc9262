"""From an image file to an array of one shape and meaning, whatever the file holds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import FORMATS, is_dicom, reading, refuse_bombs
from medmerge_jax.models.preprocessing import DEEPEST, PLAIN, Rendering

RESIZES = ("squash", "crop")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The orientations that swap the sides, that bring the right edge of what is stored to the left, and
# that bring its bottom edge to the top.
_SWAPPING, _TO_THE_LEFT, _TO_THE_TOP = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)

_Box = tuple[float, float, float, float]

_BITS_PER_SAMPLE = 258
"""A tag of TIFF files."""

_EIGHT_BITS = ("L", "LA", "RGB", "RGBA")
"""Modes in which Pillow keeps the upper 8 bits of each channel."""

_MEND = (
    "say which values are black and white, data.window = (low, high), or save it with 8 or 16 "
    "bits per channel"
)

_PAGED = ("TIFF", "GIF", "WEBP", "PNG")
"""Formats whose files may have several pages or frames."""

_SHRUNK = 2
"""A JPEG is shrunk while it is decoded to sides of at least this many times the size."""

_LONGEST = 1000
"""The longer side of an image that is cropped is at most this many times the shorter."""


def read_image(
    path: Path, size: int, resize: str = "squash", rendering: Rendering = PLAIN
) -> np.ndarray:
    """Decodes an image, turns it upright, makes it RGB and resizes it.

    Of several pages or frames the first is read; a DICOM file of several is refused. Transparent
    pixels are put over the background. 16-bit greyscale is scaled as a whole, as the rendering
    says; NaN becomes black. Resizing is bilinear with antialiasing, the same as torchvision's on
    Pillow images.

    A JPEG with sides of four times the size or more is shrunk by 2, 4 or 8 while it is decoded
    (each block of 8 × 8 pixels from its low frequencies alone), as long as its sides stay at least
    twice the size; that takes about a third of the time. On photographs of 3000 × 2000 pixels the
    result then differs from a full decode's by 0.1 to 0.25 grey levels of 255 on average and 2 at
    most, by 6 at the sharp border of a fundus, by 19 on drawn rectangles. Shrinking further, to
    the size itself, would save another tenth and differ by two to four times as much.

    Args:
      path: A JPEG, PNG, TIFF, BMP, GIF or WebP file, whatever its suffix, or a `.dcm` file; of
        89 million pixels at most (`PIL.Image.MAX_IMAGE_PIXELS`).
      size: Height and width of the result in pixels.
      resize: "squash" to a square (torchvision's `Resize((size, size))`), or "crop": the shorter
        side to `size`, then the centre (`Resize(size)`, `CenterCrop(size)`).
      rendering: How more than 8 bits become 8, and what lies under transparent pixels.

    Returns:
      uint8 (size, size, 3).

    Raises:
      UserError: The file is missing, empty, no image, damaged, too large, without an opaque pixel,
        or of numbers that the rendering gives no grey level.
    """
    _check_resize(resize)
    image, box = _read(path, size, rendering)
    try:
        return np.asarray(_resize(image, box, size, resize))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def resize_pixels(pixels: np.ndarray, size: int, resize: str = "squash") -> np.ndarray:
    """The same for an image that is decoded already.

    Args:
      pixels: uint8 (h, w) or (h, w, 3).
      size: See `read_image`.
      resize: See `read_image`.

    Returns:
      uint8 (size, size, 3).

    >>> resize_pixels(np.array([[0, 100], [0, 100]], np.uint8), 1).tolist()
    [[[50, 50, 50]]]
    """
    _check_resize(resize)
    image = Image.fromarray(pixels).convert("RGB")
    return np.asarray(_resize(image, (0, 0, *image.size), size, resize))


def full_image(path: Path) -> Image.Image:
    """Decodes an image, turns it upright and makes it RGB; see `read_image`.

    Raises:
      UserError: The file is missing, empty, no image, damaged, too large, or of floats.
    """
    return _read(path, None, PLAIN)[0]


def stored_numbers(path: Path) -> tuple[np.ndarray, bool]:
    """The numbers in an image file that Pillow reads, as they are, without transparency.

    Returns:
      (h, w) of any integer or float type, or uint8 (h, w, channels); and whether the file has
      more than the 8 bits that are left of each channel.

    Raises:
      UserError: As of `read_image`.
    """
    with reading(path, "an image that can be read", UnidentifiedImageError), _open(path) as image:
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
        tiles: Any = getattr(image, "tile", ())
        deep = max(bits) > 8 or any(";16" in str(tile.args) for tile in tiles)
        cut = image.mode in _EIGHT_BITS and deep
        if image.mode not in _EIGHT_BITS and not _has_numbers(image):
            return np.zeros((1, 1), np.uint8), False
        values = np.asarray(image)
    return values[..., :-1] if image.mode in ("LA", "RGBA") else values, cut


def has_more_frames(path: Path) -> bool:
    """Whether a file has pages or frames behind the first, which is the one that is read.

    A photograph with a preview of itself has not; of a file that cannot be opened it is not known.
    """
    try:
        with _open(path) as image:
            return image.format in _PAGED and bool(getattr(image, "is_animated", False))
    except Exception:  # Decoders raise anything on damaged files; decoding will say it.
        return False


def _read(path: Path, size: int | None, rendering: Rendering) -> tuple[Image.Image, _Box]:
    """The upright RGB image, shrunk if it may be for `size`, and the part that is the picture."""
    if path.suffix.lower() != ".dcm":
        with reading(path, "an image that can be read", UnidentifiedImageError):
            try:
                with _open(path) as image:
                    drafted = None
                    if size is not None:  # Formats other than JPEG ignore this.
                        drafted = image.draft(None, (_SHRUNK * size, _SHRUNK * size))
                    image.load()
                    width, height = drafted[1][2:] if drafted else image.size
                    return _upright(image, width, height, rendering)
            except UnidentifiedImageError:
                if not is_dicom(path):
                    raise
    from medmerge_jax.images.dicom import read_dicom  # It needs an extra.

    whole = read_dicom(path, rendering.window).convert("RGB")
    return whole, (0, 0, *whole.size)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"too many pixels to be a photograph ({error})") from error
    try:
        refuse_bombs(image.height, image.width)
    except UserError:
        image.close()
        raise
    return image


def is_upright(image: Image.Image) -> bool:
    """Whether the metadata of an opened image asks for no turning."""
    return _orientation(image) not in _UPRIGHT


def _check_resize(resize: str) -> None:
    if resize not in RESIZES:
        raise UserError(f"resize {resize!r}: {' or '.join(RESIZES)} is wanted")


def _upright(
    image: Image.Image, width: float, height: float, rendering: Rendering
) -> tuple[Image.Image, _Box]:
    """The RGB image turned upright, and where its `width` × `height` are.

    These are less than the image's own where a shrunk JPEG's last pixels are incomplete.
    """
    orientation = _orientation(image)
    right, bottom = image.width - width, image.height - height
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if orientation in _SWAPPING:
        width, height, right, bottom = height, width, bottom, right
    left = right if orientation in _TO_THE_LEFT else 0.0
    top = bottom if orientation in _TO_THE_TOP else 0.0
    return _to_rgb(image, rendering), (left, top, left + width, top + height)


def _orientation(image: Image.Image) -> int:
    """How the picture lies in the file: see the Exif standard; 1 is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Damaged metadata says nothing about the pixels.
        return 1


def _has_numbers(image: Image.Image) -> bool:
    """Whether its mode is one of integers beyond 8 bits, or of floats."""
    return image.mode == "F" or image.mode.startswith("I")


def _to_rgb(image: Image.Image, rendering: Rendering) -> Image.Image:
    if _has_numbers(image):
        return Image.fromarray(_grey_levels(np.asarray(image), rendering)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        if colours.getchannel("A").getextrema()[1] != 255:
            raise UserError(
                "has no opaque pixel: all of it is transparent; replace the file, or save it "
                "without transparency"
            )
        opaque = Image.new("RGBA", image.size, rendering.background)
        opaque.alpha_composite(colours)
        return opaque.convert("RGB")
    return image.convert("RGB")


def _grey_levels(values: np.ndarray, rendering: Rendering) -> np.ndarray:
    """uint8 (h, w), of numbers (h, w) of any kind."""
    if rendering.window is not None:
        low, high = rendering.window
        shares = (values.astype(np.float64) - low) / (high - low)
        shares = np.where(np.isnan(shares), 0.0, np.clip(shares, 0.0, 1.0))
        return np.floor(shares * 255 + 0.5).astype(np.uint8)
    if values.dtype.kind == "f":
        raise UserError(f"the pixels are floating-point numbers, whose range is unknown; {_MEND}")
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > DEEPEST:
        raise UserError(f"the pixels range from {least} to {most}, not 0 to {DEEPEST}; {_MEND}")
    white = rendering.white
    if most > white:
        raise UserError(
            f"the pixels reach {most}, and {white} is white; set data.intensity to {most} or more, "
            f"or data.window = (0, {white}) to have them all white above"
        )
    # Rounded to the nearest level, and half up: 65535 has 257 values for each.
    wide = values.astype(np.int64) * 510
    wide += white
    wide //= 2 * white
    return wide.astype(np.uint8)


def _resize(image: Image.Image, box: _Box, size: int, resize: str) -> Image.Image:
    if resize == "squash":
        return image.resize((size, size), Image.Resampling.BILINEAR, box)
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) > _LONGEST * min(width, height):  # It would take all memory.
        raise UserError(
            f"one side is more than {_LONGEST} times the other, too much for resize 'crop'; "
            "replace the file, or use 'squash'"
        )
    longer = int(size * max(width, height) / min(width, height))
    resized = (longer, size) if width > height else (size, longer)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BILINEAR, box)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
