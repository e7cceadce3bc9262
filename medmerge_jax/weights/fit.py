"""Which tensors of a file are an architecture's, whatever lies around them.

A checkpoint may hold several state dicts (of a model and its moving average), each with a prefix
before all names (`module.`, `backbone.`), with names of another family, with parts beside the
network (a projection head, a queue) and with any head. The backbone decides: a state dict and a
prefix fit if all its tensors are there, in their shapes. What was taken, and what was left out, is
said in notes.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.models import ModelSpec
from medmerge_jax.weights.lazy import LazyArray
from medmerge_jax.weights.references import CHOICE

Shape = tuple[int, ...]
StateDicts = Mapping[str, Mapping[str, np.ndarray | LazyArray]]

COUNTER = "num_batches_tracked"
MOST_LISTED = 8
_STATISTICS = ("running_mean", "running_var")
NO_STATISTICS = (
    "Its batch norms have no running statistics, which evaluation needs. Save the buffers too: the "
    "whole state_dict(), not the parameters alone. Or have them estimated on images: "
    "estimate_statistics = True in a config, --estimate-statistics of the merge command."
)
_DEEPEST = 12
"""Modules around a network that are looked through."""
_SECONDARY = re.compile(r"ema|teacher|momentum|target|swa|averag|shadow|(^|[._])key")
"""In the name of a state dict that is made from another one."""


class MisfitError(UserError):
    """The tensors are not the architecture's; they may be another one's."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Tensors that are an architecture's.

    Attributes:
      where: The state dict in the file; "" is the outermost dict.
      prefix: Before the names, "module.".
      names: By torchvision's name, that in the state dict.
      notes: What was inferred and left out, a sentence each.
    """

    where: str
    prefix: str
    names: Mapping[str, str]
    notes: tuple[str, ...]


def without_statistics(slots: Mapping[str, Shape]) -> dict[str, Shape]:
    """The slots but for the batch norms' running statistics."""
    return {name: shape for name, shape in slots.items() if not name.endswith(_STATISTICS)}


def fit(
    spec: ModelSpec, slots: Mapping[str, Shape], state_dicts: StateDicts, origin: str, choice: str
) -> Fit:
    """The state dict and the prefix whose tensors are the architecture's.

    Args:
      spec: The architecture.
      slots: Shapes of the backbone's tensors by torchvision's name.
      state_dicts: Of the file, see `torch_pickle.read_torch_file`.
      origin: The file, for messages.
      choice: The state dict or the prefix to be taken if several fit; "" if nothing is said.

    Raises:
      MisfitError: None fits.
      UserError: Several fit and none is chosen, or the choice is none of them.
    """
    fits = [
        one
        for where, tensors in state_dicts.items()
        for prefix in _prefixes(tensors, len(slots))
        if (one := _fit_of(spec, slots, tensors, where, prefix)) is not None
    ]
    if not fits:
        raise MisfitError(_mismatch_message(spec, slots, state_dicts, origin))
    labels = {_label(one): one for one in fits}
    if choice:
        chosen = [one for one in fits if choice.rstrip(".") in _names_of(one)]
        if not chosen:
            raise UserError(
                f"{origin}: no model in it is called {choice!r}; there is {listed(labels)}"
            )
        fits = chosen
    # The sort is stable: in the order of the file, what is no average of another first.
    fits.sort(key=lambda one: _SECONDARY.search(one.where) is not None)
    first, *others = fits
    rivals = [one for one in others if one.where == first.where]
    if rivals:
        several = listed(repr(_label(one)) for one in (first, *rivals))
        raise UserError(
            f"{origin}: holds several models that fit {spec.name}, by what is before the names: "
            f"{several}. Say which: {origin}{CHOICE}{_label(first)}"
        )
    if others and not choice:
        note = (
            f"holds {len(fits)} models, {listed(map(_label, fits))}; {_label(first)!r} is taken "
            f"(another: {CHOICE}{_label(others[0])} behind the file's name)"
        )
        return dataclasses.replace(first, notes=(note, *first.notes))
    return first


def fits(spec: ModelSpec, slots: Mapping[str, Shape], state_dicts: StateDicts) -> bool:
    """Whether any state dict and prefix fit."""
    return any(
        _fit_of(spec, slots, tensors, where, prefix)
        for where, tensors in state_dicts.items()
        for prefix in _prefixes(tensors, len(slots))
    )


def spread_stem(kernel: np.ndarray) -> np.ndarray:
    """A kernel (c_out, 3, k, k) for grey images in three equal channels, from one of one channel.

    Its outputs are the same; timm does likewise.
    """
    return np.repeat(kernel, 3, axis=1) / np.asarray(3, kernel.dtype)


