"""The inputs of an experiment: all that can be wrong with them shows before anything is trained."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.config import Config
from medmerge_jax.data import Batches, DataSet, ImageHashes, load_hashes, make_batches
from medmerge_jax.data.audit import with_evaluated
from medmerge_jax.data.hashing import HASHES_FILE, find_hashes
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import METRICS, titles
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.models import get_spec
from medmerge_jax.models.preprocessing import Preprocessing, Rendering
from medmerge_jax.recipes import inputs, sets
from medmerge_jax.recipes.calibration import estimate_statistics
from medmerge_jax.recipes.experiment import Inputs, Prepared
from medmerge_jax.recipes.inputs import Parent
from medmerge_jax.recipes.recipes import RECIPES, needed_parents
from medmerge_jax.recipes.soups import check_heads
from medmerge_jax.runtime.mesh import data_mesh
from medmerge_jax.runtime.progress import say

_LAST_FEW = 4
"""Parents that stay in memory from one job to the next."""


def check_paths(config: Config, names: list[str]) -> None:
    """Names everything that is missing at once: of the named parents, the data, and the sources."""
    parts = {"": (config, names)}
    for name, source in config.sources.items():
        parts[f"sources.{name}."] = (source, needed_parents(source))
    lines = [
        f"  {prefix}{line}"
        for prefix, (part, parents) in parts.items()
        for line in (
            *inputs.missing_data(part.data),
            *sets.missing_sets(part),
            *inputs.missing_parents(part, parents, list(config.sources)),
        )
    ]
    if lines:
        lines += [config.help] if config.help else []
        raise UserError("not everything that the config names is there:\n" + "\n".join(lines))


def prepare(
    config: Config,
    names: list[str],
    folder: Path,
    untrained: Mapping[str, Prepared],
    *,
    averaged: Collection[str] = (),
) -> Prepared:
    """Loads what there is and shows what is wrong with it, before anything is trained.

    Args:
      config: Of a run or a study.
      names: Of the parents that it starts from.
      folder: Of the study; the folder of a run that is in none.
      untrained: Jobs that will make parents, by name: their training images are known already.
      averaged: Those of the parents that are only averaged, so that they are not loaded here.
    """
    spec = get_spec(config.architecture)
    if refusal := spec.refusal(config.image_size):
        raise UserError(f"config.image_size = {config.image_size}: {refusal}")
    dataset = inputs.load_data(config, folder)
    dataset.check()
    _check_order(config, dataset)
    _check_metric(config, dataset)
    values = {name: config.parents[name] for name in names}
    on_disk = [name for name, value in values.items() if not inputs.job_of(value)]
    parents = {
        **inputs.load_parents(config, [n for n in on_disk if n not in averaged], folder),
        **inputs.load_cards(config, [n for n in on_disk if n in averaged], folder),
    }
    dataset, pixels, rendering = inputs.decode(config, dataset)
    trained_on: dict[str, ImageHashes | None] = {}
    for name, value in values.items():
        job = inputs.job_of(value)
        if name in parents:
            if value not in ("imagenet", "random", "zeros"):
                card = parents[name][1]
                trained_on[name] = find_hashes(Path(card["file"]), card.get("data_fingerprint"))
        elif job in untrained:
            trained_on[name] = untrained[job].hashes
        else:
            file = folder / job / HASHES_FILE
            trained_on[name] = load_hashes(file)[0] if file.exists() else None
    dataset, pixels, hashes, audit = inputs.audit_data(config, dataset, pixels, trained_on)
    _check_metric(config, dataset)  # here, because images may have been left out
    further = _further_sets(config, folder, dataset, rendering, hashes, trained_on)
    audit = with_evaluated(audit, {name: one.audit for name, one in further.items()})
    checksums = {name: of_split.sha256 for name, of_split in pixels.items()}
    hashed = json.dumps([dataset.fingerprint(), checksums], sort_keys=True)
    fingerprint = hashlib.sha256(hashed.encode()).hexdigest()
    return Prepared(
        config, folder, dataset, pixels, fingerprint, parents, hashes, audit, rendering, further
    )


def _further_sets(
    config: Config,
    folder: Path,
    dataset: DataSet,
    rendering: Rendering,
    hashes: ImageHashes,
    trained_on: dict[str, ImageHashes | None],
) -> dict[str, sets.EvaluationSet]:
    """What is evaluated besides; says which of its images the run or a parent is trained on."""
    look = Preprocessing(config.image_size, config.data.resize, rendering=rendering)
    known = {
        "this run": hashes.of(*SPLITS),  # without what its parents bring
        **{f"parent {name}": of_parent for name, of_parent in trained_on.items()},
    }
    return sets.prepare_sets(config, folder, dataset, look, known)


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


@dataclasses.dataclass(frozen=True)
class Shared:
    """What jobs on the same images share."""

    batches: dict[Any, dict[str, Batches]] = dataclasses.field(default_factory=dict)
    features: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    parents: dict[str, Parent] = dataclasses.field(default_factory=dict)  # the last few, by value

    def load(self, config: Config, names: list[str], folder: Path) -> dict[str, Parent]:
        """As `inputs.load_parents`, but what is here already is not loaded again."""
        values = {name: config.parents[name] for name in names}
        missing = [name for name, value in values.items() if value not in self.parents]
        if missing and len(self.parents) + len(missing) > _LAST_FEW:
            self.parents.clear()
            missing = names
        loaded = inputs.load_parents(config, missing, folder)
        self.parents.update({values[name]: parent for name, parent in loaded.items()})
        return {name: self.parents[value] for name, value in values.items()}


def load_inputs(prepared: Prepared, shared: Shared | None = None) -> Inputs:
    """The rest: the parents that other jobs have made, and the images in batches."""
    config, shared = prepared.config, shared or Shared()
    names = needed_parents(config)
    made = [name for name in names if name not in prepared.parents]
    averages = RECIPES[config.recipe].averages
    load = inputs.load_cards if averages else shared.load
    loaded = {**prepared.parents, **load(config, made, prepared.folder)}
    parents = {name: loaded[name] for name in names}
    mesh = data_mesh()
    key = (config.batch_size, config.data.loader, config.accumulate)
    if key not in shared.batches:
        shared.batches[key] = {
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
    if averages:
        check_heads(names, [card for _, card in parents.values()], config.soup.any_heads)
    else:
        train = shared.batches[key]["train"]
        parents = inputs.fill_zeros(estimate_statistics(config, parents, train, mesh))
    return Inputs(
        **{**vars(prepared), "parents": parents},
        batches=shared.batches[key],
        class_weights=inputs.loss_weights(config, prepared.dataset),
        mesh=mesh,
        features=shared.features,
    )
