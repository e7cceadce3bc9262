"""The hidden units of a network, and every place where they stand.

Hidden units can be put in another order without changing the function of a network, as long as
everything that makes or reads them follows. Which arrays those are is what permutation alignment
(Ainsworth et al. 2022, arXiv 2209.04836) and ZipIt! (Stoica et al. 2023, arXiv 2305.03053) need
to know. `find_spaces` derives it from the paths and shapes of a network's variables.

A residual stream is one space: blocks add to it, so that all of them, the shortcut and all that
read the stream share an order. Inside a block each convolution's output is a space of its own. A
DenseNet concatenates: each layer's output is a space that all later layers of the block and the
transition read, each in a slice of its input. Where a stream gets wider without parameters (He et
al.'s CIFAR networks pad it with zeros on both sides), the narrow stream's space goes on in the
middle of the wide one, and the padded units are a space of their own.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from medmerge_jax.merging.trees import flatten, network_order

Tree = Mapping[Any, Any]

FAMILIES = "ResNet (torchvision's, or He et al.'s for CIFAR) and DenseNet"


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Where the units of a space stand on an axis of an array.

    Attributes:
      path: Of the array in the variables, "params/layer1/0/conv2/kernel".
      axis: The axis, from 0 to ndim - 1.
      positions: (size,) of int: unit i is at `positions[i]`, one of many where streams are
        concatenated or padded. Other units' positions on the same axis are another space's.
      role: "out", the array makes the units (a kernel's c_out); "in", it reads them (a kernel's
        c_in, the head's rows); "scale", it goes along with them (a batch norm's four vectors).
    """

    path: str
    axis: int
    positions: np.ndarray
    role: str


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """Where the activations of a space can be observed.

    Attributes:
      module: Path of the module whose output is observed, "layer1/0/bn1".
      activation: What is to be applied to that output, as the network does next: "relu", "gelu" or
        "" for nothing.
      positions: (size,) of int: unit i is channel `positions[i]` of the output's last axis.
    """

    module: str
    activation: str
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """Hidden units that share one permutation.

    Attributes:
      name: Path of the module that first makes them, "layer1/0/conv3".
      size: Number of units.
      places: All of them, in network order, a module's parameters before its statistics.
      taps: At least one, in network order.
      heads: In how many blocks of equal size the units lie, one after another: an order exchanges
        whole blocks, and units inside a block.
      attention: Path of the attention whose spaces exchange the same heads, "" outside of one.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    taps: tuple[Tap, ...]
    heads: int = 1
    attention: str = ""


def exchanged_together(spaces: Iterable[Space]) -> list[tuple[Space, ...]]:
    """The spaces whose orders depend on each other, in order: those of an attention, or one."""
    groups: dict[str, list[Space]] = {}
    for space in spaces:
        # No attention has the name of a space.
        groups.setdefault(space.attention or space.name, []).append(space)
    return [tuple(group) for group in groups.values()]


def refuse_heads(spaces: Iterable[Space]) -> None:
    """A ValueError if units lie in heads, for methods that take units one by one."""
    for space in spaces:
        if space.heads > 1:
            raise ValueError(
                f"the units of {space.attention} lie in {space.heads} heads, which can only be "
                "exchanged whole, and this method takes units one by one"
            )


def find_spaces(variables: Tree) -> tuple[Space, ...]:
    """The spaces of a network, from the paths and shapes of its variables alone.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of a ResNet or DenseNet with the paths of
        this package's models, of any depths and widths. Leaves need a shape only. Without
        "head" or "batch_stats" these have no places.

    Returns:
      The spaces in network order of the modules that first make them.

    Raises:
      ValueError: The network is none of the known families, something in it is missing or
        unknown, or two shapes do not fit each other; names the path.
    """
    paths = flatten(variables.get("params", {})) if isinstance(variables, Mapping) else {}
    if "features/conv0/kernel" in paths:
        return dense_spaces(variables)
    if "layer1/0/conv1/kernel" in paths or not paths:
        return residual_spaces(variables)
    raise ValueError(
        f"hidden units are known for {FAMILIES} by their paths; found neither layer1/0/conv1 nor "
        f"features/conv0 in params, but {', '.join(list(paths)[:3])}; give those of another "
        "registered architecture, spaces=get_spec(NAME).spaces(variables)"
    )


def residual_spaces(variables: Tree) -> tuple[Space, ...]:
    """The spaces of a ResNet, see `find_spaces`."""
    network = Walk(variables)
    stream = network.convolution("conv1", None)
    network.norm("bn1", stream)
    network.tap("bn1", stream, "relu")
    for stage in network.children("", "layer"):
        for block in network.children(stage):
            stream = _residual_block(network, block, stream)
    network.head(stream)
    return network.spaces()


def dense_spaces(variables: Tree) -> tuple[Space, ...]:
    """The spaces of a DenseNet, see `find_spaces`."""
    network = Walk(variables)
    stream = network.convolution("features/conv0", None)
    network.norm("features/norm0", stream)
    network.tap("features/norm0", stream, "relu")
    blocks = network.children("features", "denseblock")
    for block in blocks:
        for layer in network.children(block, "denselayer"):
            stream = np.concatenate([stream, _dense_layer(network, layer, stream)])
        if block != blocks[-1]:
            transition = block.replace("denseblock", "transition")
            network.norm(f"{transition}/norm", stream)
            stream = network.convolution(f"{transition}/conv", stream)
            network.tap(transition, stream)
    network.norm("features/norm5", stream)
    network.head(stream)
    return network.spaces()


Stream = np.ndarray
"""Channels between modules: (c, 2) of int, of each channel its space's index and its unit there."""


