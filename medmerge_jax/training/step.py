"""The one training step."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from medmerge_jax.images.augment import Policy, augment
from medmerge_jax.models.layers import at_least_float32
from medmerge_jax.models.network import Network
from medmerge_jax.runtime.mesh import by_rows, on_all
from medmerge_jax.training.parameterization import Assemble, Parameterization, Tree

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """All that is fixed while a stage is compiled.

    Attributes:
      network: The model and its normalisation.
      assemble: See `Parameterization`.
      train_batch_norm: See `Parameterization`.
      multilabel: Binary cross-entropy per label (NaN labels are left out) instead of softmax.
      weight_decay: Decoupled, applied to everything trainable, as PyTorch's AdamW does.
      augmentation: Of the images of each step, or None.
    """

    network: Network
    assemble: Assemble
    train_batch_norm: bool
    multilabel: bool
    weight_decay: float
    augmentation: Policy | None = None

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW (Loshchilov & Hutter, 2019) up to the factor −learning rate."""
        return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(self.weight_decay))


class TrainState(NamedTuple):
    """What a step changes: all that a checkpoint needs.

    Attributes:
      step: Steps taken in this stage, int32.
      trainable: See `Parameterization`.
      batch_stats: Running statistics.
      opt_state: State of `Task.optimizer`.
      loss_sum: Sum of the losses of this epoch's steps, float32.
      bad_step: First step whose loss was not finite, or −1, int32.
    """

    step: jax.Array
    trainable: Tree
    batch_stats: Tree
    opt_state: Any
    loss_sum: jax.Array
    bad_step: jax.Array


def init_state(task: Task, start: Parameterization) -> TrainState:
    """The state before the first step; the arrays of `start` are copied, not aliased."""
    trainable, batch_stats = jax.tree.map(
        lambda leaf: jnp.array(leaf, copy=True), (start.trainable, start.batch_stats)
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        batch_stats=batch_stats,
        opt_state=task.optimizer.init(trainable),
        loss_sum=jnp.zeros((), jnp.float32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="task", donate_argnames="state")
def train_step(
    task: Task,
    state: TrainState,
    frozen: Tree,
    batch: Batch,
    learning_rate: jax.Array,
    class_weights: jax.Array,
    key: jax.Array | None = None,
) -> tuple[TrainState, jax.Array]:
    """One step of AdamW on the trainable part.

    Args:
      task: What is compiled.
      state: Donated.
      frozen: Constants of `task.assemble`.
      batch: `inputs` uint8 (n, h, w, c) or float32 (n, features); `labels` int32 (n,) or
        float32 (n, classes); with augmentation also `indices` int32 (n,), see `augment`. On
        several devices there may be more inputs, which do not count, see `mesh`.
      learning_rate: Scalar; an argument, so that one compilation serves every schedule.
      class_weights: (classes,), see `weighted_loss`.
      key: Of the epoch, see `augment.epoch_key`; only needed with augmentation.

    Returns:
      The new state and the loss of this batch before the step, a float32 scalar.
    """
    (loss, batch_stats), grads = _gradients(
        task, state.trainable, state.batch_stats, frozen, batch, class_weights, key
    )
    return _update(task, state, grads, batch_stats, loss, learning_rate), loss


def accumulated_step(
    task: Task,
    state: TrainState,
    frozen: Tree,
    batch: Sequence[Batch],
    learning_rate: jax.Array,
    class_weights: jax.Array,
    key: jax.Array | None = None,
) -> tuple[TrainState, jax.Array]:
    """`train_step` on a batch in parts, for a batch whose activations do not fit the memory.

    Loss and gradients are the sums over the parts of what they add to those of the whole batch,
    also where classes are weighted or labels unknown. Batch norms see the parts: each is normalised
    by its own statistics, and the running averages move once for each part.

    Args:
      task: As for `train_step`, like all the others.
      state: Donated.
      frozen: Constants of `task.assemble`.
      batch: Its parts.
      learning_rate: Scalar.
      class_weights: (classes,).
      key: Of the epoch.
    """
    total = _total_weight(task.multilabel, tuple(part["labels"] for part in batch), class_weights)
    sums, batch_stats = _zeros(task, state.trainable), state.batch_stats
    for part in batch:  # in a loop of the compiler, convolutions lose their threads
        sums, batch_stats = _add_part(
            task, sums, batch_stats, state.trainable, frozen, part, class_weights, total, key
        )
    grads, loss = sums
    # What is donated must be there: the running averages before the first part are not.
    return _apply(task, state._replace(batch_stats=batch_stats), grads, loss, learning_rate), loss


def _gradients(
    task: Task,
    trainable: Tree,
    batch_stats: Tree,
    frozen: Tree,
    batch: Batch,
    class_weights: jax.Array,
    key: jax.Array | None,
    total: jax.Array | None = None,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """((loss, new batch statistics), gradients) of a batch, or of a part of one, see `total`."""
    mesh = task.network.mesh
    images = batch["inputs"]
    if mesh is not None:
        # Rows that only fill the batch up to a multiple of the devices are cut off.
        images = jax.lax.with_sharding_constraint(images[: len(batch["labels"])], by_rows(mesh))
    if task.augmentation is not None:
        if images.dtype != jnp.uint8 or key is None:
            raise ValueError(
                f"augmentation of {images.dtype} inputs {'without' if key is None else 'with'} a "
                "key: uint8 images and the key of the epoch are wanted; features were computed "
                "from images that are not augmented"
            )
        images = augment(task.augmentation, images, batch["indices"], key)

    def loss_fn(trainable: Tree) -> tuple[jax.Array, Tree]:
        params = task.assemble(trainable, frozen)
        inputs = task.network.normalise(images)
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = task.network.model.apply(
            variables, inputs, train=task.train_batch_norm, mutable=["batch_stats"]
        )
        loss = weighted_loss(
            logits, batch["labels"], class_weights, multilabel=task.multilabel, total=total
        )
        return loss, updated.get("batch_stats", batch_stats)

    found, grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    if mesh is not None:
        found, grads = jax.lax.with_sharding_constraint((found, grads), on_all(mesh))
    return found, grads


def _update(
    task: Task,
    state: TrainState,
    grads: Tree,
    batch_stats: Tree,
    loss: jax.Array,
    learning_rate: jax.Array,
) -> TrainState:
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.trainable)
    updates = jax.tree.map(lambda update: -learning_rate * update, updates)
    return TrainState(
        step=state.step + 1,
        trainable=optax.apply_updates(state.trainable, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        loss_sum=state.loss_sum + loss,
        bad_step=jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step, state.bad_step),
    )


@functools.partial(jax.jit, static_argnames="task")
def _zeros(task: Task, trainable: Tree) -> tuple[Tree, jax.Array]:
    zeros = jax.tree.map(jnp.zeros_like, trainable), jnp.zeros((), jnp.float32)
    mesh = task.network.mesh
    return zeros if mesh is None else jax.lax.with_sharding_constraint(zeros, on_all(mesh))


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
    key: jax.Array | None,
) -> tuple[tuple[Tree, jax.Array], Tree]:
    """Gradients and loss added to `sums`, and the new batch statistics."""
    (loss, batch_stats), grads = _gradients(
        task, trainable, batch_stats, frozen, part, class_weights, key, total
    )
    return jax.tree.map(jnp.add, sums, (grads, loss)), batch_stats


