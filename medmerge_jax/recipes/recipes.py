"""The recipes: each a short composition of stages.

ft        fine-tune everything from one parent
lp        train the head on one parent's frozen features
lp_ft     lp, then ft (Kumar et al. 2022)
lp_bn_ft  the control for medmerge: as lp_ft, but with the batch norms trained in the probe
medmerge  merge linear probe, collapse, then ft (Almakky et al., arXiv 2403.11646)
medmerge_aligned  our own: as medmerge, the other parents' units first permuted towards the last's
merge_ft  merge by `config.merge_ft.method`, recalibrate batch norms, then lp_ft
"""

from collections.abc import Callable

from medmerge_jax.recipes.experiment import Experiment
from medmerge_jax.training.parameterization import Tree


def ft(experiment: Experiment) -> Tree:
    """Full fine-tuning from one parent with a new head."""
    return experiment.fine_tune(experiment.start())


def lp(experiment: Experiment) -> Tree:
    """Linear probe: batch norms and kernels of the parent stay as they are."""
    return experiment.linear_probe(experiment.start(), shared_as=experiment.config.start)


def lp_ft(experiment: Experiment) -> Tree:
    """Linear probe, then fine-tuning that keeps the probe's head."""
    return experiment.fine_tune(lp(experiment))


def lp_bn_ft(experiment: Experiment) -> Tree:
    """What training the batch norms in the probe brings without a second parent."""
    probed = experiment.linear_probe(experiment.start(), train_batch_norm=True)
    return experiment.fine_tune(probed)


def medmerge(experiment: Experiment) -> Tree:
    """MedMerge: both parents blended by learned coefficients, then fine-tuned."""
    merged = experiment.merge_linear_probe(experiment.parents())
    return experiment.fine_tune(merged)


def medmerge_aligned(experiment: Experiment) -> Tree:
    """MedMerge of parents whose hidden units correspond."""
    merged = experiment.merge_linear_probe(experiment.aligned_parents())
    return experiment.fine_tune(merged)


def merge_ft(experiment: Experiment) -> Tree:
    """Any merger without training, then linear probe and fine-tuning."""
    return experiment.fine_tune(experiment.linear_probe(experiment.merged()))


RECIPES: dict[str, Callable[[Experiment], Tree]] = {
    "ft": ft,
    "lp": lp,
    "lp_ft": lp_ft,
    "lp_bn_ft": lp_bn_ft,
    "medmerge": medmerge,
    "medmerge_aligned": medmerge_aligned,
    "merge_ft": merge_ft,
}
