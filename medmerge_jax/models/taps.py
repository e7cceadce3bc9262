"""The activations of hidden units in several models, as moments for matching."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from medmerge_jax.merging.correlation import Moments, init_moments, update_moments
from medmerge_jax.merging.spaces import Space
from medmerge_jax.merging.trees import flatten, without_head
from medmerge_jax.models.registry import create_model

Tree = Mapping[str, Any]

_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda x: x,
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}


def collect_moments(
    model: str | nn.Module,
    parents: Sequence[Tree],
    spaces: Sequence[Space],
    images: Any,
    batch_size: int = 32,
) -> dict[str, Moments]:
    """Moments of every space's activations in all parents, on the same images.

    Parents are run as in evaluation, with running statistics. Every position of a feature map is
    a sample; a space with several taps (a residual stream) takes in all of them.

    Args:
      model: Name of a registered architecture, or a module of this package. Its head is not used.
      parents: n ≥ 1 of `{"params": ..., "batch_stats": ...}`; heads are ignored, of any size.
      spaces: Of the parents; moments are collected of these only.
      images: float (num_images, h, w, 3), normalised.
      batch_size: Images at a time.

    Returns:
      By space name, the moments for `merging.correlation.correlation`: unit i of parent m is
      m · size + i.

    Raises:
      ValueError: There is no parent or no image, or `batch_size` is less than 1.
    """
    if not parents or not len(images) or batch_size < 1:
        raise ValueError(
            f"{len(parents)} parents, {len(images)} images, {batch_size} at a time; at least one "
            "of each is wanted"
        )
    module = create_model(model, 0) if isinstance(model, str) else model.clone(num_classes=0)
    backbones = [without_head(parent) for parent in parents]
    batch_size = min(batch_size, len(images))
    modules = tuple(sorted({tap.module for space in spaces for tap in space.taps}))
    moments = {
        space.name: init_moments(len(parents), space.size, len(space.taps)) for space in spaces
    }
    for start in range(0, len(images), batch_size):
        batch = np.asarray(images[start : start + batch_size])
        valid = np.arange(batch_size) < len(batch)
        # Padded to one shape, so that nothing is compiled for the last, shorter batch.
        batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        outputs = [outputs_of(module, modules, backbone, batch) for backbone in backbones]
        for space in spaces:
            for index, tap in enumerate(space.taps):
                maps = [output[tap.module] for output in outputs]
                whole = np.array_equal(tap.positions, np.arange(maps[0].shape[-1]))
                positions = None if whole else tap.positions
                moments[space.name] = _update(
                    moments[space.name], maps, positions, index, valid, activation=tap.activation
                )
    return moments


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_of(
    module: nn.Module, modules: tuple[str, ...], variables: Tree, images: Any
) -> dict[str, jax.Array]:
    """The outputs of some of a model's modules, by their paths."""

    def is_wanted(submodule: nn.Module, method: str) -> bool:
        return method == "__call__" and "/".join(submodule.path) in modules

    _, state = module.apply(
        variables, images, train=False, capture_intermediates=is_wanted, mutable="intermediates"
    )
    outputs = flatten(state["intermediates"])
    return {path: outputs[f"{path}/__call__"][0] for path in modules}


# One space and tap at a time: compiled once for all of the same shapes.
@functools.partial(jax.jit, static_argnames="activation", donate_argnums=0)
def _update(
    moments: Moments, maps: Sequence[Any], positions: Any, tap: Any, valid: Any, *, activation: str
) -> Moments:
    maps = [_ACTIVATIONS[activation](x) for x in maps]
    if positions is not None:
        maps = [x[..., positions] for x in maps]
    return update_moments(moments, maps, tap=tap, valid=valid)
