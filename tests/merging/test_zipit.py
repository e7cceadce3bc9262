import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick
from hypothesis import given
from hypothesis import strategies as st

from medmerge_jax.merging import flatten, unflatten
from medmerge_jax.merging.alignment import activation_matching
from medmerge_jax.merging.averages import uniform_average
from medmerge_jax.merging.correlation import correlation
from medmerge_jax.merging.permutations import (
    permute_variables,
    random_permutations,
)
from medmerge_jax.merging.recalibration import recalibrate
from medmerge_jax.merging.spaces import find_spaces
from medmerge_jax.merging.zipit import (
    ALPHA,
    BETA,
    match_features,
    partial_stops,
    partial_zipit,
    zipit,
)
from medmerge_jax.models import create_model
from medmerge_jax.models.densenet import DenseNet
from medmerge_jax.models.norm import batch_statistics
from medmerge_jax.models.resnet import CifarResNet
from medmerge_jax.models.taps import collect_moments

CLASSES = 5
# Of logits, relative. Permuting alone gives up to 5e-6, and sums are split by the cores there are.
ROUNDING = 2e-5
STOPS = {
    "cifar": ("layer3",),
    "resnet20": ("layer3",),
    "resnet18": (
        *("layer1", "layer2/0/conv1", "layer2", "layer3/0/conv1", "layer3"),
        *("layer4/0/conv1", "layer4"),
    ),
    "densenet": (*(f"features/denseblock{i}" for i in (1, 2, 3)), "features"),
    "small densenet": ("features/denseblock1", "features"),
}


def correlations_like(rng, num_models, size, rank=6):
    """Of random units with ReLU, all a little alike."""
    units = rng.normal(size=(300, rank)) @ rng.normal(size=(rank, num_models * size))
    return np.corrcoef(np.maximum(units, 0).T)


