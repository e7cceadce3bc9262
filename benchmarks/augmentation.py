"""What augmentation costs beside the training step that it is part of.

    python benchmarks/augmentation.py --architecture resnet18 --image-size 224 --batch-size 32

Noise as images, everything trained; each round takes one step with every policy and one without,
and times the augmentation by itself, so that what else the machine does falls on all alike.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.images.augment import POLICIES, augment, epoch_key
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.runtime import cpu
from medmerge_jax.training import parameterization
from medmerge_jax.training.step import Task, init_state, train_step

CLASSES = 5


def main() -> None:
    """Prints the median and the least milliseconds of each."""
    cpu.prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

    spec = get_spec(options.architecture)
    model = create_model(options.architecture, CLASSES)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    start = parameterization.fine_tune(
        jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape[1:])))
    )
    plain = Task(Network(model, spec.mean, spec.std), start.assemble, True, False)
    tasks = {"none": plain}
    tasks |= {name: dataclasses.replace(plain, augmentation=POLICIES[name]) for name in POLICIES}
    states = {name: init_state(start) for name in tasks}
    weights, scalars = jnp.ones(CLASSES), np.float32([1e-4, 1e-2])
    alone = jax.jit(augment, static_argnums=0)
    batch = {
        "inputs": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "labels": np.arange(options.batch_size, dtype=np.int32) % CLASSES,
        "indices": np.arange(options.batch_size, dtype=np.int32),
    }
    batch = jax.device_put(batch)
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 1):
        key = epoch_key(0, number)
        for name, task in tasks.items():
            (states[name], _), seconds = timed(
                train_step, task, states[name], start.frozen, batch, *scalars, weights, key
            )
            times.setdefault((name, "step"), []).append(seconds)
            if task.augmentation is not None:
                images = (batch["inputs"], batch["indices"])
                _, seconds = timed(alone, task.augmentation, *images, key)
                times.setdefault((name, "augmentation alone"), []).append(seconds)
    for (name, what), values in times.items():
        measured = 1e3 * np.array(values[1:])  # the first compiles
        print(f"{name:8} {what:18} median {np.median(measured):7.1f} ms, "
              f"least {measured.min():7.1f} ms")  # fmt: skip


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What the function returns, computed, and the seconds that it took."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
