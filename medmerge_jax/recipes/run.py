"""Runs an experiment in its run directory: one recipe, or a comparison of several."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from medmerge_jax import analysis, weights
from medmerge_jax.config import ONE_PARENT, check_config
from medmerge_jax.data import DataSet, ImageHashes, make_batches
from medmerge_jax.data.audit import AUDIT_FILE
from medmerge_jax.data.hashing import HASHES_FILE
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import (
    METRICS,
    classification_metrics,
    confusion_matrix,
    mean_std,
)
from medmerge_jax.images import Pixels
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import get_spec
from medmerge_jax.recipes import inputs as inputs_lib
from medmerge_jax.recipes.experiment import Experiment, Inputs
from medmerge_jax.recipes.inputs import Parent
from medmerge_jax.recipes.recipes import RECIPES
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.mesh import data_mesh
from medmerge_jax.runtime.progress import say
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage import atomic
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training.parameterization import Tree


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs, resumes, or returns the results of, the experiment in `workdir`.

    Returns:
      The content of results.json.

    Raises:
      UserError: Before anything is compiled or written, if a field, path or file is unusable.
    """
    check_config(config)
    directory = RunDirectory(workdir)
    with directory.locked():
        processes.from_first(lambda: directory.check_config(_json(config)))
        results = _finished(directory)
        if results is not None:
            say(f"{workdir} is finished; nothing to do")
            return results
        _check_paths(config)
        order = _source_order(config)
        prepared: dict[str, _Prepared] = {}
        waiting = [n for n in order if _finished(_source_directory(workdir, n)) is None]
        with processes.first_alone():
            for name in waiting:
                prepared[name] = _prepare(config.sources[name], workdir, prepared)
            target = _prepare(config, workdir, prepared)
        # What could be refused is past: from here on the directory belongs to this config.
        _record(config, directory, target.fingerprint, target.parents)
        for name in prepared:
            say(f"source {name}: {config.sources[name].recipe} on {config.sources[name].data.name}")
            inputs = _load(prepared[name], workdir)
            _run_recipe(config.sources[name], _source_directory(workdir, name), inputs)
        inputs = _load(target, workdir)
        if config.recipe == "compare":
            return _compare(config, directory, inputs)
        return _run_recipe(config, directory, inputs)


def _finished(directory: RunDirectory) -> dict[str, Any] | None:
    """The results of a finished run; its report is made up for if it was killed before that."""
    results: dict[str, Any] | None = processes.from_first(lambda: _read_results(directory))
    return results


def _read_results(directory: RunDirectory) -> dict[str, Any] | None:
    results: dict[str, Any] | None = directory.read_json("results.json")
    if results is None:
        return None
    try:
        analysis.results_text(results)
        if not (directory.path / "report.html").exists():
            analysis.write_report(directory.path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory.path}: results.json, or what else its report is made of, is not as this "
            f"program writes it ({type(error).__name__}: {error}); delete results.json, and the "
            "same command makes it again"
        ) from error
    return results


def _record(
    config: ml_collections.ConfigDict,
    directory: RunDirectory,
    data_fingerprint: str,
    parents: dict[str, Parent],
) -> None:
    fingerprints = {
        name: card["fingerprint"] for name, (_, card) in parents.items() if "fingerprint" in card
    }
    processes.from_first(
        lambda: directory.record_config(
            _json(config), data_fingerprint, fingerprints, package_versions()
        )
    )


def _json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())


def _check_paths(config: ml_collections.ConfigDict) -> None:
    """Names everything that is missing at once, of this experiment and of its sources."""
    lines = [
        f"  {prefix}{line}"
        for prefix, part in [
            ("", config),
            *((f"sources.{n}.", s) for n, s in config.sources.items()),
        ]
        for line in (
            *inputs_lib.missing_data(part.data),
            *inputs_lib.missing_parents(part, _needed_parents(part), list(config.sources)),
        )
    ]
    if lines:
        lines += [config.help] if config.help else []
        raise UserError("not everything that the config names is there:\n" + "\n".join(lines))


def _needed_parents(config: ml_collections.ConfigDict) -> list[str]:
    if config.recipe in ONE_PARENT:
        return [config.start]
    return sorted(config.parents)


def _source_order(config: ml_collections.ConfigDict) -> list[str]:
    """The sources, each after those that it starts from."""
    order: list[str] = []
    waiting = sorted(config.sources)
    while waiting:
        ready = [name for name in waiting if _sources_of(config.sources[name]) <= set(order)]
        if not ready:
            raise UserError(f"sources {waiting} start from each other; one must start elsewhere")
        order += ready
        waiting = [name for name in waiting if name not in ready]
    return order


def _sources_of(config: ml_collections.ConfigDict) -> set[str]:
    values = [config.parents[name] for name in _needed_parents(config)]
    return {v.removeprefix("source:") for v in values if v.startswith("source:")}


