"""torchvision's tensor names and layouts <-> Flax variables.

Paths agree but for "." and "/", the head's name and the last part:

| torchvision                       | Flax                              | layout                |
|-----------------------------------|-----------------------------------|-----------------------|
| `weight` of a convolution         | `params`, `kernel`                | OIHW <-> HWIO         |
| `weight` of the head              | `params`, `head/kernel`           | transposed; several   |
|                                   |                                   | heads: see `heads`    |
| `weight`, `bias` of a batch norm  | `params`, `scale`, `bias`         |                       |
| `running_mean`, `running_var`     | `batch_stats`, `mean`, `var`      |                       |
| `num_batches_tracked`             | none                              | int64 0 when writing  |
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten, network_order, unflatten
from medmerge_jax.models import ModelSpec, get_spec, list_models
from medmerge_jax.runtime.progress import say
from medmerge_jax.weights.fit import (
    COUNTER,
    MisfitError,
    Shape,
    StateDicts,
    fit,
    fits,
    listed,
    spread_stem,
    without_statistics,
)
from medmerge_jax.weights.heads import joined, separated
from medmerge_jax.weights.lazy import LazyArray, read_all

Variables = dict[str, Any]


class Slot(NamedTuple):
    """Where a tensor of a PyTorch state dict lives in Flax."""

    collection: str  # "params" or "batch_stats"
    path: str  # "layer1/0/conv1/kernel"
    shape: Shape  # in PyTorch's layout


def variables_from_torch(
    architecture: str, tensors: Mapping[str, np.ndarray], origin: str
) -> Variables:
    """Flax variables from a PyTorch state dict.

    Args:
      architecture: One of `models.list_models()`.
      tensors: By PyTorch name. A prefix before all names, the names of older files and of other
        libraries, one input channel, any head and tensors beside the network are all fine; what
        of these there is, is said.
      origin: The file, for messages.

    Returns:
      `{"params": ..., "batch_stats": ...}` nested in network order, float32.

    Raises:
      UserError: A tensor of the backbone is missing, extra, misshapen, not floating point or not
        finite, or a variance is negative. Names the tensors, and the architecture that they fit
        if it is another one.
    """
    variables, notes = variables_and_notes(architecture, {"": tensors}, origin)
    for note in notes:
        say(f"{origin}: {note}")
    return read_all(variables)


def variables_and_notes(
    architecture: str,
    state_dicts: StateDicts,
    origin: str,
    choice: str = "",
    *,
    lacking: bool = False,
) -> tuple[Variables, tuple[str, ...]]:
    """Flax variables of a file with any number of state dicts, and what was inferred of it.

    Their leaves are `LazyArray`s; what is wrong with the numbers of one, its reading will say.

    Args:
      architecture: One of `models.list_models()`.
      state_dicts: By their place in the file.
      origin: The file, for messages.
      choice: The state dict or the prefix of names to be taken, see `fit`.
      lacking: Whether a file may lack running statistics: "batch_stats" is then empty.

    Raises:
      UserError: As of `variables_from_torch`; or several fit and none is chosen.
    """
    spec = get_spec(architecture)
    state_dicts = {where: joined(spec, tensors) for where, tensors in state_dicts.items()}
    backbone = _backbone(architecture)
    if lacking and not fits(spec, backbone, state_dicts):
        fewer = without_statistics(backbone)
        backbone = fewer if fits(spec, fewer, state_dicts) else backbone
    try:
        chosen = fit(spec, backbone, state_dicts, origin, choice)
    except MisfitError as error:
        fitting = fitting_architectures(state_dicts)
        hint = f"They fit {' and '.join(fitting)}: is that the architecture you want?"
        raise UserError(f"{error}\n  {hint}" if fitting else str(error)) from None
    tensors = state_dicts[chosen.where]
    flat: dict[str, dict[str, LazyArray]] = {"params": {}, "batch_stats": {}}
    bias = chosen.names.get(f"{spec.torch_head}.bias")
    for name, slot in _slots(architecture, 0 if bias is None else tensors[bias].shape[0]).items():
        if name in chosen.names:  # but running statistics, which may lack
            axes = np.argsort(spec.torch_axes(slot.path, len(slot.shape)))
            shape = tuple(slot.shape[axis] for axis in axes)
            given = chosen.names[name]
            read = functools.partial(_leaf, spec, name, axes, tensors[given], given, origin)
            flat[slot.collection][slot.path] = LazyArray(shape, np.dtype(np.float32), read)
    return {collection: unflatten(leaves) for collection, leaves in flat.items()}, chosen.notes


def _leaf(
    spec: ModelSpec,
    name: str,
    axes: np.ndarray,
    tensor: np.ndarray | LazyArray,
    given: str,
    origin: str,
) -> np.ndarray:
    """A tensor as float32 with Flax's order of axes; `given` is its name in the file."""
    array = _float32(given, np.asarray(tensor), origin)
    if name == f"{spec.stem}.weight" and array.shape[1] == 1:
        array = spread_stem(array)
    if name.endswith(".running_var") and array.size and array.min() < 0:
        raise UserError(
            f"{origin}: tensor {given!r} holds a negative variance ({array.min():g}); the file is "
            "damaged or was averaged wrongly"
        )
    return np.ascontiguousarray(array.transpose(axes))


