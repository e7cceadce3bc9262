"""Learning rates: optax's schedules, as one number per step."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from medmerge_jax.registry import Registry

_BLOCK = 4096
"""Steps computed at once. One size, so that stages of other lengths compile nothing anew."""

SCHEDULES: Registry[Callable[[float, int], optax.Schedule]] = Registry("schedule")
"""From the peak and the number of steps after the warm-up, t from 0 to 1 along these:

constant     peak
cosine       ½ peak (1 + cos πt)
linear       peak (1 − t)
exponential  peak · 100⁻ᵗ
"""
SCHEDULES.add("constant", lambda peak, steps: optax.constant_schedule(peak))
SCHEDULES.add("cosine", optax.cosine_decay_schedule)
SCHEDULES.add("linear", lambda peak, steps: optax.linear_schedule(peak, 0.0, steps))
SCHEDULES.add("exponential", lambda peak, steps: optax.exponential_decay(peak, steps, 0.01))


def learning_rates(schedule: str, peak: float, steps: int, *, warmup_steps: int = 0) -> np.ndarray:
    """Learning rate of every step of a stage, float32 (steps,).

    It rises linearly in the warm-up, which is part of the steps, from peak / warmup_steps to the
    peak; then it follows the schedule, a name of `SCHEDULES`.
    """
    rates = SCHEDULES[schedule](peak, max(steps - warmup_steps, 1))
    if warmup_steps:
        warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
        rates = optax.join_schedules([warmup, rates], [warmup_steps])
    blocks = []
    with jax.enable_x64(True):  # the numbers are rounded once, at the end
        for first in range(0, steps, _BLOCK):
            values = np.asarray(rates(np.arange(first, first + _BLOCK)), np.float64)
            blocks.append(np.broadcast_to(values, _BLOCK))  # a constant comes as one number
    return np.concatenate(blocks)[:steps].astype(np.float32)


def triangular_rates(
    epochs: int, steps_per_epoch: int, *, cycle: int, highest: float, lowest: float
) -> np.ndarray:
    """Learning rate of every step of FissionFusion's generation, float32 (epochs · steps,).

    Step i, from 0, of epoch e, from 1, is at t = (e mod cycle + i / steps) / cycle of its cycle.
    The rate falls in a straight line from the highest at t = 0 to the lowest at t = ½ and rises
    again. As e starts at 1, the first epoch is in mid-descent, see `minima`.
    """
    steps = np.arange(epochs * steps_per_epoch, dtype=np.float64)
    t = (1 + steps / steps_per_epoch) % cycle / cycle
    return (lowest + (highest - lowest) * np.abs(1 - 2 * t)).astype(np.float32)


def minima(epochs: int, cycle: int) -> tuple[int, ...]:
    """Epochs, from 1, of `triangular_rates` after which the rate is the lowest.

    >>> minima(17, cycle=4)
    (1, 5, 9, 13, 17)
    """
    return tuple(e for e in range(1, epochs + 1) if (e + 1) % cycle == cycle // 2)
