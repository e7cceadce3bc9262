"""Further data sets that every run is evaluated on, beside its own splits."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.config import Config, Data
from medmerge_jax.data import DataSet, ImageHashes, hash_images, make_batches
from medmerge_jax.data.audit import audit_evaluated, without
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.evaluate import ClassMatch, match_classes
from medmerge_jax.evaluation.predict import predict
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.recipes import inputs
from medmerge_jax.runtime.progress import say


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Images that a model is evaluated on and nothing else.

    Attributes:
      dataset: They are its split "test", and it has no other.
      pixels: uint8 (n, size, size, 3), as the model wants them.
      match: Which of the model's classes are which of its.
      audit: See `data.audit.audit_evaluated`.
    """

    dataset: DataSet
    pixels: np.ndarray
    match: ClassMatch
    audit: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """For results.json: what was evaluated on, and how its classes were matched."""
        return {
            "fingerprint": self.dataset.fingerprint(),
            "images": len(self.pixels),
            "classes": list(self.match.classes),
            "notes": list(self.match.notes),
        }

    def predictions(
        self, network: Network, variables: Mapping[str, Any], config: Config
    ) -> Predictions:
        """What the network says of them, in batches as the config has them for other splits."""
        images = self.dataset.splits["test"]
        batches = make_batches(
            self.pixels,
            np.zeros(len(images)),
            config.batch_size,
            loader=config.data.loader,
            mesh=network.mesh,
            accumulate=config.accumulate,
        )
        return self.match.predictions(predict(network, dict(variables), batches), images)


def missing_sets(config: Config) -> Iterator[str]:
    """One line for each path of the further data sets that is not there."""
    for name, one in config.evaluate_on.items():
        for line in inputs.missing_data(one.data):
            said = line.replace("--config.", f"--config.evaluate_on.{name}.")
            yield f"evaluate_on.{name}.{said}"


def prepare_sets(
    config: Config, workdir: Path, own: DataSet, look: Preprocessing, known: Mapping[str, Any]
) -> dict[str, EvaluationSet]:
    """The further data sets of a run, by name; shows what is wrong with them.

    Args:
      config: Of the run.
      workdir: Where images are drawn.
      own: The run's data set.
      look: How its images are prepared.
      known: Hashes of what the run and its parents are trained on, see `audit_evaluated`.
    """
    sets = {}
    for name, one in config.evaluate_on.items():
        data = (
            one.data if one.data.name != Data().name else dataclasses.replace(one.data, name=name)
        )
        try:
            dataset = read_set(dataclasses.replace(config, data=data), workdir, one.split)
            dataset = dataclasses.replace(dataset, name=name)
            match = match_classes(own.classes, dataset, own.multilabel, one.classes, one.unmapped)
            for note in (*match.notes, *differences(look, config.image_size, data, dataset)):
                say(f"evaluate_on.{name}: {note}")
            sets[name] = complete(data, dataset, look, match, known)
            for warning in sets[name].audit["warnings"]:
                say(f"warning: {warning}")
        except UserError as error:
            raise UserError(f"evaluate_on.{name}: {error}") from error
    return sets


def read_set(config: Config, folder: Path, split: str) -> DataSet:
    """The images of `config.data` that are evaluated, checked; drawn ones are made in the folder.

    Args:
      config: The config.
      folder: Holds data/NAME of drawn images.
      split: See `DataSet.only`.
    """
    dataset = inputs.load_data(config, folder).only(split)
    dataset.check_images()
    return dataset


def differences(look: Preprocessing, size: int, data: Data, dataset: DataSet) -> Iterator[str]:
    """How images are prepared for a model otherwise than the data's own fields say."""
    rendering, _ = inputs.rendering_of(data, dataset)
    theirs = {"image_size": size, "resize": data.resize, **dataclasses.asdict(rendering)}
    ours = {"image_size": look.size, "resize": look.resize, **dataclasses.asdict(look.rendering)}
    for name, value in ours.items():
        if theirs[name] != value:
            yield f"images are prepared with {name} {value}, as the model's; not {theirs[name]}"


def complete(
    data: Data,
    dataset: DataSet,
    look: Preprocessing,
    match: ClassMatch,
    known: Mapping[str, ImageHashes | None],
) -> EvaluationSet:
    """The set with its pixels, without what the model knows if that is to be left out.

    Args:
      data: Its fields: what is done with unreadable images, and with those that are known.
      dataset: Its images, see `read_set`.
      look: How they are prepared.
      match: Of the model's classes.
      known: Hashes of what was trained on, see `audit_evaluated`.
    """
    dataset, decoded = inputs.decode_as(data, dataset, look)
    pixels = decoded["test"].array
    hashes = hash_images(dataset, {"test": pixels}, look.resize)
    audit, rows = audit_evaluated(dataset.name, hashes, known)
    if data.exclude_overlap:
        dataset = without(dataset, {"test": rows})
        pixels = pixels[~rows] if rows.any() else pixels
        audit = {**audit, "warnings": [], "excluded": int(rows.sum())}
    match.known(dataset.splits["test"])  # refuses here what would be left of no image
    return EvaluationSet(dataset, pixels, match, audit)