def fitting_architectures(state_dicts: StateDicts, *, lacking: bool = False) -> list[str]:
    """Names of the architectures that a file fits, by its tensors' names and shapes.

    Args:
      state_dicts: By their place in the file, see `torch_pickle.read_torch_file`.
      lacking: Whether it may lack running statistics.
    """
    return [name for name in list_models() if _fits(name, state_dicts, lacking)]


def variables_to_torch(
    architecture: str, variables: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """The PyTorch state dict of Flax variables; `load_state_dict(..., strict=True)` takes it.

    Args:
      architecture: One of `models.list_models()`.
      variables: `{"params": ..., "batch_stats": ...}`, with a head or without.
      dtype: Of the arrays.

    Returns:
      Arrays by PyTorch name, and int64 zeros for the batch norms' counters.

    Raises:
      UserError: A leaf is missing, extra or misshapen.
    """
    spec = get_spec(architecture)
    tensors = {
        spec.torch_name(collection, path): np.asarray(leaf, dtype).transpose(
            spec.torch_axes(path, np.ndim(leaf))
        )
        for collection in ("params", "batch_stats")
        for path, leaf in flatten(variables.get(collection, {})).items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    head = shapes.get(f"{spec.torch_head}.bias") or shapes.get(f"{spec.torch_head}.weight")
    slots = _slots(architecture, head[0] if head else 0)
    _check_written(slots, shapes, architecture)
    complete: dict[str, np.ndarray] = {}
    for name in slots:
        complete[name] = tensors[name]
        if name.endswith(".running_var"):
            complete[name.replace("running_var", COUNTER)] = np.zeros((), np.int64)
    return separated(spec, complete)


def _fits(architecture: str, state_dicts: StateDicts, lacking: bool) -> bool:
    """Tracing a model takes a second, which a look at stem and head mostly spares."""
    spec = get_spec(architecture)
    state_dicts = {where: joined(spec, tensors) for where, tensors in state_dicts.items()}
    stem, width = f"{spec.stem}.weight", spec.num_features
    names = [name for tensors in state_dicts.values() for name in tensors]
    ends = (stem, "0.weight") if spec.stem else ("",)  # by name, or by number
    if not any(name.endswith(ends) for name in names):
        return False
    heads = [
        tensors[name].shape[1:]
        for tensors in state_dicts.values()
        for name in tensors
        if spec.usual_name(name).endswith(f"{spec.torch_head}.weight") and tensors[name].ndim == 2
    ]
    if heads and (width,) not in heads:
        return False
    slots = _backbone(architecture)
    fewer = without_statistics(slots) if lacking else slots
    return fits(spec, slots, state_dicts) or fits(spec, fewer, state_dicts)


def _backbone(architecture: str) -> dict[str, Shape]:
    """Shapes of its tensors by PyTorch name."""
    return {name: slot.shape for name, slot in _slots(architecture, 0).items()}


@functools.lru_cache(maxsize=64)
def _slots(architecture: str, num_classes: int) -> dict[str, Slot]:
    """By PyTorch name, in network order."""
    spec = get_spec(architecture)
    slots = {}
    for collection, leaves in spec.shapes(num_classes).items():
        for path, leaf in leaves.items():
            shape = tuple(leaf.shape[axis] for axis in spec.torch_axes(path, leaf.ndim))
            slots[spec.torch_name(collection, path)] = Slot(collection, path, shape)
    return dict(sorted(slots.items(), key=lambda item: network_order(item[1].path)))


def _check_written(slots: Mapping[str, Slot], shapes: Mapping[str, Shape], name: str) -> None:
    """Refuses variables that are not those of the architecture."""
    missing = [f"{name} {slot.shape}" for name, slot in slots.items() if name not in shapes]
    extra = [f"{name} {shape}" for name, shape in shapes.items() if name not in slots]
    misshapen = [
        f"{name} is {shapes[name]}, wanted {slot.shape}"
        for name, slot in slots.items()
        if name in shapes and shapes[name] != slot.shape
    ]
    kinds = {"missing": missing, "extra": extra, "misshapen": misshapen}
    lines = [f"  {kind}: {listed(entries, '; ')}" for kind, entries in kinds.items() if entries]
    if lines:
        raise UserError("\n".join([f"these variables do not fit {name}.", *lines]))


def _float32(name: str, tensor: np.ndarray, origin: str) -> np.ndarray:
    # Asked of JAX, for which bfloat16 is a float: to NumPy it is of kind "V".
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{origin}: tensor {name!r} is {tensor.dtype}; floating point is wanted")
    with np.errstate(over="ignore", invalid="ignore"):
        array = tensor.astype(np.float32)
    if not np.isfinite(array).all():
        bad = int(np.size(array) - np.isfinite(array).sum())
        raise UserError(
            f"{origin}: tensor {name!r} has {bad} values that are NaN, infinite or beyond "
            "float32's range; the model it comes from was not sound"
        )
    return array
