"""torchvision's tensor names and layouts <-> Flax variables.

Paths agree but for "." and "/", the head's name and the last part:

| torchvision                       | Flax                              | layout                |
|-----------------------------------|-----------------------------------|-----------------------|
| `weight` of a convolution         | `params`, `kernel`                | OIHW <-> HWIO         |
| `weight` of the head              | `params`, `head/kernel`           | transposed            |
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
from medmerge_jax.models import get_spec, list_models

Variables = dict[str, Any]
Shape = tuple[int, ...]

COUNTER = "num_batches_tracked"
MOST_LISTED = 8


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
      tensors: By PyTorch name. A `module.` before all names, the older names of torchvision's
        DenseNets, a head of any number of classes and no head at all are all fine.
      origin: The file, for messages.

    Returns:
      `{"params": ..., "batch_stats": ...}` nested in network order, float32.

    Raises:
      UserError: A tensor is missing, extra, misshapen, not floating point or not finite. Names
        the tensors, and the architecture that they fit if it is another one.
    """
    named = _modern_names(architecture, tensors, origin)
    slots = _matching_slots(architecture, named, origin)
    spec = get_spec(architecture)
    flat: dict[str, dict[str, np.ndarray]] = {"params": {}, "batch_stats": {}}
    for name, slot in slots.items():
        array = _float32(name, named[name], origin)
        axes = np.argsort(spec.torch_axes(slot.path, array.ndim))
        flat[slot.collection][slot.path] = np.ascontiguousarray(array.transpose(axes))
    return {collection: unflatten(leaves) for collection, leaves in flat.items()}


def fitting_architectures(tensors: Mapping[str, np.ndarray], origin: str) -> list[str]:
    """Names of the architectures that tensors of a file fit, by their names and shapes."""

    def fits(architecture: str) -> bool:
        named = _modern_names(architecture, tensors, origin)
        shapes = _shapes(named)
        return _head_fits(architecture, shapes) and not _mismatch(
            _slots(architecture, _num_classes(architecture, shapes)), shapes
        )

    return [name for name in list_models() if fits(name)]


def variables_to_torch(architecture: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of Flax variables, which have a head or none.

    Returns:
      float32 arrays by PyTorch name, and int64 zeros for the batch norms' counters, as
      `load_state_dict(..., strict=True)` takes them.

    Raises:
      UserError: A leaf is missing, extra or misshapen.
    """
    spec = get_spec(architecture)
    tensors = {
        spec.torch_name(collection, path): np.asarray(leaf, np.float32).transpose(
            spec.torch_axes(path, np.ndim(leaf))
        )
        for collection in ("params", "batch_stats")
        for path, leaf in flatten(variables.get(collection, {})).items()
    }
    complete: dict[str, np.ndarray] = {}
    for name in _matching_slots(architecture, tensors, "these variables"):
        complete[name] = tensors[name]
        if name.endswith(".running_var"):
            complete[_counter(name)] = np.zeros((), np.int64)
    return complete


def _modern_names(
    architecture: str, tensors: Mapping[str, np.ndarray], origin: str
) -> dict[str, np.ndarray]:
    modern_name = get_spec(architecture).modern_name
    prefixed = all(name.startswith("module.") for name in tensors)
    named: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        new = modern_name(name.removeprefix("module.") if prefixed else name)
        if new in named:
            raise UserError(f"{origin}: tensor {new!r} is there twice, under an old name too")
        named[new] = tensor
    return named


def _shapes(tensors: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _num_classes(architecture: str, shapes: Mapping[str, Shape]) -> int:
    """As the head's tensors say; 0 without a head."""
    head = get_spec(architecture).torch_head
    sizes = [shapes[name][:1] for name in (f"{head}.weight", f"{head}.bias") if name in shapes]
    return next((size[0] for size in sizes if size), 1) if sizes else 0


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


def _counter(running_var: str) -> str:
    return running_var.removesuffix("running_var") + COUNTER


def _mismatch(slots: Mapping[str, Slot], shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """What is missing, extra and misshapen, each as a list of descriptions."""
    counters = {_counter(name) for name in slots if name.endswith(".running_var")}
    kinds = {
        "missing": [f"{name} {slot.shape}" for name, slot in slots.items() if name not in shapes],
        "extra": [
            f"{name} {shape}"
            for name, shape in shapes.items()
            if name not in slots and name not in counters
        ],
        "misshapen": [
            f"{name} is {shapes[name]}, wanted {slot.shape}"
            for name, slot in slots.items()
            if name in shapes and shapes[name] != slot.shape
        ],
    }
    return {kind: entries for kind, entries in kinds.items() if entries}


def _matching_slots(
    architecture: str, tensors: Mapping[str, np.ndarray], origin: str
) -> dict[str, Slot]:
    """Those of the architecture, if exactly they are given."""
    shapes = _shapes(tensors)
    slots = _slots(architecture, _num_classes(architecture, shapes))
    problems = _mismatch(slots, shapes)
    if not problems:
        return slots
    lines = [f"{origin}: the tensors do not fit {architecture}."]
    lines += [f"  {kind}: {_listed(entries)}" for kind, entries in problems.items()]
    if fitting := fitting_architectures(tensors, origin):
        lines.append(f"  They fit {' and '.join(fitting)}: is that the architecture you want?")
    else:
        lines.append(f"  Give a file of {architecture} with torchvision's tensor names.")
    raise UserError("\n".join(lines))


def _head_fits(architecture: str, shapes: Mapping[str, Shape]) -> bool:
    """Spares tracing most of the models, a second each; without a head any may fit."""
    heads = {get_spec(name).torch_head for name in list_models()}
    given = {head for head in heads if f"{head}.weight" in shapes}
    spec = get_spec(architecture)
    return not given or (
        given == {spec.torch_head}
        and shapes[f"{spec.torch_head}.weight"][1:] == (spec.num_features,)
    )


def _listed(entries: list[str]) -> str:
    more = len(entries) - MOST_LISTED
    return "; ".join(entries[:MOST_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _float32(name: str, tensor: np.ndarray, origin: str) -> np.ndarray:
    # Asked of JAX, for which bfloat16 is a float: to NumPy it is of kind "V".
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{origin}: tensor {name!r} is {tensor.dtype}; floating point is wanted")
    with np.errstate(over="ignore", invalid="ignore"):
        array = tensor.astype(np.float32)
    if bad := np.count_nonzero(~np.isfinite(array)):
        raise UserError(
            f"{origin}: tensor {name!r} has {bad} values that are NaN, infinite or beyond "
            "float32's range; the model it comes from was not sound"
        )
    return array
