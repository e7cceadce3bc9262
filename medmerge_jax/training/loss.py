"""The loss of a batch, or of a part of one."""

import jax
import jax.numpy as jnp
import optax

from medmerge_jax.merging.trees import at_least_float32


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
        factor of the positive term (`pos_weight`); the mean is over known labels. Or, multi-label
        alone, a row (1, classes): the factor of all of a label's loss, Σ_c w_c mean_c, where mean_c
        is over the examples of which label c is known.
      multilabel: Which of the two.
      total: What the sum is divided by, if not `total_weight` of these labels.

    Returns:
      A scalar, float32 (float64 for logits of that type).
    """
    logits = at_least_float32(logits)
    if total is None:
        total = total_weight(labels, class_weights, multilabel=multilabel)
    if multilabel:
        labelled = ~jnp.isnan(labels)
        targets = jnp.where(labelled, labels, 0.0)
        of_labels = _is_of_labels(class_weights)
        positive = targets * (1.0 if of_labels else class_weights) * jax.nn.log_sigmoid(logits)
        negative = (1.0 - targets) * jax.nn.log_sigmoid(-logits)
        losses = -(positive + negative) * labelled
        if of_labels:
            return jnp.sum(class_weights[0] * jnp.sum(losses, axis=0) / total)
        return jnp.sum(losses) / total
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(class_weights[labels] * losses) / total


def total_weight(
    labels: jax.Array | tuple[jax.Array, ...], class_weights: jax.Array, *, multilabel: bool
) -> jax.Array:
    """What `weighted_loss` divides the sum over a batch, or the parts of one, by.

    Returns:
      A scalar; (classes,) for a row of class weights, a number for each label.
    """
    whole = jnp.concatenate(labels) if isinstance(labels, tuple) else labels
    if multilabel:
        axis = 0 if _is_of_labels(class_weights) else None
        return jnp.maximum(jnp.sum(~jnp.isnan(whole), axis=axis), 1)
    return jnp.sum(class_weights[whole])


def _is_of_labels(class_weights: jax.Array) -> bool:
    return jnp.ndim(class_weights) == 2
