"""What augmentation costs beside the training step that follows it.

    python benchmarks/augmentation.py --architecture resnet18 --image-size 224 --batch-size 32

Noise as images, everything trained; each round takes one step with every policy and one without,
and times the augmentation by itself, so that what else the machine does falls on all alike.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from measuring import seconds, spread
from results import by_row, output_option, write_table

from medmerge_jax.images.augment import POLICIES, Policy, epoch_key
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.runtime import cpu
from medmerge_jax.training import parameterization
from medmerge_jax.training.augmentation import augmented_batch
from medmerge_jax.training.step import Batch, Task, init_state, train_step

CLASSES = 5
QUESTION = "What does augmentation cost beside the training step that follows it?"


def main() -> None:
    """Prints the table, and writes it."""
    cpu.prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    output_option(parser, "augmentation")
    options = parser.parse_args()

    spec = get_spec(options.architecture)
    model = create_model(options.architecture, CLASSES)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    start = parameterization.fine_tune(
        jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape[1:])))
    )
    task = Task(Network(model, spec.preprocessing), start.assemble, True, False)
    policies = {"none": None, **POLICIES}
    states = {name: init_state(start) for name in policies}
    weights, scalars = jnp.ones(CLASSES), np.float32([1e-4, 1e-2])
    batch = {
        "inputs": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "labels": np.arange(options.batch_size, dtype=np.int32) % CLASSES,
        "indices": np.arange(options.batch_size, dtype=np.int32),
    }
    batch = jax.device_put(batch)
    steps: dict[str, list[float]] = {name: [] for name in policies}
    shares: dict[str, list[float]] = {name: [] for name in POLICIES}
    only: dict[str, list[float]] = {name: [] for name in POLICIES}
    for number in range(options.rounds + 1):
        key = epoch_key(0, number)
        for name, policy in policies.items():

            def augmented(policy: Policy | None = policy, key: jax.Array = key) -> Batch:
                return augmented_batch(policy, None, batch, key) if policy else batch

            def alone(augmented: Callable[[], Batch] = augmented) -> None:
                jax.block_until_ready(augmented())

            def step(name: str = name, augmented: Callable[[], Batch] = augmented) -> None:
                states[name], _ = jax.block_until_ready(
                    train_step(task, states[name], start.frozen, augmented(), *scalars, weights)
                )

            took = seconds(step)
            if number:  # the first round compiles
                steps[name].append(took)
            if policy:
                took = seconds(alone)
                if number:
                    only[name].append(took)
                    shares[name].append(100 * took / steps["none"][-1])
    rows = [
        {
            "policy": name,
            "augmentation alone, ms": spread(only[name], 1e-3, 1) if name in only else "–",
            "share of the step without, %": spread(shares[name], digits=1) if name in only else "–",
            "step with it, ms": spread(steps[name], 1e-3),
        }
        for name in policies
    ]
    answer = by_row(rows[1:], ["policy"], "share of the step without, %")
    notes = [
        f"{options.architecture}, float32, {options.image_size} px, batch {options.batch_size}, "
        f"everything trained; medians (lowest–highest) of {options.rounds} rounds."
    ]
    answer = f"Percent of a training step: {answer}."
    write_table(options.output, QUESTION, answer, rows, notes)


if __name__ == "__main__":
    main()