class Walk:
    """Follows streams of channels through a network and notes the places of their units.

    An architecture of your own calls its methods in the order of its modules.
    """

    def __init__(self, variables: Tree) -> None:
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ValueError('variables are not a mapping with a collection "params"')
        self.has_statistics = bool(variables.get("batch_stats"))
        flat = {
            f"{collection}/{path}": leaf
            for collection in ("params", "batch_stats")
            for path, leaf in flatten(variables.get(collection, {})).items()
        }
        self.shapes = {path: tuple(np.shape(leaf)) for path, leaf in flat.items()}
        self._unknown = dict.fromkeys(self.shapes)
        self._spaces: list[Space] = []

    def children(self, module: str, prefix: str = "") -> list[str]:
        """Paths of the modules named `prefix` and digits in a module, in network order."""
        above = f"{module}/" if module else ""
        pattern = re.compile(f"params/({re.escape(above + prefix)}[0-9]+)/")
        matches = map(pattern.match, self.shapes)
        return sorted({match[1] for match in matches if match}, key=network_order)

    def has(self, module: str) -> bool:
        """Whether the network has parameters in a module."""
        start = f"params/{module}/"
        return any(path.startswith(start) for path in self.shapes)

    def new_units(self, module: str, size: int, *, heads: int = 1, attention: str = "") -> Stream:
        """A space of its own."""
        self._spaces.append(Space(module, size, (), (), heads, attention))
        return np.stack([np.full(size, len(self._spaces) - 1), np.arange(size)], axis=1)

    def features(self, module: str) -> int:
        """Output channels of a convolution."""
        path = f"params/{module}/kernel"
        if len(self._shape(path)) != 4:
            raise ValueError(
                f"{path}: shape {self.shapes[path]}; (height, width, c_in, c_out) is wanted"
            )
        return self.shapes[path][3]

    def convolution(
        self, module: str, inputs: Stream | None, outputs: Stream | None = None
    ) -> Stream:
        """Notes a convolution; its outputs are new units unless they are given."""
        features, path = self.features(module), f"params/{module}/kernel"
        if inputs is not None:
            self.note(path, 2, "in", inputs)
        outputs = self.new_units(module, features) if outputs is None else outputs
        self.note(path, 3, "out", outputs)
        return outputs

    def linear(self, module: str, inputs: Stream | None, *outputs: Stream) -> None:
        """Notes a linear layer with a bias, whose outputs are streams one after another.

        Without inputs these are no hidden units.
        """
        path = f"params/{module}/kernel"
        last = len(self._shape(path)) - 1
        if inputs is not None:
            self.note(path, last - 1, "in", inputs)
        self.note(path, last, "out", *outputs)
        self.note(f"params/{module}/bias", 0, "out", *outputs)

    def norm(self, module: str, stream: Stream) -> None:
        """Notes a batch norm, or a layer norm, on a stream."""
        for name in ("scale", "bias"):
            self.note(f"params/{module}/{name}", 0, "scale", stream)
        if self.has_statistics:
            for name in ("mean", "var"):
                self.note(f"batch_stats/{module}/{name}", 0, "scale", stream)

    def tap(self, module: str, stream: Stream, activation: str = "", *, start: int = 0) -> None:
        """Notes that a module's output is a stream, from channel `start` on."""
        for space, positions in self._parts(stream):
            found = self._spaces[space]
            tap = Tap(module, activation, start + positions)
            self._spaces[space] = dataclasses.replace(found, taps=(*found.taps, tap))

    def head(self, *streams: Stream) -> None:
        """Notes the head's rows, if there is a head, which reads streams one after another."""
        if self.has("head"):
            self.note("params/head/kernel", 0, "in", *streams)
            self._unknown.pop("params/head/bias", None)

    def spaces(self) -> tuple[Space, ...]:
        """What was noted, when all of the network has been."""
        if self._unknown:
            raise ValueError(
                f"{next(iter(self._unknown))} has no part in the networks whose hidden units are "
                f"known, {FAMILIES}"
            )
        return tuple(self._spaces)

    def note(self, path: str, axis: int, role: str, *streams: Stream) -> None:
        """Notes that streams lie one after another on an axis of an array, see `Place`."""
        shape, size = self._shape(path), sum(map(len, streams))
        if axis >= len(shape) or shape[axis] != size:
            raise ValueError(
                f"{path}: shape {shape}, but {size} channels were expected on axis {axis}"
            )
        self._unknown.pop(path, None)
        start = 0
        for stream in streams:
            for space, positions in self._parts(stream):
                found, place = self._spaces[space], Place(path, axis, start + positions, role)
                self._spaces[space] = dataclasses.replace(found, places=(*found.places, place))
            start += len(stream)

    def _shape(self, path: str) -> tuple[int, ...]:
        if path not in self.shapes:
            raise ValueError(f"{path} is absent")
        return self.shapes[path]

    def _parts(self, stream: Stream) -> Iterable[tuple[int, np.ndarray]]:
        """The spaces in a stream, each with its units' positions."""
        for space in dict.fromkeys(stream[:, 0].tolist()):
            channels = np.flatnonzero(stream[:, 0] == space)
            positions = np.empty(self._spaces[space].size, int)
            positions[stream[channels, 1]] = channels
            yield space, positions


