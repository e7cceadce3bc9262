"""What an image file may be, and what is said of one that is not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from medmerge_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Suffixes of the image files in data sets, in lower case."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
"""Pillow's names of the formats that are read, whatever the suffix. Others are not: an EPS file
is a program, which Pillow would have Ghostscript run."""


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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason}); replace the file") from error


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
