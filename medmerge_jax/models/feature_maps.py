"""The feature maps inside of a network: which there are, and what they are of images."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.models.network import Network
from medmerge_jax.models.registry import create_model, get_spec
from medmerge_jax.models.taps import outputs_of


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """What a module returns, of one image.

    Attributes:
      module: Its path, "layer1/0/bn1".
      shape: (h, w, channels).
      relu: Whether the network applies a ReLU to it next, as far as its spaces say.
      tapped: Whether it is where hidden units are observed, see `merging.spaces.Tap`.
    """

    module: str
    shape: tuple[int, int, int]
    relu: bool = False
    tapped: bool = False


def list_feature_maps(architecture: str, size: int) -> list[FeatureMap]:
    """All modules that return a feature map, in the order in which they return; computes nothing.

    Args:
      architecture: A registered one.
      size: Side of the images in pixels.
    """
    spec, module = get_spec(architecture), create_model(architecture, 0)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    found: dict[str, tuple[int, int, int]] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if path and context.method_name == "__call__" and getattr(result, "ndim", 0) == 4:
            found[path] = result.shape[1:]
        return result

    with nn.intercept_methods(note):
        variables = jax.eval_shape(module.init, jax.random.key(0), images)
    spaces = spec.spaces(variables) if spec.spaces else ()
    relu = {tap.module: tap.activation == "relu" for space in spaces for tap in space.taps}
    return [
        FeatureMap(path, shape, relu.get(path, False), path in relu)
        for path, shape in found.items()
    ]


def feature_maps(
    network: Network, wanted: Sequence[FeatureMap], variables: Mapping[str, Any], images: Any
) -> list[jax.Array]:
    """The wanted feature maps, (n, h, w, channels) each, after the ReLU that follows.

    Args:
      network: Its model's head is not used: one without (0 classes) takes variables without.
      wanted: Of `list_feature_maps`.
      variables: `{"params": ..., "batch_stats": ...}`; running statistics are used.
      images: uint8 or normalised float (n, size, size, 3), see `Network.normalise`.
    """
    modules = tuple(one.module for one in wanted)
    outputs = outputs_of(network.model, modules, variables, network.normalise(images))
    return [nn.relu(outputs[one.module]) if one.relu else outputs[one.module] for one in wanted]
