"""What is worth a warning of how a stage is asked to train, and what to try in its place."""

from collections.abc import Mapping, Sequence
from typing import Any

from medmerge_jax.training.stage import Stage

FEW_STEPS = 10
"""An epoch of fewer is hardly training: the rates of the papers are those of hundreds."""

_SMALLEST = 4
"""Batch size that is advised: batch norms want several images."""

_MOVES = 0.01
"""Part of the training loss by which a stage changes it at least, if it trains anything."""

_LOW = 0.1
"""A loss below has come to where it hardly moves any more."""


def few_steps(stage: Stage, steps: int, batch_size: int) -> str:
    """A warning of a stage with few steps in an epoch; "" if there are enough."""
    if steps >= FEW_STEPS:
        return ""
    smaller = batch_size
    while smaller > _SMALLEST and steps * batch_size // smaller < FEW_STEPS:
        smaller //= 2
    advice = f"{stage.group}.epochs = {stage.epochs * -(-FEW_STEPS // steps)}"
    if smaller < batch_size:
        advice = f"batch_size = {smaller}, or {advice}"
    of = f"{steps} step{'s' if steps > 1 else ''} of {batch_size} images an epoch"
    return f"warning: {stage.name} makes {of}; try {advice}"


def still_loss(stage: Stage, records: Sequence[Mapping[str, Any]]) -> str:
    """A warning of a stage whose training loss has hardly moved; "" if it has.

    Args:
      stage: One that has come to its end.
      records: Of its epochs and those of other stages, as in metrics.jsonl.
    """
    ours = [one for one in records if one.get("stage") == stage.name]
    losses = [one["train_loss"] for one in ours if "train_loss" in one]
    if len(losses) < 2 or stage.cycle:
        return ""
    first, last = losses[0], losses[-1]
    if last < _LOW or abs(first - last) > _MOVES * abs(first):
        return ""
    return (
        f"warning: the training loss of {stage.name} hardly moved in {len(losses)} epochs, from "
        f"{first:.4f} to {last:.4f}; try {stage.group}.learning_rate = "
        f"{10 * stage.learning_rate:.3g}, or more epochs"
    )
