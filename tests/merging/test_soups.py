import itertools
import tracemalloc
import weakref
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medmerge_jax.merging.soups import (
    greedy_soup,
    hierarchical_soup,
    learned_soup,
    uniform_soup,
)
from medmerge_jax.merging.trees import flatten, unflatten


def make(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(dtype)},
            "bn": {"scale": rng.normal(size=4).astype(dtype)},
        },
        "batch_stats": {"bn": {"var": rng.uniform(0.5, 2, 4).astype(dtype)}},
    }


class Leaf:
    """An array that is read when NumPy asks for it."""

    def __init__(self, shape, read):
        self.shape, self.dtype, self.read = shape, np.dtype(np.float32), read

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.read(), dtype)


class Files(Sequence):
    """Ingredients that are made when they are asked for; of their kernels is known which were read.

    And how many of these were alive at once.
    """

    def __init__(self, seeds):
        self.seeds = list(seeds)
        self.reads = []
        self.alive = []
        self.most = 0

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        tree = make(self.seeds[index])
        kernel = tree["params"]["conv"]["kernel"]
        tree["params"]["conv"]["kernel"] = Leaf(kernel.shape, lambda: self._read(index))
        return tree

    def _read(self, index):
        kernel = make(self.seeds[index])["params"]["conv"]["kernel"]
        self.reads.append(index)
        self.alive.append(weakref.ref(kernel))
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        return kernel


def mean(trees):
    return jax.tree.map(lambda *leaves: np.mean(np.array(leaves, np.float64), axis=0), *trees)


def assert_close(actual, wanted, rtol=1e-6, atol=1e-7):
    actual, wanted = flatten(actual), flatten(wanted)
    assert set(actual) == set(wanted)
    for path in wanted:
        np.testing.assert_allclose(actual[path], wanted[path], rtol, atol, err_msg=path)


def closeness(target):
    """A score: the higher, the nearer to the target."""

    def score(tree):
        ours, theirs = flatten(tree), flatten(target)
        return -sum(float(np.sum(np.square(ours[p] - theirs[p]))) for p in theirs)

    return score


def plain_greedy(trees, score):
    """The published procedure on trees that are all in memory."""
    alone = [score(tree) for tree in trees]
    order = sorted(range(len(trees)), key=lambda i: -alone[i])
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        found = score(mean([trees[j] for j in [*chosen, i]]))
        if found > best:
            chosen, best = [*chosen, i], found
    return tuple(chosen), best


class TestUniform:
    @pytest.mark.parametrize("n", [1, 2, 300])
    def test_is_the_mean(self, n):
        files = Files(range(n))
        assert_close(uniform_soup(files), mean([make(seed) for seed in range(n)]))
        assert files.reads == list(range(n))
        assert files.most == 1

    @pytest.mark.parametrize("n", [1, 3, 100, 333])
    def test_identical_ingredients_come_back_bit_for_bit(self, n):
        assert_close(uniform_soup(Files([7] * n)), make(7), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
    def test_dtype_order_and_keys_are_the_ingredients(self, dtype):
        soup = uniform_soup([make(0, dtype), make(1, dtype)])
        assert list(flatten(soup)) == list(flatten(make(0)))
        assert {leaf.dtype for leaf in flatten(soup).values()} == {np.dtype(dtype)}
        exact = mean([make(0, dtype), make(1, dtype)])
        assert_close(
            jax.tree.map(lambda x: x.astype(np.float32), soup),
            jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), exact),
        )

    def test_many_large_numbers_do_not_round_away(self):
        ingredients = [{"w": np.full(2, 1e4 + i / 1000, np.float32)} for i in range(1000)]
        wanted = np.mean([float(tree["w"][0]) for tree in ingredients])
        np.testing.assert_allclose(uniform_soup(ingredients)["w"], wanted, rtol=1e-7)

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("params", "bn", "scale"), np.ones(5, np.float32), r"shape \(5,\) in ingredient 1"),
            (("params", "bn", "scale"), np.arange(4), "ingredient 1 is of dtype int64"),
            (("params", "bn", "scale"), np.full(4, np.nan), "in ingredient 1: 4 of 4 numbers"),
            (("params", "bn", "more"), np.ones(4), "params/bn/more: absent in ingredient 0"),
        ],
    )
    def test_bad_ingredients_are_named(self, path, value, message):
        bad = make(1)
        bad[path[0]][path[1]][path[2]] = value
        for soup in (
            uniform_soup,
            lambda trees: greedy_soup(trees, lambda tree: 0.0, scores=(2, 1)),
            lambda trees: learned_soup(trees, lambda v, b, x: 0.0, []),
        ):
            with pytest.raises(ValueError, match=message):
                soup([make(0), bad])

    def test_none_is_refused(self):
        for soup in (
            uniform_soup,
            lambda trees: greedy_soup(trees, lambda tree: 0.0),
            lambda trees: learned_soup(trees, lambda v, b, x: 0.0, []),
        ):
            with pytest.raises(ValueError, match="0 ingredients"):
                soup([])

    @pytest.mark.parametrize(
        "make_soup", [uniform_soup, lambda trees: greedy_soup(trees, better()).variables]
    )
    def test_of_lazy_leaves_no_more_than_two_models_are_held(self, make_soup):
        def read(seed, leaf):
            return np.random.default_rng((seed, leaf)).normal(size=(64, 1024)).astype(np.float32)

        trees = [
            {str(leaf): Leaf((64, 1024), partial(read, seed, leaf)) for leaf in range(20)}
            for seed in range(6)
        ]
        tracemalloc.start()
        soup = make_soup(trees)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert_close(soup, mean([jax.tree.map(np.asarray, tree) for tree in trees]))
        # Of arrays that were copied to the device, JAX lets go some time later only.
        assert peak < 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(soup))


