"""The recipes: each a short composition of stages, and what is known of it before it runs."""

import dataclasses
from collections.abc import Callable

from medmerge_jax.config import Config
from medmerge_jax.recipes import soups
from medmerge_jax.recipes.experiment import Experiment, Trained
from medmerge_jax.registry import Decorator, Registry


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An entry of `RECIPES`."""

    function: Callable[[Experiment], Trained]  # composes stages
    one_parent: bool = False  # whether it starts from `config.start`, instead of all parents
    merges: bool = False  # whether it calls `config.merge_ft.method`
    averages: bool = False  # whether it averages the parents, which it opens one at a time


RECIPES: Registry[Recipe] = Registry("recipe")

recipe = Decorator(RECIPES, Recipe)
"""Registers a function under its name; the first line of its docstring says what it does.

The function takes an `Experiment` and returns `Trained`. Facts: see `Recipe`.
"""


def needed_parents(config: Config) -> list[str]:
    """Names of the parents that the config's recipe starts from."""
    return [config.start] if RECIPES[config.recipe].one_parent else sorted(config.parents)


@recipe(one_parent=True)
def ft(experiment: Experiment) -> Trained:
    """Fine-tunes everything from the parent `--config.start`, with a new head."""
    return experiment.fine_tune(experiment.start())


@recipe(one_parent=True)
def lp(experiment: Experiment) -> Trained:
    """Trains the head on the parent's frozen features, which are computed once."""
    return experiment.linear_probe(experiment.start())


@recipe(one_parent=True)
def lp_drift(experiment: Experiment) -> Trained:
    """As `lp`, but in training mode: the running statistics drift (FissionFusion's warm-up)."""
    return experiment.linear_probe(experiment.start(), norms="drift")


@recipe(one_parent=True)
def lp_ft(experiment: Experiment) -> Trained:
    """First `lp`, then `ft`, which keeps the probe's head (Kumar et al., 2022)."""
    return experiment.fine_tune(lp(experiment))


@recipe(one_parent=True)
def lp_bn_ft(experiment: Experiment) -> Trained:
    """The control: as `lp_ft`, but the batch norms train in the probe, as MedMerge's do."""
    probed = experiment.linear_probe(experiment.start(), norms="train")
    return experiment.fine_tune(probed)


@recipe
def medmerge(experiment: Experiment) -> Trained:
    """Learns a coefficient per kernel with head and batch norms, collapses, fine-tunes.

    Almakky et al., arXiv 2403.11646.
    """
    return experiment.fine_tune(experiment.merge_linear_probe(experiment.parents()))


@recipe
def medmerge_aligned(experiment: Experiment) -> Trained:
    """Our own: as `medmerge`, the other parents' units first permuted towards the last's."""
    return experiment.fine_tune(experiment.merge_linear_probe(experiment.aligned_parents()))


@recipe(merges=True)
def merge_ft(experiment: Experiment) -> Trained:
    """Merges without training by `merge_ft.method`, re-estimates batch norms, then `lp_ft`."""
    return experiment.fine_tune(experiment.linear_probe(experiment.merged()))


@recipe
def merge_lp(experiment: Experiment) -> Trained:
    """The first stage of `medmerge` alone: coefficients, head and batch norms, collapsed."""
    return experiment.merge_linear_probe(experiment.parents())


@recipe(one_parent=True)
def fgg(experiment: Experiment) -> Trained:
    """`ft`, then models from the minima of a cyclic learning rate (FissionFusion's generation).

    The model of the run is that of `ft`; the others are in kept/, see the study fission_fusion.
    """
    return experiment.generate(experiment.fine_tune(experiment.start(), keep_optimizer=True))


@recipe(averages=True)
def soup(experiment: Experiment) -> Trained:
    """Averages the parents, which were fine-tuned from one start; trains nothing."""
    return soups.average(experiment)
