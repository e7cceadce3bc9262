"""One run: a recipe, from its inputs to what it leaves in its run directory."""

import dataclasses
from typing import Any

import numpy as np

from medmerge_jax import analysis, weights
from medmerge_jax.analysis.drawing import FORMATS
from medmerge_jax.config import Config, to_json
from medmerge_jax.data.audit import AUDIT_FILE, shareable_audit
from medmerge_jax.data.hashing import HASHES_FILE
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import classification_metrics, confusion_matrix
from medmerge_jax.evaluation.statistics import statistics
from medmerge_jax.merging.trees import flatten
from medmerge_jax.recipes.experiment import Experiment, Inputs, Prepared, Trained
from medmerge_jax.recipes.recipes import RECIPES
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage import atomic
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training.parameterization import Tree
from medmerge_jax.training.stage import training_cost

_NOT_LOGGED = ("study", "sources", "help")
"""Fields that say where and how a run is run, or of which others are made."""


def finished(directory: RunDirectory) -> dict[str, Any] | None:
    """The results of a finished run, or None; completes what a kill cut short, as its report."""
    results: dict[str, Any] | None = processes.from_first(lambda: _read_results(directory))
    return results


def _read_results(directory: RunDirectory) -> dict[str, Any] | None:
    results: dict[str, Any] | None = directory.read_json("results.json")
    if results is None:
        return None
    try:
        analysis.results_text(results)
        if not (directory.path / "report.html").exists():
            directory.clean_up(results)
            analysis.write_report(directory.path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory.path}: results.json, or what else its report is made of, is not as this "
            f"program writes it ({type(error).__name__}: {error}); delete results.json, and the "
            "same command makes it again"
        ) from error
    return results


def record(config: Config, directory: RunDirectory, data: Prepared) -> None:
    """Writes config.json, or checks that the directory's run began with the same."""
    cards = {name: card for name, (_, card) in data.parents.items()}
    parents = {name: card["fingerprint"] for name, card in cards.items() if "fingerprint" in card}
    processes.from_first(
        lambda: directory.record_config(
            to_json(config), data.fingerprint, parents, package_versions()
        )
    )


def leave_audit(directory: RunDirectory, inputs: Prepared) -> None:
    """For the report, and for those who will start from this model."""
    directory.write_json(AUDIT_FILE, shareable_audit(inputs.audit, inputs.dataset))
    if processes.is_first():
        inputs.hashes.save(directory.path / HASHES_FILE, inputs.fingerprint)


def run_recipe(
    config: Config, directory: RunDirectory, inputs: Inputs, *, curves: bool = True
) -> dict[str, Any]:
    """One recipe, from its stages to results.json, which is written last but the report.

    Args:
      config: Of the run.
      directory: Of the run.
      inputs: What it starts from.
      curves: Whether those of thresholds and of calibration are drawn, and all figures also as
        SVG and PDF, which takes a second: not of the many members of a study.
    """
    directory.start_clock()
    record(config, directory, inputs)
    leave_audit(directory, inputs)
    told = weights.shareable({k: v for k, v in to_json(config).items() if k not in _NOT_LOGGED})
    processes.from_first(lambda: directory.begin_logging(config.log_to, told))
    try:
        return _run(config, directory, inputs, curves)
    finally:
        directory.close()  # also after an error, unless it was closed with results


def _run(config: Config, directory: RunDirectory, inputs: Inputs, curves: bool) -> dict[str, Any]:
    """The recipe of a directory whose run is begun."""
    experiment = Experiment(config, directory, inputs)
    recipe = RECIPES[config.recipe]
    trained = recipe.function(experiment)
    results = {
        "recipe": config.recipe,
        **({"method": config.merge_ft.method} if recipe.merges else {}),
        "start": _start(config, inputs),
        "seed": config.seed,
        "architecture": config.architecture,
        **_evaluate(experiment, trained, curves),
        **_evaluate_further(experiment, trained),
        **trained.facts,
        "stages": list(trained.stages),
        "data": {
            "name": config.data.name,
            "fingerprint": inputs.fingerprint,
            "classes": list(inputs.dataset.classes),
            "shown_classes": list(inputs.dataset.shown_classes),
            "counts": inputs.dataset.counts(),
            "evaluate_on": {name: one.described() for name, one in inputs.further.items()},
        },
        "parents": shared_parents(inputs),
        "versions": package_versions(),
        "wall_seconds": directory.wall_seconds(),
        "training": training_cost(trained.stages, config.batch_size),
    }

    def leave() -> None:
        for name, variables in {**trained.kept, "": trained.variables}.items():
            folder = directory.path / "kept" / name if name else directory.path
            test = None if name else results["test"]  # of the others it is not measured
            model = _model(experiment, variables, trained.head, test)
            weights.save_model(folder / "model", model)
        path = directory.figures / "learning_curves.png"
        analysis.learning_curves(directory.records(), path, _formats(curves))
        if trained.coefficients is not None:
            _leave_coefficients(experiment, trained.coefficients, _formats(curves))
        directory.write_csv()
        directory.write_json("results.json", results)
        directory.clean_up(results)
        directory.close(results)
        analysis.write_report(directory.path)

    processes.from_first(leave)
    return results


