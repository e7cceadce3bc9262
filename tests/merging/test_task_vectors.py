"""TIES and DARE against loops over single numbers, as their papers describe them."""

import numpy as np
import pytest

from medmerge_jax.merging import dare, dropped, task_arithmetic, ties, uniform_average
from medmerge_jax.merging.trees import flatten


def drawn(seed, size=40):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "params": {"conv": {"kernel": normal(3, 3, 2, 4)}, "dense": {"bias": normal(size)}},
        "batch_stats": {"bn": {"mean": normal(4), "var": np.abs(normal(4)) + 0.5}},
    }


def vector(tree):
    flat = flatten(tree)
    return np.concatenate([np.ravel(flat[p]) for p in sorted(flat) if p.startswith("params/")])


def ties_by_hand(start, parents, density, scale):
    """Number by number, of whole models as vectors in float64."""
    start, *vectors = (vector(one).astype(np.float64) for one in (start, *parents))
    differences = [v - start for v in vectors]
    keep = round(density * len(start))
    trimmed = []
    for difference in differences:
        largest = set(sorted(range(len(start)), key=lambda i: -abs(difference[i]))[:keep])
        trimmed.append([d if i in largest else 0.0 for i, d in enumerate(difference)])
    result = []
    for i, origin in enumerate(start):
        values = [one[i] for one in trimmed]
        mass_up = sum(v for v in values if v > 0)
        mass_down = -sum(v for v in values if v < 0)
        chosen = [v for v in values if (v > 0 if mass_up > mass_down else v < 0)]
        result.append(origin + scale * (sum(chosen) / len(chosen) if chosen else 0.0))
    return np.array(result)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_ties_is_the_papers(density, count):
    start, *parents = [drawn(seed) for seed in range(count + 1)]
    merged = ties(start, parents, density=density, scale=0.7)
    np.testing.assert_allclose(
        vector(merged), ties_by_hand(start, parents, density, 0.7), rtol=1e-5, atol=1e-6
    )


def test_magnitudes_are_compared_over_the_whole_model():
    start = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    parent = {"a": np.full(4, 0.1, np.float32), "b": np.full(4, 5, np.float32)}
    merged = ties(start, [parent], density=0.5)
    np.testing.assert_array_equal(merged["a"], 0)  # each array by itself would keep half of it
    np.testing.assert_array_equal(merged["b"], 5)


def test_where_signs_balance_nothing_changes():
    start, b, c = ({"x": np.array(x, np.float32)} for x in ([1, 1], [3, 2], [-1, 5]))
    np.testing.assert_array_equal(ties(start, [b, c], density=1.0)["x"], [1, 1 + 2.5])


@pytest.mark.parametrize("merger", [ties, dare])
def test_running_statistics_are_the_mean(merger):
    start, *parents = [drawn(seed) for seed in range(4)]
    found, wanted = flatten(merger(start, parents)), flatten(uniform_average(parents))
    for path in ("batch_stats/bn/mean", "batch_stats/bn/var"):
        np.testing.assert_array_equal(found[path], wanted[path])


def test_dropped_differences_are_zero_or_enlarged_and_right_on_average():
    start, parent = drawn(0, 40_000), drawn(1, 40_000)
    origin, whole = vector(start), vector(parent)
    (thin,) = dropped(start, [parent], 0.75, seed=3)
    kept = vector(thin) != origin
    np.testing.assert_allclose(
        (vector(thin) - origin)[kept], 4 * (whole - origin)[kept], rtol=1e-3, atol=1e-5
    )
    assert kept.mean() == pytest.approx(0.25, abs=0.01)  # five standard deviations
    for seed, parents in ((3, [parent, parent]), (4, [parent])):
        other = vector(dropped(start, parents, 0.75, seed)[-1])
        assert (other != vector(thin)).mean() > 0.3  # another parent, or another seed
    np.testing.assert_array_equal(vector(dropped(start, [parent], 0.75, 3)[0]), vector(thin))


def test_each_array_has_its_own_random_numbers():
    start = {name: np.zeros(64, np.float32) for name in "ab"}
    parent = {name: np.ones(64, np.float32) for name in "ab"}
    (thin,) = dropped(start, [parent], 0.5)
    assert (np.asarray(thin["a"]) != np.asarray(thin["b"])).any()


def test_without_drops_dare_is_task_arithmetic():
    start, *parents = [drawn(seed) for seed in range(3)]
    found = dare(start, parents, drop=0.0, scale=(0.3, 0.4))
    wanted = task_arithmetic(start, parents, (0.3, 0.4))
    np.testing.assert_allclose(vector(found), vector(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ties(drawn(0), [drawn(1)], density=0.0), "density is 0.0; above 0"),
        (lambda: ties(drawn(0), [drawn(1)], density=1.5), "density is 1.5"),
        (lambda: dare(drawn(0), [drawn(1)], drop=1.0), r"drop is 1\.0; from 0 on and below 1"),
        (lambda: ties(drawn(0), []), "0 parents"),
        (lambda: dare(drawn(0), []), "0 parents"),
        (lambda: ties(drawn(0, 3), [drawn(1)]), "in the ancestor"),
    ],
)
def test_what_cannot_be_merged_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
