"""Mistakes, against a look at every image."""

import numpy as np
import pytest
from helpers.drawn_predictions import drawn, drawn_labels

from medmerge_jax.analysis.mistakes import mistakes


def test_every_wrong_image_by_its_probability():
    said = drawn(3, classes=("a", "b", "c"))
    wanted = []
    for row, (logits, label) in enumerate(zip(said.logits, said.labels, strict=True)):
        shares = np.exp(logits) / np.exp(logits).sum()
        if np.argmax(shares) != label:
            wanted.append(
                (-shares.max(), row, "abc"[label], "abc"[np.argmax(shares)], shares[label])
            )
    found, total = mistakes(said, 1000)
    assert total == len(found) == len(wanted) > 10
    for one, (share, row, true, predicted, of_true) in zip(found, sorted(wanted), strict=True):
        assert (one.row, one.true, one.predicted) == (row, true, predicted)
        assert (one.probability, one.of_true) == pytest.approx((-share, of_true))
    assert mistakes(said, 4) == (found[:4], total)


def test_each_label_of_several_counts_where_it_is_known():
    said = drawn_labels()
    wanted = []
    for (row, label), truth in np.ndenumerate(said.labels):
        share = 1 / (1 + np.exp(-said.logits[row, label]))
        if truth == 1 and share <= 0.5:
            wanted.append((-(1 - share), row, str(label), f"no {label}"))
        if truth == 0 and share > 0.5:
            wanted.append((-share, row, f"no {label}", str(label)))
    found, total = mistakes(said, 1000)
    assert total == len(wanted) > 10
    assert [one[:3] for one in found] == [one[1:] for one in sorted(wanted)]
    for one, (share, *_) in zip(found, sorted(wanted), strict=True):
        assert one.probability == pytest.approx(-share)
        assert one.probability + one.of_true == pytest.approx(1)


def test_a_model_without_mistakes():
    said = drawn(2)
    right = type(said)(np.eye(2)[said.labels], said.labels)
    assert mistakes(right, 5) == ([], 0)
