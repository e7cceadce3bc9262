"""Training images that batch norms are calibrated on, and mergers look at."""

from collections.abc import Iterator

import jax
import numpy as np

from medmerge_jax.config import Config
from medmerge_jax.data import Batches
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.models.statistics import estimated_note, lacks_statistics, with_statistics
from medmerge_jax.recipes.inputs import Parent
from medmerge_jax.runtime import mesh as mesh_lib
from medmerge_jax.runtime.progress import say


def calibration_batches(
    network: Network, train: Batches, seed: int, count: int
) -> Iterator[np.ndarray]:
    """float32 (n, h, w, 3), normalised: the first training images in the order of the seed."""
    for batch in train.epoch(seed, 0):
        for part in batch if isinstance(batch, tuple) else (batch,):
            normalised = mesh_lib.fetch(network.normalise(part["inputs"]))
            images = normalised[: min(len(part["labels"]), count)]
            count -= len(images)
            if len(images):
                yield images
        if count <= 0:
            return


def estimate_statistics(
    config: Config, parents: dict[str, Parent], train: Batches, mesh: jax.sharding.Mesh | None
) -> dict[str, Parent]:
    """Gives parents whose batch norms lack running statistics those of training images."""
    lacking = [
        name
        for name, (variables, _) in parents.items()
        if variables and lacks_statistics(config.architecture, variables)  # zeros come later
    ]
    if not lacking:
        return parents
    model = create_model(config.architecture, num_classes=0)
    network = Network(model, get_spec(config.architecture).preprocessing, mesh)
    batches = calibration_batches(network, train, config.seed, config.merge_ft.num_images)
    images = np.concatenate(list(batches))
    complete = dict(parents)
    for name in lacking:
        variables, card = parents[name]
        note = estimated_note(len(images), config.data.name)
        say(f"{card['file']}: {note}")
        variables = with_statistics(config.architecture, variables, images)
        complete[name] = variables, {**card, "notes": [*card["notes"], note]}
    return complete
