"""Predictions that are right more often than not."""

import numpy as np

from medmerge_jax.evaluation.predictions import Predictions


def drawn(count, n=80, seed=0, ties=False, **facts):
    """Of images of one class each, of which there are `count`; with ties, logits are whole."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, count, n)
    logits = random.normal(size=(n, count)) + np.eye(count)[labels]
    return Predictions(np.round(logits) if ties else logits, labels, **facts)


def drawn_labels(n=80, seed=0):
    """Of images with any number of three labels, a fifth of which is unknown."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, (n, 3)).astype(float)
    logits = random.normal(size=(n, 3)) + 2 * labels - 1
    labels[random.random((n, 3)) < 0.2] = np.nan
    return Predictions(logits, labels, multilabel=True)
