"""The smallest experiments that run everything: drawn images of 16 pixels, 8 layers, two epochs.

Variants: empty for `medmerge` of two random parents; "compare" for two sources, every recipe and
two seeds, as the quickstart has them.
"""

import dataclasses
import functools

import ml_collections

from medmerge_jax.config import default_config
from medmerge_jax.models.registry import MODELS, register
from medmerge_jax.models.resnet import CifarResNet

ARCHITECTURE = "resnet8"


def get_config(variant=""):
    if variant not in ("", "compare"):
        raise ValueError(f"tests/tiny_config.py has no variant {variant!r}")
    config = _experiment(appearance=2, counts=(16, 8, 12))
    config.parents = ml_collections.ConfigDict({"b": "random", "c": "random"})
    if variant == "compare":
        config.recipe = "compare"
        config.parents = ml_collections.ConfigDict({"b": "source:b", "c": "source:c"})
        config.compare.seeds = (0, 1)
        config.sources = ml_collections.ConfigDict(
            {"b": _source(appearance=1, start="source:c"), "c": _source(0, start="random")}
        )
    return config


def _source(appearance, start):
    config = _experiment(appearance, counts=(24, 8, 8))
    config.recipe = "ft"
    config.parents = ml_collections.ConfigDict({"c": start})
    config.start = "c"
    return config


def register_architecture():
    """ResNet-20 with one of the three blocks in each stage, so that all kinds of layers are there.

    Not when this file is imported: what the tests of all models are is known before.
    """
    if ARCHITECTURE not in MODELS:
        build = functools.partial(CifarResNet, depth=1)
        register(dataclasses.replace(MODELS["resnet20"], name=ARCHITECTURE, build=build))


def _experiment(appearance, counts):
    config = default_config().unlock()
    register_architecture()
    config.architecture = ARCHITECTURE
    config.image_size = 16
    config.batch_size = 8
    config.data.name = f"clinic_{appearance}"
    config.data.kind = "synthetic"
    config.data.synthetic.appearance = appearance
    config.data.synthetic.counts = counts
    config.lp.epochs = config.ft.epochs = 2
    config.lp.learning_rate = config.ft.learning_rate = 1e-3
    config.checkpoint_seconds = 0.0  # every epoch is kept
    return config.lock()
