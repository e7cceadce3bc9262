"""The command surface: models of runs or files, on the images of a data set."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medmerge_jax import weights
from medmerge_jax.analysis import surface_figures
from medmerge_jax.analysis.surfaces import Measure, Plane, Segment, measurement, plane, segment
from medmerge_jax.config import Config
from medmerge_jax.data import Batches, DataSet, make_batches
from medmerge_jax.data.batches import epoch_order
from medmerge_jax.errors import UserError
from medmerge_jax.images import Pixels
from medmerge_jax.models import create_model, mergers
from medmerge_jax.models.network import Network
from medmerge_jax.recipes.experiment import compute_dtype
from medmerge_jax.recipes.inputs import decode_as, load_data, missing_data
from medmerge_jax.recipes.sets import differences
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic
from medmerge_jax.weights.card import last_component, short_names

ALIGNMENTS = ("weight_matching", "activation_matching")
"""How hidden units can be put in another model's order. ZipIt! and the like merge units, so that
what they give is not the model any more and is no end of a segment."""

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured between the models.

    Attributes:
      points: Along the segment, or in each direction of the plane.
      margin: By how much of the models' greater extent a plane goes beyond them.
      recalibrate: Whether numbers are also those of recalibrated batch norms, at every point.
      align: One of `ALIGNMENTS`: the units of all models but the second are first put in the
        order that fits the second's best; empty: they stay as they are.
      num_images: Of each split at most, by the config's seed; 0: all.
    """

    points: int = 21
    margin: float = 0.25
    recalibrate: bool = False
    align: str = ""
    num_images: int = 0


def surface(names: Sequence[str], config: Config, out: Path, settings: Settings) -> dict[str, Any]:
    """Measures between two models, or on the plane of three, and draws it; resumes.

    The folder gets `points.json`, from which the same call goes on, `surface.json` and
    `surface.png`. The models' own preprocessing counts, not the config's.

    Args:
      names: Two or three runs, model directories or weight files, see `weights.load_model`.
      config: Checked; of it count `data`, `batch_size`, `precision`, `loader`, `seed`,
        `merge_ft.num_images` to match activations on, and `select.metric` beside the loss.
      out: The folder.
      settings: What is measured.

    Returns:
      What `surface.json` has.

    Raises:
      UserError: Models or images are missing or do not fit each other, or the folder holds another
        surface.
    """
    if len(names) not in (2, 3):
        raise UserError(f"{len(names)} models; two, for a segment, or three, for a plane, wanted")
    if settings.points < 2 or not 0 <= settings.margin < math.inf:
        raise UserError(
            f"points {settings.points}, margin {settings.margin}: 2 points or more and a margin "
            "from 0 on are wanted"
        )
    if lines := missing_data(config.data):
        raise UserError("not everything that the config names is there:\n  " + "\n  ".join(lines))
    models = [weights.load_model(name) for name in names]
    _check_alike(names, models)
    dataset, look = load_data(config, out), models[0].preprocessing
    dataset.check()
    _check_classes(names[0], models[0], dataset)
    for note in differences(look, config.image_size, config.data, dataset):
        say(note)
    dataset, pixels = decode_as(config.data, dataset, look)
    batches = {split: _batches(config, dataset, pixels, split, settings) for split in SPLITS}
    network = Network(
        create_model(
            models[0].architecture, dataset.num_classes, dtype=compute_dtype(config.precision)
        ),
        look,
    )
    if settings.recalibrate and not models[0].variables.get("batch_stats"):
        raise UserError(f"{models[0].architecture} has no batch norms; leave out --recalibrate")
    measure = measurement(
        network,
        batches,
        multilabel=dataset.multilabel,
        ordinal=dataset.ordered,
        metric=config.select.metric,
        recalibrate_on=batches["train"] if settings.recalibrate else None,
    )
    variables = _aligned(models, network, config, pixels, settings)
    described = _described(models, dataset, pixels, batches, settings, config)
    found = _measured(variables, measure, out / "points.json", json.dumps(described), settings)
    for one, name in zip(described["models"], names, strict=True):
        one["model"] = last_component(name) if Path(name).is_absolute() else name
    results = {**described, **_numbers(found)}
    atomic.write_json(out / "surface.json", results)
    _draw(found, names, out / "surface.png")
    return results


def _measured(
    variables: Sequence[Any], measure: Measure, file: Path, key: str, settings: Settings
) -> Segment | Plane:
    options: dict[str, Any] = {"points": settings.points, "file": file, "key": key}
    try:
        if len(variables) == 2:
            return segment(variables, measure, **options)
        return plane(variables, measure, margin=settings.margin, **options)
    except ValueError as error:
        raise UserError(str(error)) from error


