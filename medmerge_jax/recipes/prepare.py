"""The inputs of an experiment: all that can be wrong with them shows before anything is trained."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.config import Config
from medmerge_jax.data import DataSet, ImageHashes, make_batches
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import METRICS, titles
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.images import Pixels
from medmerge_jax.models import get_spec
from medmerge_jax.models.preprocessing import Rendering
from medmerge_jax.recipes import inputs
from medmerge_jax.recipes.checks import needed_parents
from medmerge_jax.recipes.experiment import Inputs
from medmerge_jax.recipes.inputs import Parent
from medmerge_jax.runtime.mesh import data_mesh
from medmerge_jax.runtime.progress import say


def check_paths(config: Config) -> None:
    """Names everything that is missing at once, of this experiment and of its sources."""
    lines = [
        f"  {prefix}{line}"
        for prefix, part in [
            ("", config),
            *((f"sources.{n}.", s) for n, s in config.sources.items()),
        ]
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


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What an experiment has before its sources are trained: its images, and other parents."""

    config: Config
    dataset: DataSet
    pixels: dict[str, Pixels]
    parents: dict[str, Parent]
    hashes: ImageHashes
    audit: dict[str, Any]
    rendering: Rendering

    @property
    def fingerprint(self) -> str:
        """Of labels, splits and pixels, wherever the files are."""
        hashes = {name: pixels.sha256 for name, pixels in self.pixels.items()}
        hashed = json.dumps([self.dataset.fingerprint(), hashes], sort_keys=True)
        return hashlib.sha256(hashed.encode()).hexdigest()


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
    names = needed_parents(config)
    on_disk = [name for name in names if not config.parents[name].startswith("source:")]
    parents = inputs.load_parents(config, on_disk, {})
    dataset, pixels, rendering = inputs.decode(config, dataset)
    trained_on: dict[str, ImageHashes | None] = {}
    for name in names:
        value = config.parents[name]
        if value.removeprefix("source:") in sources:
            trained_on[name] = sources[value.removeprefix("source:")].hashes
        elif value.startswith("source:"):
            finished = source_folder(workdir, value.removeprefix("source:"))
            trained_on[name] = inputs.hashes_of_source(finished)
        elif value not in ("imagenet", "random", "zeros"):
            trained_on[name] = inputs.hashes_of_parent(parents[name][1])
    dataset, pixels, hashes, audit = inputs.audit_data(config, dataset, pixels, trained_on)
    _check_metric(config, dataset)  # here, because images may have been left out
    return Prepared(config, dataset, pixels, parents, hashes, audit, rendering)


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
    config, parents = prepared.config, prepared.parents
    made = [name for name in needed_parents(config) if name not in parents]
    directories = {name: source_folder(workdir, name) for name in sources_of(config)}
    mesh = data_mesh()
    parents = {**parents, **inputs.load_parents(config, made, directories)}
    return Inputs(
        dataset=prepared.dataset,
        batches={
            name: make_batches(
                pixels.array,
                prepared.dataset.splits[name].labels,
                config.batch_size,
                loader=config.data.loader,
                mesh=mesh,
                accumulate=config.accumulate,
            )
            for name, pixels in prepared.pixels.items()
        },
        parents=inputs.fill_zeros(dict(sorted(parents.items()))),
        class_weights=inputs.loss_weights(config, prepared.dataset),
        fingerprint=prepared.fingerprint,
        hashes=prepared.hashes,
        audit=prepared.audit,
        rendering=prepared.rendering,
        mesh=mesh,
    )