def better():
    """A score that every average makes better, so that a soup takes all."""
    numbers = itertools.count()
    return lambda tree: next(numbers)


class TestGreedy:
    @pytest.mark.parametrize("seed", range(10))
    def test_is_the_published_procedure(self, seed):
        seeds = range(100 * seed, 100 * seed + 8)
        score = closeness(mean([make(s) for s in list(seeds)[2:5]]))
        files = Files(seeds)
        soup = greedy_soup(files, score)
        trees = [make(s) for s in seeds]
        chosen, best = plain_greedy(trees, score)
        assert soup.chosen == chosen
        assert 1 < len(chosen) < 8
        np.testing.assert_allclose(soup.score, best, rtol=1e-4)
        assert_close(soup.variables, mean([trees[i] for i in chosen]))
        assert soup.score >= max(map(score, trees))
        assert files.most == 1

    def test_known_scores_are_not_computed_again(self):
        scores = [0.1, 0.9, 0.5, 0.9]
        scored = []
        files = Files(range(4))

        def score(tree):
            scored.append(tree)
            return 0.0

        soup = greedy_soup(files, score, scores)
        assert soup.chosen == (1,)
        assert soup.score == 0.9
        # By score, the earlier of equals first; with each the soup so far, at last it alone.
        assert files.reads == [1, 3, 1, 2, 1, 0, 1]
        assert len(scored) == 3
        assert_close(soup.variables, make(1), rtol=0, atol=0)

    def test_only_a_strictly_better_soup_grows(self):
        soup = greedy_soup([make(0)] * 5, lambda tree: 1.0)
        assert soup.chosen == (0,)
        growing = iter(range(1, 100))
        soup = greedy_soup([make(i) for i in range(5)], lambda tree: next(growing), [0] * 5)
        assert soup.chosen == (0, 1, 2, 3, 4)

    def test_a_soup_without_a_score_is_not_better(self):
        assert greedy_soup(Files([0, 1]), lambda tree: np.nan, (2, 1)).chosen == (0,)

    def test_finish_is_applied_to_what_is_scored_and_returned_but_not_averaged(self):
        seen = []

        def finish(tree):
            return {**tree, "batch_stats": {"bn": {"var": np.full(4, 9, np.float32)}}}

        def score(tree):
            seen.append(tree["batch_stats"]["bn"]["var"][0])
            return len(seen)

        averaged = []
        soup = greedy_soup(Files(range(3)), score, finish=lambda t: averaged.append(t) or finish(t))
        assert set(seen) == {9}
        assert len(seen) == 5
        assert len(soup.chosen) == 3
        wanted = mean([make(seed) for seed in range(3)])
        assert_close(averaged[-1], wanted)
        assert_close(soup.variables, finish(wanted))

    def test_bad_scores_are_refused(self):
        with pytest.raises(ValueError, match="1 scores for 2 ingredients"):
            greedy_soup(Files([0, 1]), lambda tree: 0.0, (1.0,))
        with pytest.raises(ValueError, match="score of ingredient 1 is NaN"):
            greedy_soup(Files([0, 1]), lambda tree: 0.0, (1.0, np.nan))


