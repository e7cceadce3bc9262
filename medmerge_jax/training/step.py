"""The one training step."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medmerge_jax.merging.trees import unflatten
from medmerge_jax.models.network import Network
from medmerge_jax.runtime.mesh import batch_sharded, replicated
from medmerge_jax.training import optimizer
from medmerge_jax.training.blocks import holding
from medmerge_jax.training.loss import weighted_loss
from medmerge_jax.training.parameterization import Assemble, Parameterization, Tree

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """All that is fixed while a stage is compiled."""

    network: Network
    assemble: Assemble  # see `Parameterization`, as for the next
    train_batch_norm: bool
    multilabel: bool  # binary cross-entropy per label (NaN labels are left out), not softmax
    still_norms: tuple[str, ...] = ()  # see `Parameterization`


class TrainState(NamedTuple):
    """What a step changes: all that a checkpoint needs."""

    step: jax.Array  # steps taken in this stage, int32
    trainable: Tree  # see `Parameterization`
    batch_stats: Tree  # running statistics
    opt_state: Any  # of `optimizer.adamw`
    loss_sum: jax.Array  # of this epoch's steps, float32
    bad_step: jax.Array  # the first whose loss was not finite, or −1, int32


def copy_tree(tree: Any) -> Any:
    """Of arrays, on the same devices; what is donated later is not lost with it."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def init_state(start: Parameterization) -> TrainState:
    """The state before the first step; the arrays of `start` are copied, not aliased."""
    copies = copy_tree((start.trainable, start.batch_stats, start.opt_state))
    trainable, batch_stats, opt_state = copies
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        batch_stats=batch_stats,
        opt_state=optimizer.adamw(0.0).init(trainable) if opt_state is None else opt_state,
        loss_sum=jnp.zeros((), jnp.float32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="task", donate_argnames="state")
def train_step(
    task: Task,
    state: TrainState,
    frozen: Tree,
    batch: Batch,
    learning_rate: optimizer.PerPart,
    weight_decay: optimizer.PerPart,
    class_weights: jax.Array,
    key: jax.Array | None = None,
) -> tuple[TrainState, jax.Array]:
    """One step of AdamW on the trainable part.

    Args:
      task: What is compiled.
      state: Donated.
      frozen: Constants of the stage, see `Parameterization`.
      batch: `inputs` uint8 (n, h, w, c) or float32 (n, features); `labels` int32 (n,) or
        float32 (n, classes). On several devices there may be more inputs, which do not count, see
        `mesh`. Images are augmented before, see `augmentation`.
      learning_rate: Scalar, or one for each part of the trainable; arguments, like the next, so
        that one compilation serves them all.
      weight_decay: Likewise, see `optimizer.adamw`.
      class_weights: See `weighted_loss`.
      key: Of the epoch, see `augment.epoch_key`; only needed by a model that draws random numbers,
        see `Network.rngs`.

    Returns:
      The new state and the loss of this batch before the step, a float32 scalar.
    """
    rngs = task.network.streams(key, state.step)
    (loss, batch_stats), grads = gradients(
        task, state.trainable, state.batch_stats, frozen, batch, class_weights, rngs
    )
    state = state._replace(batch_stats=batch_stats)
    return update(state, grads, loss, learning_rate, weight_decay, frozen), loss


def gradients(
    task: Task,
    trainable: Tree,
    batch_stats: Tree,
    frozen: Tree,
    batch: Batch,
    class_weights: jax.Array,
    rngs: dict[str, jax.Array] | None,
    total: jax.Array | None = None,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """((loss, new batch statistics), gradients) of a batch.

    Or of a part of one: then `total` is `loss.total_weight` of the whole batch.
    """
    mesh = task.network.mesh
    images = batch["inputs"]
    if mesh is not None:
        # Rows that only fill the batch up to a multiple of the devices are cut off.
        images = images[: len(batch["labels"])]
        images = jax.lax.with_sharding_constraint(images, batch_sharded(mesh))

    def loss_fn(trainable: Tree) -> tuple[jax.Array, Tree]:
        params = unflatten(task.assemble(trainable, frozen))
        with holding(task.still_norms):
            logits, updated = task.network.model.apply(
                {"params": params, "batch_stats": batch_stats},
                task.network.normalise(images),
                train=True,
                use_running_average=not task.train_batch_norm,
                mutable=["batch_stats"],
                rngs=rngs,
            )
        loss = weighted_loss(
            logits, batch["labels"], class_weights, multilabel=task.multilabel, total=total
        )
        return loss, updated.get("batch_stats", batch_stats)

    result = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    return result if mesh is None else jax.lax.with_sharding_constraint(result, replicated(mesh))


def update(
    state: TrainState,
    grads: Tree,
    loss: jax.Array,
    learning_rate: optimizer.PerPart,
    weight_decay: optimizer.PerPart,
    frozen: Tree,
) -> TrainState:
    """The state after a step with these gradients; its batch statistics are new already."""
    trainable, opt_state = optimizer.step(
        grads, state.opt_state, state.trainable, learning_rate, weight_decay, frozen
    )
    return state._replace(
        step=state.step + 1,
        trainable=trainable,
        opt_state=opt_state,
        loss_sum=state.loss_sum + loss,
        bad_step=jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step, state.bad_step),
    )


collapse = jax.jit(
    lambda assemble, trainable, frozen: unflatten(assemble(trainable, frozen)), static_argnums=0
)
"""The model's own parameters, nested: coefficients and parents are used up."""