def _draw(found: Segment | Plane, names: Sequence[str], path: Path) -> None:
    labels = short_names(list(names))
    if isinstance(found, Segment):
        surface_figures.segment_figure(found, labels, path)
    else:
        surface_figures.plane_figure(found, labels, path)


def _check_alike(names: Sequence[str], models: Sequence[weights.Model]) -> None:
    """Refuses models of which a weighted sum would be none, by the names of what differs."""
    first = models[0]
    for name, model in zip(names, models, strict=True):
        if not model.num_classes:
            raise UserError(f"{name}: has no head; whole models are wanted, whose loss is measured")
        for what, of_first, of_model in (
            ("architecture", first.architecture, model.architecture),
            ("classes", first.classes or first.num_classes, model.classes or model.num_classes),
            ("multilabel", first.multilabel, model.multilabel),
            ("preprocessing", first.preprocessing, model.preprocessing),
        ):
            if what == "classes" and not (first.classes and model.classes):
                of_first, of_model = first.num_classes, model.num_classes
            if of_first != of_model:
                raise UserError(
                    f"{name}: {what} {of_model}, but {names[0]} has {of_first}; between whole "
                    "models both must be the same"
                )


def _check_classes(name: str, model: weights.Model, dataset: DataSet) -> None:
    classes, multilabel = dataset.classes, dataset.multilabel
    if not model.classes:
        say(f"{name}: nothing says its classes; they are taken for {', '.join(classes)}")
    known = model.classes == classes if model.classes else model.num_classes == len(classes)
    if not known or model.multilabel != multilabel:
        raise UserError(
            f"{name}: its classes are {list(model.classes) or model.num_classes}, those of "
            f"{dataset.name} are {list(classes)}{' (several per image)' if multilabel else ''}; "
            "images of the same classes in the same order are wanted (data.classes orders them)"
        )


def _batches(
    config: Config, dataset: DataSet, pixels: dict[str, Pixels], split: str, settings: Settings
) -> Batches:
    array, labels = pixels[split].array, dataset.splits[split].labels
    if 0 < settings.num_images < len(labels):
        rows = np.sort(epoch_order(len(labels), config.seed, 0)[: settings.num_images])
        array, labels = array[rows], labels[rows]
    return make_batches(array, labels, config.batch_size, loader=config.data.loader)


def _aligned(
    models: Sequence[weights.Model],
    network: Network,
    config: Config,
    pixels: dict[str, Pixels],
    settings: Settings,
) -> list[Any]:
    """Variables of all models, the others' units in the order of the second's where asked for."""
    variables = [model.variables for model in models]
    if not settings.align:
        return variables
    images, reference = None, variables[1]
    if settings.align == "activation_matching":
        some = pixels["train"].array
        rows = np.sort(epoch_order(len(some), config.seed, 0)[: config.merge_ft.num_images])
        images = np.asarray(network.normalise(jnp.asarray(some[rows])))
    try:
        return [
            one
            if one is reference
            else mergers.align(
                models[0].architecture, reference, one, images, seed=config.seed, heads="merge"
            )
            for one in variables
        ]
    except ValueError as error:
        raise UserError(f"--align {settings.align}: {error}") from error


def _described(
    models: Sequence[weights.Model],
    dataset: DataSet,
    pixels: dict[str, Pixels],
    batches: dict[str, Batches],
    settings: Settings,
    config: Config,
) -> dict[str, Any]:
    """All that decides the numbers, wherever models and images are."""
    return {
        "models": [{"fingerprint": weights.model_fingerprint(one.variables)} for one in models],
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint(),
            "pixels": {split: pixels[split].sha256 for split in SPLITS},
            "images": {split: batches[split].num_examples for split in SPLITS},
        },
        "settings": dataclasses.asdict(settings),
        "metric": config.select.metric,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "precision": config.precision,
    }


def _numbers(found: Segment | Plane) -> dict[str, Any]:
    """For JSON: coordinates, values and, of a segment, barriers."""
    values = {name: _plain(array) for name, array in found.values.items()}
    if isinstance(found, Plane):
        return {
            **{name: _plain(getattr(found, name)) for name in ("x", "y", "corners")},
            "values": values,
            "at_models": {name: _plain(array) for name, array in found.at_models.items()},
        }
    barriers = {}
    for name in found.values:
        if name.endswith("_loss"):
            barrier = found.barrier(name)
            barriers[name] = barrier and dict(zip(("height", "share"), barrier, strict=True))
    return {
        "shares": _plain(found.shares),
        "distance": found.distance,
        "values": values,
        "barriers": barriers,
    }


def _plain(array: np.ndarray) -> Any:
    """Lists of numbers, None for NaN."""
    if array.ndim > 1:
        return [_plain(part) for part in array]
    return [float(value) if math.isfinite(value) else None for value in array]
