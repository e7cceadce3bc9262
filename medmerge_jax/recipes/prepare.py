"""The inputs of an experiment: all that can be wrong with them shows before anything is trained."""

import hashlib
import json
from pathlib import Path

import numpy as np

from medmerge_jax.config import Config
from medmerge_jax.data import DataSet, ImageHashes, load_hashes, make_batches
from medmerge_jax.data.hashing import HASHES_FILE, find_hashes
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import METRICS, titles
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.models import get_spec
from medmerge_jax.recipes import inputs
from medmerge_jax.recipes.calibration import estimate_statistics
from medmerge_jax.recipes.checks import needed_parents
from medmerge_jax.recipes.experiment import Inputs, Prepared
from medmerge_jax.runtime.mesh import data_mesh
from medmerge_jax.runtime.progress import say


def check_paths(config: Config) -> None:
    """Names everything that is missing at once, of this experiment and of its sources."""
    parts = {"": config, **{f"sources.{n}.": part for n, part in config.sources.items()}}
    lines = [
        f"  {prefix}{line}"
        for prefix, part in parts.items()
        for line in (
            *inputs.missing_data(part.data),
            *inputs.missing_parents(part, needed_parents(part), list(config.sources)),
        )
    ]
    if lines:
        lines += [config.help] if config.help else []
        raise UserError("not everything that the config names is there:\n" + "\n".join(lines))


def sources_of(config: Config) -> set[str]:
    """Names of the sources that make parents of the experiment."""
    values = [config.parents[name] for name in needed_parents(config)]
    return {v.removeprefix("source:") for v in values if v.startswith("source:")}


def source_folder(workdir: Path, name: str) -> Path:
    """The run directory of a source."""
    return workdir / "sources" / name


def prepare(config: Config, workdir: Path, sources: dict[str, Prepared]) -> Prepared:
    """Loads what there is and shows what is wrong with it, before anything is trained."""
    spec = get_spec(config.architecture)
    if config.image_size < spec.min_size:
        raise UserError(
            f"config.image_size = {config.image_size}: {spec.name} takes images of "
            f"{spec.min_size} pixels or more"
        )
    dataset = inputs.load_data(config, workdir)
    dataset.check()
    _check_order(config, dataset)
    _check_metric(config, dataset)
    values = {name: config.parents[name] for name in needed_parents(config)}
    on_disk = [name for name, value in values.items() if not value.startswith("source:")]
    parents = inputs.load_parents(config, on_disk, {})
    dataset, pixels, rendering = inputs.decode(config, dataset)
    trained_on: dict[str, ImageHashes | None] = {}
    for name, value in values.items():
        source = value.removeprefix("source:")
        if name in parents:
            if value not in ("imagenet", "random", "zeros"):
                card = parents[name][1]
                trained_on[name] = find_hashes(Path(card["file"]), card.get("data_fingerprint"))
        elif source in sources:
            trained_on[name] = sources[source].hashes
        else:
            file = source_folder(workdir, source) / HASHES_FILE
            trained_on[name] = load_hashes(file)[0] if file.exists() else None
    dataset, pixels, hashes, audit = inputs.audit_data(config, dataset, pixels, trained_on)
    _check_metric(config, dataset)  # here, because images may have been left out
    checksums = {name: of_split.sha256 for name, of_split in pixels.items()}
    hashed = json.dumps([dataset.fingerprint(), checksums], sort_keys=True)
    fingerprint = hashlib.sha256(hashed.encode()).hexdigest()
    return Prepared(config, dataset, pixels, fingerprint, parents, hashes, audit, rendering)


def _check_order(config: Config, dataset: DataSet) -> None:
    """Says which metrics the classes give no meaning to, and refuses to select epochs by them."""
    if dataset.ordered or dataset.multilabel:
        return
    unknown = {name: title for name, title in titles().items() if METRICS[name].ordinal}
    hint = (
        f"the order of the classes of {dataset.name}, {', '.join(dataset.classes)}, is not known "
        "to mean something; data.ordinal = True says that it does"
    )
    if config.select.metric in unknown and config.select.epoch == "best":
        raise UserError(f"select.metric = {config.select.metric!r}: {hint}")
    say(f"{' and '.join(unknown.values())} not reported: {hint}")


def _check_metric(config: Config, dataset: DataSet) -> None:
    """Refuses to select epochs by what the validation labels leave undefined, whatever is said."""
    if config.select.epoch != "best":
        return
    name, labels = config.select.metric, dataset.splits["val"].labels
    right = np.nan_to_num(labels) if dataset.multilabel else np.eye(dataset.num_classes)[labels]
    guesses = np.random.default_rng(0).normal(size=right.shape)
    for logits in (2.0 * right - 1.0, 1.0 - 2.0 * right, guesses):
        said = Predictions(logits, labels, dataset.multilabel, ordinal=dataset.ordered)
        if METRICS[name](said) is not None:
            return
    counts = ", ".join(f"{one} {n}" for one, n in dataset.counts()["val"].items())
    what = f"the {len(labels)} validation images ({counts}) give it no value"
    if dataset.multilabel and METRICS[name].multilabel is None:
        what = "it has no meaning where an image has several labels"
    raise UserError(
        f"select.metric = {name!r} can never be defined on {dataset.name}: {what}. Choose another "
        "(as 'loss'), give the validation split images of all classes, or select.epoch = 'last'"
    )


def load_inputs(prepared: Prepared, workdir: Path) -> Inputs:
    """The rest: the parents that sources have made, and the images in batches."""
    config = prepared.config
    made = [name for name in needed_parents(config) if name not in prepared.parents]
    directories = {name: source_folder(workdir, name) for name in sources_of(config)}
    mesh = data_mesh()
    batches = {
        name: make_batches(
            pixels.array,
            prepared.dataset.splits[name].labels,
            config.batch_size,
            loader=config.data.loader,
            mesh=mesh,
            accumulate=config.accumulate,
        )
        for name, pixels in prepared.pixels.items()
    }
    parents = {**prepared.parents, **inputs.load_parents(config, made, directories)}
    parents = estimate_statistics(config, dict(sorted(parents.items())), batches["train"], mesh)
    return Inputs(
        **{**vars(prepared), "parents": inputs.fill_zeros(parents)},
        batches=batches,
        class_weights=inputs.loss_weights(config, prepared.dataset),
        mesh=mesh,
    )
