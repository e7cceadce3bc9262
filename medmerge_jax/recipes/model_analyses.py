"""The command analyse, of models: what they see in images, and what they mistake."""

import fnmatch
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from medmerge_jax import weights
from medmerge_jax.analysis.cka import LEAST, Source, cka, grams
from medmerge_jax.analysis.csv_files import write_csv
from medmerge_jax.analysis.features import strongest_channels
from medmerge_jax.analysis.grad_cam import PREDICTED, GradCam, grad_cam
from medmerge_jax.analysis.layer_figures import cka_figure
from medmerge_jax.analysis.mistakes import Mistake, mistakes
from medmerge_jax.analysis.sheets import Cell, contact_sheet
from medmerge_jax.config import Config, from_json
from medmerge_jax.data import Split
from medmerge_jax.errors import UserError, nearest
from medmerge_jax.evaluation.images import Image, classes_of, prepared_pixels
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.merging.trees import without_head
from medmerge_jax.models import create_model
from medmerge_jax.models.feature_maps import FeatureMap, feature_maps, list_feature_maps
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.recipes import inputs
from medmerge_jax.recipes.evaluation import drawn_folder
from medmerge_jax.recipes.sets import read_set
from medmerge_jax.runtime.cpu import usable_cores
from medmerge_jax.runtime.progress import Bar
from medmerge_jax.storage import atomic
from medmerge_jax.storage.run_directory import RunDirectory

_IN_A_ROW = 6
"""Mistakes of a sheet."""

_MOST = 64
"""Images that are looked at one by one, and computed at once."""

Models = Mapping[str, weights.Model]
"""By what they are called in figures."""


def open_models(paths: Mapping[str, str]) -> dict[str, weights.Model]:
    """Models by what they are called.

    Args:
      paths: Runs, model directories or weight files; "imagenet" is of the architecture of the
        first of these.

    Raises:
      UserError: One cannot be opened, or there is nothing but "imagenet".
    """
    opened = {name: weights.load_model(path) for name, path in paths.items() if path != "imagenet"}
    for name, path in paths.items():
        if path == "imagenet":
            if not opened:
                raise UserError("imagenet: no other model says the architecture; give one")
            architecture = next(iter(opened.values())).architecture
            opened[name] = weights.model_from_card(
                architecture, *weights.load_parent(path, architecture)
            )
    return {name: opened[name] for name in paths}


def data_images(config: Config, split: str) -> list[Image]:
    """The images of a split of a config's data set, as paths or decoded, without their names."""
    return _images(_read(config, split))


def _read(config: Config, split: str) -> Split:
    if lines := inputs.missing_data(config.data):
        raise UserError("not everything that the config names is there:\n  " + "\n  ".join(lines))
    return read_set(config, drawn_folder(config), split).splits["test"]


def _images(split: Split) -> list[Image]:
    return [*(split.paths if split.pixels is None else split.pixels)]


def decoded(images: Sequence[Image], look: Preprocessing) -> np.ndarray:
    """uint8 (n, size, size, 3), each as a model wants it; a UserError names what is unreadable."""
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode") as pool:
        rows = range(len(images))
        return np.stack([*pool.map(lambda row: prepared_pixels(images[row], row, look), rows)])


def choose_layers(there: Sequence[FeatureMap], patterns: Sequence[str]) -> list[FeatureMap]:
    """The layers that patterns name, in network order.

    Args:
      there: Of `list_feature_maps`.
      patterns: Paths of modules, in which * and ? stand for any letters.

    Raises:
      UserError: One names nothing.
    """
    chosen = set[str]()
    for pattern in patterns:
        names = [one.module for one in there]
        if not (matching := fnmatch.filter(names, pattern)):
            raise UserError(f"there is no layer {pattern!r}; {nearest(pattern, names)}")
        chosen.update(matching)
    return [one for one in there if one.module in chosen]


def low_and_high(there: Sequence[FeatureMap]) -> list[FeatureMap]:
    """The first layer whose units are known, and the last feature map."""
    return [next((one for one in there if one.tapped), there[0]), there[-1]]


