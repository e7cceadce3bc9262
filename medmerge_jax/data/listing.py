"""Images that are named on a command line: files, folders, tables."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from medmerge_jax.data.files import find_images
from medmerge_jax.data.sheets import read_any_sheet
from medmerge_jax.data.table import find_in_folder
from medmerge_jax.errors import UserError

TABLES = (".csv", ".tsv", ".txt")
"""Suffixes of tables, in lower case."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """Images in order.

    Attributes:
      ids: A name for each, without folders of the machine; of a table its cells.
      paths: Of the files; None where a table names one that is not there.
      notes: What was left out or inferred, a sentence each.
    """

    ids: list[str]
    paths: list[Path | None]
    notes: list[str]


def list_images(
    sources: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str] | None = None,
    image_column: str = "",
) -> Listing:
    """All images that are named.

    Args:
      sources: Image files, whatever their suffix; folders, which are searched to any depth; or one
        table with a row per image (.csv, .tsv or .txt), see `image_table`.
      root: Of a table, the folder of its images; by default that of the table.
      image_column: Of a table; by default the first of the usual ones.

    Returns:
      Ids are paths below the folder, or below the deepest one that holds all sources.

    Raises:
      UserError: A source is not there, a table is not alone or has no column of images, or there is
        no image at all.
    """
    given = [Path(source).expanduser() for source in sources]
    if lacking := [path for path in given if not path.exists()]:
        raise UserError(f"{lacking[0]}: there is no such file or folder")
    tables = [path for path in given if path.is_file() and path.suffix.lower() in TABLES]
    if tables and len(given) > 1:
        raise UserError(f"{tables[0]}: a table is to be given alone, without other images")
    if tables:
        return _of_table(tables[0], Path(root or tables[0].parent).expanduser(), image_column)
    if root is not None or image_column:
        raise UserError(
            f"a root and an image column are a table's ({', '.join(TABLES)}), and none is given"
        )
    paths, notes = list[Path](), list[str]()
    for path in given:
        found, left_out = find_images(path) if path.is_dir() else ([path], [])
        paths += found
        notes += left_out
    if not paths:
        raise UserError(f"{given[0]}: there is no image in it{f' ({notes[0]})' if notes else ''}")
    paths = list(dict.fromkeys(paths))
    folders = [path if path.is_dir() else path.parent for path in given]
    above = os.path.commonpath([folder.absolute() for folder in folders])
    ids = [path.absolute().relative_to(above).as_posix() for path in paths]
    return Listing(ids, [*paths], notes)


def _of_table(table: Path, root: Path, image_column: str) -> Listing:
    sheet = read_any_sheet(table)
    column = image_column or next(iter(sheet.usual("image_column")), "")
    if sheet.header.count(column) != 1:
        what = f"{sheet.header.count(column)} are called {column!r}" if column else "none is usual"
        raise UserError(
            f"{table}: one of its columns {sheet.header} has to name the images, and {what}; "
            "--image-column NAME says which it is"
        )
    ids = sheet.values(column)
    paths, notes = find_in_folder(sheet, column, root)
    return Listing(ids, paths, [*sheet.notes, f"the image is the column {column!r}", *notes])
