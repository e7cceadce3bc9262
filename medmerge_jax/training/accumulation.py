"""The step on a batch in parts, for a batch whose activations do not fit the memory."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from medmerge_jax.runtime.mesh import replicated
from medmerge_jax.training.loss import total_weight
from medmerge_jax.training.optimizer import PerPart
from medmerge_jax.training.parameterization import Tree
from medmerge_jax.training.step import (
    Batch,
    Task,
    TrainState,
    gradients,
    update,
)


def accumulated_step(
    task: Task,
    state: TrainState,
    frozen: Tree,
    batch: Sequence[Batch],
    learning_rate: PerPart,
    weight_decay: PerPart,
    class_weights: jax.Array,
    key: jax.Array | None = None,
) -> tuple[TrainState, jax.Array]:
    """`step.train_step` on the parts of a batch; the arguments are the same.

    Loss and gradients are the sums over the parts of what they add to those of the whole batch,
    also where classes are weighted or labels unknown. Batch norms see the parts: each is normalised
    by its own statistics, and the running averages move once for each part.
    """
    labels, batch_stats = tuple(part["labels"] for part in batch), state.batch_stats
    sums, total = _begin(task, state.trainable, labels, class_weights)
    for index, part in enumerate(batch):  # a loop of the compiler would convolve on one thread
        rngs = task.network.streams(key, state.step, index)
        sums, batch_stats = _add_part(
            task, sums, batch_stats, state.trainable, frozen, part, class_weights, total, rngs
        )
    grads, loss = sums
    # The running averages from before the first part were donated to it.
    state = state._replace(batch_stats=batch_stats)
    return _update(state, grads, loss, learning_rate, weight_decay, frozen), loss


_update = jax.jit(update, donate_argnames="state")


@functools.partial(jax.jit, static_argnames="task")
def _begin(
    task: Task, trainable: Tree, labels: tuple[jax.Array, ...], class_weights: jax.Array
) -> tuple[tuple[Tree, jax.Array], jax.Array]:
    """Gradients and loss of no part yet, and the total weight of all parts."""
    sums = jax.tree.map(jnp.zeros_like, trainable), jnp.zeros((), jnp.float32)
    begun = sums, total_weight(labels, class_weights, multilabel=task.multilabel)
    mesh = task.network.mesh
    return begun if mesh is None else jax.lax.with_sharding_constraint(begun, replicated(mesh))


@functools.partial(jax.jit, static_argnames="task", donate_argnames=("sums", "batch_stats"))
def _add_part(
    task: Task,
    sums: tuple[Tree, jax.Array],
    batch_stats: Tree,
    trainable: Tree,
    frozen: Tree,
    part: Batch,
    class_weights: jax.Array,
    total: jax.Array,
    rngs: dict[str, jax.Array] | None,
) -> tuple[tuple[Tree, jax.Array], Tree]:
    """Gradients and loss added to `sums`, and the new batch statistics."""
    (loss, batch_stats), grads = gradients(
        task, trainable, batch_stats, frozen, part, class_weights, rngs, total
    )
    return jax.tree.map(jnp.add, sums, (grads, loss)), batch_stats