def quadratic(variables, beta, batch):
    """Distance to the target; beta's best value is 3."""
    ours, target = flatten(variables), flatten(batch)
    distance = sum(jnp.sum(jnp.square(ours[path] - target[path])) for path in target)
    return distance + jnp.square(beta - 3.0)


class TestLearned:
    @pytest.mark.parametrize("granularity", ["tensor", "model"])
    def test_takes_the_steps_of_autodiff_and_adam(self, granularity):
        trees = [make(seed) for seed in range(3)]
        batches = [make(seed) for seed in range(10, 15)]
        flats = [flatten(tree) for tree in trees]
        keys = {path: path if granularity == "tensor" else "all" for path in flats[0]}

        def mixed(raw):
            shares = {path: jax.nn.softmax(raw[key]) for path, key in keys.items()}
            return {
                path: sum(shares[path][i] * flat[path] for i, flat in enumerate(flats))
                for path in keys
            }

        def loss(raw, batch):
            ours, target = mixed(raw), flatten(batch)
            distance = sum(jnp.sum(jnp.square(ours[path] - target[path])) for path in target)
            return distance + jnp.square(raw["beta"] - 3.0)

        raw = {"beta": jnp.ones(()), **{key: jnp.zeros(3) for key in keys.values()}}
        adam = optax.adam(0.1)
        state = adam.init(raw)
        losses = []
        for batch in batches:
            value, gradient = jax.value_and_grad(loss)(raw, batch)
            losses.append(float(value))
            updates, state = adam.update(gradient, state)
            raw = optax.apply_updates(raw, updates)

        soup = learned_soup(trees, quadratic, batches, learning_rate=0.1, granularity=granularity)
        np.testing.assert_allclose(soup.losses, losses, rtol=1e-5)
        np.testing.assert_allclose(soup.beta, raw["beta"], rtol=1e-5)
        assert set(soup.coefficients) == set(keys)
        for path, shares in soup.coefficients.items():
            np.testing.assert_allclose(shares, jax.nn.softmax(raw[keys[path]]), rtol=1e-4)
            assert np.ptp(shares) > 0.05
        assert_close(soup.variables, unflatten(mixed(raw)), rtol=1e-4, atol=1e-5)
        assert list(flatten(soup.variables)) == list(flats[0])

    def test_finds_the_shares_of_each_tensor(self):
        trees = [make(seed) for seed in range(3)]
        true = {
            "params/conv/kernel": (0.7, 0.2, 0.1),
            "params/bn/scale": (0.1, 0.8, 0.1),
            "batch_stats/bn/var": (0.3, 0.3, 0.4),
        }
        flats = [flatten(tree) for tree in trees]
        target = {
            path: sum(share * flat[path] for share, flat in zip(shares, flats, strict=True))
            for path, shares in true.items()
        }
        soup = learned_soup(trees, quadratic, [unflatten(target)] * 400)
        for path, shares in true.items():
            np.testing.assert_allclose(soup.coefficients[path], shares, atol=0.01)
        assert soup.losses[-1] < 0.01 * soup.losses[0]
        assert soup.beta == pytest.approx(3, abs=0.01)

    def test_reads_one_at_a_time(self):
        files = Files(range(4))
        learned_soup(files, quadratic, [make(9)] * 3)
        # Checked, then mixed and compared in each step, then mixed.
        assert files.reads == list(range(4)) * (1 + 2 * 3 + 1)
        assert files.most <= 2  # JAX lets go of its arguments only after the next call has begun

    def test_without_steps_it_is_the_uniform_soup(self):
        soup = learned_soup(Files(range(3)), quadratic, [])
        assert_close(soup.variables, uniform_soup(Files(range(3))))
        assert len(soup.losses) == 0

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_identical_ingredients_are_a_fixed_point(self, n):
        soup = learned_soup(Files([5] * n), quadratic, [make(9)] * 3)
        assert_close(soup.variables, make(5))

    def test_dtype_is_the_ingredients(self):
        trees = [make(seed, jnp.bfloat16) for seed in range(2)]
        soup = learned_soup(trees, quadratic, [make(9)])
        assert {leaf.dtype for leaf in jax.tree.leaves(soup.variables)} == {np.dtype(jnp.bfloat16)}

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match="the loss in step 1 is nan"):
            learned_soup(Files([0, 1]), lambda v, b, x: quadratic(v, b, make(9)) * x, [1.0, np.nan])
        with pytest.raises(ValueError, match="granularity is 'layer'; one of tensor, model"):
            learned_soup(Files([0, 1]), quadratic, [], granularity="layer")


