"""Densely connected networks as in torchvision.

Huang et al., "Densely connected convolutional networks" (arXiv 1608.06993). Submodules bear
torchvision's names, so that a parameter's path is its PyTorch name with "/" for ".".
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.errors import UserError
from medmerge_jax.merging.spaces import dense_spaces
from medmerge_jax.models.layers import (
    KAIMING_FAN_IN,
    Conv,
    dense_head,
    global_average,
    max_pool,
)
from medmerge_jax.models.norm import BatchNorm, Statistics, resolve, statistics
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.models.registry import Block, Elsewhere, ModelSpec, numbered_block, register

Array = jax.Array

BOTTLENECK = 4
"""The 1 x 1 convolution of a dense layer has this many times `growth` output channels."""


def smallest_image(blocks: int) -> int:
    """Side in pixels of which one is left, halved twice rounding up, then between blocks."""
    return 4 * 2 ** (blocks - 1) - 3


class DenseLayer(nn.Module):
    """Batch norm, 1 x 1 convolution, batch norm, 3 x 3 convolution to `growth` channels."""

    growth: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool, of_batch: Statistics | None) -> Array:
        """Maps (n, h, w, c), and what it has for statistics, to the new (n, h, w, growth)."""
        x = nn.relu(BatchNorm(self.dtype, name="norm1")(x, use_running_average, of_batch))
        x = Conv(BOTTLENECK * self.growth, 1, 1, self.dtype, KAIMING_FAN_IN, name="conv1")(x)
        x = nn.relu(BatchNorm(self.dtype, name="norm2")(x, use_running_average))
        return Conv(self.growth, 3, 1, self.dtype, KAIMING_FAN_IN, name="conv2")(x)


class DenseBlock(nn.Module):
    """Layers that each see the concatenation of the input and all earlier layers' outputs.

    All normalise the same channels with the same statistics of the batch: they are computed once.
    """

    depth: int
    growth: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> tuple[Array, Statistics | None]:
        """Maps (n, h, w, c) to (n, h, w, c + depth · growth) and, in training, its statistics."""
        of_batch = None if use_running_average else statistics(x)
        for i in range(self.depth):
            layer = DenseLayer(self.growth, self.dtype, name=f"denselayer{i + 1}")
            new = layer(x, use_running_average, of_batch)
            x = jnp.concatenate([x, new], axis=-1)
            if of_batch is not None:
                of_batch = jax.tree.map(lambda *of: jnp.concatenate(of), of_batch, statistics(new))
        return x, of_batch


class Transition(nn.Module):
    """Halves the channels by a 1 x 1 convolution and the sides by averaging 2 x 2."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool, of_batch: Statistics | None) -> Array:
        """Maps (n, h, w, c), and what it has for statistics, to (n, ⌊h/2⌋, ⌊w/2⌋, ⌊c/2⌋)."""
        features = x.shape[-1] // 2
        x = nn.relu(BatchNorm(self.dtype, name="norm")(x, use_running_average, of_batch))
        x = Conv(features, 1, 1, self.dtype, KAIMING_FAN_IN, name="conv")(x)
        return nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))


