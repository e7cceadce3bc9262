"""The recipe `soup`: one model of many, of whose files no more than an array is held."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax import merging, weights
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import METRICS, classification_metrics
from medmerge_jax.merging.trees import flatten
from medmerge_jax.recipes import inputs
from medmerge_jax.recipes.experiment import Experiment, Trained
from medmerge_jax.runtime.progress import say
from medmerge_jax.training.loss import weighted_loss
from medmerge_jax.training.parameterization import Tree

_LEARNED_EPOCHS = 5
"""Over the validation images, as in the appendix of Wortsman et al. 2022."""

_ALIKE = 1e-3
"""Members whose distance from the soup is a smaller share of its length hardly differ."""


class _Members(Sequence[Tree]):
    """The parents of an experiment, or some of them; arrays are read when they are asked for."""

    def __init__(self, experiment: Experiment, names: Iterable[str]):
        self.names, self._experiment = list(names), experiment

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Tree: ...

    @overload
    def __getitem__(self, index: slice) -> "_Members": ...

    def __getitem__(self, index: int | slice) -> "Tree | _Members":
        if isinstance(index, slice):
            return self.some(range(len(self))[index])
        folder = self._experiment.inputs.folder
        return inputs.open_parent(self._experiment.config, self.names[index], folder)

    def some(self, indices: Iterable[int]) -> "_Members":
        """Those with these numbers."""
        return _Members(self._experiment, (self.names[index] for index in indices))


@dataclasses.dataclass(frozen=True)
class _Judge:
    """What tells which of two models is better, and by how much."""

    experiment: Experiment

    def score(self, variables: Tree) -> float:
        """The metric on the validation images, its sign such that more is better."""
        name = self.experiment.config.soup.metric
        value = self.metrics(variables, "val")[name]
        if value is None:
            raise UserError(
                f"soup.metric = {name!r} is undefined on the validation images; another is wanted, "
                "as 'loss'"
            )
        return float(value) if METRICS[name].higher_is_better else -float(value)

    def shown(self, score: float) -> float:
        """The metric itself."""
        return score if METRICS[self.experiment.config.soup.metric].higher_is_better else -score

    def metrics(self, variables: Tree, split: str) -> dict[str, Any]:
        """All metrics on a split."""
        predictions = self.experiment.predictions(weights.read_all(variables), split)
        return classification_metrics(predictions)

    def finish(self, variables: Tree) -> Tree:
        """With the statistics of batch norms estimated anew."""
        count = self.experiment.config.soup.num_images
        return self.experiment.recalibrated(weights.read_all(variables), count)


def average(experiment: Experiment) -> Trained:
    """The soup `config.soup` of all parents, and why it is worse than its best member if it is.

    Statistics of batch norms are averaged like all else. `soup.recalibrate` says whether they are
    estimated anew afterwards; the results have the metrics of both.

    Raises:
      UserError: The members did not begin with one head, or are of other classes; or the metric
        that ranks them is undefined on the validation images.
    """
    settings, judge = experiment.config.soup, _Judge(experiment)
    members = _Members(experiment, experiment.inputs.parents)
    always = settings.recalibrate == "always" and _has_statistics(members[0])
    finish = judge.finish if always else None
    scores = [judge.score(finish(one) if finish else one) for one in members]
    chosen: Sequence[int] = range(len(members))
    if settings.kind == "greedy":
        chosen = merging.greedy_soup(members, judge.score, scores, finish=finish).chosen
    if settings.kind == "learned":
        averaged = _learned(experiment, members)
    else:
        averaged = merging.uniform_soup(members.some(chosen))
    variants = {"averaged": averaged}
    if _has_statistics(averaged):
        variants["recalibrated"] = judge.finish(averaged)
    ranks = {name: judge.score(variables) for name, variables in variants.items()}
    taken = "recalibrated" if always else "averaged"
    if settings.recalibrate == "if_better":
        taken = max(ranks, key=lambda name: ranks[name])  # of equals the first
    best = int(np.argmax(scores))
    best_member = finish(members[best]) if finish else members[best]
    facts: dict[str, Any] = {
        "kind": settings.kind,
        "metric": settings.metric,
        "members": dict(zip(members.names, map(judge.shown, scores), strict=True)),
        "best": {
            "member": members.names[best],
            **{split: judge.metrics(best_member, split) for split in ("val", "test")},
        },
        "chosen": [members.names[index] for index in chosen],
        "taken": taken,
        "variants": {
            name: {split: judge.metrics(variables, split) for split in ("val", "test")}
            for name, variables in variants.items()
        },
    }
    if ranks[taken] < max(scores):
        facts["explanation"] = _explanation(judge, members, scores, variants, ranks, taken)
        say(facts["explanation"])
    head = _common_head(experiment)
    return Trained(variants[taken], head=head, facts={"soup": facts})


def check_heads(names: Sequence[str], cards: Sequence[dict[str, Any]], any_heads: bool) -> None:
    """Refuses members of a soup whose heads did not begin as one.

    Heads that began apart have their units and signs elsewhere, and so have the features that were
    fine-tuned towards them: the average of such models is none.

    Raises:
      UserError: It names two that differ, or one of which it is not known.
    """
    heads = {name: card.get("head", "") for name, card in zip(names, cards, strict=True)}
    if any_heads or (len(set(heads.values())) == 1 and "" not in heads.values()):
        return
    unknown = [name for name, head in heads.items() if not head]
    first, *others = heads
    apart = next((name for name in others if heads[name] != heads[first]), first)
    found = (
        f"nothing says with which head {unknown[0]} began"
        if unknown
        else f"{first} and {apart} began with different heads"
    )
    raise UserError(
        f"{found}. Members of a soup must be fine-tuned from one head (head = 'keep' from one "
        "linear probe, or equal seeds): averaged over others, models collapse. "
        "soup.any_heads = True averages them all the same"
    )


def _common_head(experiment: Experiment) -> str:
    """The head with which all members began; empty if that is not one."""
    heads = {card.get("head", "") for _, card in experiment.inputs.parents.values()}
    return heads.pop() if len(heads) == 1 else ""


def _has_statistics(variables: Tree) -> bool:
    return bool(variables.get("batch_stats"))


def _learned(experiment: Experiment, members: _Members) -> Tree:
    """The soup with a share per member and array, trained on the validation images."""
    dataset, network = experiment.inputs.dataset, experiment.network
    equal = jnp.ones(dataset.num_classes)

    def loss(variables: Tree, beta: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits = network.model.apply(variables, network.normalise(batch["inputs"]), train=False)
        labels = batch["labels"]
        return weighted_loss(
            beta * logits[: len(labels)], labels, equal, multilabel=dataset.multilabel
        )

    validation = experiment.inputs.batches["val"]
    batches = (
        batch
        for epoch in range(_LEARNED_EPOCHS)
        for batch in validation.epoch(experiment.config.seed, epoch)
    )
    # Each is read twice a step, so that all are held where there is room for them.
    return merging.learned_soup([*map(weights.read_all, members)], loss, batches).variables


def _explanation(
    judge: _Judge,
    members: _Members,
    scores: Sequence[float],
    variants: dict[str, Tree],
    ranks: dict[str, float],
    taken: str,
) -> str:
    """Why a soup is worse than its best member: statistics, a barrier, or members too alike."""
    best = int(np.argmax(scores))
    metric = judge.experiment.config.soup.metric
    told = (
        f"the soup's {metric} on the validation images, {judge.shown(ranks[taken]):.4f}, is worse "
        f"than that of its best member {members.names[best]}, {judge.shown(scores[best]):.4f}: "
    )
    other = max(ranks, key=lambda name: ranks[name])
    if ranks[other] >= scores[best]:
        return (
            f"{told}the statistics of its batch norms are to blame, for {other} it has "
            f"{judge.shown(ranks[other]):.4f} (soup.recalibrate)"
        )
    distances = [_distance(member, variants["averaged"]) for member in members]
    apart = f"members are {min(distances):.1e} to {max(distances):.1e} of its length from the soup"
    if max(distances) < _ALIKE:
        return f"{told}{apart}, so alike that they have the same faults"
    far = max((i for i in range(len(members)) if i != best), key=lambda index: distances[index])
    ends = [members[best], members[far]]
    middle = merging.uniform_soup(ends)
    losses = [judge.metrics(one, "val")["loss"] for one in (*ends, middle)]
    barrier = losses[2] - (losses[0] + losses[1]) / 2
    between = (
        f"half-way between {members.names[best]} and {members.names[far]} the validation loss is "
        f"{losses[2]:.4f}, {abs(barrier):.4f} {'above' if barrier > 0 else 'below'} their mean"
    )
    if barrier > 0:
        return f"{told}members are too far apart; {between} ({apart})"
    return f"{told}no barrier lies between its members, other members are just worse; {between}"


def _distance(member: Tree, soup: Tree) -> float:
    """Of two models' parameters, as a share of the length of the second's."""
    ours, theirs = flatten(member["params"]), flatten(soup["params"])
    length = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in theirs.values())
    apart = sum(
        float(np.sum(np.square(np.asarray(ours[path], np.float64) - np.asarray(x))))
        for path, x in theirs.items()
    )
    return float(np.sqrt(apart / length))
