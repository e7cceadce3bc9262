"""Images per second of `predict` beside evaluation's, and its memory over many images.

    taskset -c 0,1 python benchmarks/predict.py --workdir runs/predict

Both sides begin with the same JPEG files of 224 px and end with probabilities: `predict` decodes
while the device computes; evaluation decodes all images first, into an empty cache, then predicts.
Blocks of `--images` in turn. Memory is that of a process that predicts `--many` files with a small
network: what it holds after the first 1,000, and the most that it holds later.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from measuring import forget_peak, memory, seconds, spread
from PIL import Image
from results import output_option, write_table

from medmerge_jax.data import make_batches
from medmerge_jax.data.dataset import Split
from medmerge_jax.data.listing import Listing
from medmerge_jax.evaluation.predict import predict
from medmerge_jax.evaluation.prediction_file import write_predictions
from medmerge_jax.images import cached_pixels
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.runtime import cpu
from medmerge_jax.weights import Model

QUESTION = "How fast is predict beside evaluation, and does its memory grow?"
CLASSES, DIFFERENT = 5, 200


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--images", type=int, default=320, help="of a block")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--many", type=int, default=20_000, help="images for the memory")
    output_option(parser, "predict")
    options = parser.parse_args()
    cpu.prepare()
    files = _files(options.workdir)
    model = _model(options.architecture, 224)
    paths = list(_repeated(files, options.images))
    sides = {
        "predict": lambda: _predict(model, paths, options.workdir),
        "evaluation": lambda: _evaluate(model, paths, options.workdir),
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(options.blocks + 1):
        for name in sorted(sides, reverse=block % 2 == 1):
            duration = seconds(sides[name])
            if block:  # the first compiles
                took[name].append(duration)
    ratios = [e / p for e, p in zip(took["evaluation"], took["predict"], strict=True)]
    first, most = _memory(files, options)
    rows = [
        {"side": name, "images/s": spread([options.images / one for one in times], digits=1)}
        for name, times in took.items()
    ]
    answer = (
        f"Throughput {spread(ratios, digits=2)} times evaluation's; over {options.many} images the "
        f"process grows from {first:.0f} MB after the first 1,000 to {most:.0f} MB at most."
    )
    notes = [
        f"{options.architecture}, 224 px, float32; blocks of {options.images} JPEG files, medians "
        f"(lowest–highest) of {options.blocks} blocks. Memory: resnet20, 32 px from 224 px files."
    ]
    write_table(options.output, QUESTION, answer, rows, notes)


def _files(workdir: Path) -> list[Path]:
    """JPEG files of 224 px, drawn once: smooth noise, which is as large as a photograph."""
    folder = workdir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(DIFFERENT):
        path = folder / f"{number}.jpg"
        if not path.exists():
            coarse = Image.fromarray(random.integers(0, 256, (28, 28, 3), np.uint8))
            coarse.resize((224, 224), Image.Resampling.BICUBIC).save(path, quality=92)
    return sorted(folder.glob("*.jpg"))


def _model(architecture: str, size: int) -> Model:
    images = np.zeros((1, size, size, 3), np.float32)
    variables = jax.jit(create_model(architecture, CLASSES).init)(jax.random.key(0), images)
    return Model(architecture, variables, Preprocessing(size))


def _repeated(files: list[Path], count: int) -> Iterator[Path]:
    for number in range(count):
        yield files[number % len(files)]


def _predict(model: Model, paths: list[Path], workdir: Path) -> None:
    out = workdir / "predictions.csv"
    listing = Listing([f"{number}" for number in range(len(paths))], [*paths], [])
    write_predictions({"model": model}, listing, out)


def _evaluate(model: Model, paths: list[Path], workdir: Path) -> None:
    names = tuple(f"{number}" for number in range(len(paths)))
    split = Split(names, tuple(paths), np.zeros(len(paths), np.int64), None)
    cache = Path(tempfile.mkdtemp(dir=workdir))
    look = model.preprocessing
    pixels = cached_pixels(split, look.size, look.resize, cache, rendering=look.rendering)
    spec = get_spec(model.architecture)
    module = create_model(model.architecture, CLASSES)
    network = Network(module, Preprocessing(look.size, mean=spec.preprocessing.mean))
    batches = make_batches(pixels.array, np.zeros(len(paths)), 32)
    predict(network, dict(model.variables), batches)
    shutil.rmtree(cache)


def _memory(files: list[Path], options: argparse.Namespace) -> tuple[float, float]:
    """MB after the first 1,000 images, and the most of all later ones."""
    model = _model("resnet20", 32)
    _predict(model, list(_repeated(files, 1000)), options.workdir)
    first = memory("VmRSS") / 2**20
    forget_peak()
    _predict(model, list(_repeated(files, options.many)), options.workdir)
    return first, memory("VmHWM") / 2**20


if __name__ == "__main__":
    main()
