"""What an image file may be, and what is said of one that is not."""

from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Suffixes of the image files in data sets, in lower case."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
"""Pillow's names of the formats that are read, whatever the suffix. Others are not: an EPS file
is a program, which Pillow would have Ghostscript run."""


def what_it_is(path: Path, expected: str) -> str:
    """What is wrong with a file that is not `expected`, and what to do, to follow the path."""
    with path.open("rb") as file:
        beginning = file.read(16)
    if not beginning:
        return "the file is empty (0 bytes); replace it"
    return f"is not {expected} (it begins with {beginning!r}); replace the file"
