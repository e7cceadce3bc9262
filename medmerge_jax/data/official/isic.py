"""What the layouts of the ISIC challenges have in common."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from medmerge_jax.data.official.files import image_file, is_there
from medmerge_jax.data.official.tables import Row, by_id, one_hot, read_table
from medmerge_jax.errors import UserError

HAM10000_CITATION = """\
@article{tschandl2018ham10000,
  title = {The {HAM10000} dataset, a large collection of multi-source dermatoscopic images of
           common pigmented skin lesions},
  author = {Tschandl, Philipp and Rosendahl, Cliff and Kittler, Harald},
  journal = {Scientific Data},
  volume = {5},
  pages = {180161},
  year = {2018},
  doi = {10.1038/sdata.2018.161},
}
"""
"""Of the images that ISIC 2019 has from it, too."""

_SUFFIXES = (".jpg",)


def find(root: Path, *names: str) -> Path | None:
    """The first of the files or folders that is in `root`, or there in a folder of its own name.

    The challenges' archives hold such a folder, which some programs unpack into another one.
    """
    for name in names:
        for path in (root / name.removesuffix(".csv") / name, root / name):
            if path.exists():
                return path
    return None


def wanted(root: Path, *names: str, hint: str = "") -> Path:
    """As `find`; without any of them an error that names the first."""
    path = find(root, *names)
    if path is None:
        raise UserError(f"{root / names[0]}: is not there{hint}") from FileNotFoundError()
    return path


def read_one_hot(path: Path, classes: Sequence[str]) -> tuple[dict[str, Row], list[int]]:
    """Rows by image, and their classes, of a table with a column of 0 and 1 per class."""
    rows = by_id(path, read_table(path, ["image", *classes]), "image")
    return rows, [one_hot(path, row, classes) for row in rows.values()]


def read_lesions(path: Path, images: Iterable[str]) -> list[str]:
    """The lesion of each image, out of a table with the columns `image` and `lesion_id`.

    Raises:
      UserError: An image has no row.
    """
    rows = by_id(path, read_table(path, ["image", "lesion_id"]), "image")
    found = []
    for image in images:
        if image not in rows:
            raise UserError(f"{path}: has no row for the image {image!r}; download it again")
        found.append(lesion(rows[image]["lesion_id"], image))
    return found


def lesion(name: str, image: str) -> str:
    """The lesion's name; an image whose lesion is unknown is a lesion of its own."""
    return name or f"(unknown lesion of {image})"


def image_files(table: Path, rows: dict[str, Row], folders: Sequence[Path]) -> list[Path]:
    """The file of each row, in the first of the folders that has it."""
    return [_image_file(table, row, name, folders) for name, row in rows.items()]


def _image_file(table: Path, row: Row, name: str, folders: Sequence[Path]) -> Path:
    there = (folder for folder in folders if is_there(folder / f"{name}{_SUFFIXES[0]}"))
    return image_file(table, row.line, next(there, folders[0]) / name, _SUFFIXES)
