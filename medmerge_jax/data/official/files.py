"""The image files that tables name."""

from collections.abc import Sequence
from pathlib import Path

from medmerge_jax.data.official.tables import row_error


def is_there(path: Path) -> bool:
    """Whether there is such a file, of whatever name: too long, or with a zero byte."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def image_file(table: Path, line: int, path: Path, suffixes: Sequence[str] = ("",)) -> Path:
    """`path` with the first of the suffixes for which there is a file.

    Args:
      table: The file that names the image.
      line: Where in it.
      path: The image, without its extension if there are suffixes.
      suffixes: Extensions that it may have.

    Raises:
      UserError: There is none, or it is empty.
    """
    for suffix in suffixes:
        # Not `with_suffix`: a dot may be part of the name.
        candidate = path.with_name(path.name + suffix)
        if not is_there(candidate):
            continue
        if not candidate.stat().st_size:
            raise row_error(table, line, f"the image {candidate} is empty (0 bytes); replace it")
        return candidate
    shown = path.with_name(f"{path.name}{suffixes[0]}")
    others = f" (nor one with {', '.join(suffixes[1:])})" if len(suffixes) > 1 else ""
    raise row_error(table, line, f"there is no image {shown}{others}; add it, or remove the row")
