"""What a stage is asked to do, and what it leaves."""

import dataclasses
from typing import Any

from medmerge_jax import config
from medmerge_jax.images.augment import Policy
from medmerge_jax.training.parameterization import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(config.Stage):
    """How long and how a stage trains: what the config says of it, and what it says of all.

    An epoch whose metric is strictly better than the best so far sets the count that `patience`
    limits to zero, one that is worse by more than `patience_delta` adds one, and any other, also
    one whose metric is undefined, leaves it. The schedule is that of all epochs.

    Attributes:
      name: Names its checkpoints and its lines in metrics.jsonl.
      weight_decay: Of AdamW.
      select: "best" epoch by validation `metric`, the first of equals, or the "last".
      metric: A name of `metrics.METRICS`.
      checkpoint_seconds: Least time between two checkpoints, and before the first; the last epoch
        always has one.
      augmentation: Of training images, or None; what is evaluated is never augmented.
      ordinal: Whether the order of the classes means something, for metrics that depend on it.
    """

    name: str
    weight_decay: float = 1e-2
    select: str = "best"
    metric: str = "macro_f1"
    checkpoint_seconds: float = 30.0
    augmentation: Policy | None = None
    ordinal: bool = False


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