def similarity(
    models: Models,
    images: Sequence[Image],
    out: Path,
    patterns: Sequence[str] = (),
    batch_size: int = 64,
) -> dict[str, Any]:
    """CKA between all layers of all models; writes cka.png, cka.csv and cka.json.

    Args:
      models: One or more, of any architectures.
      images: 4 or more.
      out: The folder.
      patterns: See `choose_layers`; none: all layers whose units are known, or else all.
      batch_size: See `cka.grams`.

    Returns:
      What cka.json has.
    """
    if len(images) < LEAST or batch_size < 2 * LEAST:
        raise UserError(
            f"{len(images)} images, {batch_size} at a time; CKA wants {LEAST} or more, "
            f"{2 * LEAST} or more at a time"
        )
    sources, layers = [], list[list[str]]()
    for model in models.values():
        there = list_feature_maps(model.architecture, model.preprocessing.size)
        wanted = [one for one in there if one.tapped] or there
        wanted = choose_layers(there, patterns) if patterns else wanted
        layers.append([one.module for one in wanted])
        network, variables = _backbone(model)
        sources.append(Source(network, variables, wanted, decoded(images, model.preprocessing)))
    with Bar("cka", len(images), "images", "compiling") as bar:

        def counted(gram: np.ndarray) -> np.ndarray:
            bar.advance(gram.shape[-1])
            return gram

        matrix = cka(map(counted, grams(sources, batch_size)))
    names = [f"{name}: {layer}" for name, of in zip(models, layers, strict=True) for layer in of]
    rows = [[name, *values] for name, values in zip(names, matrix.tolist(), strict=True)]
    write_csv(out / "cka.csv", ["", *names], rows)
    cka_figure(matrix, list(models), layers, out / "cka.png")
    results = {
        "models": _described(models),
        "layers": dict(zip(models, layers, strict=True)),
        "images": len(images),
        "batch_size": batch_size,
        "estimator": "linear CKA of whole feature maps, unbiased HSIC over batches",
    }
    atomic.write_json(out / "cka.json", results)
    return results


def feature_sheets(
    models: Models,
    images: Sequence[Image],
    out: Path,
    patterns: Sequence[str] = (),
    channels: int = 2,
) -> dict[str, Any]:
    """Feature maps of each image in all models; writes features-1.png and so on, features.json.

    A row for each model; of each layer the mean of all channels and the channels that vary most, in
    colours that are the same in a column.

    Args:
      models: One or more, of one architecture.
      images: One or more.
      out: The folder.
      patterns: See `choose_layers`; none: see `low_and_high`.
      channels: Of each layer.

    Returns:
      What features.json has.
    """
    _check_few(images)
    architectures = {name: model.architecture for name, model in models.items()}
    if len(set(architectures.values())) > 1:
        said = ", ".join(f"{name} is a {one}" for name, one in architectures.items())
        raise UserError(f"{said}; the channels of models of one architecture can be compared")
    maps: dict[str, list[np.ndarray]] = {}
    pixels = {}
    for name, model in models.items():
        there = list_feature_maps(model.architecture, model.preprocessing.size)
        layers = choose_layers(there, patterns) if patterns else low_and_high(there)
        pixels[name] = decoded(images, model.preprocessing)
        network, variables = _backbone(model)
        for layer, of in zip(
            layers, feature_maps(network, layers, variables, pixels[name]), strict=True
        ):
            maps.setdefault(layer.module, []).append(np.asarray(of))
    chosen = {layer: strongest_channels(of, channels) for layer, of in maps.items()}
    for number in range(len(images)):
        columns = [column for layer in maps for column in _columns(layer, maps, chosen, number)]
        rows = [
            [
                Cell(pixels[name][number], "" if row else "image"),
                *(column[row] for column in columns),
            ]
            for row, name in enumerate(models)
        ]
        contact_sheet(rows, out / f"features-{number + 1}.png", list(models))
    results = {"models": _described(models), "images": len(images), "channels": chosen}
    atomic.write_json(out / "features.json", results)
    return results


def _check_few(images: Sequence[Image]) -> None:
    if len(images) > _MOST:
        raise UserError(
            f"{len(images)} images; {_MOST} at most make a sheet to look at, and --num-images N "
            "takes the first N"
        )


def _columns(
    layer: str, maps: Mapping[str, Sequence[np.ndarray]], chosen: Mapping[str, list[int]], row: int
) -> list[list[Cell]]:
    """Cells of an image and layer: of each picture one for each model, in the same colours."""
    shown = [(f"{layer}\nmean", [of[row].mean(axis=-1) for of in maps[layer]])]
    for channel in chosen[layer]:
        name = f"{layer}\nchannel {channel}"
        shown.append((name, [of[row, :, :, channel] for of in maps[layer]]))
    return [
        [
            # Of each column the first row says what all show.
            Cell(
                picture, "" if below else title, None, float(np.min(of_all)), float(np.max(of_all))
            )
            for below, picture in enumerate(of_all)
        ]
        for title, of_all in shown
    ]


