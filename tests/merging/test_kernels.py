import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick

from medmerge_jax.merging import (
    GRANULARITIES,
    effective_coefficients,
    init_coefficients,
    merge_kernels,
    merge_variables,
    zeros_parent,
)
from medmerge_jax.models import get_spec, list_models

SHAPES = {"kernel": (4,), "layer": (), "slice": (3, 4), "parameter": (3, 3, 3, 4), "row": (4,)}
ONE_OF_EACH_KIND = ("resnet20", "resnet50", "densenet121", "vit_tiny_patch16_224")
# No subnormal numbers, nor such products: XLA flushes them to zero, NumPy does not.
magnitudes = st.floats(2.0**-20, 10, width=32)
floats = st.just(0.0) | magnitudes | magnitudes.map(lambda value: -value)


def parent(seed, dtype=jnp.float32, head=None):
    """A backbone of two convolutions (3, 3, 3, 4) and (1, 1, 4, 5), and a batch norm."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "conv1": {"kernel": jax.random.normal(keys[0], (3, 3, 3, 4), dtype)},
        "layer1": {"0": {"conv1": {"kernel": jax.random.normal(keys[1], (1, 1, 4, 5), dtype)}}},
        "bn1": {
            "scale": jax.random.normal(keys[2], (4,), dtype),
            "bias": jax.random.normal(keys[3], (4,), dtype),
        },
    }
    return params if head is None else {**params, "head": {"kernel": jnp.ones((5, head), dtype)}}


def filled(value, like):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), like)


def one(kernel):
    return {"conv": {"kernel": kernel}}


kernels = hnp.arrays(np.float32, (2, 1, 2, 3), elements=floats)


@hypothesis.given(kernels, kernels, st.sampled_from(GRANULARITIES))
def test_coefficients_of_one_zero_and_half(b, c, granularity):
    start = init_coefficients(one(b), granularity=granularity)

    def merged(value):
        return merge_kernels((one(b), one(c)), filled(value, start))["conv"]["kernel"]

    np.testing.assert_array_equal(merged(1.0), b)
    np.testing.assert_array_equal(merged(0.0), c)
    np.testing.assert_array_equal(merged(0.5), (b + c) / 2)
    np.testing.assert_array_equal(
        merge_kernels((one(b), one(c)), start)["conv"]["kernel"], merged(0.5)
    )


@hypothesis.given(kernels, hnp.arrays(np.float32, (3,), elements=floats))
def test_identical_parents_are_a_fixed_point(kernel, weights):
    merged = merge_kernels((one(kernel), one(kernel)), {"conv": {"kernel": weights}})
    # Rounding of the products: |w| + |1 - w| times the kernel, in units of float32's last place.
    bound = 2 * np.finfo(np.float32).eps * (np.abs(weights) + np.abs(1 - weights) + 1)
    assert np.all(np.abs(merged["conv"]["kernel"] - kernel) <= bound * np.abs(kernel) + 1e-37)


@hypothesis.given(kernels, kernels, hnp.arrays(np.float32, (3,), elements=floats))
def test_two_parents_are_the_pair_formula(b, c, weights):
    merged = merge_kernels((one(b), one(c)), {"conv": {"kernel": weights}})["conv"]["kernel"]
    np.testing.assert_array_equal(merged, weights * b + (np.float32(1) - weights) * c)


@pytest.mark.parametrize("granularity", some_quick(GRANULARITIES, "kernel", "slice"))
def test_gradient_is_the_inner_product_with_the_parents_difference(granularity):
    b, c = parent(0), parent(1)
    start = init_coefficients(b, granularity=granularity)
    weights = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(2), leaf.shape), start
    )

    def loss_of_params(params):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params))

    gradients = jax.grad(lambda w: loss_of_params(merge_kernels((b, c), w)))(weights)
    merged_gradients = jax.grad(loss_of_params)(merge_kernels((b, c), weights))
    difference = np.asarray(b["conv1"]["kernel"] - c["conv1"]["kernel"])
    product = np.asarray(merged_gradients["conv1"]["kernel"]) * difference
    summed = {"layer": (0, 1, 2, 3), "slice": (0, 1), "parameter": ()}
    expected = product.sum(axis=summed.get(granularity, (0, 1, 2)))
    assert gradients["conv1"]["kernel"].shape == SHAPES[granularity]
    np.testing.assert_allclose(gradients["conv1"]["kernel"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_parents", [2, 3, 4])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_initial_coefficients(granularity, num_parents):
    start = init_coefficients(parent(0, head=3), num_parents, granularity=granularity)
    leading = () if num_parents == 2 else (num_parents - 1,)
    leaf = start["conv1"]["kernel"]
    assert leaf.shape == leading + SHAPES[granularity]
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, np.float32(1 / num_parents))
    assert start.keys() == {"conv1", "layer1"}


def test_initial_coefficients_need_shapes_only():
    shapes = jax.eval_shape(lambda: parent(0, jnp.bfloat16))
    start = init_coefficients(shapes)
    assert jax.tree.map(jnp.shape, start) == {
        "conv1": {"kernel": (4,)},
        "layer1": {"0": {"conv1": {"kernel": (5,)}}},
    }


def test_three_parents():
    parents = [one(np.full((1, 1, 1, 2), value, np.float32)) for value in (1.0, 10.0, 100.0)]
    weights = {"conv": {"kernel": np.array([[0.5, 2.0], [0.25, -1.0]], np.float32)}}
    merged = merge_kernels(parents, weights)["conv"]["kernel"]
    np.testing.assert_allclose(merged.ravel(), [0.5 + 2.5 + 25.0, 2.0 - 10.0 + 0.0], rtol=1e-6)
    start = init_coefficients(parents[0], 3)
    np.testing.assert_allclose(merge_kernels(parents, start)["conv"]["kernel"], 37.0, rtol=1e-6)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_of_three_parents_alone(granularity, index):
    parents = [parent(seed) for seed in range(3)]
    start = init_coefficients(parents[0], 3, granularity=granularity)
    chosen = jnp.array([index == 0, index == 1], jnp.float32)
    weights = jax.tree.map(
        lambda x: jnp.broadcast_to(chosen.reshape((2,) + (1,) * (x.ndim - 1)), x.shape), start
    )
    merged = merge_kernels(parents, weights)
    np.testing.assert_array_equal(merged["conv1"]["kernel"], parents[index]["conv1"]["kernel"])


def test_other_leaves_are_the_mean():
    parents = [parent(seed) for seed in range(3)]
    merged = merge_kernels(parents, init_coefficients(parents[0], 3))
    for name in ("scale", "bias"):
        expected = np.mean([p["bn1"][name] for p in parents], axis=0)
        np.testing.assert_allclose(merged["bn1"][name], expected, rtol=1e-6, atol=1e-7)
    assert jax.tree.structure(merged) == jax.tree.structure(parents[0])


def test_jit_equals_eager_and_grad_of_jit_is_finite():
    parents, weights = (parent(0), parent(1)), init_coefficients(parent(0))
    eager, jitted = merge_kernels(parents, weights), jax.jit(merge_kernels)(parents, weights)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_vmap_over_stacked_coefficients(granularity):
    parents = (parent(0), parent(1), parent(2))
    start = init_coefficients(parents[0], 3, granularity=granularity)
    members = [jax.tree.map(lambda x, v=value: x + v, start) for value in (-0.2, 0.0, 0.4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    merged = jax.vmap(lambda w: merge_kernels(parents, w))(stacked)
    for index, member in enumerate(members):
        alone = merge_kernels(parents, member)["conv1"]["kernel"]
        np.testing.assert_allclose(merged["conv1"]["kernel"][index], alone, rtol=1e-6, atol=1e-6)


def test_vmap_over_parents():
    stacks = [jax.tree.map(lambda *x: jnp.stack(x), parent(s), parent(s + 1)) for s in (0, 5)]
    start = init_coefficients(parent(0))
    merged = jax.vmap(lambda b, c: merge_kernels((b, c), start))(*stacks)
    alone = merge_kernels((parent(1), parent(6)), start)
    np.testing.assert_allclose(
        merged["conv1"]["kernel"][1], alone["conv1"]["kernel"], rtol=1e-6, atol=1e-7
    )


def test_strict_promotion():
    parents = (parent(0, jnp.bfloat16), parent(1, jnp.bfloat16), parent(2, jnp.bfloat16))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        merged = merge_kernels(parents, init_coefficients(parents[0], 3), constraint="clip")
    assert merged["bn1"]["scale"].dtype == jnp.bfloat16


def test_bfloat16_is_merged_in_float32_and_rounded_once():
    low = (parent(0, jnp.bfloat16), parent(1, jnp.bfloat16))
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    weights = filled(0.3, init_coefficients(low[0]))
    merged = merge_kernels(low, weights)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merge_kernels(high, weights))
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))
    w, (b, c) = jnp.bfloat16(0.3), [p["conv1"]["kernel"] for p in low]
    naive = w * b + (1 - w) * c
    assert jnp.any(naive != merged["conv1"]["kernel"])


def test_dtypes_are_those_of_the_parents():
    b, c = parent(0, jnp.bfloat16), parent(1, jnp.float32)
    merged = merge_kernels((b, c), init_coefficients(b))
    assert merged["conv1"]["kernel"].dtype == jnp.float32  # what JAX promotes the two to
    half = merge_kernels((parent(0, jnp.float16), parent(1, jnp.float16)), init_coefficients(b))
    assert half["bn1"]["scale"].dtype == jnp.float16


def test_heads_are_ignored():
    weights = init_coefficients(parent(0))
    expected = merge_kernels((parent(0), parent(1)), weights)
    for heads in [(3, 7), (None, 7), (3, None), (3, 3)]:
        merged = merge_kernels([parent(i, head=head) for i, head in enumerate(heads)], weights)
        assert jax.tree.structure(merged) == jax.tree.structure(expected)
        np.testing.assert_array_equal(merged["conv1"]["kernel"], expected["conv1"]["kernel"])


def test_a_head_that_is_a_convolution_is_ignored_too():
    params = {**parent(0), "head": {"kernel": jnp.ones((1, 1, 5, 3))}}
    assert "head" not in init_coefficients(params)
    assert "head" not in merge_kernels((params, params), init_coefficients(params))


def test_own_predicate():
    parents = [{"dense": {"kernel": jnp.full((2, 3), value)}} for value in (0.0, 1.0)]

    def is_dense(path, leaf):
        return path.endswith("kernel") and leaf.ndim == 2

    weights = init_coefficients(parents[0], is_kernel=is_dense)
    weights = {"dense": {"kernel": weights["dense"]["kernel"] + jnp.array([0.0, 0.5, -0.5])}}
    merged = merge_kernels(parents, weights, is_kernel=is_dense)
    np.testing.assert_array_equal(merged["dense"]["kernel"], [[0.5, 0.0, 1.0]] * 2)


# Constraints


@hypothesis.given(hnp.arrays(np.float32, (2, 5), elements=floats))
def test_clip_gives_weights_of_a_mean(raw):
    weights = effective_coefficients({"k": raw}, 3, "clip")["k"]
    assert np.all(weights >= 0)
    assert np.all(np.sum(weights, axis=0) <= 1 + 1e-6)
    inside = np.all((raw >= 0) & (raw <= 1), axis=0) & (raw.sum(axis=0) <= 1)
    np.testing.assert_array_equal(weights[:, inside], raw[:, inside])


def test_clip_values():
    two = effective_coefficients({"k": jnp.array([-0.5, 0.25, 1.5])}, 2, "clip")["k"]
    np.testing.assert_array_equal(two, [0.0, 0.25, 1.0])
    three = effective_coefficients({"k": jnp.array([[2.0, 0.5], [0.6, -1.0]])}, 3, "clip")["k"]
    np.testing.assert_allclose(three, [[1 / 1.6, 0.5], [0.6 / 1.6, 0.0]], rtol=1e-6)


def test_sigmoid_values():
    raw = np.array([-1.0, 0.0, 2.0], np.float32)
    two = effective_coefficients({"k": raw}, 2, "sigmoid")["k"]
    np.testing.assert_allclose(two, 1 / (1 + np.exp(-raw)), rtol=1e-6)
    three = effective_coefficients({"k": np.array([[1.0], [-2.0]], np.float32)}, 3, "sigmoid")["k"]
    total = np.exp(1.0) + np.exp(-2.0) + 1.0
    np.testing.assert_allclose(three[:, 0], [np.exp(1.0) / total, np.exp(-2.0) / total], rtol=1e-6)


@pytest.mark.parametrize("num_parents", [2, 3, 4])
@pytest.mark.parametrize("constraint", ["none", "clip", "sigmoid"])
def test_every_constraint_starts_at_the_mean(constraint, num_parents):
    parents = [parent(seed) for seed in range(num_parents)]
    start = init_coefficients(parents[0], num_parents, constraint=constraint)
    merged = merge_kernels(parents, start, constraint=constraint)["conv1"]["kernel"]
    expected = np.mean([p["conv1"]["kernel"] for p in parents], axis=0)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("constraint", "init"),
    [
        ("none", (1, 0)),
        ("none", (1.5, -0.5)),
        ("none", (0, -0.25, 1.25)),
        ("clip", (0, 1)),
        ("clip", (0.25, 0, 0.75)),
        ("sigmoid", (0.99, 0.01)),
        ("sigmoid", (0.2, 0.7, 0.1)),
    ],
)
@pytest.mark.parametrize("granularity", ["kernel", "slice"])
def test_coefficients_start_at_the_weights_that_are_given(constraint, init, granularity):
    shapes = {"conv": {"kernel": np.zeros((3, 3, 4, 8), np.float32)}}
    options = {"granularity": granularity, "constraint": constraint}
    usual = init_coefficients(shapes, len(init), **options)
    start = init_coefficients(shapes, len(init), init=init, **options)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, usual)
    found = effective_coefficients(start, len(init), constraint)["conv"]["kernel"]
    for weight, of_parent in zip(init, found[None] if len(init) == 2 else found, strict=False):
        np.testing.assert_allclose(of_parent, weight, rtol=1e-6)


@pytest.mark.parametrize("num_parents", [2, 3])
@pytest.mark.parametrize("constraint", ["none", "clip", "sigmoid"])
def test_merging_uses_the_effective_coefficients(constraint, num_parents):
    parents = [parent(seed) for seed in range(num_parents)]
    start = init_coefficients(parents[0], num_parents)
    raw = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(7), x.shape), start)
    effective = effective_coefficients(raw, num_parents, constraint)
    constrained = merge_kernels(parents, raw, constraint=constraint)
    plain = merge_kernels(parents, effective)
    np.testing.assert_array_equal(constrained["conv1"]["kernel"], plain["conv1"]["kernel"])


# Variables and the parent of zeros


def variables(seed):
    stats = {"bn1": {"mean": jnp.full(4, seed + 1.0), "var": jnp.full(4, 10.0 * (seed + 1))}}
    return {"params": parent(seed, head=seed + 2), "batch_stats": stats}


def test_merge_variables_averages_running_statistics():
    parents = [variables(0), variables(1)]
    weights = init_coefficients(parents[0]["params"])
    merged = merge_variables(parents, weights)
    assert merged.keys() == {"params", "batch_stats"}
    np.testing.assert_array_equal(merged["batch_stats"]["bn1"]["mean"], 1.5)
    np.testing.assert_array_equal(merged["batch_stats"]["bn1"]["var"], 15.0)
    params = merge_kernels([p["params"] for p in parents], weights)
    for a, b in zip(jax.tree.leaves(merged["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_merge_variables_without_statistics_or_with_those_of_one_parent_only():
    b, c = ({"params": parent(seed)} for seed in (0, 1))
    assert merge_variables((b, c), init_coefficients(b["params"])).keys() == {"params"}
    with pytest.raises(ValueError, match=r"batch_stats/bn1/mean: absent in parent 0, shape \(4,\)"):
        merge_variables((b, variables(1)), init_coefficients(b["params"]))
    with pytest.raises(ValueError, match='parent 1 is not a mapping with a collection "params"'):
        merge_variables((b, parent(1)), init_coefficients(b["params"]))


def test_zeros_parent_scales_the_kernels_and_keeps_the_rest():
    given = variables(0)
    zeros = zeros_parent(given)
    weights = filled(0.25, init_coefficients(given["params"]))
    merged = merge_variables((given, zeros), weights)
    kernel = given["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(merged["params"]["conv1"]["kernel"], 0.25 * kernel)
    np.testing.assert_array_equal(merged["params"]["bn1"]["scale"], given["params"]["bn1"]["scale"])
    np.testing.assert_array_equal(merged["batch_stats"]["bn1"]["var"], 10.0)
    assert "head" not in zeros["params"]
    assert not np.any(zeros["params"]["layer1"]["0"]["conv1"]["kernel"])


# Refusals


def without(params, name):
    return {key: child for key, child in params.items() if key != name}


def test_fewer_than_two_parents():
    weights = init_coefficients(parent(0))
    for parents in ([], [parent(0)]):
        with pytest.raises(ValueError, match=rf"{len(parents)} parents; two or more are wanted"):
            merge_kernels(parents, weights)
    with pytest.raises(ValueError, match="1 parents"):
        init_coefficients(parent(0), 1)
    with pytest.raises(ValueError, match="1 parents"):
        effective_coefficients(weights, 1)


@pytest.mark.parametrize("jitted", [False, True])
def test_parents_that_differ(jitted):
    merge = jax.jit(merge_kernels) if jitted else merge_kernels
    b, weights = parent(0), init_coefficients(parent(0))
    wide = {**b, "conv1": {"kernel": jnp.ones((5, 5, 3, 4))}}
    message = r"conv1/kernel: shape \(3, 3, 3, 4\) in parent 0, shape \(5, 5, 3, 4\) in parent 1"
    with pytest.raises(ValueError, match=message):
        merge((b, wide), weights)
    with pytest.raises(ValueError, match=r"bn1/\w+: shape \(4,\) in parent 0, absent in parent 2"):
        merge((b, b, without(b, "bn1")), weights)
    with pytest.raises(ValueError, match=r"bn1/\w+: absent in parent 0, shape \(4,\) in parent 1"):
        merge((without(b, "bn1"), b), weights)


def test_coefficients_that_do_not_fit():
    b = parent(0)
    weights = init_coefficients(b)
    with pytest.raises(ValueError, match=r"coefficients of conv1/kernel: absent, .*\(3, 3, 3, 4\)"):
        merge_kernels((b, b), without(weights, "conv1"))
    extra = {**weights, "bn1": {"scale": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"coefficients of bn1/scale: shape \(4,\), but .* absent"):
        merge_kernels((b, b), extra)
    for shape in [(3,), (1,), (1, 4), (4, 3), (3, 3, 4), (2, 4), (1, 1, 1, 4)]:
        wrong = {**weights, "conv1": {"kernel": jnp.ones(shape)}}
        with pytest.raises(
            ValueError, match=r"conv1/kernel: shape .*, but a kernel \(3, 3, 3, 4\)"
        ):
            merge_kernels((b, b), wrong)
    with pytest.raises(
        ValueError, match=r"shape \(4,\), but .* of 3 parents takes one of \(2, 4\), \(2,\)"
    ):
        merge_kernels((b, b, b), weights)
    with pytest.raises(ValueError, match=r"conv1/kernel: shape \(4,\), but 3 parents need \(2, "):
        effective_coefficients(weights, 3)


@pytest.mark.parametrize("leaf", [jnp.ones((4,), jnp.int32), [1.0], "x", None])
def test_leaves_that_cannot_be_averaged(leaf):
    b = {**parent(0), "count": leaf}
    with pytest.raises(ValueError, match=r"count in parent 0 is .* floating-point array is wanted"):
        merge_kernels((b, b), init_coefficients(parent(0)))


def test_unknown_options_and_trees_without_kernels():
    with pytest.raises(ValueError, match="granularity is 'filter'; one of kernel, layer, slice"):
        init_coefficients(parent(0), granularity="filter")
    with pytest.raises(ValueError, match="constraint is 'tanh'; one of none, clip, sigmoid"):
        merge_kernels((parent(0), parent(1)), init_coefficients(parent(0)), constraint="tanh")
    with pytest.raises(ValueError, match="none of the 2 leaves outside the head is a kernel"):
        init_coefficients({"bn1": parent(0)["bn1"], "head": {"kernel": jnp.ones((2, 3))}})


# Flax


class Small(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv1")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn1")(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def test_linen_models():
    images = jax.random.normal(jax.random.key(9), (2, 8, 8, 3))
    parents = [flax.core.freeze(Small().init(jax.random.key(seed), images)) for seed in (0, 1)]
    coefficients = init_coefficients(parents[0]["params"])
    merged = merge_variables(parents, filled(1.0, coefficients))
    merged = {**merged, "params": {**merged["params"], "head": parents[0]["params"]["head"]}}
    # The batch norms of fresh parents are equal, so only the kernels decide.
    expected = Small().apply(parents[0], images)
    np.testing.assert_allclose(Small().apply(merged, images), expected, rtol=1e-6)
    assert jnp.any(Small().apply(parents[1], images) != expected)


def test_a_head_under_another_name_is_named():
    parents = [
        {"conv": {"kernel": np.full((1, 1, 2, 3), x)}, "classifier": {"kernel": np.full((3, 2), x)}}
        for x in (1.0, 3.0)
    ]

    def is_head(path):
        return path.startswith("classifier/")

    coefficients = init_coefficients(parents[0], is_head=is_head)
    merged = merge_kernels(parents, coefficients, is_head=is_head)
    assert set(merged) == {"conv"}
    variables = [{"params": parent} for parent in parents]
    assert set(merge_variables(variables, coefficients, is_head=is_head)["params"]) == {"conv"}
    assert set(zeros_parent(variables[0], is_head=is_head)["params"]) == {"conv"}
    # A head that nobody names is averaged like everything else.
    assert set(merge_kernels(parents, coefficients)) == {"conv", "classifier"}


@pytest.mark.parametrize("collections", [("params",), ("params", "batch_stats")])
def test_whole_variables_are_refused_with_the_mend(collections):
    tree = {"conv": {"kernel": np.ones((3, 3, 2, 4))}}
    variables = dict.fromkeys(collections, tree)
    for call in (init_coefficients, lambda v: merge_kernels([v, v], init_coefficients(tree))):
        with pytest.raises(ValueError, match=r"whole variables.*take merge_variables"):
            call(variables)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (64, 3, 7, 7), (32, 8, 1, 1), (96, 3, 4, 4, 4)])
def test_pytorchs_layout_is_refused_with_the_mend(shape):
    tree = {"conv": {"kernel": np.ones(shape)}}
    for granularity in ("kernel", "slice"):
        with pytest.raises(ValueError, match=r"conv/kernel: .* PyTorch's layout") as error:
            init_coefficients(tree, granularity=granularity)
    axes = eval(str(error.value).rpartition("transpose")[2])
    mended = {"conv": {"kernel": tree["conv"]["kernel"].transpose(axes)}}
    assert init_coefficients(mended)["conv"]["kernel"].shape == shape[:1]
    # Where a coefficient is for the whole kernel, or for each number, the layout does not matter.
    assert init_coefficients(tree, granularity="layer")["conv"]["kernel"].shape == ()
    assert init_coefficients(tree, granularity="parameter")["conv"]["kernel"].shape == shape


@pytest.mark.parametrize(
    "shape",
    [
        (3, 3, 3, 3),
        (1, 1, 8, 8),
        (8, 8, 1, 1),
        (3, 3, 1, 64),
        (1, 7, 32, 32),
        (5, 3, 8),
        (16, 16, 3, 768),
    ],
)
def test_shapes_that_may_be_flaxs_are_not_refused(shape):
    assert (
        init_coefficients({"conv": {"kernel": np.ones(shape)}})["conv"]["kernel"].shape
        == (shape[-1:])
    )


@pytest.mark.parametrize("name", some_quick(list_models(), *ONE_OF_EACH_KIND))
def test_no_registered_architecture_is_taken_for_pytorchs(name):
    shapes = get_spec(name).shapes()["params"]
    assert set(init_coefficients(shapes)) == {p for p, x in shapes.items() if x.ndim == 4}


def test_haikus_trees_and_frozen_dicts_come_back_as_they_were():
    parents = [{"net/~/conv": {"w": np.full((1, 1, 2, 3), x)}} for x in (1.0, 3.0)]

    def is_kernel(path, leaf):
        return path.endswith("/w")

    coefficients = init_coefficients(parents[0], is_kernel=is_kernel)
    merged = merge_kernels(parents, coefficients, is_kernel=is_kernel)
    np.testing.assert_array_equal(merged["net/~/conv"]["w"], np.full((1, 1, 2, 3), 2.0))
    frozen = [flax.core.freeze({"params": {"conv": {"kernel": np.ones((1, 1, 2, 3))}}})] * 2
    coefficients = init_coefficients(frozen[0]["params"])
    for tree in (
        coefficients,
        merge_kernels([parent["params"] for parent in frozen], coefficients),
        merge_variables(frozen, coefficients),
        zeros_parent(frozen[0]),
    ):
        assert isinstance(tree, flax.core.FrozenDict)