def _renamed(spec: ModelSpec, tensors: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """Torchvision's names of those that begin with the prefix, and what they are in the file."""
    names: dict[str, list[str]] = {}
    for name in tensors:
        if name.startswith(prefix):
            names.setdefault(spec.usual_name(name.removeprefix(prefix)), []).append(name)
    return names


def _fit_of(
    spec: ModelSpec,
    slots: Mapping[str, Shape],
    tensors: Mapping[str, np.ndarray | LazyArray],
    where: str,
    prefix: str,
) -> Fit | None:
    several = _renamed(spec, tensors, prefix)
    if _problems(spec, slots, tensors, several):
        return None
    names = {usual: name for usual, (name, *_) in several.items()}
    kept = {usual: names[usual] for usual in slots}
    head = {usual: name for usual, name in names.items() if _in(usual, [spec.torch_head])}
    notes = []
    if prefix:
        notes.append(f"its names begin with {prefix!r}, which is taken off")
    other = [(usual, name) for usual, name in kept.items() if name != prefix + usual]
    if other:
        notes.append(f"has other names than torchvision: {other[0][1]!r} is {other[0][0]!r}")
    if spec.stem and tensors[kept[f"{spec.stem}.weight"]].shape[1] == 1:
        notes.append(
            "its first convolution takes one channel; it is spread over three, a third each: for "
            "grey images the same"
        )
    linear = _linear(spec, head, tensors)
    if linear:
        kept |= linear
    elif head:
        notes.append(
            f"its head ({listed(head)}) is not one linear layer with a bias on "
            f"{spec.num_features} features, and is left out"
        )
    taken = {*kept.values(), *head.values()}
    beside = [name for name in tensors if name not in taken and not name.endswith(COUNTER)]
    if beside:
        notes.append(f"{len(beside)} tensors beside the network are left out: {listed(beside)}")
    return Fit(where, prefix, kept, tuple(notes))


def _linear(
    spec: ModelSpec, head: Mapping[str, str], tensors: Mapping[str, np.ndarray | LazyArray]
) -> dict[str, str]:
    """Weight and bias of a head that is one linear layer on the features, maybe behind dropout."""
    parts = {usual.rpartition(".")[2]: name for usual, name in head.items()}
    if len(head) != 2 or parts.keys() != {"weight", "bias"}:
        return {}
    classes = tensors[parts["bias"]].shape
    if len(classes) != 1 or tensors[parts["weight"]].shape != (*classes, spec.num_features):
        return {}
    return {f"{spec.torch_head}.{part}": name for part, name in parts.items()}


def _problems(
    spec: ModelSpec,
    slots: Mapping[str, Shape],
    tensors: Mapping[str, np.ndarray | LazyArray],
    names: Mapping[str, Sequence[str]],
) -> dict[str, list[str]]:
    """What the backbone misses, and what is wrong with its tensors, each a list of descriptions."""
    shapes = {usual: tensors[name].shape for usual, (name, *_) in names.items()}
    own = {name.partition(".")[0] for name in slots}
    extra = {
        name: shape
        for name, shape in shapes.items()
        if name.partition(".")[0] in own and name not in slots and not name.endswith(COUNTER)
    }
    stem = f"{spec.stem}.weight"
    kinds = {
        "missing": [f"{name} {shape}" for name, shape in slots.items() if name not in shapes],
        "extra": [f"{name} {shape}" for name, shape in extra.items()],
        "twice": [" and ".join(names[name]) for name in slots if len(names.get(name, ())) > 1],
        "misshapen": [
            f"{name} is {shapes[name]}, wanted {shape}"
            for name, shape in slots.items()
            if name in shapes
            and shapes[name] != shape
            and not (name == stem and shapes[name] == (shape[0], 1, *shape[2:]))
        ],
    }
    return {kind: entries for kind, entries in kinds.items() if entries}


def _prefixes(tensors: Iterable[str], least: int) -> list[str]:
    """What so many names begin with, up to a dot; "" always, and the shortest first."""
    counts: collections.Counter[str] = collections.Counter()
    for name in tensors:
        parts = name.split(".", _DEEPEST)
        counts.update(".".join([*parts[:depth], ""]) for depth in range(1, len(parts)))
    return ["", *(prefix for prefix, count in counts.items() if count >= least)]


def _label(one: Fit) -> str:
    return ".".join(part for part in (one.where, one.prefix.rstrip(".")) if part)


def _names_of(one: Fit) -> set[str]:
    """What a choice may call it."""
    return {one.where, one.where.rpartition(".")[2], one.prefix.rstrip("."), _label(one)} - {""}


def _in(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _mismatch_message(
    spec: ModelSpec, slots: Mapping[str, Shape], state_dicts: StateDicts, origin: str
) -> str:
    where, prefix = _nearest(spec, slots, state_dicts)
    tensors = state_dicts[where]
    names = _renamed(spec, tensors, prefix)
    shapes = {usual: tensors[name].shape for usual, (name, *_) in names.items()}
    place = f" (in {where!r})" if where else ""
    place += f" (behind {prefix!r})" if prefix else ""
    lines = [f"{origin}: the tensors do not fit {spec.name}{place}."]
    other = spec.other_network(shapes)
    if other:
        lines.append(f"  They are of another network: {other}. Give weights of torchvision's.")
    elif all(name.endswith(_STATISTICS) == (name not in shapes) for name in slots):
        lines.append(f"  {NO_STATISTICS}")
    problems = _problems(spec, slots, tensors, names)
    lines += [f"  {kind}: {listed(entries, '; ')}" for kind, entries in problems.items()]
    return "\n".join(lines)


def _nearest(
    spec: ModelSpec, slots: Mapping[str, Shape], state_dicts: StateDicts
) -> tuple[str, str]:
    """The state dict and the prefix with which the most tensors are there."""

    def candidates() -> Iterator[tuple[int, int, str, str]]:
        for order, (where, tensors) in enumerate(state_dicts.items()):
            for prefix in _prefixes(tensors, len(slots) // 4):
                names = _renamed(spec, tensors, prefix)
                yield len(names.keys() & slots.keys()), -order - len(prefix), where, prefix

    _, _, where, prefix = max(candidates())
    return where, prefix


def listed(entries: Iterable[str], separator: str = ", ") -> str:
    """The first few, none of them endless, and how many more there are."""
    entries = list(entries)
    more = len(entries) - MOST_LISTED
    shown = [entry[:200] for entry in entries[:MOST_LISTED]]
    return separator.join(shown) + (f"{separator}and {more} more" if more > 0 else "")
