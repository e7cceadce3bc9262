"""What the layouts of the ISIC challenges have in common."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from medmerge_jax.data.sheets import Row, by_id, read_table
from medmerge_jax.errors import UserError


def find(root: Path, *names: str, folder: bool = False) -> Path | None:
    """The first of the files, or folders, that is in `root`, or there in a folder of its own name.

    The challenges' archives hold such a folder, which some programs unpack into another one.
    """
    for name in names:
        for path in (root / PurePath(name).stem / name, root / name):
            if path.is_dir() if folder else path.is_file():
                return path
    return None


def need(root: Path, *names: str, folder: bool = False, hint: str = "") -> Path:
    """As `find`; without any of them an error that names the first."""
    path = find(root, *names, folder=folder)
    if path is None:
        raise UserError(f"{root / names[0]}: is not there{hint}") from FileNotFoundError()
    return path


def read_one_hot(path: Path, classes: Sequence[str]) -> tuple[dict[str, Row], list[int]]:
    """Rows by image, and their classes, of a table with a column of 0 and 1 per class."""
    rows = by_id(read_table(path, ["image", *classes]), "image")
    return rows, [row.one_hot(classes) for row in rows.values()]


def read_lesions(path: Path, images: Iterable[str]) -> list[str]:
    """The lesion of each image, out of a table with the columns `image` and `lesion_id`.

    Raises:
      UserError: An image has no row.
    """
    rows = by_id(read_table(path, ["image", "lesion_id"]), "image")
    images = list(images)
    missing = next((image for image in images if image not in rows), None)
    if missing is not None:
        raise UserError(f"{path}: has no row for the image {missing!r}; download it again")
    return [lesion(rows[image]["lesion_id"], image) for image in images]


def lesion(name: str, image: str) -> str:
    """The lesion's name; an image whose lesion is unknown is a lesion of its own."""
    return name or f"(unknown lesion of {image})"


def image_files(rows: dict[str, Row], folders: Sequence[Path]) -> tuple[Path, ...]:
    """The `.jpg` file of each row, in the first of the folders that has it."""
    return tuple(
        row.image_file(*(folder / f"{name}.jpg" for folder in folders))
        for name, row in rows.items()
    )
