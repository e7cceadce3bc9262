"""Batches with augmented images, a program beside the step: members of a grid share the step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from medmerge_jax.images.augment import Policy, augment
from medmerge_jax.runtime.mesh import batch_sharded
from medmerge_jax.training.step import Batch


def augmented_batch(policy: Policy, mesh: jax.sharding.Mesh | None, batch: Any, key: Any) -> Any:
    """The batch, or the parts of one, with augmented `inputs`.

    Args:
      policy: What to do.
      mesh: Of the devices among which the batch is split; None for one device.
      batch: As of `step.train_step`, or a tuple of such as of `accumulation.accumulated_step`;
        with `indices` int32 (n,), see `augment`.
      key: Of the epoch, see `augment.epoch_key`.

    Raises:
      ValueError: The inputs are no images, uint8.
    """
    if isinstance(batch, tuple):
        return tuple(augmented_batch(policy, mesh, part, key) for part in batch)
    images = batch["inputs"]
    if images.dtype != jnp.uint8:
        raise ValueError(
            f"augmentation of {images.dtype} inputs: uint8 images are wanted; features were "
            "computed from images that are not augmented"
        )
    augmented: Batch = {**batch, "inputs": _augmented(policy, mesh, images, batch["indices"], key)}
    return augmented


@functools.partial(jax.jit, static_argnames=("policy", "mesh"))
def _augmented(
    policy: Policy,
    mesh: jax.sharding.Mesh | None,
    images: jax.Array,
    indices: jax.Array,
    key: jax.Array,
) -> jax.Array:
    count = len(indices)
    result = augment(policy, images[:count], indices, key)
    if mesh is None:
        return result
    # Rows that only fill the batch up to a multiple of the devices stay as they are.
    whole = jnp.concatenate([result, images[count:]])
    return jax.lax.with_sharding_constraint(whole, batch_sharded(mesh))
