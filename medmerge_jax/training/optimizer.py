"""AdamW, whose learning rate and weight decay may differ between parts of what is trained."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medmerge_jax.training.parameterization import Tree

PerPart = jax.Array | float | Mapping[str, jax.Array]
"""A number for everything trainable, or one for each of its parts: "params", "coefficients"."""


def adamw(
    weight_decay: PerPart, decay_to: Mapping[str, Tree] | None = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2019) up to the factor −learning rate.

    The weight decay is decoupled and of everything trainable, as in PyTorch's AdamW; it pulls
    towards zero, or where a part of the trainable has one in `decay_to`, towards that.
    """

    def decay(updates: Tree, trainable: Tree) -> Tree:
        goals = {} if decay_to is None else decay_to
        away = {part: jax.tree.map(jnp.subtract, trainable[part], goals[part]) for part in goals}
        return _by_part(
            lambda factor, update, distance: update + factor * distance,
            *(weight_decay, updates, {**trainable, **away}),
        )

    return optax.chain(optax.scale_by_adam(), optax.stateless(decay))


def _by_part(function: Callable[..., Any], numbers: PerPart, *trees: Tree) -> Tree:
    """`function(number, *leaves)` of every leaf, with the number of its part."""
    mapped: Tree = jax.tree.map(
        lambda number, *parts: jax.tree.map(functools.partial(function, number), *parts),
        *(numbers, *trees),
    )
    return mapped


def step(
    grads: Tree,
    opt_state: Any,
    trainable: Tree,
    learning_rate: PerPart,
    weight_decay: PerPart,
    frozen: Tree,
) -> tuple[Tree, Any]:
    """What is trainable, and the optimiser's state, after one step of `adamw`.

    Weight decay pulls towards the "decay_to" of what is frozen, and the learning rate of each array
    is multiplied by its number in "rate_scale", where there are these, see `Parameterization`.
    """
    decay = adamw(weight_decay, frozen.get("decay_to"))
    updates, opt_state = decay.update(grads, opt_state, trainable)
    if "rate_scale" in frozen:
        updates = jax.tree.map(jnp.multiply, frozen["rate_scale"], updates)
    updates = _by_part(lambda rate, update: -rate * update, learning_rate, updates)
    return optax.apply_updates(trainable, updates), opt_state
