"""Rank correlations, against scipy's."""

import itertools

import numpy as np
import pytest
import scipy.stats

from medmerge_jax.analysis.rank import rank_correlation


@pytest.mark.parametrize("ties", [False, True])
def test_correlation_and_exact_p_are_scipys(rng, ties):
    values, scores = rng.normal(size=(5, 2)), rng.normal(size=5)
    if ties:
        values, scores = np.round(values), np.round(scores)
    found = rank_correlation(list("ab"), values, scores)
    for column in range(2):

        def statistic(x, column=column):
            return scipy.stats.spearmanr(x, values[:, column]).statistic

        exact = scipy.stats.permutation_test(
            (scores,), statistic, permutation_type="pairings", n_resamples=np.inf
        )
        assert found.rho[column] == pytest.approx(exact.statistic)
        as_far = [abs(x) >= abs(exact.statistic) - 1e-9 for x in exact.null_distribution]
        assert found.p[column] == pytest.approx(np.mean(as_far))


def test_p_of_the_best_layer_counts_the_best_of_each_order(rng):
    values, scores = rng.normal(size=(5, 3)), rng.normal(size=5)
    found = rank_correlation(list("abc"), values, scores)
    best = [
        max(abs(scipy.stats.spearmanr(scores[list(order)], column).statistic)
            for column in values.T)
        for order in itertools.permutations(range(5))
    ]  # fmt: skip
    for column in range(3):
        wanted = np.mean(np.array(best) >= abs(found.rho[column]) - 1e-9)
        assert found.p_of_any[column] == pytest.approx(wanted)
    assert (found.p_of_any >= found.p).all()


def test_p_of_many_targets_is_near_the_exact_one(rng):
    scores = rng.normal(size=30)
    values = np.stack([scores + rng.normal(size=30) * 2, rng.normal(size=30)], axis=1)
    found = rank_correlation(["a", "b"], values, scores)
    for column in range(2):
        rho, p = scipy.stats.spearmanr(scores, values[:, column])
        assert found.rho[column] == pytest.approx(rho)
        assert found.p[column] == pytest.approx(p, abs=0.02)


def test_a_constant_layer_has_no_correlation(rng):
    values = np.stack([np.ones(5), np.arange(5.0)], axis=1)
    found = rank_correlation(["a", "b"], values, np.arange(5.0))
    assert np.isnan([found.rho[0], found.p[0], found.p_of_any[0]]).all()
    assert found.rho[1] == pytest.approx(1)
    assert found.p[1] == found.smallest_p == pytest.approx(2 / 120)
    assert np.isnan(rank_correlation(["b"], values[:, 1:], np.ones(5)).p).all()


def test_too_few_targets_are_said_to_be():
    found = rank_correlation(["a"], np.arange(4.0)[:, None], np.arange(4.0))
    assert found.p[0] == pytest.approx(2 / 24)
    assert "4 targets are too few: no order of them has a p below 0.08" in found.warning()
    assert not rank_correlation(["a"], np.arange(5.0)[:, None], np.arange(5.0)).warning()
    with pytest.raises(ValueError, match="2 targets; 3 or more"):
        rank_correlation(["a"], np.zeros((2, 1)), np.zeros(2))