class TestHierarchical:
    GROUPS = (range(0, 4), range(10, 13), range(20, 25))

    @pytest.fixture
    def score(self):
        return closeness(mean([make(seed) for seed in (0, 1, 11, 12, 21)]))

    def test_gou_is_greedy_over_uniform_soups(self, score):
        soups = [mean([make(seed) for seed in group]) for group in self.GROUPS]
        chosen, best = plain_greedy(soups, score)
        soup = hierarchical_soup([Files(group) for group in self.GROUPS], score, "GoU")
        assert soup.members == {group: tuple(range(len(self.GROUPS[group]))) for group in chosen}
        assert tuple(soup.members) == chosen
        np.testing.assert_allclose(soup.score, best, rtol=1e-4)
        assert_close(soup.variables, mean([soups[group] for group in chosen]), rtol=1e-5)

    def test_gog_is_greedy_over_greedy_soups(self, score):
        trees = [[make(seed) for seed in group] for group in self.GROUPS]
        members = [plain_greedy(group, score)[0] for group in trees]
        soups = [
            mean([group[i] for i in chosen]) for group, chosen in zip(trees, members, strict=True)
        ]
        chosen, best = plain_greedy(soups, score)
        files = [Files(group) for group in self.GROUPS]
        soup = hierarchical_soup(files, score, "GoG")
        assert soup.members == {group: members[group] for group in chosen}
        assert any(1 < len(m) < len(g) for m, g in zip(members, self.GROUPS, strict=True))
        np.testing.assert_allclose(soup.score, best, rtol=1e-4)
        assert_close(soup.variables, mean([soups[group] for group in chosen]), rtol=1e-5)
        assert max(group.most for group in files) == 1

    def test_known_scores_spare_those_of_single_ingredients(self, score):
        groups = [Files(group) for group in self.GROUPS]
        known = [[score(make(seed)) for seed in group] for group in self.GROUPS]
        calls = []
        soup = hierarchical_soup(groups, lambda t: calls.append(t) or score(t), "GoG", known)
        # Each group's others on top of its best, then the groups' others.
        assert len(calls) == sum(len(group) - 1 for group in self.GROUPS) + len(self.GROUPS) - 1
        assert soup.score == hierarchical_soup(groups, score, "GoG").score

    @pytest.mark.parametrize("level", ["GoU", "GoG"])
    def test_one_group_of_one_is_that_ingredient(self, level):
        soup = hierarchical_soup([[make(3)]], lambda tree: 0.5, level)
        assert_close(soup.variables, make(3), rtol=0, atol=0)
        assert soup.members == {0: (0,)}
        assert soup.score == 0.5

    @pytest.mark.parametrize("level", ["GoU", "GoG"])
    def test_finish_is_applied_to_all_that_is_scored(self, level):
        def finish(tree):
            return {**tree, "batch_stats": {"bn": {"var": np.full(4, 9, np.float32)}}}

        seen = []

        def score(tree):
            seen.append(float(tree["batch_stats"]["bn"]["var"][0]))
            return len(seen)

        soup = hierarchical_soup([Files([0, 1]), Files([2])], score, level, finish=finish)
        assert set(seen) == {9}
        np.testing.assert_array_equal(soup.variables["batch_stats"]["bn"]["var"], 9)

    def test_bad_input_is_refused(self):
        def refused(message, *args):
            with pytest.raises(ValueError, match=message):
                hierarchical_soup(*args)

        def score(tree):
            return 0.0

        refused("level is 'GoX'; one of GoU, GoG", [[make(0)]], score, "GoX")
        refused("0 groups", [], score)
        refused("group 1 is empty", [[make(0)], []], score)
        refused("scores of 1 groups for 2", [[make(0)], [make(1)]], score, "GoG", [[1.0]])
        bad = make(2)
        bad["params"]["bn"]["scale"][0] = np.inf
        refused(
            "group 1: params/bn/scale in ingredient 1: 1 of 4", [[make(0)], [make(1), bad]], score
        )
        refused(
            "params/bn/scale in ingredient 1 of group 1", [[make(0)], [make(1), bad]], score, "GoU"
        )
