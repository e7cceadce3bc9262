"""A model on another data set: which of its classes are which of the data set's."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from scipy.special import logsumexp

from medmerge_jax.data.dataset import DataSet, Split
from medmerge_jax.errors import UserError, nearest
from medmerge_jax.evaluation.predictions import Predictions, number_groups

UNMAPPED = ("error", "drop")

ClassMap: TypeAlias = Mapping[str, str | Sequence[str]]
"""The model's class, or its classes, of each of the data set's classes."""


@dataclasses.dataclass(frozen=True)
class ClassMatch:
    """The classes that a model and a data set have in common, as `match_classes` finds them.

    Attributes:
      classes: Names of what is evaluated, in the data set's order.
      outputs: Of each, the model's outputs, whose probabilities are summed.
      labels: Of each, the data set's labels, which count as one.
      multilabel: Whether an image has any number of the classes, instead of exactly one.
      ordinal: Whether the order of what is evaluated means something.
      notes: What is to be said of it, a sentence each.
    """

    classes: tuple[str, ...]
    outputs: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    multilabel: bool
    ordinal: bool
    notes: tuple[str, ...]

    def known(self, images: Split) -> tuple[np.ndarray, np.ndarray]:
        """Labels, indices into `classes`, of the images whose class is one of them; and their rows.

        Raises:
          UserError: There are none.
        """
        if self.multilabel:
            columns = [first for first, *_ in self.labels]
            return images.labels[:, columns], np.arange(len(images))
        of_data = [label for those in self.labels for label in those]
        numbers = np.full(1 + max(*of_data, *images.labels.tolist()), -1, np.int32)
        for number, those in enumerate(self.labels):
            numbers[list(those)] = number
        labels = numbers[images.labels]
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise UserError(f"no image is of any of the classes {list(self.classes)}")
        return labels[rows], rows

    def predictions(self, logits: np.ndarray, images: Split) -> Predictions:
        """What the model says of the images whose class it knows; the others are left out.

        Probabilities of several outputs that are one class are summed, and those of outputs that
        are none of the classes are left out of the whole: the softmax is over the others. Of
        several labels per image, outputs and labels without a partner are left out.

        Args:
          logits: (n, outputs) of the model.
          images: Its n images, with the data set's labels.

        Raises:
          UserError: No image is of any of the classes.
        """
        labels, rows = self.known(images)
        parts = [
            logits[:, those[0]] if len(those) == 1 else _log_of_sum(logits[:, list(those)])
            for those in self.outputs
        ]
        groups = number_groups(images.groups)
        return Predictions(
            np.stack(parts, axis=1)[rows],
            labels,
            self.multilabel,
            tuple(images.ids[row] for row in rows.tolist()),
            self.classes,
            self.ordinal,
            groups=None if groups is None else groups[rows],
        )


def match_classes(
    outputs: Sequence[str] | int,
    dataset: DataSet,
    multilabel: bool = False,
    classes: ClassMap | None = None,
    unmapped: str = "error",
) -> ClassMatch:
    """Which of a model's outputs are which of a data set's classes.

    Without a mapping, those of one name belong together, in any order; where a model does not say
    its classes' names, those of one number, if there are as many. In a mapping, the outputs of a
    model that says no names are called "0", "1" and so on; several of its classes may be one of the
    data set's, {"malignant": ["MEL", "BCC"]}, and several of the data set's one of its,
    {"1": "DR", "2": "DR"}.

    Args:
      outputs: Names of the model's classes in order, or how many it has.
      dataset: The data set.
      multilabel: Whether the model gives an image any number of classes.
      classes: The mapping; None or empty: by name.
      unmapped: Classes of either that have no partner are an "error", or left out ("drop").

    Raises:
      UserError: Classes do not fit; names them.
    """
    if multilabel != dataset.multilabel:
        kinds = ("one class per image", "several labels per image")
        raise UserError(
            f"the model gives {kinds[multilabel]}, and {dataset.name} has "
            f"{kinds[dataset.multilabel]}; only models and data of one kind can be compared"
        )
    names = tuple(map(str, range(outputs))) if isinstance(outputs, int) else tuple(outputs)
    notes = []
    if classes:
        pairs = _given(classes, names, dataset)
    elif isinstance(outputs, int):
        pairs, note = _by_number(names, dataset)
        notes.append(note)
    else:
        pairs = {name: (name,) for name in dataset.classes if name in names}
        if names != dataset.classes:
            notes.append(f"classes are matched by name: {', '.join(pairs)}")
    notes += _without_partner(pairs, names, dataset, unmapped)
    return _together(pairs, names, dataset, tuple(notes))


Pairs: TypeAlias = dict[str, tuple[str, ...]]


def _given(classes: ClassMap, names: tuple[str, ...], dataset: DataSet) -> Pairs:
    """The mapping, of names that there are, in the data set's order."""
    pairs: Pairs = {}
    for one, those in classes.items():
        parts = tuple(those) if isinstance(those, list | tuple) else (those,)
        for name, known, whose in (
            (one, dataset.classes, f"of {dataset.name}"),
            *((part, names, "of the model") for part in parts),
        ):
            if name not in known:
                raise UserError(f"classes {whose}: there is no {name!r}; {nearest(name, known)}")
        if not parts:
            raise UserError(f"classes: {one!r} is mapped to nothing; leave it out to drop it")
        pairs[one] = tuple(dict.fromkeys(parts))
    return {one: pairs[one] for one in dataset.classes if one in pairs}