def greedy_by_brute_force(matrix, num_models, size, alpha, beta):
    """Sets of units, by comparing every two of them before every merge."""
    clusters = {unit: frozenset([unit]) for unit in range(num_models * size)}
    similarity = {pair: matrix[pair] for pair in itertools.permutations(clusters, 2)}
    budget = [int(beta * (num_models - 1) * size / num_models + 1e-4)] * num_models
    full = False

    def models(cluster):
        return {unit // size for unit in clusters[cluster]}

    def is_allowed(a, b):
        shared = models(a) & models(b)
        if any(budget[model] <= 0 for model in shared):
            return False
        if alpha == 0 and shared and max(len(clusters[a]), len(clusters[b])) > 1:
            return False
        mixed = (len(models(a)) > 1) + (len(models(b)) > 1)
        return not full or mixed == 1 or (mixed == 0 and shared)

    while len(clusters) > size:
        pairs = [p for p in itertools.combinations(sorted(clusters), 2) if is_allowed(*p)]
        a, b = max(pairs, key=lambda pair: similarity[pair])
        for model in models(a) & models(b):
            budget[model] -= 1
        clusters[a] |= clusters.pop(b)
        for other in clusters:
            if other != a:
                value = min(similarity[a, other], similarity[b, other])
                similarity[a, other] = similarity[other, a] = value * (alpha or 1)
        full = full or sum(len(models(c)) > 1 for c in clusters) == size
    return set(clusters.values())


def clusters_of(unmerge):
    return {frozenset(np.flatnonzero(column).tolist()) for column in unmerge.T}


class TestMatchFeatures:
    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.3, 1.0])
    @pytest.mark.parametrize(("num_models", "size"), [(2, 10), (3, 7), (4, 5)])
    def test_equals_brute_force(self, rng, num_models, size, alpha, beta):
        for rank in (3, 20):
            matrix = correlations_like(rng, num_models, size, rank)
            _, unmerge = match_features(matrix, num_models, size, alpha, beta)
            wanted = greedy_by_brute_force(matrix, num_models, size, alpha, beta)
            assert clusters_of(unmerge) == wanted

    @given(
        num_models=st.integers(1, 5),
        size=st.integers(1, 8),
        alpha=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        beta=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        levels=st.sampled_from([2, 5, 10**6]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_matrices_are_what_they_are_for(self, num_models, size, alpha, beta, levels, seed):
        rng = np.random.default_rng(seed)
        # Coarse levels make ties, and among them units that are dead or cannot be told apart.
        matrix = np.round(rng.uniform(-1, 1, size=(num_models * size,) * 2) * levels) / levels
        matrix = np.minimum(matrix, matrix.T)
        np.fill_diagonal(matrix, rng.uniform(size=len(matrix)) < 0.8)
        dead = np.diagonal(matrix) == 0
        matrix[dead] = matrix[:, dead] = 0
        merge, unmerge = match_features(matrix, num_models, size, alpha, beta)
        assert merge.shape == unmerge.T.shape == (size, num_models * size)
        np.testing.assert_allclose(merge @ unmerge, np.eye(size), atol=1e-12)
        assert set(np.unique(unmerge)) <= {0, 1}
        np.testing.assert_array_equal(unmerge.sum(axis=1), 1)
        np.testing.assert_allclose(merge, unmerge.T / unmerge.sum(axis=0)[:, None])
        # The budget: what a model's units take up less than `size` places were merged within.
        held = unmerge.reshape(num_models, size, size).any(axis=1).sum(axis=1)
        budget = int(beta * (num_models - 1) * size / num_models + 1e-4)
        assert (size - held <= budget).all()

    @pytest.mark.parametrize("alpha", [0.0, ALPHA, 1.0])
    def test_without_budget_two_models_are_permuted(self, rng, alpha):
        matrix = correlations_like(rng, 2, 30)
        _, unmerge = match_features(matrix, 2, 30, alpha, 0.0)
        np.testing.assert_array_equal(unmerge[:30], np.eye(30))
        np.testing.assert_array_equal(unmerge[30:].sum(axis=0), 1)
        _, other = match_features(matrix, 2, 30, 0.5, 0.0)
        np.testing.assert_array_equal(unmerge, other)

    @pytest.mark.parametrize("num_models", [3, 4, 5])
    def test_without_budget_each_unit_has_one_of_each_model(self, rng, num_models):
        _, unmerge = match_features(correlations_like(rng, num_models, 9), num_models, 9, 0.3, 0.0)
        np.testing.assert_array_equal(unmerge.reshape(num_models, 9, 9).sum(axis=1), 1)

    def test_the_most_alike_are_merged_first_and_no_more_than_the_budget_within(self):
        # Units a0 a1 a2 a3 of one model, b0 b1 b2 b3 of the other. Alike are a0 and a1 most, then
        # b2 and b3, a2 and b0, and a3 and b1 least.
        matrix = np.eye(8)
        for (i, j), value in {(0, 1): 0.9, (6, 7): 0.8, (2, 4): 0.7, (3, 5): 0.1}.items():
            matrix[i, j] = matrix[j, i] = value
        _, unmerge = match_features(matrix, 2, 4, alpha=0.5, beta=0.5)
        assert clusters_of(unmerge) == {
            frozenset(units) for units in ((0, 1), (6, 7), (2, 4), (3, 5))
        }
        # The place is that of the first unit of the first model; what is only b's has the room.
        assert np.flatnonzero(unmerge[6]) == np.flatnonzero(unmerge[7]) == 1
        np.testing.assert_array_equal(unmerge[[0, 2, 3]].argmax(axis=1), [0, 2, 3])
        _, unmerge = match_features(matrix, 2, 4, alpha=0.5, beta=0.0)
        assert {frozenset((2, 4)), frozenset((3, 5))} < clusters_of(unmerge)

    def test_alpha_keeps_merged_units_from_taking_in_more(self):
        # a0, b0 and b1 are alike, a1 and b1 less, but more than half as much.
        matrix = np.eye(4)
        matrix[np.ix_([0, 2, 3], [0, 2, 3])] = 0.9
        matrix[0, 2] = matrix[2, 0] = 0.95
        matrix[1, 3] = matrix[3, 1] = 0.5
        np.fill_diagonal(matrix, 1)
        _, unmerge = match_features(matrix, 2, 2, alpha=0.5, beta=1.0)
        assert clusters_of(unmerge) == {frozenset((0, 2)), frozenset((1, 3))}
        _, unmerge = match_features(matrix, 2, 2, alpha=0.6, beta=1.0)
        assert clusters_of(unmerge) == {frozenset((0, 2, 3)), frozenset((1,))}

    @pytest.mark.parametrize("num_models", [2, 3])
    @pytest.mark.parametrize("alpha", [0.0, ALPHA, 1.0])
    @pytest.mark.parametrize("beta", [0.0, BETA, 1.0])
    def test_identical_models_are_merged_unit_by_unit(self, rng, num_models, alpha, beta):
        one = correlations_like(rng, 1, 12, rank=3)
        one[3] = one[:, 3] = one[7] = one[:, 7] = 0  # Dead.
        one[5], one[:, 5] = one[4], one[:, 4]  # Not to be told apart.
        one[5, 5] = 1
        one[9] *= 0.01  # Hardly varies: see eps in `correlation`.
        one[:, 9] *= 0.01
        matrix = np.tile(one, (num_models, num_models))
        matrix *= 1 + 1e-9 * rng.normal(size=matrix.shape)
        _, unmerge = match_features((matrix + matrix.T) / 2, num_models, 12, alpha, beta)
        np.testing.assert_array_equal(unmerge, np.tile(np.eye(12), (num_models, 1)))

    def test_one_model_stays_as_it_is(self, rng):
        merge, unmerge = match_features(correlations_like(rng, 1, 6), 1, 6)
        np.testing.assert_array_equal(merge, np.eye(6))
        np.testing.assert_array_equal(unmerge, np.eye(6))

    def test_the_matrix_is_not_written_to(self, rng):
        matrix = correlations_like(rng, 2, 6)
        before = matrix.copy()
        match_features(matrix, 2, 6)
        np.testing.assert_array_equal(matrix, before)

    def test_bad_arguments_are_refused(self, rng):
        matrix = correlations_like(rng, 2, 6)
        with pytest.raises(ValueError, match=r"shape \(12, 12\); for 2 models of 5 units \(10, 10"):
            match_features(matrix, 2, 5)
        for alpha, beta, found in ((-0.1, 0.1, "alpha is -0.1"), (0.1, 1.1, "beta is 1.1")):
            with pytest.raises(ValueError, match=found):
                match_features(matrix, 2, 6, alpha, beta)
        with pytest.raises(ValueError, match="alpha is nan"):
            match_features(matrix, 2, 6, float("nan"))
        matrix[3, 4] += 0.1
        with pytest.raises(ValueError, match="not symmetric"):
            match_features(matrix, 2, 6)
        matrix[3, 4] = np.nan
        with pytest.raises(ValueError, match="1 numbers that are not finite"):
            match_features(matrix, 2, 6)


def network(name):
    if name == "densenet":
        return DenseNet((2, 3, 2, 2), 4, 8, CLASSES)
    if name == "small densenet":
        return DenseNet((1, 2), 4, 8, CLASSES)
    if name == "cifar":
        return CifarResNet(1, CLASSES)
    return create_model(name, CLASSES)


@functools.partial(jax.jit, static_argnums=0)
def init(model, key, images):
    return model.init(key, images)


statistics = jax.jit(batch_statistics, static_argnums=0)


def trained_like(model, images, seed):
    """Variables with uneven batch norms and the running statistics that go with them."""
    rng = np.random.default_rng(seed)
    flat = flatten(init(model, jax.random.key(seed), images[:1]))
    for path, leaf in flat.items():
        if path.endswith("scale"):
            flat[path] = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        elif path.endswith("bias") and "head" not in path:
            flat[path] = rng.uniform(-0.3, 0.5, leaf.shape).astype(np.float32)
    return recalibrate(lambda v, x: statistics(model, v, x), unflatten(flat), [images])


class Case:
    """Two models a and c of one architecture, permuted copies of a, and images."""

    def __init__(self, name):
        rng = np.random.default_rng(0)
        self.images = rng.normal(size=(96, 32, 32, 3)).astype(np.float32)
        self.unseen = rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
        self.name, self.model = name, network(name)
        self.apply = jax.jit(self.model.apply)
        self.a, self.c = (trained_like(self.model, self.images, seed) for seed in (0, 1))
        self.spaces = find_spaces(self.a)
        orders = [random_permutations(self.spaces, seed) for seed in (1, 2)]
        self.copies = [permute_variables(self.a, order) for order in orders]
        self.collected = {}

    def correlations(self, *parents):
        key = tuple(map(id, parents))
        if key not in self.collected:
            moments = collect_moments(self.model, parents, self.spaces, self.images, 48)
            self.collected[key] = {name: correlation(x) for name, x in moments.items()}
        return dict(self.collected[key])

    def error(self, found, wanted):
        """Of logits of images that no correlation was computed on, relative to the largest."""
        found, wanted = (self.apply(variables, self.unseen) for variables in (found, wanted))
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@functools.cache
def case_of(name):
    return Case(name)


@pytest.fixture(
    params=[
        "cifar",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("densenet", "resnet18")),
    ]
)
def case(request):
    return case_of(request.param)


@pytest.fixture
def small():
    return case_of("small densenet")


def assert_same(found, wanted, rtol=0):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, leaf in flatten(wanted).items():
        assert flatten(found)[path].dtype == leaf.dtype
        np.testing.assert_allclose(flatten(found)[path], leaf, rtol=rtol, err_msg=path)


class TestZipit:
    def test_permuted_copies_make_the_model_again(self, case):
        for parents in ([case.a, case.copies[0]], [*case.copies, case.a]):
            correlations = case.correlations(*parents)
            assert min(found.diagonal().min() for found in correlations.values()) > 0
            assert case.error(zipit(parents, correlations), case.a) < ROUNDING

    @pytest.mark.parametrize("num_parents", [2, 3])
    def test_identical_parents_are_a_fixed_point(self, case, num_parents):
        parents = [case.a] * num_parents
        assert_same(zipit(parents, case.correlations(*parents)), case.a)

    def test_without_budget_it_is_the_average_of_aligned_models(self, case):
        correlations = case.correlations(case.a, case.c)
        found = zipit([case.a, case.c], correlations, beta=0.0)
        orders = {}
        for space in case.spaces:
            _, unmerge = match_features(correlations[space.name], 2, space.size, beta=0.0)
            orders[space.name] = unmerge[space.size :].T.argmax(axis=1)
        wanted = uniform_average([case.a, permute_variables(case.c, orders)])
        assert_same(found, wanted, rtol=1e-6)
        assert not np.allclose(case.apply(found, case.unseen), case.apply(case.a, case.unseen))

    def test_without_budget_it_aligns_as_activation_matching_does(self, case):
        correlations = case.correlations(case.a, case.copies[0])
        across = {s.name: correlations[s.name][: s.size, s.size :] for s in case.spaces}
        orders = activation_matching(across)
        aligned = permute_variables(case.copies[0], orders)
        found = zipit([case.a, case.copies[0]], correlations, beta=0.0)
        assert_same(found, uniform_average([case.a, aligned]), rtol=1e-6)

    def test_kernels_are_the_papers_formula(self, case):
        parents = [case.a, case.c, case.copies[0]]
        correlations = case.correlations(*parents)
        found = flatten(zipit(parents, correlations, alpha=0.7, beta=0.4))
        matrices = {
            s.name: match_features(correlations[s.name], 3, s.size, 0.7, 0.4) for s in case.spaces
        }
        kernels = [path for path in found if path.endswith("kernel")]
        for path in (*kernels, "params/head/bias"):
            total = 0
            for i, parent in enumerate(parents):
                kernel = np.array(flatten(parent)[path], np.float64)
                if path.startswith("params/head"):
                    kernel /= 3
                for space in case.spaces:
                    own = slice(i * space.size, (i + 1) * space.size)
                    merge, unmerge = matrices[space.name]
                    for place in space.places:
                        if place.path == path:
                            matrix = merge[:, own] if place.role == "out" else unmerge[own].T
                            units = np.moveaxis(kernel, place.axis, 0)
                            old = units[place.positions]
                            units[place.positions] = np.einsum("uv,v...->u...", matrix, old)
                total += kernel
            np.testing.assert_allclose(found[path], total, atol=1e-6, err_msg=path)

    @pytest.mark.slow
    def test_batch_norms_are_averaged_as_their_units(self, small):
        correlations = small.correlations(small.a, small.c)
        found = flatten(zipit([small.a, small.c], correlations))
        space = next(s for s in small.spaces if s.name.endswith("denselayer2/conv1"))
        merge, _ = match_features(correlations[space.name], 2, space.size)
        path = f"{space.name.removesuffix('conv1')}norm2"
        for vector in (f"params/{path}/scale", f"params/{path}/bias", f"batch_stats/{path}/var"):
            both = np.concatenate([flatten(small.a)[vector], flatten(small.c)[vector]])
            np.testing.assert_allclose(found[vector], merge @ both, rtol=1e-6)

    def test_units_are_merged_within_models_too(self, small):
        correlations = small.correlations(small.a, small.c)
        both = zipit([small.a, small.c], correlations, beta=1.0)
        across = zipit([small.a, small.c], correlations, beta=0.0)
        assert small.error(both, across) > 1e-3

    def test_one_parent_stays_as_it_is(self, small):
        assert_same(zipit([small.a], small.correlations(small.a)), small.a)

    def test_returns_the_parents_dtype(self, small):
        correlations = small.correlations(small.a, small.c)
        half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), v) for v in (small.a, small.c)]
        found = zipit(half, correlations)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
        exact = zipit(
            [jax.tree.map(lambda x: x.astype(jnp.float32), v) for v in half], correlations
        )
        assert_same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))

    def test_backbones_without_head_and_statistics(self, small):
        correlations = small.correlations(small.a, small.c)
        wanted = flatten(zipit([small.a, small.c], correlations))
        backbones = [
            {"params": {k: x for k, x in v["params"].items() if k != "head"}}
            for v in (small.a, small.c)
        ]
        found = flatten(zipit(backbones, correlations))
        assert found.keys() == {p for p in wanted if p.startswith("params/features")}
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, wanted[path])

    def test_bad_parents_are_refused(self, small):
        correlations = small.correlations(small.a, small.c)
        flat = flatten(small.c)
        head = {"params/head/kernel": np.zeros((flat["params/head/kernel"].shape[0], 7))}
        damaged = np.where(np.arange(8) == 1, np.nan, flat["params/features/norm0/scale"])
        cases = [
            ({}, head, r"params/head/kernel: shape \(\d+, 5\) in parent 0, .* 7\) in parent 1"),
            ({}, {"params/features/norm0/scale": damaged}, "norm0/scale in parent 1: 1 of 8"),
            ({}, {"params/features/norm0/bias": np.zeros(8, int)}, "norm0/bias in parent 1 is of"),
            ({"params/features/norm0/bias"}, {}, "norm0/bias: shape .* absent in parent 1"),
        ]
        for without, changed, message in cases:
            other = {p: x for p, x in {**flat, **changed}.items() if p not in without}
            with pytest.raises(ValueError, match=message):
                zipit([small.a, unflatten(other)], correlations)
        with pytest.raises(ValueError, match="0 parents"):
            zipit([], correlations)

    def test_bad_correlations_are_refused(self, small):
        correlations = small.correlations(small.a, small.c)
        with pytest.raises(
            ValueError, match=r"'features/conv0' has shape .* for 3 models of 8 unit"
        ):
            zipit([small.a, small.c, small.a], correlations)
        del correlations["features/transition1/conv"]
        with pytest.raises(ValueError, match="'features/transition1/conv' is absent"):
            zipit([small.a, small.c], correlations)


