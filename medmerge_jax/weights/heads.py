"""Several heads of a PyTorch state dict as one, whose logits are the mean of theirs.

Each head reads its part of the features (`ModelSpec.further_heads`): of a distilled DeiT the first
the class token's state, the second that of the token it was distilled through. With heads W_i, b_i
of t parts x_i,

    (1/t) Σᵢ (W_i x_i + b_i)  =  [W_1, W_2, …]/t · [x_1; x_2; …] + (1/t) Σᵢ b_i

so that one linear layer says the same. Written again, the weights are those that were read, to the
bit where t is 2; each head has the mean of the biases, which changes no logit.
"""

from collections.abc import Mapping

import numpy as np

from medmerge_jax.models import ModelSpec
from medmerge_jax.weights.lazy import LazyArray

Tensors = Mapping[str, np.ndarray | LazyArray]


def joined(spec: ModelSpec, tensors: Tensors) -> Tensors:
    """Tensors with one head in place of several, whatever is before their names.

    As they are if the architecture has one head, or if one is missing or misshapen.
    """
    changed = dict(tensors)
    for name in tensors if spec.further_heads else ():
        first = f"{spec.torch_head}.bias"
        prefix = name.removesuffix(first)
        heads = [prefix + head for head in (spec.torch_head, *spec.further_heads)]
        if not name.endswith(first) or not _are_alike(tensors, heads):
            continue
        for part in ("weight", "bias"):
            parts = [tensors[f"{head}.{part}"] for head in heads]
            changed = {n: x for n, x in changed.items() if n not in {f"{h}.{part}" for h in heads}}
            changed[f"{heads[0]}.{part}"] = _joined(parts)
    return changed


def separated(spec: ModelSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undoes `joined` for tensors without a prefix."""
    changed = {}
    for name, tensor in tensors.items():
        changed[name] = tensor
        module, _, part = name.rpartition(".")
        if spec.further_heads and module == spec.torch_head:
            heads = (spec.torch_head, *spec.further_heads)
            parts = np.split(tensor, len(heads), axis=1) if part == "weight" else None
            for i, head in enumerate(heads):
                changed[f"{head}.{part}"] = tensor if parts is None else parts[i] * len(heads)
    return changed


def _are_alike(tensors: Tensors, heads: list[str]) -> bool:
    for part, ndim in (("weight", 2), ("bias", 1)):
        shapes = {getattr(tensors.get(f"{head}.{part}"), "shape", None) for head in heads}
        if len(shapes) != 1 or len(next(iter(shapes)) or ()) != ndim:
            return False
    return True


def _joined(parts: list[np.ndarray | LazyArray]) -> LazyArray:
    """Weights (classes, width) next to each other, or biases (classes,) added; divided by both."""
    classes, *width = parts[0].shape

    def read() -> np.ndarray:
        arrays = [np.asarray(part, np.float32) / len(parts) for part in parts]
        return np.concatenate(arrays, axis=1) if width else np.sum(arrays, axis=0)

    shape = (classes, *(len(parts) * size for size in width))
    return LazyArray(shape, np.dtype(np.float32), read)