@functools.partial(jax.jit, static_argnames="task", donate_argnames="state")
def _apply(
    task: Task, state: TrainState, grads: Tree, loss: jax.Array, learning_rate: jax.Array
) -> TrainState:
    return _update(task, state, grads, state.batch_stats, loss, learning_rate)


@functools.partial(jax.jit, static_argnums=0)
def _total_weight(
    multilabel: bool, labels: tuple[jax.Array, ...], class_weights: jax.Array
) -> jax.Array:
    """What the sum of a whole batch's losses is divided by, see `weighted_loss`."""
    together = jnp.concatenate(labels)
    if multilabel:
        return jnp.maximum(jnp.sum(~jnp.isnan(together)), 1)
    return jnp.sum(class_weights[together])


def weighted_loss(
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array,
    *,
    multilabel: bool,
    total: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy as PyTorch weighs it.

    Args:
      logits: (n, classes).
      labels: Class indices int32 (n,); for multi-label float32 (n, classes) of 0, 1 and NaN for
        unknown.
      class_weights: (classes,). Multi-class: the mean is Σ w_y l / Σ w_y. Multi-label: the
        factor of the positive term (`pos_weight`); the mean is over known labels.
      multilabel: Which of the two.
      total: What the sum is divided by, if not the weights of these labels.

    Returns:
      A scalar, float32 (float64 for logits of that type).
    """
    logits = at_least_float32(logits)
    if multilabel:
        known = ~jnp.isnan(labels)
        targets = jnp.where(known, labels, 0.0)
        positive = targets * class_weights * jax.nn.log_sigmoid(logits)
        negative = (1.0 - targets) * jax.nn.log_sigmoid(-logits)
        loss = -jnp.sum((positive + negative) * known)
        return loss / (jnp.maximum(jnp.sum(known), 1) if total is None else total)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weights = class_weights[labels]
    return jnp.sum(weights * losses) / (jnp.sum(weights) if total is None else total)


collapse = jax.jit(
    lambda assemble, trainable, frozen: assemble(trainable, frozen), static_argnums=0
)
"""The model's own parameters: coefficients and parents are used up."""
