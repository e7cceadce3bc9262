"""The architectures by name, and what each says of itself.

An architecture is one file: the module and its `ModelSpec`. Nobody else asks what family a network
is of or guesses by the names or shapes of its leaves what they are for: they ask the spec.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.errors import UserError
from medmerge_jax.merging.coefficients import Tie, is_conv_kernel, is_head, untied
from medmerge_jax.merging.spaces import Space
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.registry import Registry

LEAF_NAMES: Mapping[tuple[str, str], str] = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
"""PyTorch's names of the leaves of convolutions, linear layers and batch norms."""


def leaf_role(path: str, leaf: Any) -> str:
    """What a parameter is in a network of convolutions, batch norms and a linear head.

    Args:
      path: "layer1/0/conv2/kernel", without the collection.
      leaf: Anything with `ndim`.

    Returns:
      "head"; "kernel", what MedMerge has coefficients for; "norm", what a probe may train with the
      head; or "other".
    """
    if is_head(path):
        return "head"
    if is_conv_kernel(path, leaf):
        return "kernel"
    return "norm" if path.rpartition("/")[2] in ("scale", "bias") else "other"


Block = tuple[float, ...]
"""Numbers of a block, which sort in network order: (2, 0) of "layer2/0"."""

STEM: Block = ()
"""What comes before the first block."""

LAST: Block = (math.inf,)
"""What comes behind the last block: the head, and the norm before it."""


