"""The smallest networks that a run can train."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medmerge_jax.models.layers import Conv, dense_head, global_average
from medmerge_jax.models.norm import BatchNorm, resolve
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.models.registry import MODELS, ModelSpec, register


class OneLayer(nn.Module):
    """A convolution with batch norm, or more of them, and a head."""

    num_classes: int
    dtype: Any = jnp.float32
    layers: int = 1

    @nn.compact
    def __call__(self, x, train=False, use_running_average=None):
        average = resolve(train, use_running_average)
        for number in range(self.layers):
            x = Conv(8, 3, 1, self.dtype, name=f"conv{number or ''}")(x)
            x = nn.relu(BatchNorm(self.dtype, name=f"norm{number or ''}")(x, average))
        x = global_average(x)
        return dense_head(8, self.num_classes)(x) if self.num_classes else x


class TwoLayers(OneLayer):
    """With paths "conv/kernel" and "conv1/kernel"."""

    layers: int = 2


ARCHITECTURE = "one_layer"


def register_architecture():
    """Not when this file is imported: what the tests of all models are is known before."""
    if ARCHITECTURE not in MODELS:
        register(
            ModelSpec(
                name=ARCHITECTURE,
                build=OneLayer,
                num_features=8,
                preprocessing=Preprocessing(16),
                torch_head="fc",
            )
        )
