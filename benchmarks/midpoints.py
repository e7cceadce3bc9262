r"""The middle between two networks trained from different seeds, by every merger.

    python benchmarks/midpoints.py --data FOLDER --workdir runs/midpoints --architecture resnet18 \
        --image-size 96

FOLDER holds `train/`, `val/` and `test/` with a folder of images for each class. Two networks are
trained from scratch, with seeds 0 and 1, that also decide the order of the images. Then each merger
makes one of the two, with calibration images from the training split and no labels; with and
without re-estimated batch-norm statistics. Everything is evaluated on the test split. Training
resumes when the same command is given again.
"""

import argparse
import time
from pathlib import Path

import ml_collections
import numpy as np
from results import by_row, output_option, write_table

import medmerge_jax as mm
from medmerge_jax import weights
from medmerge_jax.config import default_config, parse
from medmerge_jax.data import epoch_order, make_batches
from medmerge_jax.evaluation.predict import evaluate
from medmerge_jax.models import get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.recipes.inputs import decode, load_data
from medmerge_jax.runtime import cpu
from medmerge_jax.studies.execute import run

SEEDS = (0, 1)
QUESTION = "What is the middle between two networks trained from different seeds worth?"
OMITTED = ("weighted", "task_arithmetic")  # the first is uniform; the second wants an ancestor


def main() -> None:
    """Trains the parents and prints the table."""
    cpu.prepare()
    options = _options()
    folders = [options.workdir / f"seed{seed}" for seed in SEEDS]
    for seed, folder in zip(SEEDS, folders, strict=True):
        run(_parent(options, seed), folder)
    parents = [weights.load_parent(folder, options.architecture)[0] for folder in folders]
    measure = _Measure(options)
    for seed, parent in zip(SEEDS, parents, strict=True):
        measure.add(f"parent, seed {seed}", lambda parent=parent: parent)
    for method in mm.list_mergers():
        if method not in OMITTED:
            measure.add(method, lambda method=method: measure.merge(method, parents))
    answer = by_row(measure.rows, ["model"], "accuracy, recalibrated")
    notes = [
        f"{options.architecture}, {options.image_size} px, {options.epochs} epochs of each parent, "
        f"calibration on {options.images} training images, test split."
    ]
    answer = f"Accuracy with statistics estimated anew: {answer}."
    write_table(options.output, QUESTION, answer, measure.rows, notes)


class _Measure:
    """The data, and what a model does on its test split."""

    def __init__(self, options: argparse.Namespace):
        config = parse(_parent(options, 0))
        dataset = load_data(config, options.workdir)
        dataset, pixels, _ = decode(config, dataset)
        spec = get_spec(options.architecture)
        model = mm.create_model(options.architecture, num_classes=dataset.num_classes)
        self.architecture = options.architecture
        self.rows: list[dict[str, str]] = []
        self.network = Network(model, spec.preprocessing)
        self.test = make_batches(pixels["test"].array, dataset.splits["test"].labels, 64)
        rows = np.sort(epoch_order(len(pixels["train"].array), 0, 0)[: options.images])
        self.images = np.asarray(self.network.normalise(pixels["train"].array[rows]))

    def merge(self, method, parents, **options):
        """As `mm.merge`, on the calibration images."""
        return mm.merge(method, self.architecture, parents, self.images, **options)

    def add(self, name, make):
        """A row of the table: as `make()` gives it, and with its statistics re-estimated."""
        started = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - started
        row = {"model": name}
        recalibrated = self.merge("uniform", [model], recalibrate=True)
        for variables, suffix in ((model, ""), (recalibrated, ", recalibrated")):
            metrics = evaluate(self.network, variables, self.test, multilabel=False)
            row[f"accuracy{suffix}"] = f"{metrics['accuracy']:.3f}"
            row[f"macro F1{suffix}"] = f"{metrics['macro_f1']:.3f}"
        self.rows.append({**row, "seconds": f"{seconds:.0f}"})
        print(self.rows[-1], flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=1024, help="to calibrate with")
    output_option(parser, "midpoints")
    return parser.parse_args()


def _parent(options: argparse.Namespace, seed: int) -> ml_collections.ConfigDict:
    config = default_config().unlock()
    config.recipe = "ft"
    config.architecture = options.architecture
    config.image_size = options.image_size
    config.batch_size = options.batch_size
    config.seed = seed
    config.parents = ml_collections.ConfigDict({"c": "random"})
    config.start = "c"
    config.data.name = options.data.parent.name
    config.data.root = str(options.data)
    config.ft.epochs = options.epochs
    config.ft.learning_rate = options.learning_rate
    config.ft.schedule = "cosine"
    config.ft.warmup_epochs = 1.0
    config.select.epoch = "last"
    return config.lock()


if __name__ == "__main__":
    main()
