"""From image files to the step: decoding into the cache, loading, and the share of an epoch.

    taskset -c 0,1 python benchmarks/data_path.py --architecture resnet18 --images 256

How fast photographs are decoded is the matter of `prepare_images.py`. Here: drawn JPEGs of
640 x 480, a cache made of them (and found again), then epochs of the package's loop as it is, with
resident and with streamed batches, beside the same number of steps on one batch that lies on the
device. What an epoch takes beyond its steps is what loading, ordering, transfers and the loop cost.
The three are taken in turn, in blocks.

Checked: both kinds of batches hold the same pixels, those of the cache.

Expected: a batch of 8 at 224 px has 1.2 MB, which is copied once or twice at some 10 GB/s, 0.2 ms
of a step of a second; on a GPU 64 images are 9.6 MB, resident 4 us at 4.8 TB/s, streamed 0.2 ms at
50 GB/s and hidden behind the step.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import beside_pytorch
import jax
import jax.numpy as jnp
import numpy as np
from measuring import Side, interleave, ratio, spread
from PIL import Image
from results import by_row, output_option, write_table

from medmerge_jax.data import ResidentBatches, StreamedBatches
from medmerge_jax.data.dataset import Split
from medmerge_jax.images.cache import cached_pixels
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.recipes.experiment import compute_dtype
from medmerge_jax.runtime.progress import Bar
from medmerge_jax.training import loop, parameterization
from medmerge_jax.training.progress import Progress
from medmerge_jax.training.stage import Stage
from medmerge_jax.training.step import Task, init_state, train_step

CLASSES, RATE = 5, 1e-4
QUESTION = "How much of an epoch do loading, ordering, transfers and the loop cost?"


def main() -> None:
    """Prints the tables, and writes them."""
    beside_pytorch.prepare_process()
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="densenet121" if gpu else "resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=2929 if gpu else 128)
    parser.add_argument("--batch-size", type=int, default=64 if gpu else 8)
    parser.add_argument("--blocks", type=int, default=6)
    output_option(parser, "data_path")
    options = parser.parse_args()
    labels = np.arange(options.images, dtype=np.int32) % CLASSES
    notes = [
        f"{options.architecture}, {options.images} images, "
        f"{options.image_size} px, batch {options.batch_size}, {options.blocks} epochs of each."
    ]
    with tempfile.TemporaryDirectory() as name:
        pixels, note = _decode(Path(name), labels, options.image_size)
        notes.append(note)
        batches = {
            "resident": ResidentBatches(pixels, labels, options.batch_size),
            "streamed": StreamedBatches(pixels, labels, options.batch_size),
        }
        _check(batches, pixels)
        steps = batches["resident"].steps_per_epoch
        sides = {
            kind: _Epochs(options.architecture, one, options.image_size)
            for kind, one in batches.items()
        }
        sides["steps alone"] = _Steps(options.architecture, batches["resident"], options.image_size)
        costs = interleave(
            [Side(kind, side, side.wait) for kind, side in sides.items()], options.blocks, 1
        )
        loading = interleave(
            [Side(kind, _Loading(one)) for kind, one in batches.items()], options.blocks, 1
        )
    alone, rows = costs["steps alone"], []
    for kind, found_costs in costs.items():
        row = {
            "batches": kind,
            "epoch, s": spread([cost.wall for cost in found_costs], digits=2),
            "CPU s": spread([cost.cpu for cost in found_costs], digits=2),
            "beside its steps alone": spread(ratio(found_costs, alone), digits=3),
            "in CPU time": spread(ratio(found_costs, alone, "cpu"), digits=3),
        }
        only = loading.get(kind)
        row["loading alone, ms a batch"] = (
            spread([cost.wall / steps for cost in only], 1e-3, digits=2) if only else ""
        )
        rows.append(row)
    answer = by_row(rows[:2], ["batches"], "beside its steps alone")
    answer = f"An epoch beside its steps alone, median (lowest–highest): {answer}."
    write_table(options.output, QUESTION, answer, rows, notes)


def _decode(folder: Path, labels: np.ndarray, size: int) -> tuple[np.ndarray, str]:
    """The cache of drawn JPEGs, and how long it took to make and to find."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(len(labels)):
        small = rng.integers(0, 256, (15, 20, 3), np.uint8)
        paths.append(folder / f"{number}.jpg")
        image = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(paths[-1], quality=90)
    split = Split(tuple(path.name for path in paths), tuple(paths), labels)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        pixels = cached_pixels(split, size, "squash", folder / "cache").array
        seconds.append(time.perf_counter() - started)
    note = (
        f"Decoded and kept: {len(labels) / seconds[0]:.0f} images/s of 640 × 480; found again in "
        f"{seconds[1] * 1e3:.1f} ms."
    )
    return pixels, note


def _check(batches: dict[str, Any], pixels: np.ndarray) -> None:
    for kind, one in batches.items():
        for number, batch in enumerate(one.epoch(0, 0)):
            if not np.array_equal(batch["inputs"], pixels[np.asarray(batch["indices"])]):
                raise SystemExit(f"{kind}: batch {number} does not hold the pixels of the cache")


class _Stage:
    def __init__(self, architecture: str, batches: Any, size: int):
        spec = get_spec(architecture)
        model = create_model(architecture, CLASSES, compute_dtype("auto"))
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
        self.start = parameterization.fine_tune(variables)
        network = Network(model, spec.preprocessing)
        self.task = Task(network, self.start.assemble, True, False)
        self.state = init_state(self.start)
        self.batches, self.weights = batches, jnp.ones(CLASSES)

    def wait(self) -> None:
        """For the last step."""
        jax.block_until_ready(self.state)


class _Steps(_Stage):
    """As many steps as an epoch has, on its first batch."""

    def __call__(self) -> None:
        """An epoch."""
        if not hasattr(self, "batch"):
            self.batch = next(iter(self.batches.epoch(0, 0)))
            self.scalars = jax.device_put([np.float32(RATE), np.float32(1e-2)])
        for _ in range(self.batches.steps_per_epoch):
            self.state, _ = train_step(
                self.task, self.state, self.start.frozen, self.batch, *self.scalars, self.weights
            )


class _Epochs(_Stage):
    """Epochs by the loop itself, without its validation."""

    done = 0

    def __call__(self) -> None:
        """The next epoch."""
        stage = Stage(name="ft", epochs=1, learning_rate=RATE)
        progress = _Position(stage, self.state)
        steps = self.batches.steps_per_epoch
        progress.steps_per_epoch, progress.rates = steps, np.full(steps, RATE, np.float32)
        constants = jax.device_put([np.float32(stage.weight_decay), self.weights])
        with Bar("ft", 1, "images") as bar:
            loop._train_epoch(
                self.task,
                progress,
                self.start.frozen,
                self.batches,
                constants,
                type(self).done,
                bar,
            )
        type(self).done += 1
        self.state = progress.state


class _Position(Progress):
    """Without checkpoints."""

    def __init__(self, stage: Any, state: Any):
        self.stage, self.state, self._checkpoints = stage, state, None
        self.values = {"epoch": 0, "step": 0, "epoch_seconds": 0.0}


class _Loading:
    """An epoch of batches that nothing is done with."""

    def __init__(self, batches: Any):
        self.batches, self.done = batches, 0

    def __call__(self) -> None:
        """The next epoch."""
        for batch in self.batches.epoch(0, self.done):
            jax.block_until_ready(batch)
        self.done += 1


if __name__ == "__main__":
    main()