def _source_directory(workdir: Path, name: str) -> RunDirectory:
    return RunDirectory(workdir / "sources" / name)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What an experiment has before its sources are trained: its images, and other parents."""

    config: ml_collections.ConfigDict
    dataset: DataSet
    pixels: dict[str, Pixels]
    parents: dict[str, Parent]
    hashes: ImageHashes
    audit: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        hashes = {name: pixels.sha256 for name, pixels in self.pixels.items()}
        hashed = json.dumps([self.dataset.fingerprint(), hashes], sort_keys=True)
        return hashlib.sha256(hashed.encode()).hexdigest()


def _prepare(
    config: ml_collections.ConfigDict, workdir: Path, sources: dict[str, _Prepared]
) -> _Prepared:
    """Loads what there is and shows what is wrong with it, before anything is trained."""
    spec = get_spec(config.architecture)
    if config.image_size < spec.min_size:
        raise UserError(
            f"config.image_size = {config.image_size}: {spec.name} takes images of "
            f"{spec.min_size} pixels or more"
        )
    dataset = inputs_lib.load_data(config, workdir)
    dataset.check()
    names = _needed_parents(config)
    there = [name for name in names if not config.parents[name].startswith("source:")]
    parents = inputs_lib.load_parents(config, there, {})
    pixels = inputs_lib.decode(config, dataset)
    known: dict[str, ImageHashes | None] = {}
    for name in names:
        value = config.parents[name]
        if value.removeprefix("source:") in sources:
            known[name] = sources[value.removeprefix("source:")].hashes
        elif value.startswith("source:"):
            finished = _source_directory(workdir, value.removeprefix("source:")).path
            known[name] = inputs_lib.hashes_of_source(finished)
        elif value not in ("imagenet", "random", "zeros"):
            known[name] = inputs_lib.hashes_of_parent(parents[name][1])
    dataset, pixels, hashes, found = inputs_lib.audit_data(config, dataset, pixels, known)
    return _Prepared(config, dataset, pixels, parents, hashes, found)


def _load(prepared: _Prepared, workdir: Path) -> Inputs:
    """The rest: the parents that sources have made, and the images in batches."""
    config, parents = prepared.config, prepared.parents
    made = [name for name in _needed_parents(config) if name not in parents]
    directories = {name: _source_directory(workdir, name).path for name in _sources_of(config)}
    mesh = data_mesh()
    parents = {**parents, **inputs_lib.load_parents(config, made, directories)}
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
        parents=inputs_lib.fill_zeros(dict(sorted(parents.items()))),
        class_weights=inputs_lib.loss_weights(config, prepared.dataset),
        fingerprint=prepared.fingerprint,
        hashes=prepared.hashes,
        audit=prepared.audit,
        mesh=mesh,
    )


def _leave_audit(directory: RunDirectory, inputs: Inputs) -> None:
    """For the report, and for those who will start from this model."""
    directory.write_json(AUDIT_FILE, inputs.audit)
    if processes.is_first():
        inputs.hashes.save(directory.path / HASHES_FILE, inputs.fingerprint)


def _run_recipe(
    config: ml_collections.ConfigDict, directory: RunDirectory, inputs: Inputs
) -> dict[str, Any]:
    """One recipe, from its stages to results.json, which is written last but the report."""
    started = time.monotonic()
    _record(config, directory, inputs.fingerprint, inputs.parents)
    _leave_audit(directory, inputs)
    experiment = Experiment(config, directory, inputs)
    variables = RECIPES[config.recipe](experiment)
    results = {
        "recipe": config.recipe,
        **({"method": config.merge_ft.method} if config.recipe == "merge_ft" else {}),
        "start": config.start if config.recipe in ONE_PARENT else "+".join(inputs.parents),
        "seed": config.seed,
        "architecture": config.architecture,
        **_evaluate(experiment, variables),
        "stages": experiment.summaries,
        "data": {
            "name": config.data.name,
            "fingerprint": inputs.fingerprint,
            "classes": list(inputs.dataset.classes),
            "counts": inputs.dataset.counts(),
        },
        "parents": {name: card for name, (_, card) in inputs.parents.items()},
        "versions": package_versions(),
        "wall_seconds": round(time.monotonic() - started, 3),
    }

    def leave() -> None:
        weights.save_model(
            directory.path / "model", config.architecture, variables, _model_card(config, inputs)
        )
        _draw(experiment)
        directory.write_json("results.json", results)
        directory.close()
        analysis.write_report(directory.path)

    processes.from_first(leave)
    return results


def _evaluate(experiment: Experiment, variables: Tree) -> dict[str, Any]:
    """Metrics on validation and test split; writes predictions.npz and the confusion matrix."""
    dataset, directory = experiment.inputs.dataset, experiment.directory
    metrics = {}
    for split in ("val", "test"):
        logits, labels = experiment.logits(variables, split), dataset.splits[split].labels
        metrics[split] = classification_metrics(logits, labels, multilabel=dataset.multilabel)
    if not processes.is_first():
        return metrics
    predictions: dict[str, Any] = {
        "ids": np.asarray(dataset.splits["test"].ids),
        "logits": logits,
        "labels": labels,
    }
    atomic.write_atomically(
        directory.path / "predictions.npz", lambda file: np.savez(file, **predictions)
    )
    if not dataset.multilabel:
        matrix = confusion_matrix(logits, labels)
        path = directory.figures / "confusion_matrix.png"
        analysis.confusion_matrix_figure(matrix, dataset.classes, path)
    return metrics


def _model_card(config: ml_collections.ConfigDict, inputs: Inputs) -> dict[str, Any]:
    spec = get_spec(config.architecture)
    return {
        "num_classes": inputs.dataset.num_classes,
        "classes": list(inputs.dataset.classes),
        "multilabel": inputs.dataset.multilabel,
        "image_size": config.image_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "recipe": config.recipe,
        "seed": config.seed,
        "parents": {name: card for name, (_, card) in inputs.parents.items()},
        "data_fingerprint": inputs.fingerprint,
        "versions": package_versions(),
    }


def _draw(experiment: Experiment) -> None:
    directory = experiment.directory
    analysis.learning_curves(directory.records(), directory.figures / "learning_curves.png")
    if experiment.coefficients is not None:
        coefficients = {
            path: np.asarray(leaf) for path, leaf in flatten(experiment.coefficients).items()
        }
        analysis.save_coefficients(directory.path / "coefficients.npz", coefficients)
        rows = {experiment.config.data.name: coefficients}
        names = sorted(experiment.inputs.parents)
        analysis.coefficient_heatmap(
            rows,
            directory.figures / "coefficients.png",
            num_parents=len(names),
            parent_names=names,
        )


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of the comparison.

    There is one for each trained parent of a recipe with one parent, and one for each merger of
    `merge_ft`.
    """

    recipe: str
    start: str
    method: str

    @property
    def variant(self) -> str:
        """What tells it from other lines of the same recipe."""
        if self.recipe in ONE_PARENT:
            return self.start
        return self.method if self.recipe == "merge_ft" else ""

    @property
    def folder(self) -> str:
        return "-".join(filter(None, (self.recipe, self.variant)))


