"""What the benchmarks beside PyTorch share: fair timing of two sides, floors, and tables."""

import dataclasses
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from pytorch_recipe import conv_outputs
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


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the programs that are compared.

    Attributes:
      name: Unique among those that are interleaved.
      step: Begins the work.
      wait: Returns when all that was begun is done.
    """

    name: Any
    step: Callable[[], Any]
    wait: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step took, on average over a block."""

    wall: float
    cpu: float
    faults: float


def interleave(sides: Sequence[Side], blocks: int, steps: int) -> dict[Any, list[Cost]]:
    """Runs each side `steps` times in every block, in another order in each.

    So that what else the machine does falls on all alike. A first block, not counted, compiles.
    """
    costs: dict[Any, list[Cost]] = {side.name: [] for side in sides}
    for block in range(blocks + 1):
        first = block % len(sides)
        for side in (*sides[first:], *sides[:first]):
            cost = _measured(side, steps)
            if block:
                costs[side.name].append(cost)
    return costs


def _measured(side: Side, steps: int) -> Cost:
    side.wait()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        side.step()
    side.wait()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    return Cost(wall / steps, cpu / steps, faults / steps)


def median(costs: Sequence[Cost], what: str = "wall") -> float:
    """Over the blocks."""
    return statistics.median(getattr(cost, what) for cost in costs)


def ratio(costs: Sequence[Cost], others: Sequence[Cost], what: str = "wall") -> list[float]:
    """Lowest, median and highest over the blocks of what one took beside the other."""
    found = [getattr(a, what) / getattr(b, what) for a, b in zip(costs, others, strict=True)]
    return [min(found), statistics.median(found), max(found)]


def spread(values: Sequence[float], unit: float = 1.0, digits: int = 0) -> str:
    """Median (lowest–highest), in multiples of a unit; a single value by itself."""
    if len(values) == 1:
        return f"{values[0] / unit:.{digits}f}"
    shown = [f"{value / unit:.{digits}f}" for value in (min(values), max(values))]
    return f"{statistics.median(values) / unit:.{digits}f} ({'–'.join(shown)})"


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
        seconds = min(  # of two libraries, either may be the faster on a machine
            _least(lambda: torch.mm(a, a, out=product)),
            _least(lambda: multiply(b, b).block_until_ready()),
        )
        operations = 2 * len(a) ** 3 / seconds
        copied = 2 * source.nbytes / _least(lambda: target.copy_(source))
        return cls(operations, copied, "measured: a product of 2048 × 2048 matrices, a copy")

    def __str__(self) -> str:
        return (
            f"{self.operations / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:.3g} GB/s ({self.origin})"
        )


def _least(function: Callable[[], Any], repeats: int = 40) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


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
    for module, output in conv_outputs(network, shape):
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


def machine() -> str:
    """Date, processor, cores, load and versions, for the line above a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    cores = len(os.sched_getaffinity(0))
    return (
        f"{date.today()}, {device}, {cores} cores, load {os.getloadavg()[0]:.1f}; "
        f"JAX {jax.__version__}, PyTorch {torch.__version__}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def write_table(path: Path, notes: Sequence[str], rows: Sequence[dict[str, Any]], raw: Any) -> None:
    """Prints a Markdown table, and writes it to `path` and all figures beside it as JSON."""
    lines = [*notes, ""]
    lines.append("| " + " | ".join(rows[0]) + " |")
    lines.append("|---" + "|---:" * (len(rows[0]) - 1) + "|")
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(f"\n{text}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.with_suffix(".json").write_text(json.dumps(raw, indent=2) + "\n")
