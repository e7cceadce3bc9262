"""Residual networks: torchvision's for ImageNet and He et al.'s for CIFAR.

He et al., "Deep residual learning for image recognition" (arXiv 1512.03385). Submodules bear
torchvision's names, so that a parameter's path is its PyTorch name with "/" for ".".
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.merging.spaces import residual_spaces
from medmerge_jax.models.layers import (
    KAIMING_FAN_IN,
    KAIMING_FAN_OUT,
    Conv,
    dense_head,
    global_average,
    max_pool,
)
from medmerge_jax.models.norm import BatchNorm, resolve
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.models.registry import Elsewhere, ModelSpec, numbered_block, register

Array = jax.Array


class Block(nn.Module):
    """A residual block.

    Attributes:
      width: Channels inside.
      stride: Of its 3 x 3 convolution, the first if there are two, and of the shortcut.
      dtype: Compute dtype.
    """

    width: int
    stride: int
    dtype: Any


class BasicBlock(Block):
    """Two 3 x 3 convolutions and the shortcut."""

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Maps (n, h, w, c) to (n, ⌈h/stride⌉, ⌈w/stride⌉, width)."""
        convolutions = ((self.width, 3, self.stride), (self.width, 3, 1))
        y = branch(x, convolutions, self.dtype, use_running_average)
        return nn.relu(y + shortcut(x, y.shape[-1], self.stride, self.dtype, use_running_average))


class Bottleneck(Block):
    """1 x 1, 3 x 3 and 1 x 1 convolutions; the stride is in the 3 x 3 one ("v1.5")."""

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Maps (n, h, w, c) to (n, ⌈h/stride⌉, ⌈w/stride⌉, 4 · width)."""
        convolutions = ((self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1))
        y = branch(x, convolutions, self.dtype, use_running_average)
        return nn.relu(y + shortcut(x, y.shape[-1], self.stride, self.dtype, use_running_average))


class CifarBlock(Block):
    """Two 3 x 3 convolutions and a shortcut without parameters (option A of the paper)."""

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Maps (n, h, w, c) to (n, ⌈h/stride⌉, ⌈w/stride⌉, width)."""
        convolutions = ((self.width, 3, self.stride), (self.width, 3, 1))
        y = branch(x, convolutions, self.dtype, use_running_average, KAIMING_FAN_IN)
        extra = (self.width - x.shape[-1]) // 2
        x = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra, extra))))


def branch(
    x: Array,
    convolutions: Sequence[tuple[int, int, int]],
    dtype: Any,
    use_running_average: bool,
    kernel_init: Callable[..., Array] = KAIMING_FAN_OUT,
) -> Array:
    """Convolutions of (features, size, stride), each with a batch norm, and ReLUs in between.

    They are the calling module's submodules `conv1`, `bn1`, `conv2`, ….
    """
    for i, (features, size, stride) in enumerate(convolutions, 1):
        x = x if i == 1 else nn.relu(x)
        x = Conv(features, size, stride, dtype, kernel_init, name=f"conv{i}")(x)
        x = BatchNorm(dtype, name=f"bn{i}")(x, use_running_average)
    return x


class Downsample(nn.Module):
    """The shortcut where the shape changes: 1 x 1 convolution "0" and batch norm "1"."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Maps (n, h, w, c) to (n, ⌈h/stride⌉, ⌈w/stride⌉, features)."""
        x = Conv(self.features, 1, self.stride, self.dtype, name="0")(x)
        return BatchNorm(self.dtype, name="1")(x, use_running_average)


def shortcut(x: Array, features: int, stride: int, dtype: Any, use_running_average: bool) -> Array:
    """The identity where the shape stays, else the calling module's submodule `downsample`."""
    if stride == 1 and x.shape[-1] == features:
        return x
    return Downsample(features, stride, dtype, name="downsample")(x, use_running_average)


class Stage(nn.Module):
    """Blocks "0", "1", … of one width, the first with the stride."""

    block: type[Block]
    depth: int
    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Maps (n, h, w, c) to (n, ⌈h/stride⌉, ⌈w/stride⌉, c')."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = self.block(self.width, stride, self.dtype, name=str(i))(x, use_running_average)
        return x


class ResNet(nn.Module):
    """torchvision's ResNet.

    Attributes:
      block: `BasicBlock` or `Bottleneck`.
      depths: Blocks in each of the four stages.
      num_classes: Number of logits; 0 leaves the head out.
      dtype: Compute dtype.
    """

    block: type[Block]
    depths: tuple[int, ...]
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, use_running_average: bool | None = None
    ) -> Array:
        """Logits of images (n, h, w, 3), see `registry.create_model`."""
        use_running_average = resolve(train, use_running_average)
        x = max_pool(nn.relu(branch(x, [(64, 7, 2)], self.dtype, use_running_average)))
        for i, depth in enumerate(self.depths):
            stride = 1 if i == 0 else 2
            stage = Stage(self.block, depth, 64 * 2**i, stride, self.dtype, name=f"layer{i + 1}")
            x = stage(x, use_running_average)
        x = global_average(x)
        return dense_head(x.shape[-1], self.num_classes)(x) if self.num_classes else x


