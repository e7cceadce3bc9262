"""FissionFusion (Sanjeev et al., arXiv 2403.13341): few fine-tunings, many models, one soup.

A warm-up trains a head. From it one model is fine-tuned for each learning rate of the grid, and
from each of these a cyclic learning rate generates more (fast geometric generation, the recipe
`fgg`). Soups of each learning rate's models are averaged again (hierarchical souping): a greedy
soup over the groups' uniform soups (GoU) and one over their greedy soups (GoG).
"""

from typing import Any

from medmerge_jax.config import Config
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


@study(reduce=_reduce, extends=("grid",))
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