def numbered_block(numbers: str, behind: str, path: str) -> Block:
    r"""The block of a parameter, see `ModelSpec.block`, by patterns of its path.

    >>> numbered_block(r"layer(\d+)/(\d+)/", "head/", "layer2/0/conv1/kernel")
    (2, 0)

    Args:
      numbers: Has a group for each number of a block.
      behind: Of what comes behind the last block.
      path: "layer2/0/conv1/kernel", without the collection.
    """
    if match := re.match(numbers, path):
        return tuple(map(int, match.groups()))
    return LAST if re.match(behind, path) else STEM


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """The same network in a library of PyTorch's.

    Attributes:
      create: The expression that makes it there; `{classes}` is the number of classes.
      rename: From torchvision's name of a tensor to the library's.
    """

    create: str
    rename: Callable[[str], str] = str


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSpec:
    """An architecture.

    Attributes:
      name: As users give it.
      build: `build(num_classes=5, dtype=jnp.float32)` makes the module, see `create_model`.
      num_features: Width of the pooled features.
      preprocessing: Of the images that published weights were trained on.
      torch_head: Name of the head in PyTorch state dicts.
      further_heads: Names of others there, if the model has the mean of several heads, each on an
        equal part of the features, the first on the first part.
      licence: Of the published weights.
      hub_id: Repository of the ImageNet-1k weights on the Hugging Face hub, if there is one.
      torch_file: Name of the ImageNet-1k file in PyTorch's cache, torchvision's or its authors';
        ends in eight digits of its sha256.
      min_size: Side of the smallest images, in pixels, that the model takes.
      patch: Sides of images are multiples of it, in pixels.
      role: What a parameter is, see `leaf_role`.
      tie: Which kernels share MedMerge's coefficients, see `merging.coefficients.Tie`.
      block: From a parameter's path to its block, `STEM` or `LAST`, see `numbered_block`; None if
        these are not known, so that none can be frozen and no rate decays from block to block.
      drop_path: Whether `build` takes `drop_path` too, see `create_model`.
      spaces: From variables to the hidden units that can be permuted, see `merging.spaces`; None
        if these are not known, so that nothing can be aligned.
      leaf_names: PyTorch's last part of a leaf's name, by collection and the last part of its path.
      stem: PyTorch's name of the first convolution, the one that sees the images; "" if there is
        none, so that neither grey stems nor another normalisation can be adapted.
      stem_norm: That of the batch norm behind it.
      usual_name: From a tensor's name in older files and other libraries to torchvision's.
      other_network: From shapes by torchvision's name to what other network of this family they
        are of, in words; "" where that is not known.
      rngs: Names of the random streams that the module takes in training, such as "dropout".
      elsewhere: The same network in other libraries, by "torchvision", "timm" and "monai".
    """

    name: str
    build: Callable[..., nn.Module]
    num_features: int
    preprocessing: Preprocessing
    torch_head: str
    further_heads: tuple[str, ...] = ()
    licence: str = "unknown"
    hub_id: str | None = None
    torch_file: str | None = None
    min_size: int = 1
    patch: int = 1
    role: Callable[[str, Any], str] = leaf_role
    tie: Tie = untied
    block: Callable[[str], Block] | None = None
    drop_path: bool = False
    spaces: Callable[[Any], tuple[Space, ...]] | None = None
    leaf_names: Mapping[tuple[str, str], str] = dataclasses.field(
        default_factory=lambda: LEAF_NAMES
    )
    stem: str = ""
    stem_norm: str = ""
    usual_name: Callable[[str], str] = str
    other_network: Callable[[Mapping[str, tuple[int, ...]]], str] = lambda _: ""
    rngs: tuple[str, ...] = ()
    elsewhere: Mapping[str, Elsewhere] = dataclasses.field(default_factory=dict)

    def refusal(self, size: int) -> str:
        """Why images of this side, in pixels, cannot be taken; "" if they can."""
        if size < self.min_size:
            return f"{self.name} takes images of {self.min_size} pixels or more"
        if size % self.patch:
            return f"{self.name} takes images whose side is a multiple of {self.patch} pixels"
        return ""

    def depths(self, paths: Iterable[str]) -> dict[str, int]:
        """Of each parameter: 0 for the stem, then the number of its block, then one more.

        Args:
          paths: Of all parameters, with the head's or without.

        Returns:
          By path; none if the blocks are not known.
        """
        if self.block is None:
            return {}
        blocks = {path: self.block(path) for path in paths}
        order = sorted({STEM, LAST, *blocks.values()})
        return {path: order.index(block) for path, block in blocks.items()}

    @functools.cached_property
    def num_blocks(self) -> int:
        """How many blocks there are; 0 if they are not known."""
        return max(self.depths(self.shapes(1)["params"]).values(), default=1) - 1

    def torch_name(self, collection: str, path: str) -> str:
        """The name in PyTorch's state dict of a leaf.

        Raises:
          UserError: The architecture has no such leaf.
        """
        module, _, leaf = path.rpartition("/")
        if (collection, leaf) not in self.leaf_names:
            raise UserError(f"{collection} has {path!r}, which {self.name} has not")
        module = self.torch_head if module == "head" else module.replace("/", ".")
        return ".".join(filter(None, (module, self.leaf_names[collection, leaf])))

    def torch_axes(self, path: str, ndim: int) -> tuple[int, ...]:
        """A leaf's axes in PyTorch's order; a kernel (*window, c_in, c_out) is mirrored there."""
        if path.rpartition("/")[2] != "kernel":
            return tuple(range(ndim))
        return (ndim - 1, ndim - 2, *range(ndim - 2))

    def shapes(self, num_classes: int = 0) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Every leaf of the variables, by collection and path; nothing is computed."""
        size = max(self.min_size, 32)
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        model = create_model(self.name, num_classes)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        return {collection: flatten(tree) for collection, tree in variables.items()}


MODELS: Registry[ModelSpec] = Registry("model")


def register(spec: ModelSpec) -> ModelSpec:
    """Makes an architecture known by its name, and returns it."""
    return MODELS.add(spec.name, spec)


def list_models() -> list[str]:
    """Names of all registered models, by family and size.

    >>> list_models()[:5]
    ['resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet18']
    """
    return list(MODELS)


def get_spec(name: str) -> ModelSpec:
    """What is known of a model.

    Args:
      name: One of `list_models()`.

    Raises:
      UserError: There is no such model; names the nearest.
    """
    return MODELS[name]


def create_model(
    name: str, num_classes: int, dtype: Any = jnp.float32, *, drop_path: float = 0.0
) -> nn.Module:
    """A Flax Linen module, hashable by value.

    `model.apply(variables, images, train=False)` maps normalised NHWC images to float32 logits
    (n, num_classes). With `train=True` everything that training switches is on: dropout and its
    like, for models that have it (they then want `rngs`), and batch norms use the batch's
    statistics, and update `batch_stats` if that collection is mutable. `use_running_average`
    decides on the batch norms alone: True freezes their statistics whatever `train` is.

    Args:
      name: One of `list_models()`.
      num_classes: Number of logits. 0 leaves the head out: the model returns the pooled
        features, (n, num_features).
      dtype: Of the computation. Parameters, statistics and logits are always float32.
      drop_path: Stochastic depth: with what probability the last block's branches are left out of
        an image's training step, and those of the blocks before it less and less often. Above 0
        training wants the random stream "drop_path".

    Raises:
      UserError: There is no such model, it has no stochastic depth, or `num_classes` is negative.

    >>> model = create_model("resnet20", num_classes=5)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> model.apply(variables, jnp.zeros((2, 32, 32, 3))).shape
    (2, 5)
    """
    if num_classes < 0:
        raise UserError(f"num_classes is {num_classes}; wanted a number of classes, or 0")
    spec, options = get_spec(name), {"drop_path": drop_path} if drop_path else {}
    if options and not spec.drop_path:
        raise UserError(f"drop_path is {drop_path}: {name} has no stochastic depth; 0 is wanted")
    return spec.build(num_classes=num_classes, dtype=jnp.dtype(dtype), **options)
