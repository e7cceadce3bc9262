"""From an image file to an array of one shape and meaning, whatever the file holds."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import FORMATS, reading, refuse_bombs

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

_SHRUNK = 2
"""A JPEG is shrunk while it is decoded to sides of at least this many times the size."""

_LONGEST = 1000
"""The longer side of an image that is cropped is at most this many times the shorter."""


def read_image(path: Path, size: int, resize: str = "squash") -> np.ndarray:
    """Decodes an image, turns it upright, makes it RGB and resizes it.

    Transparent pixels are put over black. 16-bit greyscale is scaled as a whole, 65535 to 255.
    Resizing is bilinear with antialiasing, the same as torchvision's on Pillow images.

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

    Returns:
      uint8 (size, size, 3).

    Raises:
      UserError: The file is missing, empty, no image, damaged, too large, or of floats.
    """
    _check_resize(resize)
    image, box = _read(path, size)
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
    return _read(path, None)[0]


def _read(path: Path, size: int | None) -> tuple[Image.Image, _Box]:
    """The upright RGB image, shrunk if it may be for `size`, and the part that is the picture."""
    if path.suffix.lower() == ".dcm":
        from medmerge_jax.images.dicom import read_dicom  # It needs an extra.

        image = read_dicom(path).convert("RGB")
        return image, (0, 0, *image.size)
    with reading(path, "an image that can be read", UnidentifiedImageError):
        try:
            opened = Image.open(path, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UserError(f"too many pixels to be a photograph ({error})") from error
        with opened as image:
            refuse_bombs(image.height, image.width)
            drafted = None
            if size is not None:  # Formats other than JPEG ignore this.
                drafted = image.draft(None, (_SHRUNK * size, _SHRUNK * size))
            image.load()
            return _upright(image, *(drafted[1][2:] if drafted else image.size))


def is_upright(image: Image.Image) -> bool:
    """Whether the metadata of an opened image asks for no turning."""
    return _orientation(image) not in _UPRIGHT


def _check_resize(resize: str) -> None:
    if resize not in RESIZES:
        raise UserError(f"resize {resize!r}: {' or '.join(RESIZES)} is wanted")


def _upright(image: Image.Image, width: float, height: float) -> tuple[Image.Image, _Box]:
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
    return _to_rgb(image), (left, top, left + width, top + height)


def _orientation(image: Image.Image) -> int:
    """How the picture lies in the file: see the Exif standard; 1 is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Damaged metadata says nothing about the pixels.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError(
            "the pixels are floating-point numbers, whose range is unknown; save it with 8 or 16 "
            "bits per channel"
        )
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _from_16_bits(values: np.ndarray) -> Image.Image:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UserError(f"the pixels range from {low} to {high}; 0 to 65535 is wanted")
    wide = values.astype(np.int32)
    wide += 128
    wide //= 257
    return Image.fromarray(wide.astype(np.uint8)).convert("RGB")


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
