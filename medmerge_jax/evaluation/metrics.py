"""Classification metrics over a whole split, on the host, with scikit-learn.

Never means of batch means: those are wrong on a short last batch, and F1 and AUC have none.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_expit, log_softmax, logsumexp

# scikit-learn takes a second to import, so the functions that need it import it.

METRICS = ("loss", "accuracy", "macro_f1", "balanced_accuracy", "macro_auc", "kappa")
"""The names that every result has, in the order of tables."""


def higher_is_better(name: str) -> bool:
    """Whether more of the metric is better; of all of `METRICS` only the loss is not.

    Raises:
      ValueError: `name` is not one of `METRICS`.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r}: one of {', '.join(METRICS)} is wanted")
    return name != "loss"


def classification_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    multilabel: bool,
    class_weights: np.ndarray | None = None,
) -> dict[str, Any]:
    """All of `METRICS`, and `num_examples`; None where a metric is undefined.

    Multi-class:

    * loss: mean cross-entropy.
    * accuracy, in [0, 1] as all below but kappa.
    * macro_f1: mean F1 over the classes that occur among labels or predictions, which is
      scikit-learn's default; a class that is only predicted, or never hit, counts as 0.
    * balanced_accuracy: mean recall over the classes that occur among the labels.
    * macro_auc: mean area under the ROC curve, each class against the rest, over the classes that
      have positives and negatives; for two classes that of class 1.
    * kappa: Cohen's, with quadratic weights and the classes in order, in [-1, 1].

    Several labels per image, where unknown labels are left out label by label:

    * loss: mean binary cross-entropy over the known labels.
    * accuracy: mean over labels; positive is a probability above 0.5.
    * macro_f1: mean over the labels that are positive or predicted positive somewhere.
    * balanced_accuracy, macro_auc: means over the labels that have positives and negatives.
    * kappa: None.

    Args:
      logits: (n, classes) float.
      labels: Class indices (n,); for `multilabel` (n, classes) of 0, 1 and NaN for unknown.
      multilabel: Which of the two.
      class_weights: (classes,) of the loss, as in `loss.weighted_loss`; by default all are 1.

    Raises:
      FloatingPointError: A logit is NaN or infinite.
      ValueError: There are no examples, the shapes do not fit, or a label is no class.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    wanted = logits.shape if multilabel else logits.shape[:1]
    if logits.ndim != 2 or labels.shape != wanted or not len(logits):
        raise ValueError(
            f"logits of shape {logits.shape} and labels of shape {labels.shape}: "
            f"(n, classes) and {'(n, classes)' if multilabel else '(n,)'} with n > 0 are wanted"
        )
    bad = int(np.sum(~np.isfinite(logits)))
    if bad:
        raise FloatingPointError(f"{bad} of {logits.size} logits are not finite")
    weights = np.ones(logits.shape[1]) if class_weights is None else np.asarray(class_weights)
    compute = _multilabel if multilabel else _multiclass
    values = compute(logits, labels, weights.astype(np.float64))
    return {**{name: _number(values[name]) for name in METRICS}, "num_examples": len(logits)}


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts (classes, classes), int64: row the label, column the prediction.

    Args:
      logits: (n, classes).
      labels: (n,) class indices.
    """
    from sklearn.metrics import confusion_matrix as count

    return count(labels, np.argmax(logits, axis=1), labels=np.arange(np.shape(logits)[1]))


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Over repetitions (seeds): `{"mean", "std", "values"}`.

    The standard deviation is that of a sample (n - 1); None for a single value.
    """
    numbers = [float(value) for value in values]
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)), "std": std, "values": numbers}


def _multiclass(
    logits: np.ndarray, labels: np.ndarray, class_weights: np.ndarray
) -> dict[str, float]:
    from sklearn import metrics

    labels = labels.astype(np.int64)
    classes = np.arange(logits.shape[1])
    if not np.all(np.isin(labels, classes)):
        raise ValueError(
            f"labels are in [{labels.min()}, {labels.max()}], of {len(classes)} classes"
        )
    predictions = np.argmax(logits, axis=1)
    losses = -np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1)[:, 0]
    weights = class_weights[labels]
    scored = [1] if len(classes) == 2 else classes.tolist()
    aucs = [_auc(labels == c, _log_odds(logits, c)) for c in scored if _both(labels == c)]
    # With one class among labels and predictions alike, agreement by chance is certain.
    certain = len(np.union1d(labels, predictions)) == 1
    kappa = math.nan
    if not certain:
        kappa = metrics.cohen_kappa_score(labels, predictions, labels=classes, weights="quadratic")
    return {
        "loss": np.sum(weights * losses) / np.sum(weights),
        "accuracy": np.mean(predictions == labels),
        "macro_f1": metrics.f1_score(labels, predictions, average="macro", zero_division=0),
        "balanced_accuracy": metrics.recall_score(
            labels, predictions, labels=np.unique(labels), average="macro", zero_division=0
        ),
        "macro_auc": _mean(aucs),
        "kappa": kappa,
    }


def _multilabel(
    logits: np.ndarray, labels: np.ndarray, class_weights: np.ndarray
) -> dict[str, float]:
    labels = labels.astype(np.float64)
    known = ~np.isnan(labels)
    targets = np.where(known, labels, 0.0)
    losses = -(targets * class_weights * log_expit(logits) + (1.0 - targets) * log_expit(-logits))
    columns = [
        _binary(logits[known[:, label], label], labels[known[:, label], label] == 1)
        for label in range(labels.shape[1])
    ]
    names = ("accuracy", "macro_f1", "balanced_accuracy", "macro_auc")
    means = {name: _mean([column[name] for column in columns]) for name in names}
    return {"loss": _mean(losses[known]), **means, "kappa": math.nan}


def _binary(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Metrics of one label, NaN where undefined; scores > 0 are predicted positive."""
    predicted = scores > 0
    hits = np.sum(predicted & positive)
    both = _both(positive)
    recalls = [np.mean(predicted[positive]), np.mean(~predicted[~positive])] if both else []
    counted = np.sum(predicted) + np.sum(positive)
    return {
        "accuracy": np.mean(predicted == positive) if len(positive) else math.nan,
        "macro_f1": 2 * hits / counted if counted else math.nan,
        "balanced_accuracy": _mean(recalls),
        "macro_auc": _auc(positive, scores) if both else math.nan,
    }


def _auc(positive: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(positive, scores)


def _log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """log(p / (1 - p)) of a class: ranks as its probability, but confident ones never tie."""
    return logits[:, label] - logsumexp(np.delete(logits, label, axis=1), axis=1)


def _both(positive: np.ndarray) -> bool:
    return bool(np.any(positive) and not np.all(positive))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Of those that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
