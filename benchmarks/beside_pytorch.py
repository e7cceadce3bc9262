"""What the benchmarks beside PyTorch share: their options, and the floor of the time."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytorch_recipe
import results
import torch
from measuring import seconds
from torch import nn

from medmerge_jax.runtime import cpu
from medmerge_jax.storage import atomic

# Dense matrix products per second (bfloat16, TF32) and bytes per second, from the data sheets.
_GPUS = {
    "H200": (989e12, 494e12, 4.8e12),
    "H100": (989e12, 494e12, 3.35e12),
    "A100": (312e12, 156e12, 2.0e12),
}


def prepare_process() -> None:
    """Memory, caches and flags. To be called first, before JAX has a device."""
    cpu.prepare()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some too
    jax.config.update("jax_compilation_cache_dir", str(atomic.cache_folder("xla")))


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options of those that time single steps of both sides."""
    gpu = torch.cuda.is_available()
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--models", type=listed(str), default="densenet121,resnet50")
    options.add_argument("--image-size", type=int, default=224)
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32"
    )
    options.add_argument("--blocks", type=int, default=10)
    options.add_argument("--steps", type=int, default=20 if gpu else 2, help="in a block")
    options.add_argument("--compile", default=pytorch_recipe.default_compile(), help="mode, or off")
    results.output_option(options, name)
    return options


def listed(kind: type) -> Callable[[str], list[Any]]:
    """The type of an option that takes several values with commas between them."""
    return lambda text: [kind(part) for part in text.split(",")]


def described(options: argparse.Namespace, peak: "Peak") -> str:
    """What was chosen by the options of `parser`, for the notes above a table."""
    return (
        f"{options.dtype}, {options.image_size} px, {options.blocks} blocks of {options.steps} "
        f"steps; torch.compile: {options.compile}. Peak: {peak}."
    )


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most that the machine does.

    Attributes:
      operations: Floating-point operations per second.
      bandwidth: Bytes per second, read and written.
      origin: Where the figures are from.
    """

    operations: float
    bandwidth: float
    origin: str

    @classmethod
    def of_machine(cls, dtype: torch.dtype) -> "Peak":
        """A GPU's from its data sheet; a CPU's measured, as matrix product and copy."""
        if torch.cuda.is_available():
            for name, (lower, tf32, bandwidth) in _GPUS.items():
                if name in torch.cuda.get_device_name():
                    operations = lower if dtype == torch.bfloat16 else tf32
                    return cls(operations, bandwidth, f"data sheet of the {name}")
        a, source = torch.ones(2048, 2048, dtype=dtype), torch.ones(2**26)
        product, target = torch.empty_like(a), torch.empty_like(source)
        multiply, b = jax.jit(jnp.matmul), jnp.ones(a.shape, str(dtype).removeprefix("torch."))
        least = min(  # of two libraries, either may be the faster on a machine
            _least(lambda: torch.mm(a, a, out=product)),
            _least(lambda: multiply(b, b).block_until_ready()),
        )
        operations = 2 * len(a) ** 3 / least
        copied = 2 * source.nbytes / _least(lambda: target.copy_(source))
        return cls(operations, copied, "measured: a product of 2048 × 2048 matrices, a copy")

    def __str__(self) -> str:
        return (
            f"{self.operations / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:.3g} GB/s ({self.origin})"
        )


def _least(function: Callable[[], Any], repeats: int = 40) -> float:
    return min(seconds(function) for _ in range(repeats))


@dataclasses.dataclass(frozen=True)
class Work:
    """What cannot be avoided.

    Attributes:
      operations: Of convolutions and dense layers.
      bytes: Read and written in the device's memory if everything else is fused.
    """

    operations: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.operations * times, self.bytes * times)

    def seconds(self, peak: Peak) -> float:
        """The floor of the time."""
        return max(self.operations / peak.operations, self.bytes / peak.bandwidth)


def forward_work(network: nn.Module, shape: Sequence[int], itemsize: int) -> Work:
    """Each layer's output written once and read once; the weights, float32, read once."""
    operations = elements = 0
    for module, output in pytorch_recipe.conv_outputs(network, shape):
        operations += 2 * output.numel() * module.weight[0].numel()
        elements += output.numel()
    weights = sum(p.numel() for p in network.parameters())
    return Work(operations, 2 * itemsize * elements + 4 * weights)


def training_work(
    network: nn.Module, shape: Sequence[int], itemsize: int, weight_passes: int
) -> Work:
    """Three times the operations, for the gradients of outputs and of weights.

    Bytes: the backward pass reads the outputs again, and writes and reads their gradients.

    Args:
      network: Torchvision's.
      shape: Of the images, (n, h, w, 3).
      itemsize: Bytes of an activation.
      weight_passes: How often something of the weights' size is read or written: 8 for AdamW
        (weights, gradients, two moments), 4 for a blend (two parents, forwards and backwards).
    """
    forward = forward_work(network, shape, itemsize)
    weights = 4 * sum(p.numel() for p in network.parameters())
    return Work(3 * forward.operations, 2.5 * (forward.bytes - weights) + weight_passes * weights)
