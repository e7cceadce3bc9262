"""FissionFusion from nothing, in a few minutes on two cores: drawn images, ResNet-20, 24 px.

    python -m medmerge_jax.main --config configs/fission_fusion/quickstart.py \
        --workdir runs/fission_fusion

Draws pigmented lesions and fundus photographs. Trains a parent on the lesions from scratch, then
a head on the photographs (the warm-up), fine-tunes it at four learning rates, generates three more
models from each by a cyclic rate, and makes soups of the sixteen. The table has the best single
model beside the uniform and the greedy soup of all, and the hierarchical ones (GoU, GoG).

Fewer learning rates, epochs and augmentation than the paper's, and higher rates, because the
network is small; the other files of this folder have the published settings. The images are drawn,
so the figures say that the program works, not that the method does.
"""

import ml_collections

from medmerge_jax.config import default_config

SIZE = 24


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or "grid" for a grid search over as many epochs."""
    if variant not in ("", "grid"):
        raise ValueError(f"configs/fission_fusion/quickstart.py has no variant {variant!r}")
    config = _experiment("clinic", kind="fundus", counts=(320, 160, 320))
    config.recipe = "grid_search" if variant else "fission_fusion"
    config.parents = ml_collections.ConfigDict({"c": "source:c"})
    config.start = "c"
    config.augmentation = "minimal"
    config.lp.learning_rate, config.lp.epochs = 3e-3, 4
    config.ft.epochs, config.ft.schedule = 8, "cosine"
    config.grid.learning_rates = (3e-3, 1e-3, 3e-4, 1e-4)
    config.grid.augmentations = ("none", "minimal")
    config.grid.seeds = (0,)
    config.fgg.epochs = 9
    config.fgg.learning_rate, config.fgg.lowest = 1e-3, 1e-6
    config.sources = ml_collections.ConfigDict({"c": _source()})
    return config


def _source() -> ml_collections.ConfigDict:
    config = _experiment("lesions", kind="lesion", counts=(960, 160, 160))
    config.recipe = "ft"
    config.parents = ml_collections.ConfigDict({"c": "random"})
    config.start = "c"
    config.ft.learning_rate, config.ft.epochs = 3e-3, 3
    config.ft.schedule, config.ft.warmup_epochs = "cosine", 1.0
    return config


def _experiment(name: str, *, kind: str, counts: tuple[int, int, int]) -> ml_collections.ConfigDict:
    config = default_config().unlock()
    config.architecture = "resnet20"
    config.image_size = SIZE
    config.batch_size = 16
    config.data.name = name
    config.data.kind = "synthetic"
    config.data.synthetic.kind = kind
    config.data.synthetic.counts = counts
    return config.lock()