def explanations(
    models: Models,
    images: Sequence[Image],
    out: Path,
    class_name: str = "",
    layer: str = "",
) -> dict[str, Any]:
    """Grad-CAM of images; writes grad_cam.png and grad_cam.json.

    Args:
      models: One or more, with heads.
      images: One or more.
      out: The folder.
      class_name: The class that is explained; "": of each image what the model predicts.
      layer: Path of a module; "": the last feature map.

    Returns:
      What grad_cam.json has.
    """
    _check_few(images)
    columns, told = list[list[Cell]](), []
    for name, model in models.items():
        if not model.num_classes:
            raise UserError(f"{name}: the model has no head, so that it tells no classes")
        names = classes_of(model)
        if class_name and class_name not in names:
            raise UserError(f"{name}: no class {class_name!r}; {nearest(class_name, names)}")
        there = list_feature_maps(model.architecture, model.preprocessing.size)
        wanted = choose_layers(there, [layer])[-1] if layer else there[-1]
        pixels = decoded(images, model.preprocessing)
        network = Network(create_model(model.architecture, model.num_classes), model.preprocessing)
        explained = names.index(class_name) if class_name else PREDICTED
        found = grad_cam(network, model.variables, wanted, pixels, explained)
        of_images = [_said(found, row, names, model.multilabel) for row in range(len(images))]
        told.append({"layer": wanted.module, "images": of_images})
        if not columns:
            columns.append([Cell(of, f"image {n}") for n, of in enumerate(pixels, 1)])
        columns.append(
            [
                Cell(of, f"{name}\n{one['class']}: {one['probability']:.2f}", heat)
                for of, one, heat in zip(pixels, of_images, found.maps, strict=True)
            ]
        )
    contact_sheet([list(row) for row in zip(*columns, strict=True)], out / "grad_cam.png")
    described = zip(_described(models), told, strict=True)
    results = {"class": class_name, "models": [{**one, **of} for one, of in described]}
    atomic.write_json(out / "grad_cam.json", results)
    return results


def _said(found: GradCam, row: int, names: Sequence[str], multilabel: bool) -> dict[str, Any]:
    logits, chosen = found.logits[row].astype(np.float64), int(found.classes[row])
    probabilities = expit(logits) if multilabel else softmax(logits)
    return {
        "image": row + 1,
        "class": names[chosen],
        "probability": float(probabilities[chosen]),
        "greatest": float(found.maps[row].max()),
    }


def mistake_sheet(
    run: Path, out: Path, count: int = 24, config: Config | None = None
) -> dict[str, Any]:
    """The mistakes on a run's test images; writes mistakes.png, mistakes.csv and mistakes.json.

    An image is named by its row in predictions.npz, which has the ids: these may be patients'.

    Args:
      run: Directory of a finished run.
      out: The folder.
      count: Mistakes at most.
      config: Whose `data` finds the images; None: that of the run.

    Returns:
      What mistakes.json has.

    Raises:
      UserError: The run is not finished, or the data set has not the images that it was tested on.
    """
    directory, file = RunDirectory(run), run / "predictions.npz"
    recorded = directory.read_json("config.json")
    if recorded is None or not file.exists():
        raise UserError(f"{run}: a finished run is wanted, with config.json and predictions.npz")
    predictions = Predictions.load(file)
    found, total = mistakes(predictions, count)
    results = {
        "images": len(predictions),
        "mistakes": total,
        "shown": [one._asdict() for one in found],
    }
    images = _tested(predictions, _read(config or from_json(recorded["config"]), "test"), run)
    _draw_mistakes(found, images, weights.load_model(run).preprocessing, out)
    write_csv(out / "mistakes.csv", Mistake._fields, found)
    atomic.write_json(out / "mistakes.json", results)
    return results


def _tested(predictions: Predictions, split: Split, run: Path) -> list[Image]:
    """The images of the predictions, in their order."""
    place = {name: row for row, name in enumerate(split.ids)}
    rows = [place.get(name, -1) for name in predictions.ids]
    if -1 in rows or not np.array_equal(split.labels[rows], predictions.labels, equal_nan=True):
        raise UserError(
            f"{run}: its predictions are of other test images than the data set has now; restore "
            "it, or say with --config where it is"
        )
    images = _images(split)
    return [images[row] for row in rows]


def _draw_mistakes(
    found: Sequence[Mistake], images: Sequence[Image], look: Preprocessing, out: Path
) -> None:
    if not found:
        return
    pixels = decoded([images[one.row] for one in found], look)
    cells = [
        Cell(of, f"is {one.true}\nsaid {one.predicted}\n{one.probability:.3f} (row {one.row})")
        for one, of in zip(found, pixels, strict=True)
    ]
    rows = [cells[first : first + _IN_A_ROW] for first in range(0, len(cells), _IN_A_ROW)]
    contact_sheet(rows, out / "mistakes.png")


def _backbone(model: weights.Model) -> tuple[Network, dict[str, Any]]:
    network = Network(create_model(model.architecture, 0), model.preprocessing)
    return network, without_head(model.variables)


def _described(models: Models) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "architecture": model.architecture,
            "fingerprint": weights.model_fingerprint(model.variables),
        }
        for name, model in models.items()
    ]
