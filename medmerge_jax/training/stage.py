"""What a stage is asked to do, and what it leaves."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from medmerge_jax import config
from medmerge_jax.images.augment import Policy
from medmerge_jax.training.parameterization import Tree
from medmerge_jax.training.schedules import learning_rates, triangular_rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(config.Stage):
    """How long and how a stage trains: what the config says of it, and what it says of all.

    An epoch whose metric is strictly better than the best so far sets the count that `patience`
    limits to zero, one that is worse by more than `patience_delta` adds one, and any other, also
    one whose metric is undefined, leaves it. The schedule is that of all epochs.
    """

    name: str  # of its checkpoints and its lines in metrics.jsonl
    group: str = ""  # of the config's fields that say how long and how fast; for messages
    weight_decay: float = 1e-2  # of AdamW
    # The "best" epoch by validation metric, the first of equals; or the "last", as where the metric
    # is undefined in all.
    select: str = "best"
    metric: str = "macro_f1"
    checkpoint_seconds: float = 30.0  # least time before each; the last epoch always has one
    augmentation: Policy | None = None  # what is evaluated is never augmented
    ordinal: bool = False  # whether the order of the classes means something to metrics
    cycle: int = 0  # epochs of a triangular cycle, in place of the schedule; 0: none
    lowest: float = 0.0  # learning rate of that cycle; the highest is `learning_rate`
    keep_optimizer: bool = False  # whether the result has the optimiser's state

    def rates(self, steps_per_epoch: int, highest: float | None = None) -> np.ndarray:
        """Learning rate of every step, float32; their highest is the stage's, or another."""
        highest = self.learning_rate if highest is None else highest
        if self.cycle:
            return triangular_rates(
                self.epochs,
                steps_per_epoch,
                cycle=self.cycle,
                highest=highest,
                lowest=self.lowest,
            )
        steps, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        return learning_rates(self.schedule, highest, steps, warmup_steps=round(warmup))


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage leaves."""

    variables: Tree  # {"params", "batch_stats"} of an ordinary model, already collapsed
    trainable: Tree  # see `Parameterization`; of a merge with its coefficients
    summary: dict[str, Any]  # JSON values for results.json
    # Variables after those epochs of `Stage.keep` that the stage came to, in NumPy.
    kept: dict[int, Tree] = dataclasses.field(default_factory=dict)
    opt_state: Any = None  # after the selected epoch, if the stage was to keep it


def training_cost(summaries: Iterable[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """What stages cost together, by their summaries.

    >>> training_cost([{"epochs": 2, "images": 24, "seconds": 1.5}, {"epochs": 1}], batch_size=8)
    {'epochs': 3, 'steps': 3, 'images': 24, 'seconds': 1.5}

    Args:
      summaries: Of the stages, see `StageResult`.
      batch_size: Of all devices.

    Returns:
      "epochs", "steps", "images" (trained on, each as often as it was seen) and "seconds" of the
      steps, without validation and compilation. Stages of an earlier version, which did not count
      images, have none.
    """
    told = list(summaries)
    images = sum(one.get("images", 0) for one in told)
    return {
        "epochs": sum(one.get("epochs", 0) for one in told),
        "steps": -(-images // batch_size),
        "images": images,
        "seconds": round(sum(one.get("seconds", 0.0) for one in told), 3),
    }
