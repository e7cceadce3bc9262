"""Weights by depth and over epochs, against what NumPy says of each layer by hand."""

import numpy as np
import pytest

from medmerge_jax.analysis.coefficients import Target, depth, trajectory
from medmerge_jax.errors import UserError

LAYERS = ["conv1/kernel", "layer1/0/conv1/kernel", "layer10/0/conv1/kernel"]


def coefficients(rng, shape=(6,)):
    return {path: rng.normal(0.5, 0.2, shape) for path in reversed(LAYERS)}


def test_a_row_is_the_mean_over_kernels_and_seeds(rng):
    runs = (coefficients(rng), coefficients(rng))
    found = depth([Target("isic", ("b", "c"), runs), Target("aptos", ("b", "c"), runs[:1])])
    assert (found.rows, found.parents, found.seeds) == (["isic", "aptos"], ["b", "b"], [2, 1])
    assert (found.layers, found.num_parents) == (LAYERS, 2)
    for column, path in enumerate(LAYERS):
        first, second = (run[path] for run in runs)
        assert found.mean[0, column] == pytest.approx((first.mean() + second.mean()) / 2)
        inside = np.sqrt((first.std() ** 2 + second.std() ** 2) / 2)
        assert found.inside[0, column] == pytest.approx(inside)
        apart = abs(first.mean() - second.mean()) / np.sqrt(2)
        assert found.between[0, column] == pytest.approx(apart)
        assert found.mean[1, column] == pytest.approx(first.mean())
        assert found.inside[1, column] == pytest.approx(first.std())
    assert np.isnan(found.between[1]).all()


def test_each_of_three_parents_has_a_row(rng):
    run = coefficients(rng, (2, 6))
    found = depth([Target("isic", ("a", "b", "zeros"), (run,))])
    assert found.rows == ["isic: a", "isic: b", "isic: zeros"]
    last = 1 - run[LAYERS[0]].sum(axis=0)
    np.testing.assert_allclose(found.mean[:, 0], [*run[LAYERS[0]].mean(axis=1), last.mean()])
    np.testing.assert_allclose(found.inside[2, 0], last.std())


def test_a_layer_that_a_row_lacks_is_no_number(rng):
    short = {path: value for path, value in coefficients(rng).items() if path != LAYERS[1]}
    found = depth([Target(name, ("b", "c"), (run,))
                   for name, run in (("x", short), ("y", coefficients(rng)))])  # fmt: skip
    assert np.isnan(found.mean[0]).tolist() == [False, True, False]
    assert np.isfinite(found.mean[1]).all()


def test_targets_that_cannot_stand_in_one_figure(rng):
    two, three = Target("x", ("b", "c"), (coefficients(rng),)), Target("y", ("a", "b", "c"), ())
    with pytest.raises(UserError, match=r"different numbers of parents .x: b, c, y: a, b, c"):
        depth([two, three])
    with pytest.raises(UserError, match=r"y: coefficients of .*3 parents have"):
        depth([Target("y", ("a", "b", "c"), (coefficients(rng),))])
    for values in ([np.nan, 1.0], [], ["a", "b"]):
        with pytest.raises(UserError, match="z: "):
            depth([Target("z", ("b", "c"), ({LAYERS[0]: np.array(values)},))])
    with pytest.raises(UserError, match="z: there are no coefficients of any layer"):
        depth([Target("z", ("b", "c"), ({},))])


def records(epochs=3, parents=2):
    return [
        {"epoch": e + 1, "layers": {p: [[e, i, n, 9] for n in range(parents)]
                                    for i, p in reversed(list(enumerate(LAYERS)))}}
        for e in range(epochs)
    ]  # fmt: skip


def test_a_trajectory_has_the_recorded_numbers_in_network_order():
    found = trajectory("run", ("b", "c"), records())
    assert (found.layers, found.epochs.tolist()) == (LAYERS, [1, 2, 3])
    mean, deviation, least, greatest = found.values
    np.testing.assert_array_equal(mean[:, 1, 0], [0, 1, 2])
    np.testing.assert_array_equal(deviation[0, :, 1], [0, 1, 2])
    assert (least[..., 1] == 1).all() and (greatest == 9).all()


@pytest.mark.parametrize(
    "damaged",
    [
        [{"epoch": 1}],
        [],
        [*records(), {"epoch": 4, "layers": {}}],
        records(parents=3),
        [{"epoch": 1, "layers": {LAYERS[0]: "text"}}],
        [{"epoch": 1, "layers": {LAYERS[0]: [[1, 2, 3, float("inf")]] * 2}}],
        [{"epoch": 1, "layers": {}}],
    ],
)
def test_records_of_another_kind_are_refused(damaged):
    with pytest.raises(UserError, match=r"x: coefficients.jsonl is not as this program writes it"):
        trajectory("x", ("b", "c"), damaged)
