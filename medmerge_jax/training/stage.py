"""What a stage is asked to do, and what it leaves."""

import dataclasses
from collections.abc import Collection
from typing import Any

from medmerge_jax.images.augment import Policy
from medmerge_jax.training.parameterization import Tree


@dataclasses.dataclass(frozen=True)
class Stage:
    """How long and how a stage trains.

    Attributes:
      name: Names its checkpoints and its lines in metrics.jsonl.
      epochs: Passes over the training split, at most.
      learning_rate: Peak.
      schedule: See `schedules.learning_rates`.
      warmup_epochs: Of linear warm-up, may be a fraction.
      weight_decay: Of AdamW.
      select: "best" epoch by validation `metric`, the first of equals, or the "last"; that, too,
        if the metric is undefined in all.
      metric: A name of `metrics.METRICS`.
      checkpoint_seconds: Least time between two checkpoints, and before the first; the last epoch
        always has one.
      augmentation: Of training images, or None; what is evaluated is never augmented.
      patience: Epochs without progress after which the stage ends; 0 trains all. An epoch whose
        `metric` is strictly better than the best so far sets the count to zero, one that is worse
        by more than `patience_delta` adds one, and any other, also one whose metric is undefined,
        leaves it. The schedule is that of all epochs.
      patience_delta: In units of the metric, at least 0.
      ordinal: Whether the order of the classes means something, for metrics that depend on it.
      keep: Epochs, from 1, whose models are results too, see `StageResult.kept`.
    """

    name: str
    epochs: int
    learning_rate: float
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    weight_decay: float = 1e-2
    select: str = "best"
    metric: str = "macro_f1"
    checkpoint_seconds: float = 30.0
    augmentation: Policy | None = None
    patience: int = 0
    patience_delta: float = 0.0
    ordinal: bool = False
    keep: Collection[int] = ()


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage leaves.

    Attributes:
      variables: `{"params", "batch_stats"}` of an ordinary model, already collapsed.
      trainable: What was trained, see `Parameterization`; of a merge with its coefficients.
      summary: JSON values for results.json.
      kept: Variables after those epochs of `Stage.keep` that the stage came to, in NumPy.
    """

    variables: Tree
    trainable: Tree
    summary: dict[str, Any]
    kept: dict[int, Tree] = dataclasses.field(default_factory=dict)
