"""The models by name, with what goes with their published weights."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medmerge_jax.errors import UserError
from medmerge_jax.models.densenet import DenseNet, smallest_image
from medmerge_jax.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A registered architecture.

    Attributes:
      name: As users give it.
      family: "resnet", "densenet" or "cifar_resnet".
      num_features: Width of the pooled features.
      input_size: Side of the images, in pixels, that published weights were trained on.
      torch_head: Name of the head in PyTorch state dicts.
      licence: Of the published weights.
      hub_id: Repository of the ImageNet-1k weights on the Hugging Face hub, if there is one.
      torch_file: Name of torchvision's ImageNet-1k file; ends in eight digits of its sha256.
      mean: Of the normalisation, per RGB channel, in units of [0, 1].
      std: Likewise.
      min_size: Side of the smallest images, in pixels, that the model takes.
    """

    name: str
    family: str
    num_features: int
    input_size: int
    torch_head: str
    licence: str
    hub_id: str | None = None
    torch_file: str | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    min_size: int = 1


def list_models() -> list[str]:
    """Names of all registered models, by family and size."""
    return list(_MODELS)


def get_spec(name: str) -> ModelSpec:
    """What is known of a model.

    Args:
      name: One of `list_models()`.

    Raises:
      UserError: There is no such model; names the nearest.
    """
    return _entry(name)[0]


def create_model(name: str, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """A Flax Linen module, hashable by value.

    `model.apply(variables, images, train=False)` maps normalised NHWC images to float32 logits
    (n, num_classes). With `train=True` batch norms use the batch's statistics, and update
    `batch_stats` if that collection is mutable.

    Args:
      name: One of `list_models()`.
      num_classes: Number of logits. 0 leaves the head out: the model returns the pooled
        features, (n, num_features).
      dtype: Of the computation. Parameters, statistics and logits are always float32.

    Raises:
      UserError: There is no such model, or `num_classes` is negative.
    """
    if num_classes < 0:
        raise UserError(f"num_classes is {num_classes}; wanted a number of classes, or 0")
    return _entry(name)[1](num_classes=num_classes, dtype=jnp.dtype(dtype))


def _entry(name: str) -> tuple[ModelSpec, Callable[..., nn.Module]]:
    if name in _MODELS:
        return _MODELS[name]
    near = difflib.get_close_matches(name, _MODELS, n=1, cutoff=0.0)[0]
    raise UserError(
        f"there is no model {name!r}; did you mean {near!r}? The models are {', '.join(_MODELS)}"
    )


def _builder(cls: Callable[..., nn.Module], **fields: Any) -> Callable[..., nn.Module]:
    return lambda num_classes, dtype: cls(**fields, num_classes=num_classes, dtype=dtype)


def _imagenet(
    name: str,
    family: str,
    num_features: int,
    digits: str,
    cls: Any,
    min_size: int = 1,
    **fields: Any,
) -> tuple[ModelSpec, Callable[..., nn.Module]]:
    spec = ModelSpec(
        name=name,
        family=family,
        num_features=num_features,
        input_size=224,
        torch_head="fc" if family == "resnet" else "classifier",
        licence="BSD-3-Clause",
        min_size=min_size,
        hub_id=f"timm/{name}.tv_in1k",
        torch_file=f"{name}-{digits}.pth",
    )
    return spec, _builder(cls, **fields)


def _resnet(
    layers: int, digits: str, block: Any, *depths: int
) -> tuple[ModelSpec, Callable[..., nn.Module]]:
    features = 512 if block is BasicBlock else 2048
    return _imagenet(
        f"resnet{layers}", "resnet", features, digits, ResNet, block=block, depths=depths
    )


def _densenet(
    layers: int, digits: str, *depths: int, growth: int = 32, init_features: int = 64
) -> tuple[ModelSpec, Callable[..., nn.Module]]:
    features = init_features
    for i, depth in enumerate(depths):
        features = (features if i == 0 else features // 2) + depth * growth
    return _imagenet(
        f"densenet{layers}",
        "densenet",
        features,
        digits,
        DenseNet,
        min_size=smallest_image(len(depths)),
        depths=depths,
        growth=growth,
        init_features=init_features,
    )


def _cifar_resnet(layers: int) -> tuple[ModelSpec, Callable[..., nn.Module]]:
    spec = ModelSpec(
        name=f"resnet{layers}",
        family="cifar_resnet",
        num_features=64,
        input_size=32,
        torch_head="linear",
        licence="BSD-2-Clause",
    )
    return spec, _builder(CifarResNet, depth=(layers - 2) // 6)


_MODELS = {
    spec.name: (spec, build)
    for spec, build in (
        _cifar_resnet(20),
        _cifar_resnet(32),
        _cifar_resnet(44),
        _cifar_resnet(56),
        _resnet(18, "f37072fd", BasicBlock, 2, 2, 2, 2),
        _resnet(34, "b627a593", BasicBlock, 3, 4, 6, 3),
        _resnet(50, "0676ba61", Bottleneck, 3, 4, 6, 3),
        _resnet(101, "63fe2227", Bottleneck, 3, 4, 23, 3),
        _resnet(152, "394f9c45", Bottleneck, 3, 8, 36, 3),
        _densenet(121, "a639ec97", 6, 12, 24, 16),
        _densenet(161, "8d451a50", 6, 12, 36, 24, growth=48, init_features=96),
        _densenet(169, "b2777c0a", 6, 12, 32, 32),
        _densenet(201, "c1103571", 6, 12, 48, 32),
    )
}
