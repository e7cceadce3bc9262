"""From an image file to an array of one shape and meaning, whatever the file holds."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from medmerge_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Of the files that data sets are made of, in lower case."""

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

# What Pillow's decoders raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


def read_image(path: Path, size: int, resize: str = "squash") -> np.ndarray:
    """Decodes an image, turns it upright, makes it RGB and resizes it.

    Transparent pixels are put over black. 16-bit greyscale is scaled as a whole, 65535 to 255.
    Resizing is bilinear with antialiasing, the same as torchvision's on Pillow images.

    Args:
      path: A file that Pillow reads, or a `.dcm` file.
      size: Height and width of the result in pixels.
      resize: "squash" to a square (torchvision's `Resize((size, size))`), or "crop": the shorter
        side to `size`, then the centre (`Resize(size)`, `CenterCrop(size)`).

    Returns:
      uint8 (size, size, 3).

    Raises:
      UserError: The file is missing, empty, no image, damaged, too large, or of floats.
    """
    _check_resize(resize)
    return np.asarray(_resize(full_image(path), size, resize))


def resize_pixels(pixels: np.ndarray, size: int, resize: str = "squash") -> np.ndarray:
    """The same for an image that is decoded already.

    Args:
      pixels: uint8 (h, w) or (h, w, 3).
      size: See `read_image`.
      resize: See `read_image`.

    Returns:
      uint8 (size, size, 3).
    """
    _check_resize(resize)
    return np.asarray(_resize(Image.fromarray(pixels).convert("RGB"), size, resize))


def full_image(path: Path) -> Image.Image:
    """Decodes an image, turns it upright and makes it RGB; see `read_image`.

    Raises:
      UserError: The file is missing, empty, no image, damaged, too large, or of floats.
    """
    if path.suffix.lower() == ".dcm":
        from medmerge_jax.data.dicom import read_dicom  # pydicom is an extra

        return read_dicom(path).convert("RGB")
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(_upright(image))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: too many pixels to be a photograph ({error})") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: {_what_it_is(path)}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except _DAMAGE as error:
        raise UserError(f"{path}: cannot be decoded ({error}); replace the file") from error


def is_upright(image: Image.Image) -> bool:
    """Whether the metadata of an opened image asks for no turning."""
    return _orientation(image) is None


def _check_resize(resize: str) -> None:
    if resize not in RESIZES:
        raise UserError(f"resize {resize!r}: {' or '.join(RESIZES)} is wanted")


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        beginning = file.read(16)
    if not beginning:
        return "the file is empty (0 bytes); replace it"
    return f"is not an image that can be read (it begins with {beginning!r}); replace the file"


def _upright(image: Image.Image) -> Image.Image:
    method = _orientation(image)
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata; the pixels are fine
        return None


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
    wide = values.astype(np.int64)
    low, high = int(wide.min()), int(wide.max())
    if low < 0 or high > 65535:
        raise UserError(f"the pixels range from {low} to {high}; 0 to 65535 is wanted")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")


def _resize(image: Image.Image, size: int, resize: str) -> Image.Image:
    if resize == "squash":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    resized = (longer, size) if width > height else (size, longer)
    if min(width, height) != size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
