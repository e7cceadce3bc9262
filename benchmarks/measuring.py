"""What the benchmarks share: fair timing of several sides in turn, ratios, and memory.

It needs neither JAX nor PyTorch, so that a process whose memory is measured can import it.
"""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


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
    wait: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step took, on average over a block: seconds, processor seconds and page faults."""

    wall: float
    cpu: float
    faults: float


def interleave(sides: Sequence[Side], blocks: int, steps: int) -> dict[Any, list[Cost]]:
    """Runs each side `steps` times in every block, in another order in each.

    So what else the machine does falls on all alike. A first block, not counted, compiles.
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
    return Cost(wall / steps, cpu / steps, (after.ru_minflt - before.ru_minflt) / steps)


def seconds(function: Callable[[], Any]) -> float:
    """The wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def median(costs: Sequence[Cost], what: str = "wall") -> float:
    """Over the blocks."""
    return statistics.median(getattr(cost, what) for cost in costs)


def ratio(costs: Sequence[Cost], others: Sequence[Cost], what: str = "wall") -> list[float]:
    """Lowest, median and highest over the blocks of what one took beside the other."""
    ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(costs, others, strict=True)]
    return [min(ratios), statistics.median(ratios), max(ratios)]


def spread(values: Sequence[float], unit: float = 1.0, digits: int = 0) -> str:
    """Median (lowest–highest), in multiples of a unit; a single value by itself."""
    if len(values) == 1:
        return f"{values[0] / unit:.{digits}f}"
    ends = [f"{value / unit:.{digits}f}" for value in (min(values), max(values))]
    return f"{statistics.median(values) / unit:.{digits}f} ({'–'.join(ends)})"


def forget_peak() -> None:
    """Lets Linux measure the peak of this process's memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Bytes that this process has, "VmRSS", or has had at most, "VmHWM". On Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no field {field}")
