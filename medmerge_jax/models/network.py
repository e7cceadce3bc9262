"""A model together with what its input means."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and what its input means. Compared by value, so that equal ones compile once.

    Attributes:
      model: Maps normalised NHWC float images (or features) to logits.
      mean: Per channel, of images scaled to [0, 1]; unused for inputs that are not uint8.
      std: As `mean`.
      mesh: The devices that it runs on, see `mesh`; None for one.
    """

    model: nn.Module
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    mesh: jax.sharding.Mesh | None = None

    def normalise(self, inputs: jax.Array) -> jax.Array:
        """uint8 images (n, h, w, c) → (x / 255 − mean) / std in float32; else unchanged."""
        if inputs.dtype != jnp.uint8:
            return inputs
        images = inputs.astype(jnp.float32) / 255.0
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