class CifarResNet(nn.Module):
    """He et al.'s ResNet for 32-pixel images: three stages of 16, 32 and 64 channels.

    Attributes:
      depth: Blocks in each stage; the network has 6 · depth + 2 layers.
      num_classes: Number of logits; 0 leaves the head out.
      dtype: Compute dtype.
    """

    depth: int
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, use_running_average: bool | None = None
    ) -> Array:
        """Logits of images (n, h, w, 3), see `registry.create_model`."""
        use_running_average = resolve(train, use_running_average)
        x = branch(x, [(16, 3, 1)], self.dtype, use_running_average, KAIMING_FAN_IN)
        x = nn.relu(x)
        for i in range(3):
            stride = 1 if i == 0 else 2
            stage = Stage(
                CifarBlock, self.depth, 16 * 2**i, stride, self.dtype, name=f"layer{i + 1}"
            )
            x = stage(x, use_running_average)
        x = global_average(x)
        return dense_head(x.shape[-1], self.num_classes)(x) if self.num_classes else x


_block = functools.partial(numbered_block, r"layer(\d+)/(\d+)/", "head/")

_NUMBERED = {"0": "conv1", "1": "bn1", **{f"{i + 3}": f"layer{i}" for i in range(1, 5)}}
"""Children by their number, as `nn.Sequential(*network.children())` names them (RadImageNet)."""


def _usual_name(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{_NUMBERED.get(first, first)}{dot}{rest}".replace(".shortcut.", ".downsample.")


def _usual_cifar_name(name: str) -> str:
    return re.sub(r"^fc\.", "linear.", _usual_name(name))


def _other_network(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Of ResNet's many variants; version 1, whose stride is elsewhere, has the same shapes."""
    stem = shapes.get("conv1.weight", ())
    if any(len(shape) == 5 for shape in shapes.values()):
        return "a ResNet for volumes, with kernels of three axes"
    if "conv1.0.weight" in shapes or len(shapes.get("layer1.0.downsample.1.weight", ())) == 4:
        return "a ResNet-D or -C (a stem of three convolutions, or averages in the shortcuts)"
    if any(".se." in name or ".se_module." in name for name in shapes):
        return "a squeeze-and-excitation ResNet"
    if len(stem) == 4 and stem[1] == 4:
        return "a ResNet for images of four channels"
    if len(stem) == 4 and stem[2] == 3 and stem[0] == 64:
        return "a ResNet with a stem of 3 x 3, for small images"
    if len(stem) == 4 and stem[0] == 16 and "layer2.0.downsample.0.weight" in shapes:
        return "a ResNet for small images whose shortcuts have convolutions"
    return ""


for _depth in (3, 5, 7, 9):
    register(
        ModelSpec(
            name=f"resnet{6 * _depth + 2}",
            build=functools.partial(CifarResNet, depth=_depth),
            num_features=64,
            preprocessing=Preprocessing(size=32),
            torch_head="linear",
            licence="BSD-2-Clause",
            block=_block,
            spaces=residual_spaces,
            stem="conv1",
            stem_norm="bn1",
            usual_name=_usual_cifar_name,
            other_network=_other_network,
        )
    )

for _layers, _digits, _kind, _depths in (
    (18, "f37072fd", BasicBlock, (2, 2, 2, 2)),
    (34, "b627a593", BasicBlock, (3, 4, 6, 3)),
    (50, "0676ba61", Bottleneck, (3, 4, 6, 3)),
    (101, "63fe2227", Bottleneck, (3, 4, 23, 3)),
    (152, "394f9c45", Bottleneck, (3, 8, 36, 3)),
):
    register(
        ModelSpec(
            name=f"resnet{_layers}",
            build=functools.partial(ResNet, block=_kind, depths=_depths),
            num_features=512 if _kind is BasicBlock else 2048,
            preprocessing=Preprocessing(size=224, resize="crop"),
            torch_head="fc",
            licence="BSD-3-Clause",
            hub_id=f"timm/resnet{_layers}.tv_in1k",
            torch_file=f"resnet{_layers}-{_digits}.pth",
            block=_block,
            spaces=residual_spaces,
            stem="conv1",
            stem_norm="bn1",
            usual_name=_usual_name,
            other_network=_other_network,
            elsewhere={
                "torchvision": Elsewhere(
                    f"torchvision.models.resnet{_layers}(num_classes={{classes}})"
                ),
                "timm": Elsewhere(f"timm.create_model('resnet{_layers}', num_classes={{classes}})"),
                "monai": Elsewhere(
                    f"monai.networks.nets.resnet{_layers}(spatial_dims=2, n_input_channels=3, "
                    "num_classes={classes}, conv1_t_stride=2, shortcut_type='B', "
                    "bias_downsample=False)"
                ),
            },
        )
    )