class TestPartialZipit:
    def test_stops_are_where_all_that_reads_is_linear(self, case):
        assert partial_stops(case.spaces) == STOPS[case.name]

    def test_bottlenecks_have_their_stem_and_inner_units_apart(self):
        model = create_model("resnet50", 0)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        stops = partial_stops(find_spaces(shapes))
        assert [s for s in stops if "/" not in s] == [
            "conv1",
            "layer1",
            "layer2",
            "layer3",
            "layer4",
        ]
        assert [s for s in stops if "layer3/" in s] == ["layer3/0/conv1", "layer3/0/conv2"]

    def test_permuted_copies_keep_their_function_at_every_stop(self, case):
        parents = [case.a, case.copies[0]]
        correlations = case.correlations(*parents)
        for stop in partial_stops(case.spaces):
            models = partial_zipit(parents, correlations, stop=stop)
            assert max(case.error(model, case.a) for model in models) < ROUNDING

    def test_models_share_the_trunk_and_keep_the_rest(self, case):
        parents = [case.a, case.c]
        correlations = case.correlations(*parents)
        whole = flatten(zipit(parents, correlations))
        for stop in partial_stops(case.spaces):
            zipped = next(s for s in case.spaces if s.name.startswith(stop)).name
            first, second = (flatten(m) for m in partial_zipit(parents, correlations, stop=stop))
            shared = {path for path in first if first[path] is second[path]}
            assert f"params/{case.spaces[0].name}/kernel" in shared
            assert f"params/{zipped}/kernel" in shared
            assert not any(path.startswith("params/head") for path in shared)
            for path in shared:
                np.testing.assert_array_equal(first[path], whole[path], err_msg=path)
            # Own layers change where they read the trunk's units: one or two convolutions, or the
            # head. The first model's units may all be where they were.
            for found, parent, fewest in ((first, case.a, 0), (second, case.c, 1)):
                changed = [
                    path
                    for path, leaf in flatten(parent).items()
                    if path not in shared and not np.array_equal(leaf, found[path])
                ]
                assert all(path.endswith("kernel") for path in changed)
                assert fewest <= len(changed) <= 2

    def test_all_but_the_heads(self, case):
        # Different numbers of classes; and the whole zip's head is the mean of the two.
        parents = [case.a, case.c]
        correlations = case.correlations(*parents)
        stop = partial_stops(case.spaces)[-1]
        models = [flatten(m) for m in partial_zipit(parents, correlations, stop=stop)]
        whole = flatten(zipit(parents, correlations))
        path = "params/head/kernel"
        np.testing.assert_allclose((models[0][path] + models[1][path]) / 2, whole[path], atol=1e-6)

        flat = flatten(case.c)
        flat[path], flat["params/head/bias"] = flat[path][:, :3], flat["params/head/bias"][:3]
        fewer = partial_zipit([case.a, unflatten(flat)], correlations, stop=stop)
        assert_same(fewer[0], unflatten(models[0]))
        np.testing.assert_array_equal(flatten(fewer[1])[path], models[1][path][:, :3])

    @pytest.mark.parametrize("count", some_quick((1, 2, 3), 2))
    def test_identical_parents_are_a_fixed_point(self, small, count):
        parents = [small.a] * count
        correlations = small.correlations(*parents)
        for stop in partial_stops(small.spaces):
            for model in partial_zipit(parents, correlations, stop=stop):
                assert_same(model, small.a)

    def test_correlations_behind_the_cut_are_not_needed(self, small):
        parents = [small.a, small.c]
        correlations = small.correlations(*parents)
        first = {n: x for n, x in correlations.items() if "denseblock1" in n or "conv0" in n}
        stop = "features/denseblock1"
        wanted = partial_zipit(parents, correlations, stop=stop)
        for model, other in zip(partial_zipit(parents, first, stop=stop), wanted, strict=True):
            assert_same(model, other)

    def test_bad_stops_and_heads_are_refused(self, small):
        correlations = small.correlations(small.a, small.c)
        with pytest.raises(ValueError, match="after 'layer2'; possible are features/denseblock1, "):
            partial_zipit([small.a, small.c], correlations, stop="layer2")
        flat = flatten(small.c)
        rows = len(flat["params/head/kernel"])
        flat["params/head/kernel"] = flat["params/head/kernel"][:-1]
        message = rf"head/kernel: shape \({rows - 1}, 5\) in parent 1, but {rows} units"
        with pytest.raises(ValueError, match=message):
            partial_zipit([small.a, unflatten(flat)], correlations, stop="features")
        flat["params/head/kernel"] = jnp.full((rows, 5), jnp.inf)
        with pytest.raises(ValueError, match="head/kernel in parent 1"):
            partial_zipit([small.a, unflatten(flat)], correlations, stop="features")
