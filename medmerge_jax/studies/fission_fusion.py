"""FissionFusion (Sanjeev et al., arXiv 2403.13341): few fine-tunings, many models, one soup.

A warm-up trains a head. From it one model is fine-tuned for each learning rate of the grid, and
from each of these a cyclic learning rate generates more (fast geometric generation, the recipe
`fgg`). Soups of each learning rate's models are averaged again (hierarchical souping): a greedy
soup over the groups' uniform soups (GoU) and one over their greedy soups (GoG).
"""

from typing import Any

import ml_collections

from medmerge_jax.analysis.published import FISSION_FUSION
from medmerge_jax.config import Config, default_config
from medmerge_jax.studies import grid
from medmerge_jax.studies.jobs import Job, Outcomes, study
from medmerge_jax.training.schedules import minima


def _bases(config: Config) -> list[Job]:
    """A job for each learning rate, which leaves its base and what is generated from it."""
    return [
        grid.member(config, f"fgg/lr{rate:g}", "fgg", **{"ft.learning_rate": rate})
        for rate in config.grid.learning_rates
    ]


def _reduce(config: Config, outcomes: Outcomes) -> dict[str, Any]:
    names = [job.name for job in _bases(config)]
    return grid.table(config, outcomes, names)


@study(reduce=_reduce, extends=("grid",), mistakes=grid.mistakes)
def fission_fusion(config: Config) -> list[Job]:
    """FissionFusion: a model per learning rate, more from a cyclic rate, and hierarchical soups.

    Sanjeev et al., arXiv 2403.13341. Augmentation and seed of all members are the config's.
    """
    bases = _bases(config)
    kept = [f"fgg-{epoch}" for epoch in minima(config.fgg.epochs, config.fgg.cycle)]
    groups = {
        job.name.removeprefix("fgg/"): {
            "base": f"job:{job.name}",
            **{name: f"job:{job.name}::{name}" for name in kept},
        }
        for job in bases
    }
    return [grid.warmup(config), *bases, *grid.soups(config, groups)]


def published_config(data: str, variant: str, *, metric: str) -> ml_collections.ConfigDict:
    """The settings of the paper's published code on one of its data sets, of ResNet-50 or DeiT-B.

    Warm-up: a linear probe, 10 epochs at 1e-3. Then a fine-tuning for each of 8 learning rates, 50
    epochs at most with cosine decay, and 17 epochs of generation from each: 48 models. AdamW with
    weight decay 1e-2, batches of 128, heavy augmentation, 224 px squashed, epochs by the lowest
    validation loss, from torchvision's ImageNet-1k weights of version 2, or DeiT's. (The code
    trains one epoch more than it says, at a learning rate of 0, which is left out here.)

    Args:
      data: Name of the official data set, and of the folder that it is looked for in.
      variant: A comma-separated choice of "grid", the grid of 48 that FissionFusion is compared
        with, 8 learning rates, 3 augmentations and 2 seeds; and "deit_base", the other network.
      metric: Ranks models on the validation images.

    Raises:
      ValueError: The variant is another.
    """
    words = set(filter(None, variant.split(",")))
    if words - {"grid", "deit_base"}:
        raise ValueError(
            f"FissionFusion on {data} has no variant {variant!r}; there are grid and deit_base"
        )
    config = default_config()
    config.recipe = "grid_search" if "grid" in words else "fission_fusion"
    config.start = "c"
    config.update_from_flattened_dict(dict(FISSION_FUSION.settings))
    if "deit_base" in words:
        config.architecture = "deit_base_patch16_224"
        config.parents = ml_collections.ConfigDict({"c": "imagenet"})
    else:
        config.parents = ml_collections.ConfigDict({"c": "resnet50-11ad3fa6.pth"})
        config.help = (
            "parents.c are torchvision's weights IMAGENET1K_V2 of ResNet-50, resnet50-11ad3fa6.pth;"
            " give their path with --config.parents.c=PATH, or =imagenet for those of version 1"
        )
    config.data.kind, config.data.name, config.data.root = "official", data, data
    config.soup.metric = metric
    return config
