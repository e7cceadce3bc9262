"""Fine-tuning by blocks: which of them train, and at which rate."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from medmerge_jax.merging.trees import flatten
from medmerge_jax.models.norm import BatchNorm
from medmerge_jax.training.parameterization import Parameterization


def by_block(
    start: Parameterization,
    depths: Mapping[str, int],
    *,
    blocks: int = 0,
    layer_decay: float = 1.0,
) -> Parameterization:
    """Fine-tuning of the last blocks alone, with all that is behind them, or at rates by block.

    What is frozen is as in evaluation: its batch norms use their running statistics, which stay.

    Args:
      start: Of `fine_tune`; an optimiser's state in it is that of the same blocks.
      depths: Of all parameters, see `ModelSpec.depths`; empty: the start stays as it is.
      blocks: How many of the last ones are trained; 0: all, and the stem.
      layer_decay: Factor on the learning rate from each depth to the one before it; what is
        deepest has the stage's (Bao et al. 2021, "BEiT", arXiv 2106.08254).
    """
    if not depths:
        return start
    params, last = start.trainable["params"], max(depths.values())
    first = last - blocks if blocks else 0
    trainable = {path: leaf for path, leaf in params.items() if depths[path] >= first}
    frozen = {path: leaf for path, leaf in params.items() if path not in trainable}
    scale = {path: np.float32(layer_decay ** (last - depths[path])) for path in trainable}
    norms = {path.rpartition("/")[0] for path in flatten(start.batch_stats)}
    return dataclasses.replace(
        start,
        trainable={"params": trainable},
        frozen={"params": frozen, "rate_scale": {"params": scale}},
        still_norms=tuple(sorted(norm for norm in norms if f"{norm}/scale" in frozen)),
    )


def holding(still_norms: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
    """Within it these batch norms use their running statistics, whatever the others do."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, BatchNorm) and "/".join(module.path) in still_norms:
            return call(args[0], use_running_average=True)
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept) if still_norms else contextlib.nullcontext()
