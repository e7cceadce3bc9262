import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmerge_jax.data import stratified_group_split
from medmerge_jax.data.splits import stratified_group_folds
from medmerge_jax.errors import UserError

FRACTIONS = (0.8, 0.1, 0.1)


@st.composite
def labelled_groups(draw):
    """Labels of either kind, and groups that may have several classes."""
    n = draw(st.integers(1, 120))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups = rng.integers(0, draw(st.integers(1, n)), n).astype(str)
    classes = draw(st.integers(1, 6))
    if draw(st.booleans()):
        labels = rng.choice([0.0, 1.0, np.nan], (n, classes)).astype(np.float32)
    else:
        labels = rng.integers(0, classes, n)
    return labels, groups


@settings(deadline=None, max_examples=60)
@given(labelled_groups(), st.integers(-5, 2**40), st.sampled_from([FRACTIONS, (0.5, 0.5, 0.0)]))
def test_groups_never_cross_and_nothing_but_the_arguments_matters(data, seed, fractions):
    labels, groups = data
    split = stratified_group_split(labels, groups, fractions, seed)
    assert split.shape == (len(labels),)
    assert set(split) <= {index for index in range(3) if fractions[index]}
    for group in np.unique(groups):
        assert len(set(split[groups == group])) == 1
    np.testing.assert_array_equal(split, stratified_group_split(labels, groups, fractions, seed))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.sampled_from([FRACTIONS, (0.6, 0.2, 0.2), (0.34, 0.33, 0.33)]),
    st.integers(0, 1000),
)
def test_every_class_keeps_its_proportions(sizes, fractions, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    split = stratified_group_split(labels, None, fractions, seed)
    for label, size in enumerate(sizes):
        counts = np.bincount(split[labels == label], minlength=3)
        if size >= 3:
            assert counts.min() >= 1
        # Within one image of the share, except where the guarantee above takes one or two.
        assert np.all(np.abs(counts - np.asarray(fractions) * size) <= (1.01 if size >= 20 else 2))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_fractions_hold_for_many_groups_of_several_labels(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((900, 4)) < (0.5, 0.3, 0.1, 0.03)).astype(np.float32)
    groups = rng.integers(0, 400, 900)
    split = stratified_group_split(labels, groups, FRACTIONS, seed)
    np.testing.assert_allclose(np.bincount(split, minlength=3) / 900, FRACTIONS, atol=0.03)
    for label in range(4):
        counts = np.bincount(split[labels[:, label] == 1], minlength=3)
        np.testing.assert_allclose(counts / counts.sum(), FRACTIONS, atol=0.06)
        assert counts.min() >= 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.integers(0, 1000))
def test_a_class_of_three_groups_is_in_every_split(group_sizes, seed):
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    labels = (groups % 2) * (len(group_sizes) >= 6)
    split = stratified_group_split(labels, groups, FRACTIONS, seed)
    for label in np.unique(labels):
        assert set(split[labels == label]) == {0, 1, 2}


def test_another_seed_another_split():
    labels = np.arange(200) % 2
    first, second = (stratified_group_split(labels, None, FRACTIONS, seed) for seed in (0, 1))
    assert np.any(first != second)


def test_the_split_is_the_same_on_every_machine():
    split = stratified_group_split(np.arange(20) % 2, None, (0.6, 0.2, 0.2), 3)
    assert "".join(map(str, split)) == "10011001020000202200"


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.2), (0.8, 0.1, 0.2), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1), (np.nan, 0, 0)]
)
def test_bad_fractions(fractions):
    with pytest.raises(UserError, match="three numbers ≥ 0 that sum to 1 are wanted"):
        stratified_group_split(np.zeros(5, int), None, fractions, 0)


def test_nothing_to_split():
    assert stratified_group_split(np.zeros(0, int), None, FRACTIONS, 0).shape == (0,)


@settings(deadline=None, max_examples=40)
@given(labelled_groups(), st.integers(0, 1000), st.integers(2, 6))
def test_folds_keep_groups_together_and_classes_apart_evenly(data, seed, folds):
    labels, groups = data
    fold = stratified_group_folds(labels, groups, folds, seed)
    assert set(fold) <= set(range(folds))
    for group in np.unique(groups):
        assert len(set(fold[groups == group])) == 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(6, 60), min_size=1, max_size=5), st.integers(2, 6))
def test_folds_have_equal_parts_of_every_class(sizes, folds):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    fold = stratified_group_folds(labels, None, folds, seed=3)
    for label, size in enumerate(sizes):
        counts = np.bincount(fold[labels == label], minlength=folds)
        assert np.all(np.abs(counts - size / folds) <= 1.01)
