"""Which columns of a table hold the image, the labels, the split and the group."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Sequence

from medmerge_jax.data.sheets import Sheet
from medmerge_jax.data.splits import plain, split_of
from medmerge_jax.errors import UserError

_SUGGESTS_GROUP = re.compile(
    r"patient|subject|participant|person|individual|donor|mrn|case|stud(?:y|ies)|exam|accession|lesion"
)
_PERSON = re.compile("group|patient|subject|participant|person|pid|mrn")
_NO_GROUP = re.compile(
    r"age|sex|gender|weight|height|race|ethnic|view|position|type|status|count|date|time|desc"
    r"|location|size|history|smok|label|finding|diagnos|follow"
)
"""Of names of columns as `plain` makes them: what is said of a person is no name of one."""

_FLAGS = ("isvalid", "isval", "isvalidation", "istest", "istrain", "istraining")
_FOLDS = ("fold", "partition", "datasplit")

_MOST_CLASSES = 20
"""Different cells of a column that is proposed as the label."""
_LOOKED_AT = 50
"""Cells of a column that is proposed as the image."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
      image: Of the image's name.
      labels: One, or one for each class.
      split: None where splits are made.
      group: None where none is known.
      notes: What was inferred, a sentence each.
    """

    image: str
    labels: list[str]
    split: str | None
    group: str | None
    notes: list[str]


def choose_columns(
    sheet: Sheet,
    image: str,
    labels: Sequence[str],
    split: str,
    group: str,
    multilabel: bool,
    names_image: Callable[[str], bool],
) -> Columns:
    """Finds the columns whose names are empty among the usual ones.

    Args:
      sheet: The table.
      image: Name of the column, likewise the others.
      labels: See `image`.
      split: See `image`; "none" says that there is none.
      group: See `image`; "none" says that there is none.
      multilabel: Whether an image has any number of classes.
      names_image: Whether a cell names an image that is there, for proposals.

    Raises:
      UserError: A column is missing or may mean something else; it proposes what would be read.
    """
    image_column = sheet.column("image_column", image)
    label_columns = [sheet.named("label_columns", name) for name in labels]
    notes: list[str] = []
    if not label_columns:
        label_columns, notes = _labels(sheet, image_column, multilabel)
    if image_column is None or not label_columns:
        field = "label_columns" if image_column else "image_column"
        hint = _proposal(sheet, image_column, label_columns, names_image)
        raise sheet.undetected(field, hint)
    split_column = _split(sheet, split)
    taken = [image_column, *label_columns, *([split_column] if split_column else [])]
    group_column, asked = _group(sheet, group, taken)
    shown = repr(label_columns[0])
    if len(label_columns) > 1:
        shown = f"one of the {len(label_columns)} columns from {shown} to {label_columns[-1]!r}"
    notes = [
        f"the image is the column {image_column!r}, the label {shown}, the split "
        f"{'made' if split_column is None else repr(split_column)}, the group "
        f"{'not known' if group_column is None else repr(group_column)}; data.image_column, "
        "label_columns, split_column and group_column overrule it",
        *notes,
        *asked,
    ]
    return Columns(image_column, label_columns, split_column, group_column, notes)


def _labels(sheet: Sheet, image: str | None, multilabel: bool) -> tuple[list[str], list[str]]:
    """The label columns, none if they cannot be found, and sentences."""
    usual = [name for name in sheet.usual("label_columns") if name != image]
    if image and plain(image) == "imagename" and "target" in sheet.header:  # ISIC 2020
        usual = list(dict.fromkeys(["target", *usual]))
    if multilabel and usual and not holds_lists(sheet.values(usual[0])):
        return [], []
    if usual:
        others = ", ".join(map(repr, usual[1:]))
        hint = f"the label could be another column: {others}"
        return [sheet.named("label_columns", usual[0])], [hint] if others else []
    hot = [] if multilabel else _one_hot(sheet)
    never = [name for name in hot if all(_flag(cell) == 0 for cell in sheet.values(name))]
    classes = [name for name in hot if name not in never]
    notes = [f"the columns {', '.join(classes)} are read as classes: one is 1 in each row"]
    if never:
        notes.append(f"columns that are never 1 are no classes: {', '.join(never)}")
    return (classes, notes) if len(classes) > 1 else ([], [])


def holds_lists(cells: Sequence[str]) -> bool:
    """Whether the cells of the one column of several labels are lists of names, "Edema|Mass".

    Otherwise they are 0, 1 or nothing.
    """
    filled = [cell for cell in cells if cell.lower() not in ("", "nan", "-1", "-1.0")]
    return any("|" in cell for cell in filled) or all(_flag(cell) is None for cell in filled)


def _one_hot(sheet: Sheet) -> list[str]:
    """All columns of 0 and 1, if exactly one of them is 1 in each row."""
    names = [name for name in sheet.header if sheet.header.count(name) == 1]
    flags = {name: [_flag(cell) for cell in sheet.values(name)] for name in names}
    hot = {name: values for name, values in flags.items() if None not in values}
    sums = [sum(value or 0 for value in row) for row in zip(*hot.values(), strict=True)]
    return list(hot) if sums and set(sums) == {1} else []


def _flag(cell: str) -> int | None:
    """0 or 1; None if a cell is neither."""
    return {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}.get(cell.lower())


def _split(sheet: Sheet, given: str) -> str | None:
    if given:
        return sheet.column("split_column", given)
    for name in sheet.usual("split_column"):
        if sheet.strictly_usual("split_column", name):
            return sheet.named("split_column", name)
        cells = set(sheet.values(name))
        known = [cell for cell in cells if split_of(cell) is not None]
        if known and len(known) == len(cells):
            return sheet.named("split_column", name)
        if known or plain(name) in _FOLDS:
            raise _split_question(sheet, name)
    for name in sheet.header:
        if plain(name) in _FLAGS:
            raise _split_question(sheet, name)
    return None


def _split_question(sheet: Sheet, name: str) -> UserError:
    shown = ", ".join(map(repr, sorted(set(sheet.values(name)))[:5]))
    return UserError(
        f"{sheet.path}: is the column {name!r} the split? It holds {shown}; train, val and test, "
        "or usual spellings of these, are wanted. If it is not, data.split_column = 'none' has "
        "splits made, and the name of another column has that read"
    )


def _group(sheet: Sheet, given: str, taken: Sequence[str]) -> tuple[str | None, list[str]]:
    """The group column, and a sentence on what else could be one."""
    if given:
        return sheet.column("group_column", given), []
    usual = [name for name in sheet.usual("group_column") if name not in taken]
    # A person has studies and lesions: a split by persons is one by these too.
    for name in sorted(usual, key=lambda name: not _PERSON.match(plain(name))):
        if sheet.strictly_usual("group_column", name) or _repeats(sheet, name, few=False):
            return sheet.named("group_column", name), []
    return None, _other_groups(sheet, taken)


def _other_groups(sheet: Sheet, taken: Sequence[str]) -> list[str]:
    names = [
        name
        for name in sheet.header
        if name not in taken
        and _SUGGESTS_GROUP.search(plain(name))
        and not _NO_GROUP.search(plain(name))
        and _repeats(sheet, name)
    ]
    if not names:
        return []
    shown = " or ".join(f"data.group_column = {name!r}" for name in names)
    return [f"values repeat in what may name persons, studies or lesions: should it be {shown}?"]


def _repeats(sheet: Sheet, column: str, few: bool = True) -> bool:
    """Whether cells repeat, and, unless they may be few, name too many things for classes."""
    cells = [cell for cell in sheet.values(column) if cell]
    different = len(set(cells))
    many = different > 10 or different * 5 >= len(cells)
    return 1 < different < len(cells) and (few or many)


def _proposal(
    sheet: Sheet,
    image: str | None,
    labels: list[str],
    names_image: Callable[[str], bool],
) -> str:
    """The flags that would read the table, as far as they can be guessed."""
    flags = []
    if image is None:
        images = [name for name in sheet.header if _names_images(sheet, name, names_image)]
        image = images[0] if images else None
        flags += [f"--config.data.image_column={image}"] if image else []
    if not labels:
        labels = [
            name
            for name in sheet.header
            if name != image
            and not _SUGGESTS_GROUP.search(plain(name))
            and 1 < len(set(sheet.values(name))) <= min(_MOST_CLASSES, len(sheet.rows) - 1)
        ][:1]
        flags += [f"--config.data.label_columns=({json.dumps(labels[0])},)"] if labels else []
    return f". Perhaps {' '.join(map(shlex.quote, flags))}" if flags else ""


def _names_images(sheet: Sheet, column: str, names_image: Callable[[str], bool]) -> bool:
    cells = sheet.values(column)[:_LOOKED_AT]
    return all(cell and names_image(cell) for cell in cells)