def _by_number(names: tuple[str, ...], dataset: DataSet) -> tuple[Pairs, str]:
    if len(names) != dataset.num_classes:
        raise UserError(
            f"the model does not say its {len(names)} classes' names, and {dataset.name} has "
            f"{dataset.num_classes}, {list(dataset.classes)}; say which is which, by number, as in "
            f'{{"{dataset.classes[0]}": "0"}}'
        )
    pairs: Pairs = {one: (name,) for one, name in zip(dataset.classes, names, strict=True)}
    listed = ", ".join(f"{name} is {one}" for one, (name,) in pairs.items())
    return pairs, f"the model does not say its classes' names; they are taken by number: {listed}"


def _without_partner(
    pairs: Pairs, names: tuple[str, ...], dataset: DataSet, unmapped: str
) -> list[str]:
    """What is said of classes that are left out, if they are to be."""
    mapped = {part for parts in pairs.values() for part in parts}
    of_data = [one for one in dataset.classes if one not in pairs]
    of_model = [name for name in names if name not in mapped]
    least = 1 if dataset.multilabel else 2
    if (of_data or of_model) and (unmapped == "error" or not pairs):
        raise UserError(
            f"classes without a partner: {of_model} of the model's {list(names)}, and {of_data} of "
            f"those of {dataset.name}, {list(dataset.classes)}. Map them, as in "
            '{"class of the data": "class of the model"}, or leave them out (unmapped = drop)'
        )
    notes = []
    if of_data:
        what = "labels" if dataset.multilabel else "images"
        notes.append(f"{what} of {', '.join(of_data)} are left out: the model knows no such class")
    if of_model:
        rest = "" if dataset.multilabel else "; the others' probabilities are scaled to sum to 1"
        notes.append(f"the model's {', '.join(of_model)} are left out{rest}")
    if len(set(pairs.values())) < least:
        raise UserError(
            f"of the model's classes and those of {dataset.name} only {list(pairs)} have partners; "
            f"{least} or more are wanted"
        )
    return notes


def _together(
    pairs: Pairs, names: tuple[str, ...], dataset: DataSet, notes: tuple[str, ...]
) -> ClassMatch:
    """Classes of the data set with the same partners are one class."""
    members: dict[tuple[str, ...], list[str]] = {}
    for one, parts in pairs.items():
        members.setdefault(tuple(sorted(parts)), []).append(one)
    if len({part for parts in members for part in parts}) < sum(map(len, members)):
        raise UserError(
            f"classes {pairs}: classes of {dataset.name} share some of the model's classes and not "
            "others; they must share all or none"
        )
    if dataset.multilabel and any(len(p) > 1 or len(m) > 1 for p, m in members.items()):
        raise UserError(
            "classes: where an image has several labels, each is one of the model's and no two are "
            "the same one"
        )
    labels = tuple(tuple(dataset.classes.index(one) for one in those) for those in members.values())
    in_order = [label for those in labels for label in those]
    return ClassMatch(
        tuple(m[0] if len(m) == 1 else "+".join(parts) for parts, m in members.items()),
        tuple(tuple(names.index(part) for part in parts) for parts in members),
        labels,
        dataset.multilabel,
        dataset.ordered and in_order == sorted(in_order),
        notes,
    )


def _log_of_sum(logits: np.ndarray) -> np.ndarray:
    """(n,) the logit of what is any of several classes, (n, those): their probabilities add."""
    return np.asarray(logsumexp(logits.astype(np.float64), axis=1))
