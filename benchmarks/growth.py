"""Time and memory of a step against batch, image size, parents, classes and data-set size.

    taskset -c 0,1 python benchmarks/growth.py --architecture resnet18 --image-size 64

One of them is varied at a time. Batch, image size and classes: fine-tuning. Parents: the merge
linear probe of 2 to 8; 1 stands for its control, the batch norms and the head of one network.
Data-set size: taking a batch out of resident images, and the order of an epoch. Values of one
quantity are timed in turn, in blocks. Memory is what the compiler says of the compiled step: what
it allocates besides its arguments, and these; donated arguments take no room for the results.

Checked: the loss of every step is finite, in the first step the same for all numbers of parents
(which are one network, the average of equals), and batches out of more images are the same.

Expected: linear in the images and in their pixels. Each parent adds its kernels to the arguments
and a pass over them, forwards and backwards, to the step: for ResNet-18, 45 MB read twice beside
some GFLOP. Classes and the size of the data set cost nothing worth the name.
"""

import argparse
from typing import Any

import beside_pytorch
import jax
import jax.numpy as jnp
import numpy as np
from measuring import Side, interleave, ratio, spread
from results import by_row, output_option, write_table

from medmerge_jax.data import ResidentBatches
from medmerge_jax.data.batches import epoch_order
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.recipes.experiment import compute_dtype
from medmerge_jax.training import parameterization
from medmerge_jax.training.parameterization import Parameterization
from medmerge_jax.training.step import Task, init_state, train_step

RATE, MIB = 1e-4, 2**20
QUESTION = "How do a step's time and memory grow with what is given to it?"
QUANTITIES = ("batch", "image size", "parents", "classes", "images in the data set")


def main() -> None:
    """Prints the table, and writes it."""
    beside_pytorch.prepare_process()
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="densenet121" if gpu else "resnet18")
    parser.add_argument("--image-size", type=int, default=224 if gpu else 64)
    parser.add_argument("--batch-size", type=int, default=64 if gpu else 8)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=QUANTITIES)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10 if gpu else 2, help="in a block")
    output_option(parser, "growth")
    options = parser.parse_args()
    base = (options.architecture, options.batch_size, options.image_size, options.classes)
    _, batch, size, _ = base
    values = dict(
        zip(
            QUANTITIES,
            (
                (batch // 4, batch // 2, batch, 2 * batch),
                (size // 2, size, 2 * size),
                (1, 2, 3, 4, 6, 8),
                (2, 10, 100, 1000),
                (256, 1024, 4096),
            ),
            strict=True,
        )
    )
    notes = [
        f"{options.architecture}, batch {batch}, {size} px, "
        f"{options.classes} classes where not varied; {options.blocks} blocks of {options.steps}."
    ]
    rows: list[dict[str, str]] = []
    for quantity in options.quantities:
        chosen = values[quantity]
        sides = {value: _side(quantity, value, base) for value in chosen}
        _check(quantity, sides)
        costs = interleave(
            [Side(value, side, side.wait) for value, side in sides.items()],
            options.blocks,
            options.steps,
        )
        for value, side in sides.items():
            rows.append(
                {
                    "varied": quantity,
                    "value": str(value),
                    "ms": spread([cost.wall for cost in costs[value]], 1e-3, 2),
                    "CPU ms": spread([cost.cpu for cost in costs[value]], 1e-3, 2),
                    "beside the first": spread(ratio(costs[value], costs[chosen[0]]), digits=2),
                    "in CPU time": spread(ratio(costs[value], costs[chosen[0]], "cpu"), digits=2),
                    "temporary, MiB": f"{side.temporary / MIB:.1f}",
                    "arguments, MiB": f"{side.arguments / MIB:.1f}",
                }
            )
        largest = [row for row in rows if row["value"] == str(values[row["varied"]][-1])]
        answer = by_row(largest, ["varied", "value"], "beside the first")
        answer = f"The largest value beside the smallest: {answer}."
        write_table(options.output, QUESTION, answer, rows, notes)


def _side(quantity: str, value: int, base: tuple[str, int, int, int]) -> Any:
    architecture, batch, size, classes = base
    if quantity == "images in the data set":
        return _Loading(value, batch, size)
    parents = value if quantity == "parents" else 0
    batch = value if quantity == "batch" else batch
    size = value if quantity == "image size" else size
    classes = value if quantity == "classes" else classes
    return _Step(architecture, batch, size, classes, parents)


class _Step:
    """A compiled step, again and again; of a merge if there are parents."""

    def __init__(self, architecture: str, batch: int, size: int, classes: int, parents: int):
        spec = get_spec(architecture)
        model = create_model(architecture, classes, compute_dtype("auto"))
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
        start = _start(variables, parents)
        network = Network(model, spec.preprocessing)
        task = Task(network, start.assemble, start.train_batch_norm, False)
        images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
        labels = np.arange(batch, dtype=np.int32) % classes
        self._state = init_state(start)
        self._rest = jax.device_put(
            (
                start.frozen,
                {"inputs": images, "labels": labels},
                np.float32(RATE),
                np.float32(1e-2),
                np.ones(classes, np.float32),
            )
        )
        self._compiled = train_step.lower(task, self._state, *self._rest).compile()
        memory = self._compiled.memory_analysis()
        self.temporary, self.arguments = memory.temp_size_in_bytes, memory.argument_size_in_bytes
        self.loss = jnp.zeros(())

    def __call__(self) -> None:
        """Dispatches a step."""
        self._state, self.loss = self._compiled(self._state, *self._rest)

    def wait(self) -> None:
        """For the last step."""
        jax.block_until_ready(self._state)


def _start(variables: Any, parents: int) -> Parameterization:
    if not parents:
        return parameterization.fine_tune(variables)
    if parents == 1:
        return parameterization.linear_probe(variables, norms="train")
    return parameterization.merge_linear_probe([variables] * parents, variables["params"]["head"])


class _Loading:
    """Batches out of resident images, epoch after epoch."""

    def __init__(self, count: int, batch: int, size: int):
        draw = np.random.default_rng(0)  # of more images, the first are the same
        images = np.concatenate(
            [draw.integers(0, 256, (256, size, size, 3), np.uint8) for _ in range(count // 256)]
        )
        self._count, self.temporary = count, batch * size * size * 3
        self.arguments = images.nbytes
        self.batches = ResidentBatches(images, np.zeros(count, np.int32), batch)
        self._epoch, self._iterator = 0, iter(())
        self.last: Any = None

    def __call__(self) -> None:
        """The next batch; before the first of an epoch also its order."""
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator = iter(self.batches.epoch(0, self._epoch))
            self._epoch += 1
            batch = next(self._iterator)
        self.last = batch

    def wait(self) -> None:
        """For the last batch."""
        jax.block_until_ready(self.last)


def _check(quantity: str, sides: dict[int, Any]) -> None:
    """See above."""
    if quantity == "images in the data set":
        first = [next(side.batches.ordered())[0]["inputs"] for side in sides.values()]
        for other in first[1:]:
            np.testing.assert_array_equal(first[0], other)
        orders = [epoch_order(count, 0, 0) for count in sides]
        if not all(np.array_equal(np.sort(one), np.arange(len(one))) for one in orders):
            raise SystemExit("the order of an epoch is no permutation")
        return
    losses = []
    for side in sides.values():
        side()
        losses.append(float(side.loss))
    if not np.isfinite(losses).all():
        raise SystemExit(f"{quantity}: losses {losses}")
    if quantity == "parents":
        np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


if __name__ == "__main__":
    main()
