"""Whole recipes, from the command to the results, beside the same recipes in PyTorch.

    python benchmarks/whole_recipe.py --workdir runs/whole_recipe            # on a GPU
    python benchmarks/whole_recipe.py --workdir runs/tiny --architecture resnet18 --scale 0.02 \
        --epochs 2 --image-size 32 --batch-size 8                            # anywhere

Draws a data set of the size of APTOS 2019 (2,929 / 366 / 367 images), makes two parents of random
weights, and runs MedMerge and LP-FT as the programs that a user would start:
`python -m medmerge_jax.main` (through `watched_main.py`, which writes down where its time goes)
and `pytorch_recipe.py`. Each twice: with empty caches, and with the decoded images and compiled
programs of the first run. The sides take turns, with the same parents, head and order of images. In
float32, the mean losses of all epochs must agree; in bfloat16, where rounding may decide which
epoch is the best, that of the first.

The same command again goes on with the runs that are missing; one that was interrupted begins anew.

The floor is what the convolutions of all epochs need at the machine's peak.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which leaves the GPU to those it starts

import jax
import jax.numpy as jnp
import numpy as np
import pytorch_recipe
import torch
from beside_pytorch import Peak, Work, forward_work, training_work
from PIL import Image
from results import by_row, output_option, write_table
from safetensors.numpy import save_file

from medmerge_jax.data import write_synthetic
from medmerge_jax.models import LinearHead, get_spec
from medmerge_jax.storage import atomic

HERE = Path(__file__).parent
QUESTION = "How long do whole recipes take beside PyTorch's, from the command to the results?"
APTOS = {"train": 2929, "val": 366, "test": 367}
CLASSES = 4  # of the drawn eyes
DRAWN_SIZE = 64
FREE = ("workdir", "output", "recipes")
"""Options that may change from one command to the next."""
RECIPES = {"medmerge": ("merge_lp", "ft"), "lp_ft": ("lp", "ft")}
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
"""Of mean losses of an epoch, relatively."""


def main() -> None:
    """Prints the table, and writes it."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of these options alone")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--architecture", default="densenet121")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--stored-size", type=int, default=512, help="of the image files")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=50, help="of each stage")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of images")
    parser.add_argument("--dtype", choices=TOLERANCES, default="bfloat16" if gpu else "float32")
    output_option(parser, "whole_recipe")
    options = parser.parse_args()
    check_workdir(options)

    peak = Peak.of_machine(getattr(torch, options.dtype))
    counts = {name: max(CLASSES, round(options.scale * n)) for name, n in APTOS.items()}
    draw_images(options.workdir / "data", counts, options.stored_size)
    make_parents(options)
    notes = [
        f"{options.architecture}, {options.dtype}, {options.image_size} px, batch "
        f"{options.batch_size}, {'/'.join(map(str, counts.values()))} images, {options.epochs} "
        f"epochs a stage. Peak: {peak}.",
    ]
    rows, raw = [], []
    for recipe in options.recipes:
        floor = recipe_work(options, recipe, counts).seconds(peak)
        for caches in ("empty", "filled"):
            ours, theirs = (once(options, run, recipe, caches) for run in (run_jax, run_pytorch))
            notes.append(f"{recipe}, caches {caches}: {check(options, ours, theirs)}")
            rows.append(row(recipe, caches, floor, ours, theirs))
            raw.append({"recipe": recipe, "caches": caches, "JAX": ours, "PyTorch": theirs})
            answer = by_row(rows, ["recipe", "caches"], "PyTorch / JAX")
            write_table(options.output, QUESTION, f"PyTorch / JAX: {answer}.", rows, notes, raw=raw)


def check_workdir(options: argparse.Namespace) -> None:
    """Raises SystemExit if there are runs of other options, whose results would be mixed in."""
    marker = options.workdir / "options.json"
    own = {name: value for name, value in vars(options).items() if name not in FREE}
    if marker.exists() and json.loads(marker.read_text()) != own:
        raise SystemExit(f"{options.workdir} holds runs with the options {marker.read_text()}")
    atomic.write_text(marker, json.dumps(own))


def once(
    options: argparse.Namespace, run: Callable[..., dict[str, Any]], recipe: str, caches: str
) -> dict[str, Any]:
    """What `run` returns; of an earlier command, if that came to its end.

    An interrupted run's folder is removed, and so are the caches that it was to fill.
    """
    workdir = options.workdir / f"{run.__name__}-{recipe}-{caches}"
    cache = options.workdir / f"{run.__name__}-{recipe}-cache"
    finished = workdir.with_suffix(".finished.json")
    if not finished.exists():
        shutil.rmtree(workdir, ignore_errors=True)
        if caches == "empty":
            shutil.rmtree(cache, ignore_errors=True)
        atomic.write_text(finished, json.dumps(run(options, recipe, workdir, cache)))
    return json.loads(finished.read_text())


