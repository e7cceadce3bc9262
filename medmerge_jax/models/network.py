"""A model together with what its input means."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.models.preprocessing import Preprocessing

_OWN = 2**31 - 1
"""Folded into an epoch's key before a model draws from it; augmentation folds in image numbers."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and what its input means. Compared by value, so that equal ones compile once.

    Attributes:
      model: Maps normalised NHWC float images (or features) to logits.
      preprocessing: Of images; None for a model of features.
      mesh: The devices that it runs on, see `mesh`; None for one.
      rngs: Names of the random streams that the model takes in training, see `ModelSpec.rngs`.
    """

    model: nn.Module
    preprocessing: Preprocessing | None = None
    mesh: jax.sharding.Mesh | None = None
    rngs: tuple[str, ...] = ()

    def normalise(self, inputs: jax.Array) -> jax.Array:
        """uint8 images (n, h, w, c) → (x / 255 − mean) / std in float32; else unchanged."""
        if inputs.dtype != jnp.uint8 or self.preprocessing is None:
            return inputs
        images = inputs.astype(jnp.float32) / 255.0
        return (images - jnp.asarray(self.preprocessing.mean)) / jnp.asarray(self.preprocessing.std)

    def streams(
        self, key: jax.Array | None, step: jax.Array, part: int = 0
    ) -> dict[str, jax.Array] | None:
        """Keys for what the model draws in a part of a step of a stage; None if it draws nothing.

        They come from the key of the epoch.
        """
        if not self.rngs:
            return None
        if key is None:
            raise ValueError(f"the model draws {', '.join(self.rngs)}: the epoch's key is wanted")
        for number in (_OWN, step, part):
            key = jax.random.fold_in(key, number)
        return {name: jax.random.fold_in(key, i) for i, name in enumerate(self.rngs)}