def _rows(config: ml_collections.ConfigDict) -> list[_Row]:
    trained = [name for name, value in sorted(config.parents.items()) if value != "zeros"]
    return [
        _Row(recipe, start, method)
        for recipe in config.compare.recipes
        for start in (trained if recipe in ONE_PARENT else [config.start])
        for method in (config.compare.mergers if recipe == "merge_ft" else [""])
    ]


def _compare(
    config: ml_collections.ConfigDict, directory: RunDirectory, inputs: Inputs
) -> dict[str, Any]:
    """Every recipe on the same parents, splits and seeds; each run in a directory of its own."""
    started = time.monotonic()
    _leave_audit(directory, inputs)
    runs: dict[_Row, list[dict[str, Any]]] = {row: [] for row in _rows(config)}
    for seed in config.compare.seeds:
        for row, finished in runs.items():
            part = config.copy_and_resolve_references()
            part.update(recipe=row.recipe, start=row.start, seed=seed)
            if row.method:
                part.merge_ft.method = row.method
            finished.append(_run_part(part, directory.path / row.folder / f"seed{seed}", inputs))
    results = {
        "recipe": "compare",
        "architecture": config.architecture,
        "seeds": list(config.compare.seeds),
        "table": [_summarise(row, finished) for row, finished in runs.items()],
        "data": next(iter(runs.values()))[0]["data"],
        "parents": {name: card for name, (_, card) in inputs.parents.items()},
        "versions": package_versions(),
        "wall_seconds": round(time.monotonic() - started, 3),
    }
    directory.write_json("results.json", results)
    if processes.is_first():
        analysis.write_report(directory.path)
    return results


def _run_part(config: ml_collections.ConfigDict, path: Path, inputs: Inputs) -> dict[str, Any]:
    directory = RunDirectory(path)
    results = _finished(directory)
    if results is None:
        say(f"{path.parent.name}, seed {config.seed}")
        results = _run_recipe(config, directory, inputs)
    return results


def _summarise(row: _Row, runs: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {}
    for name in METRICS:
        values = [run["test"][name] for run in runs]
        metrics[name] = None if None in values else mean_std(values)
    return {
        "recipe": f"{row.recipe} {row.method}".rstrip(),
        "start": runs[0]["start"],
        "seeds": [run["seed"] for run in runs],
        **metrics,
    }