def draw_images(folder: Path, counts: dict[str, int], size: int) -> None:
    """PNG files by split and class; drawn small, and enlarged: one of 512 pixels takes 0.2 s."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        drawn, enlarged = Path(name, "drawn"), Path(name, "enlarged")
        write_synthetic(drawn, "fundus", counts, size=min(size, DRAWN_SIZE))

        def enlarge(path: Path) -> None:
            target = enlarged / path.relative_to(drawn)
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.resize((size, size), Image.Resampling.BICUBIC).save(target, compress_level=1)

        with ThreadPoolExecutor() as pool:
            list(pool.map(enlarge, drawn.rglob("*.png")))
        enlarged.rename(folder)


def make_parents(options: argparse.Namespace) -> None:
    """b.safetensors, c.safetensors, and the head that the package starts from with seed 0."""
    for seed, name in enumerate("bc"):
        network = pytorch_recipe.new_network(options.architecture, CLASSES, seed)
        pytorch_recipe.save_network(network, options.workdir / f"{name}.safetensors")
    features = jnp.zeros((1, get_spec(options.architecture).num_features))
    head = LinearHead(CLASSES).init(jax.random.key(0), features)["params"]["head"]
    tensors = {"weight": np.asarray(head["kernel"]).T.copy(), "bias": np.asarray(head["bias"])}
    save_file(tensors, options.workdir / "head.safetensors")


def run_jax(options: argparse.Namespace, recipe: str, workdir: Path, cache: Path) -> dict[str, Any]:
    """Seconds and losses of `python -m medmerge_jax.main`."""
    watched = workdir.with_suffix(".json")
    config = {
        "recipe": recipe,
        "architecture": options.architecture,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "lp.epochs": options.epochs,
        "ft.epochs": options.epochs,
        "precision": options.dtype,
        "data.root": options.workdir / "data",
        "parents.b": options.workdir / "b.safetensors",
        "parents.c": options.workdir / "c.safetensors",
    }
    total = _run(
        [HERE / "watched_main.py", watched, "--config", HERE.parent / "configs" / "folder.py"],
        ["--workdir", workdir, *(f"--config.{field}={value}" for field, value in config.items())],
        workdir.with_suffix(".log"),
        MEDMERGE_JAX_CACHE=cache,
    )
    results = json.loads((workdir / "results.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "total": total,
        "seconds": json.loads(watched.read_text()),
        "losses": {
            stage: [line["train_loss"] for line in lines if line["stage"] == stage]
            for stage in RECIPES[recipe]
        },
        "test_macro_f1": results["test"]["macro_f1"],
    }


def run_pytorch(
    options: argparse.Namespace, recipe: str, workdir: Path, cache: Path
) -> dict[str, Any]:
    """Seconds and losses of `pytorch_recipe.py`."""
    names = ("b", "c", "head")
    b, c, head = (options.workdir / f"{name}.safetensors" for name in names)
    total = _run(
        [HERE / "pytorch_recipe.py", "--recipe", recipe, "--architecture", options.architecture],
        [
            *("--data", options.workdir / "data", "--weights", b, c, "--head", head),
            *("--workdir", workdir, "--cache", cache, "--image-size", options.image_size),
            *("--batch-size", options.batch_size, "--epochs", options.epochs),
            *("--dtype", options.dtype),
        ],
        workdir.with_suffix(".log"),
        TORCHINDUCTOR_CACHE_DIR=cache / "inductor",
    )
    return {"total": total, **json.loads((workdir / "results.json").read_text())}


def _run(program: list[Any], arguments: list[Any], log: Path, **environment: Any) -> float:
    """Wall time of a Python program, which must succeed."""
    command = list(map(str, [sys.executable, *program, *arguments]))
    variables = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    started = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(
            command,
            env={**variables, **{name: str(value) for name, value in environment.items()}},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see {log}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - started


def check(options: argparse.Namespace, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Says how far the losses differ.

    Raises:
      SystemExit: Too far.
    """
    losses, expected = (np.concatenate(list(side["losses"].values())) for side in (ours, theirs))
    compared = len(losses) if options.dtype == "float32" else 1
    worst = float(np.max(np.abs(losses / expected - 1)[:compared]))
    tolerance = TOLERANCES[options.dtype]
    if not worst <= tolerance:
        raise SystemExit(f"losses differ by {worst:.1e}, more than {tolerance}: {ours}\n{theirs}")
    return f"losses of {compared} epochs differ by {worst:.0e} at most."


def recipe_work(options: argparse.Namespace, recipe: str, counts: dict[str, int]) -> Work:
    """Of all epochs: training, validation, and the evaluations of the end."""
    network = pytorch_recipe.new_network(options.architecture, CLASSES, seed=0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    itemsize = jnp.dtype(options.dtype).itemsize
    forward = forward_work(network, shape, itemsize) * (1 / options.batch_size)
    fine_tune, merge = (
        training_work(network, shape, itemsize, passes) * (1 / options.batch_size)
        for passes in (8, 4)
    )
    train, val, test = (counts[name] for name in ("train", "val", "test"))
    epoch = fine_tune * train + forward * val
    end = forward * (val + test)
    if recipe == "lp_ft":
        return epoch * options.epochs + forward * (train + val) + end
    return (epoch + merge * train + forward * val) * options.epochs + end


def row(
    recipe: str, caches: str, floor: float, ours: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, str]:
    """A line of the table."""
    cells = {"recipe": recipe, "caches": caches, "floor s": f"{floor:.3g}"}
    for name, side in (("JAX", ours), ("PyTorch", theirs)):
        parts = (f"{what} {seconds:.1f}" for what, seconds in side["seconds"].items())
        cells[f"{name} s"] = f"{side['total']:.1f}"
        cells[f"{name}: of which"] = ", ".join(parts)
    return {**cells, "PyTorch / JAX": f"{theirs['total'] / ours['total']:.2f}"}


if __name__ == "__main__":
    main()
