"""The command evaluate: models on a data set, each with its own preprocessing."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmerge_jax import weights
from medmerge_jax.config import Config
from medmerge_jax.data import DataSet
from medmerge_jax.data.hashing import find_hashes
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.bootstrap import metric_interval
from medmerge_jax.evaluation.evaluate import ClassMap, ClassMatch, match_classes
from medmerge_jax.evaluation.metrics import METRICS, classification_metrics
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.models import create_model
from medmerge_jax.models.network import Network
from medmerge_jax.recipes import inputs
from medmerge_jax.recipes.experiment import compute_dtype
from medmerge_jax.recipes.sets import complete, differences, read_set
from medmerge_jax.runtime.mesh import data_mesh
from medmerge_jax.runtime.progress import say
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage import atomic
from medmerge_jax.weights.card import last_component


def evaluate_models(
    models: Sequence[str],
    config: Config,
    split: str = "test",
    classes: ClassMap | None = None,
    unmapped: str = "error",
) -> dict[str, Any]:
    """Models on the data set of a config, each with its own preprocessing.

    Args:
      models: Runs, model directories or weight files, see `weights.load_model`.
      config: Checked; of it count `data`, `batch_size`, `accumulate`, `precision` and, for drawn
        images, `image_size`.
      split: See `DataSet.only`.
      classes: Of all models, see `match_classes`.
      unmapped: See `match_classes`.

    Returns:
      For JSON: "data", "models" (a dict of each, in order) and "versions".

    Raises:
      UserError: A path, model or class cannot be used.
    """
    if lines := inputs.missing_data(config.data):
        raise UserError("not everything that the config names is there:\n  " + "\n  ".join(lines))
    loaded = {name: weights.load_model(name) for name in dict.fromkeys(models)}
    for name, model in loaded.items():
        if not model.num_classes:
            raise UserError(f"{name}: the model has no head to predict with")
    dataset = read_set(config, drawn_folder(config), split)
    matches = {}
    for name, model in loaded.items():
        try:
            outputs = model.classes or model.num_classes
            matches[name] = match_classes(outputs, dataset, model.multilabel, classes, unmapped)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return {
        "data": {
            "name": dataset.name,
            "split": split,
            "classes": list(dataset.classes),
            "counts": dataset.counts()["test"],
            "images": len(dataset.splits["test"]),
            "resampled": "images" if dataset.splits["test"].groups is None else "groups",
            "fingerprint": dataset.fingerprint(),
        },
        "models": [
            _evaluate_model(name, model, config, dataset, matches[name])
            for name, model in loaded.items()
        ],
        "versions": package_versions(),
    }


def _evaluate_model(
    name: str, model: weights.Model, config: Config, dataset: DataSet, match: ClassMatch
) -> dict[str, Any]:
    look, fingerprint = model.preprocessing, model.provenance.get("data_fingerprint")
    hashes = None if model.file is None else find_hashes(model.file, fingerprint)
    notes = [*match.notes, *differences(look, config.image_size, config.data, dataset)]
    evaluated = complete(config.data, dataset, look, match, {"the model": hashes})
    module = create_model(
        model.architecture, model.num_classes, dtype=compute_dtype(config.precision)
    )
    network = Network(module, look, data_mesh())
    predictions = evaluated.predictions(network, model.variables, config)
    notes += evaluated.audit["warnings"]
    notes += ["its training images are not known"] if hashes is None else []
    total = len(dataset.splits["test"])
    if left_out := total - len(predictions):
        notes.append(f"{left_out} of {total} images are left out")
    for note in notes:
        say(f"{name}: {note}")
    return {
        "model": last_component(name) if Path(name).is_absolute() else name,
        "fingerprint": weights.model_fingerprint(model.variables),
        "architecture": model.architecture,
        "classes": list(match.classes),
        "counts": predictions.counts(),
        "left_out": left_out,
        "metrics": classification_metrics(predictions),
        "intervals": intervals(predictions),
        "audit": evaluated.audit,
        "notes": notes,
    }


def intervals(predictions: Predictions) -> dict[str, dict[str, float] | None]:
    """Of each metric its bootstrap interval, for JSON; over groups where they are known."""
    found: dict[str, dict[str, float] | None] = {}
    for name, entry in METRICS.items():
        interval = metric_interval(entry, predictions)
        found[name] = None if interval is None else dataclasses.asdict(interval)
    return found


def drawn_folder(config: Config) -> Path:
    """A folder of the cache for images that are drawn as these."""
    described = json.dumps([dataclasses.asdict(config.data.synthetic), config.image_size])
    return atomic.cache_folder("drawn") / hashlib.sha256(described.encode()).hexdigest()[:32]
