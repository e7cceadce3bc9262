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
    """

    name: str  # of its checkpoints and its lines in metrics.jsonl
    weight_decay: float = 1e-2  # of AdamW
    # The "best" epoch by validation metric, the first of equals; or the "last", as where the metric
    # is undefined in all.
    select: str = "best"
    metric: str = "macro_f1"
    checkpoint_seconds: float = 30.0  # least time before each; the last epoch always has one
    augmentation: Policy | None = None  # what is evaluated is never augmented
    ordinal: bool = False  # whether the order of the classes means something to metrics


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage leaves."""

    variables: Tree  # {"params", "batch_stats"} of an ordinary model, already collapsed
    trainable: Tree  # see `Parameterization`; of a merge with its coefficients
    summary: dict[str, Any]  # JSON values for results.json
    # Variables after those epochs of `Stage.keep` that the stage came to, in NumPy.
    kept: dict[int, Tree] = dataclasses.field(default_factory=dict)