class Features(nn.Module):
    """Everything before the global average, see `DenseNet`."""

    depths: tuple[int, ...]
    growth: int
    init_features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Maps (n, h, w, 3) to (n, h/32, w/32, features)."""
        x = Conv(self.init_features, 7, 2, self.dtype, KAIMING_FAN_IN, name="conv0")(x)
        x = nn.relu(BatchNorm(self.dtype, name="norm0")(x, use_running_average))
        x = max_pool(x)
        for i, depth in enumerate(self.depths):
            block = DenseBlock(depth, self.growth, self.dtype, name=f"denseblock{i + 1}")
            x, of_batch = block(x, use_running_average)
            if i + 1 < len(self.depths):
                transition = Transition(self.dtype, name=f"transition{i + 1}")
                x = transition(x, use_running_average, of_batch)
        return nn.relu(BatchNorm(self.dtype, name="norm5")(x, use_running_average, of_batch))


class DenseNet(nn.Module):
    """torchvision's DenseNet, without dropout.

    Attributes:
      depths: Layers in each of the four blocks.
      growth: Output channels of each layer.
      init_features: Channels after the first convolution.
      num_classes: Number of logits; 0 leaves the head out.
      dtype: Compute dtype.
    """

    depths: tuple[int, ...]
    growth: int
    init_features: int
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, use_running_average: bool | None = None
    ) -> Array:
        """Logits of images (n, h, w, 3), see `registry.create_model`.

        Raises:
          UserError: The images are smaller than `smallest_image(len(depths))`.
        """
        smallest = smallest_image(len(self.depths))
        if min(x.shape[1:3]) < smallest:
            raise UserError(
                f"images have the shape {x.shape}: this DenseNet takes {smallest} x {smallest} "
                "pixels or more"
            )
        sizes = (self.depths, self.growth, self.init_features)
        features = Features(*sizes, self.dtype, name="features")
        x = global_average(features(x, resolve(train, use_running_average)))
        return dense_head(x.shape[-1], self.num_classes)(x) if self.num_classes else x


def block(depths: tuple[int, ...], path: str) -> Block:
    """The dense layer of a parameter, see `ModelSpec.block`; a transition is of the one before it.

    So timm groups them.
    """
    if match := re.match(r"features/transition(\d+)/", path):
        number = int(match[1])
        return (number, depths[number - 1])
    behind = "features/norm5/|head/"
    return numbered_block(r"features/denseblock(\d+)/denselayer(\d+)/", behind, path)


_SPELLINGS = (
    # torchvision's older files, and CheXNet's
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    # MONAI
    (re.compile(r"(denselayer\d+)\.layers\."), r"\1."),
    (re.compile(r"^class_layers\.out\."), "classifier."),
)


def _usual_name(name: str) -> str:
    for pattern, usual in _SPELLINGS:
        name = pattern.sub(usual, name)
    return name


def _monai_name(name: str) -> str:
    """The inverse of MONAI's spellings above."""
    name = re.sub(r"(denselayer\d+)\.", r"\1.layers.", name)
    return re.sub(r"^classifier\.", "class_layers.out.", name)


def _other_network(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(len(shape) == 5 for shape in shapes.values()):
        return "a DenseNet for volumes, with kernels of three axes"
    if shapes.get("features.conv0.weight", (0, 0))[1] == 4:
        return "a DenseNet for images of four channels"
    return ""


for _layers, _digits, _depths, _growth, _init_features, _num_features in (
    (121, "a639ec97", (6, 12, 24, 16), 32, 64, 1024),
    (161, "8d451a50", (6, 12, 36, 24), 48, 96, 2208),
    (169, "b2777c0a", (6, 12, 32, 32), 32, 64, 1664),
    (201, "c1103571", (6, 12, 48, 32), 32, 64, 1920),
):
    register(
        ModelSpec(
            name=f"densenet{_layers}",
            build=functools.partial(
                DenseNet, depths=_depths, growth=_growth, init_features=_init_features
            ),
            num_features=_num_features,
            preprocessing=Preprocessing(size=224, resize="crop"),
            torch_head="classifier",
            licence="BSD-3-Clause",
            hub_id=f"timm/densenet{_layers}.tv_in1k",
            torch_file=f"densenet{_layers}-{_digits}.pth",
            min_size=smallest_image(len(_depths)),
            block=functools.partial(block, _depths),
            spaces=dense_spaces,
            stem="features.conv0",
            stem_norm="features.norm0",
            usual_name=_usual_name,
            other_network=_other_network,
            elsewhere={
                "torchvision": Elsewhere(
                    f"torchvision.models.densenet{_layers}(num_classes={{classes}})"
                ),
                "timm": Elsewhere(
                    f"timm.create_model('densenet{_layers}', num_classes={{classes}})"
                ),
                "monai": Elsewhere(
                    f"monai.networks.nets.DenseNet{_layers}("
                    "spatial_dims=2, in_channels=3, out_channels={classes}"
                    + (", init_features=96, growth_rate=48)" if _layers == 161 else ")"),
                    _monai_name,
                ),
            },
        )
    )