def _residual_block(network: Walk, block: str, inputs: Stream) -> Stream:
    convolutions = network.children(block, "conv")
    if len(convolutions) < 2:
        # The units of a stream that one convolution maps to itself cannot be matched in one step.
        raise ValueError(
            f"params/{block} has {len(convolutions)} convolutions; 2 or more are wanted"
        )
    *inner, last = convolutions
    stream = inputs
    for convolution in inner:
        stream = network.convolution(convolution, stream)
        norm = convolution.replace("conv", "bn")
        network.norm(norm, stream)
        network.tap(norm, stream, "relu")
    downsample = f"{block}/downsample"
    if network.has(downsample):
        outputs = network.convolution(last, stream)
        network.convolution(f"{downsample}/0", inputs, outputs)
        network.norm(f"{downsample}/1", outputs)
    else:
        # A shortcut without parameters pads the stream with new units on both sides. Fewer channels
        # are an error, which is raised where the shapes are compared.
        outputs, more = inputs, network.features(last) - len(inputs)
        if more > 0:
            padding = network.new_units(last, more)
            outputs = np.concatenate([padding[: more // 2], inputs, padding[more // 2 :]])
        network.convolution(last, stream, outputs)
    network.norm(last.replace("conv", "bn"), outputs)
    network.tap(block, outputs)
    return outputs


def _dense_layer(network: Walk, layer: str, inputs: Stream) -> Stream:
    network.norm(f"{layer}/norm1", inputs)
    inner = network.convolution(f"{layer}/conv1", inputs)
    network.norm(f"{layer}/norm2", inner)
    network.tap(f"{layer}/norm2", inner, "relu")
    outputs = network.convolution(f"{layer}/conv2", inner)
    # No ReLU: each of the layers that read these channels has a batch norm of its own first.
    network.tap(f"{layer}/conv2", outputs)
    return outputs
