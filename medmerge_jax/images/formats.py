"""What an image file may be, and what is said of one that is not."""

from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Of the files that data sets are made of, in lower case."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
"""Pillow's names of what may be in a file, whatever its suffix. Not all that Pillow knows: it would
have Ghostscript run the program that an EPS file is."""


def what_it_is(path: Path, wanted: str) -> str:
    """What is wrong with a file that is not `wanted`, and what to do; the path goes before it."""
    with path.open("rb") as file:
        beginning = file.read(16)
    if not beginning:
        return "the file is empty (0 bytes); replace it"
    return f"is not {wanted} (it begins with {beginning!r}); replace the file"