def _start(config: Config, inputs: Inputs) -> str:
    """What the recipe starts from, in the words of a table."""
    recipe = RECIPES[config.recipe]
    if recipe.averages:
        return f"{len(inputs.parents)} models"
    return config.start if recipe.one_parent else "+".join(inputs.parents)


def _evaluate(experiment: Experiment, trained: Trained, curves: bool) -> dict[str, Any]:
    """Metrics on validation and test split, and statistics; writes predictions.npz and figures."""
    dataset, directory = experiment.inputs.dataset, experiment.directory
    said = {split: experiment.predictions(trained.variables, split) for split in ("val", "test")}
    metrics = {split: classification_metrics(one) for split, one in said.items()}
    if not processes.is_first():
        return metrics
    test, told = said["test"], statistics(said["val"], said["test"])
    test.save(directory.path / "predictions.npz")
    named = dataclasses.replace(test, classes=dataset.shown_classes)
    if not dataset.multilabel:
        path = directory.figures / "confusion_matrix.png"
        counts = confusion_matrix(test)
        analysis.confusion_matrix_figure(counts, named.classes, path, _formats(curves))
    if curves:
        analysis.threshold_curves(named, directory.figures / "threshold_curves.png")
        heat = told["calibration"]["temperature"]
        analysis.reliability_diagram(test, heat, directory.figures / "reliability.png")
    return {**metrics, "statistics": told}


def _evaluate_further(experiment: Experiment, trained: Trained) -> dict[str, Any]:
    """Metrics on the further data sets, if there are any; writes predictions-NAME.npz of each."""
    metrics = {}
    for name in experiment.inputs.further:
        predictions = experiment.predictions_on(name, trained.variables)
        metrics[name] = classification_metrics(predictions)
        if processes.is_first():
            file = experiment.directory.path / f"predictions-{name}.npz"
            atomic.remove_leftovers(file.parent, [file.name])  # of a process killed in between
            predictions.save(file)
    return {"evaluate_on": metrics} if metrics else {}


def shared_parents(inputs: Inputs) -> dict[str, Any]:
    """The parents' cards, as others may see them."""
    cards = {name: card for name, (_, card) in inputs.parents.items()}
    return dict(weights.shareable(cards, "parents"))


def _model(
    experiment: Experiment, variables: Tree, head: str, test: dict[str, Any] | None = None
) -> weights.Model:
    """A model with what a run says of it, also metrics on the test split where they are known."""
    config, inputs = experiment.config, experiment.inputs
    results = {"data": config.data.name, "split": "test", "metrics": test}
    return weights.Model(
        config.architecture,
        variables,
        experiment.preprocessing,
        inputs.dataset.classes,
        inputs.dataset.multilabel,
        {
            "ordinal": inputs.dataset.ordered,
            "recipe": config.recipe,
            "seed": config.seed,
            "head": head,
            "parents": {name: card for name, (_, card) in inputs.parents.items()},
            "data_fingerprint": inputs.fingerprint,
            **({"results": results} if test else {}),
        },
        image_hashes=inputs.hashes.training().perceptual,
    )


def _formats(curves: bool) -> tuple[str, ...]:
    """Of figures: all, or what the report shows."""
    return () if curves else FORMATS[:1]


def _leave_coefficients(experiment: Experiment, effective: Tree, formats: tuple[str, ...]) -> None:
    directory = experiment.directory
    coefficients = {path: np.asarray(leaf) for path, leaf in flatten(effective).items()}
    analysis.save_coefficients(directory.path / "coefficients.npz", coefficients)
    names = sorted(experiment.inputs.parents)
    analysis.coefficient_heatmap(
        {experiment.config.data.name: coefficients},
        directory.figures / "coefficients.png",
        num_parents=len(names),
        parent_names=names,
        formats=formats,
    )
