"""What an image file may be, and what is said of one that is not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from medmerge_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
"""Suffixes of the image files in data sets, in lower case."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
"""Pillow's names of the formats that are read, whatever the suffix. Others are not: an EPS file
is a program, which Pillow would have Ghostscript run."""


_PREAMBLE = 128
"""Bytes of a DICOM file that may be anything."""


@contextlib.contextmanager
def reading(path: Path, expected: str, unrecognised: type[Exception]) -> Iterator[None]:
    """Whatever is wrong with a file is a UserError that names it and says what to do.

    Args:
      path: The file that is read inside.
      expected: What it should be.
      unrecognised: Raised inside where it is something else.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; {expected} is wanted") from error
    except PermissionError as error:
        raise UserError(
            f"{path}: may not be read ({error.strerror}); give yourself the right to, as with "
            "chmod u+r"
        ) from error
    except unrecognised as error:
        with path.open("rb") as file:
            beginning = file.read(16)
        what = f"is not {expected} (it begins with {beginning!r}); replace the file"
        if not beginning:
            what = "the file is empty (0 bytes); replace it"
        raise UserError(f"{path}: {what}") from error
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise anything on damaged files.
        if isinstance(error, OSError) and error.errno:  # The disk's, not the decoder's.
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason}); replace the file") from error


def is_dicom(path: Path) -> bool:
    """Whether a file begins as a DICOM file does, whatever its suffix."""
    with path.open("rb") as file:
        return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def refuse_bombs(height: int, width: int) -> None:
    """To be asked before any pixel is decoded: a few bytes of header can ask for any memory.

    Raises:
      UserError: There are more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise UserError(
            f"has {height} × {width} pixels, too many pixels for one image (at most {limit} are "
            "read); save it smaller"
        )
