import functools
import itertools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from medmerge_jax.merging import flatten, unflatten
from medmerge_jax.merging.alignment import (
    STARTS,
    activation_matching,
    align_to_mean,
    matched_averaging,
    weight_matching,
)
from medmerge_jax.merging.permutations import (
    compose_permutations,
    identity_permutations,
    invert_permutations,
    permute_variables,
    random_permutations,
)
from medmerge_jax.merging.spaces import find_spaces
from medmerge_jax.merging.trees import without_head
from medmerge_jax.models import create_model
from medmerge_jax.models.densenet import DenseNet
from medmerge_jax.models.resnet import Bottleneck, ResNet

# Compiling a large network takes seconds instead of half a minute, and running it once no longer.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


MODELS = {
    "densenet": DenseNet((2, 3, 2), 12, 24, 7),
    "bottlenecks": ResNet(Bottleneck, (2, 1, 1, 1), 7),
}


@functools.lru_cache
def shapes(name, num_classes):
    model = MODELS[name] if name in MODELS else create_model(name, num_classes)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return flatten(jax.eval_shape(model.init, jax.random.key(0), images))


def network(name, seed, num_classes=7):
    """Variables of which no two numbers are alike, batch norms included; unlike `model.init`'s."""
    rng = np.random.default_rng([seed, 71])

    def fill(path, shape):
        kind = path.rpartition("/")[2]
        if kind == "kernel":
            return rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
        if kind in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, 0.1, shape)

    flat = {p: fill(p, x.shape).astype(np.float32) for p, x in shapes(name, num_classes).items()}
    return unflatten(flat)


def compiled(name, variables, images, **options):
    model = MODELS[name] if name in MODELS else create_model(name, 7)
    forward = jax.jit(lambda variables: model.apply(variables, images, **options))
    return forward.lower(variables).compile(compiler_options=QUICK)


def assert_same_tree(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


def assert_same_permutations(found, wanted):
    assert found.keys() == wanted.keys()
    for name, order in found.items():
        np.testing.assert_array_equal(order, wanted[name], err_msg=name)


def inner_product(a, b):
    """Of all parameters, in float64."""
    a, b = flatten(a["params"]), flatten(b["params"])
    return sum(float(np.vdot(a[p].astype(np.float64), b[p].astype(np.float64))) for p in a)


def changed(variables, **leaves):
    """The same tree with other leaves; "__" in the keywords stands for "/"."""
    flat = flatten(variables)
    return unflatten(flat | {path.replace("__", "/"): leaf for path, leaf in leaves.items()})


# The stages of resnet20 and where the first one's 16 channels begin in their streams.
STREAM = ((1, 0), (2, 8), (3, 24))
# With more than ten blocks in a stage, too; the spaces of all models are in test_spaces.py.
SLOW_MODELS = ("bottlenecks", "resnet18", "resnet50", "resnet101", "densenet121")


@pytest.mark.parametrize(
    "name",
    [
        *("densenet", "resnet20"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_MODELS),
    ],
)
def test_permuted_network_is_the_same_function_and_is_recovered(name, rng):
    variables = network(name, seed=0)
    planted = random_permutations(find_spaces(variables), seed=1)
    permuted = permute_variables(variables, planted)
    moved = flatten(permuted)
    for path, leaf in flatten(variables).items():
        assert path == "params/head/bias" or not np.array_equal(leaf, moved[path])

    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    forward = compiled(name, variables, images)
    logits, same = forward(variables), forward(permuted)
    size = float(jnp.abs(logits).max())
    np.testing.assert_allclose(same, logits, rtol=0, atol=1e-5 * size)
    # With statistics that stay behind, as in known implementations, it is another function.
    forgotten = forward({**permuted, "batch_stats": variables["batch_stats"]})
    assert float(jnp.abs(forgotten - logits).max()) > 1e-3 * size

    found = weight_matching(variables, permuted)
    assert_same_permutations(found, invert_permutations(planted))
    assert_same_tree(permute_variables(permuted, found), variables)


@pytest.mark.parametrize("seed", range(20))
def test_planted_permutations_are_recovered_whatever_the_seeds(seed):
    variables = network("resnet20", seed)
    planted = random_permutations(find_spaces(variables), seed + 100)
    found = weight_matching(variables, permute_variables(variables, planted), seed=seed + 200)
    assert_same_permutations(found, invert_permutations(planted))


def test_planted_permutations_are_recovered_in_the_presence_of_noise_and_other_heads():
    variables = network("resnet20", 0)
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.1 * x.std() * rng.normal(size=x.shape), variables)
    planted = random_permutations(find_spaces(variables), 2)
    other_head = permute_variables(noisy, planted)
    other_head["params"]["head"] = network("resnet20", 3, num_classes=2)["params"]["head"]
    found = weight_matching(without_head(variables), without_head(other_head))
    assert_same_permutations(found, invert_permutations(planted))


@pytest.mark.parametrize("start", STARTS)
def test_identical_models_keep_their_order(start):
    variables = network("resnet20", 0)
    identity = identity_permutations(find_spaces(variables))
    assert_same_permutations(weight_matching(variables, variables, start=start), identity)


@pytest.mark.parametrize("start", STARTS)
def test_equal_units_are_not_exchanged_for_ever(start):
    """All units of a space equal, and all units of another dead, in two different models."""
    models = []
    for seed in range(2):
        flat = flatten(network("resnet20", seed))
        for path, leaf in flat.items():
            if "layer1/1" in path:
                flat[path] = np.full_like(leaf, 0.1 + seed)
            if "layer2/1/conv1" in path or "layer2/1/bn1" in path:
                flat[path] = np.zeros_like(leaf)
        models.append(unflatten(flat))
    found = [weight_matching(*models, start=start, max_sweeps=n) for n in (50, 51)]
    assert_same_permutations(*found)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "name",
    [
        *("resnet20", "densenet"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "densenet121")),
    ],
)
def test_weight_matching_ends_where_no_exchange_of_two_units_gains(name, start, rng):
    reference, model = without_head(network(name, 0)), without_head(network(name, 1))
    before = inner_product(reference, model)
    found = weight_matching(reference, model, start=start)
    matched = permute_variables(model, found)
    reached = inner_product(reference, matched)
    assert reached > before
    flat, wanted = flatten(matched), flatten(reference)
    for space in find_spaces(matched)[::5]:
        for _ in range(20):
            one, other = rng.choice(space.size, 2, replace=False)
            gain = 0.0
            for place in space.places:
                if place.path.startswith("params/"):
                    a, b = (
                        np.moveaxis(x[place.path], place.axis, 0)[place.positions[[one, other]]]
                        for x in (wanted, flat)
                    )
                    gain -= float(np.vdot(a[0] - a[1], (b[0] - b[1]).astype(np.float64)))
            assert gain < 1e-4


def test_seed_and_start_decide_which_optimum_is_found():
    reference, model = network("resnet20", 0), network("resnet20", 1)

    def reached(**options):
        found = weight_matching(reference, model, **options)
        return inner_product(reference, permute_variables(model, found))

    published = [reached(seed=seed, start="identity") for seed in range(3)]
    assert reached(seed=2, start="identity") == published[2]
    assert len(set(published)) > 1
    assert reached() not in published
    assert reached(max_sweeps=1, start="identity") < published[0]
    assert reached(tolerance=1e9, start="identity") == inner_product(reference, model)


def test_low_precision_models_are_matched_in_float32():
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network("resnet20", 0))
    planted = random_permutations(find_spaces(variables), 1)
    permuted = permute_variables(variables, planted)
    assert {leaf.dtype for leaf in jax.tree.leaves(permuted)} == {jnp.dtype(jnp.bfloat16)}
    found = weight_matching(variables, permuted)
    assert_same_permutations(found, invert_permutations(planted))


def test_permuting_under_jit_and_by_numpy_is_the_same():
    variables = network("densenet", 0)
    spaces = find_spaces(variables)
    permutations = random_permutations(spaces, 1)
    wanted = permute_variables(variables, permutations)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(wanted))
    on_device = permute_variables(jax.tree.map(jnp.asarray, variables), permutations)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
    assert_same_tree(on_device, wanted)
    assert_same_tree(jax.jit(permute_variables)(variables, permutations), wanted)
    only_variables = jax.jit(lambda v: permute_variables(v, permutations, spaces))
    assert_same_tree(only_variables(variables), wanted)
    frozen = permute_variables(flax.core.freeze(variables), permutations)
    assert_same_tree(frozen, wanted)


def test_permutations_undo_follow_and_leave_out():
    variables = network("resnet20", 0)
    spaces = find_spaces(variables)
    first, then = random_permutations(spaces, 1), random_permutations(spaces, 2)
    one_after_another = permute_variables(permute_variables(variables, first), then)
    assert_same_tree(
        permute_variables(variables, compose_permutations(first, then)), one_after_another
    )
    undone = compose_permutations(first, invert_permutations(first))
    assert_same_permutations(undone, identity_permutations(spaces))
    assert_same_tree(permute_variables(variables, {}), variables)
    only = permute_variables(variables, {"conv1": first["conv1"]})
    moved = [p for p, x in flatten(only).items() if not np.array_equal(x, flatten(variables)[p])]
    stem = next(space for space in spaces if space.name == "conv1")
    assert set(moved) == {place.path for place in stem.places}


def test_random_permutations_follow_the_seed():
    spaces = find_spaces(network("resnet20", 0))
    assert_same_permutations(random_permutations(spaces, 4), random_permutations(spaces, 4))
    others = random_permutations(spaces, 5)
    for name, order in random_permutations(spaces, 4).items():
        assert sorted(order) == list(range(len(order)))
        assert not np.array_equal(order, others[name])


def activations(name, variables, images):
    """By space, (samples, size)."""
    spaces = find_spaces(variables)
    modules = {tap.module for space in spaces for tap in space.taps}
    forward = compiled(
        name,
        variables,
        images,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: "/".join(module.path) in modules,
    )
    outputs = flatten(forward(variables)[1]["intermediates"])
    found = {}
    for space in spaces:
        samples = []
        for tap in space.taps:
            (output,) = outputs[f"{tap.module}/__call__"]
            output = np.asarray(output, np.float64)[..., tap.positions].reshape(-1, space.size)
            samples.append(np.maximum(output, 0) if tap.activation else output)
        found[space.name] = np.concatenate(samples)
    return found


def correlation(a, b):
    """Of the columns; 0 where one of them is constant."""
    a, b = (x - x.mean(axis=0) for x in (a, b))
    scale = np.outer(*(np.linalg.norm(x, axis=0) for x in (a, b)))
    return np.where(scale > 0, a.T @ b / np.where(scale > 0, scale, 1), 0)


@pytest.mark.parametrize("name", ["resnet20", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_activation_matching_recovers_planted_permutations(name, rng):
    variables = network(name, 0)
    planted = random_permutations(find_spaces(variables), 1)
    images = rng.normal(size=(8, 64, 64, 3)).astype(np.float32)
    reference = activations(name, variables, images)
    model = activations(name, permute_variables(variables, planted), images)
    correlations, distinct = {}, {}
    for space in reference:
        correlations[space] = correlation(reference[space], model[space])
        among = correlation(reference[space], reference[space])
        # Units that no image wakes cannot be told from each other, nor those that only one place
        # of one image does.
        distinct[space] = (np.diag(among) > 0.5) & (np.sum(among > 1 - 1e-6, axis=0) == 1)
    assert sum(map(np.sum, distinct.values())) > 0.85 * sum(map(len, distinct.values()))
    found, wanted = activation_matching(correlations), invert_permutations(planted)
    for space, units in distinct.items():
        np.testing.assert_array_equal(found[space][units], wanted[space][units], err_msg=space)


def test_activation_matching_leaves_what_is_no_better_elsewhere():
    correlations = np.eye(4)
    correlations[2, 2] = 0  # A dead unit.
    correlations[:2, :2] = 1  # Two equal units, up to rounding.
    correlations[0, 1] += 1e-9
    found = activation_matching({"conv1": correlations, "conv2": np.eye(3)[[2, 0, 1]]})
    assert_same_permutations(found, {"conv1": np.arange(4), "conv2": np.array([2, 0, 1])})


def test_activation_matching_maximises_the_sum(rng):
    matrix = rng.normal(size=(5, 5))
    sums = {
        order: sum(matrix[i, j] for i, j in enumerate(order))
        for order in itertools.permutations(range(5))
    }
    (found,) = activation_matching({"conv1": matrix}).values()
    assert tuple(found) == max(sums, key=sums.__getitem__)


@pytest.mark.parametrize("name", ["resnet20", "densenet"])
def test_n_permuted_copies_are_aligned_to_the_first(name):
    variables = network(name, 0)
    spaces = find_spaces(variables)
    planted = [identity_permutations(spaces), *(random_permutations(spaces, i) for i in range(2))]
    copies = [permute_variables(variables, permutations) for permutations in planted]
    aligned = align_to_mean(copies)
    for found, permutations in zip(aligned, planted, strict=True):
        assert_same_permutations(found, invert_permutations(permutations))
    merged = flatten(jax.tree.map(np.asarray, matched_averaging(copies[::-1])))
    for path, leaf in flatten(copies[-1]).items():
        np.testing.assert_allclose(merged[path], leaf, rtol=1e-6, err_msg=path)


def test_no_model_can_be_brought_nearer_to_the_mean_of_the_others():
    parents = [network("resnet20", seed) for seed in range(3)]
    found = align_to_mean(parents, seed=1)
    spaces = find_spaces(parents[0])
    identity = identity_permutations(spaces)
    assert_same_permutations(found[0], identity)
    aligned = [permute_variables(p, f) for p, f in zip(parents, found, strict=True)]
    # Before the search each was matched to those before it only; the first to none.
    for i in range(3):
        one, other = (aligned[j] for j in range(3) if j != i)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, one, other)
        before = inner_product(mean, aligned[i])
        again = weight_matching(mean, aligned[i], start="identity")
        gained = inner_product(mean, permute_variables(aligned[i], again)) - before
        assert 0 <= gained < 1e-4

    def together(models):
        return sum(inner_product(a, b) for a, b in itertools.combinations(models, 2))

    to_first = [weight_matching(parents[0], parent) for parent in parents]
    only_to_first = [permute_variables(p, f) for p, f in zip(parents, to_first, strict=True)]
    assert together(aligned) > together(only_to_first) > together(parents)
    assert_same_permutations(align_to_mean(parents, seed=1)[2], found[2])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_identical_parents_stay_as_they_are(number):
    variables = network("resnet20", 0)
    identity = identity_permutations(find_spaces(variables))
    for found in align_to_mean([variables] * number):
        assert_same_permutations(found, identity)
    weights = [None, [1 / number] * number]
    for merged in (matched_averaging([variables] * number, w) for w in weights):
        for path, leaf in flatten(merged).items():
            wanted = flatten(variables)[path]
            assert leaf.dtype == wanted.dtype
            np.testing.assert_allclose(leaf, wanted, rtol=3e-7, err_msg=path)


def test_two_models_are_aligned_as_by_weight_matching():
    first, second = network("resnet20", 0), network("resnet20", 1)
    _, found = align_to_mean([first, second], seed=5)
    assert_same_permutations(found, weight_matching(first, second, seed=5))


def test_matched_averaging_is_the_weighted_mean_in_the_firsts_order():
    first, second = network("resnet20", 0), network("resnet20", 1)
    shuffled = permute_variables(second, random_permutations(find_spaces(second), 2))
    for weights in (None, [0.25, 0.75]):
        merged, same = (matched_averaging([first, x], weights) for x in (second, shuffled))
        for path, leaf in flatten(merged).items():
            np.testing.assert_allclose(flatten(same)[path], leaf, rtol=1e-6, atol=1e-7)
    only_first = matched_averaging([first, second], [1.0, 0.0])
    assert_same_tree(only_first, first)
    # The stem is matched first, and by nothing but its own kernel and batch norm.
    units = [
        np.concatenate(
            [p["conv1"]["kernel"].reshape(-1, 16), [p["bn1"]["scale"]], [p["bn1"]["bias"]]]
        )
        for p in (first["params"], second["params"])
    ]
    norms = [
        np.stack(
            [
                p[f"layer{i}"][str(j)]["bn2"][x][extra : extra + 16]
                for i, extra in STREAM
                for j in range(3)
                for x in ("scale", "bias")
            ]
        )
        for p in (first["params"], second["params"])
    ]
    a, b = (np.concatenate(pair) for pair in zip(units, norms, strict=True))
    order = linear_sum_assignment(a.T @ b, maximize=True)[1]
    wanted = first["params"]["conv1"]["kernel"] + second["params"]["conv1"]["kernel"][..., order]
    found = matched_averaging([first, second])["params"]["conv1"]["kernel"]
    np.testing.assert_allclose(found, wanted / 2, rtol=1e-6, atol=1e-7)


def test_matched_averaging_takes_no_negative_weights():
    parents = [network("resnet20", seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"the weight -0\.5 is negative; numbers from 0"):
        matched_averaging(parents, [1.5, -0.5])


def test_matched_averaging_matches_by_what_produces_units_alone():
    """Another head changes nothing but the head, where weight matching takes it into account."""
    first, second = network("resnet20", 0), network("resnet20", 1)
    kernel = 100 * network("resnet20", 2)["params"]["head"]["kernel"]
    other = changed(second, params__head__kernel=kernel)
    merged, with_other = (flatten(matched_averaging([first, x])) for x in (second, other))
    stream = find_spaces(first)[-1].name
    for path, leaf in merged.items():
        if path != "params/head/kernel":
            np.testing.assert_array_equal(leaf, with_other[path], err_msg=path)
    assert not np.array_equal(
        weight_matching(first, second)[stream], weight_matching(first, other)[stream]
    )


METHODS = {
    "weight_matching": lambda a, b: weight_matching(a, b),
    "align_to_mean": lambda a, b: align_to_mean([a, b]),
    "matched_averaging": lambda a, b: matched_averaging([a, b]),
}


@pytest.mark.parametrize("method", METHODS)
def test_parents_that_do_not_fit(method):
    merge, good = METHODS[method], network("resnet20", 0)
    kernel = good["params"]["layer1"]["0"]["conv1"]["kernel"]
    path = "params__layer1__0__conv1__kernel"
    broken = kernel.copy()
    broken[0, 0, 1, 2] = np.nan
    for other, message in [
        (network("resnet32", 0), r"layer1/3/bn1/bias: absent in parent 0, shape .* parent 1"),
        (
            network("resnet20", 0, num_classes=3),
            r"head/bias: shape \(7,\) in parent 0, shape \(3,\) in parent 1",
        ),
        (changed(good, **{path: kernel[..., :8]}), r"conv1/kernel: .* \(3, 3, 16, 8\) in parent 1"),
        (changed(good, **{path: kernel.astype(int)}), r"conv1/kernel in parent 1 is of dtype int"),
        (changed(good, **{path: broken}), "layer1/0/conv1/kernel in parent 1: 1 of 2304 numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge(good, other)
    with pytest.raises(ValueError, match="known for ResNet"):
        merge({"params": {"fc": {"kernel": kernel}}}, {"params": {"fc": {"kernel": kernel}}})
    with pytest.raises(ValueError, match='collection "params"'):
        merge(good["params"], good["params"])


def test_arguments_that_make_no_sense():
    variables = network("resnet20", 0)
    with pytest.raises(ValueError, match="start is 'random'; one of forward, identity is wanted"):
        weight_matching(variables, variables, start="random")
    with pytest.raises(ValueError, match=r"the weights sum to 0\.9"):
        matched_averaging([variables, variables], [0.5, 0.4])
    for empty in (align_to_mean, matched_averaging):
        with pytest.raises(ValueError, match="0 parents"):
            empty([])
    for permutations, message in [
        ({"conv7": np.arange(16)}, "no hidden units named 'conv7'; it has conv1, layer1/0/conv1"),
        ({"conv1": np.arange(8)}, r"of conv1 has shape \(8,\); \(16,\) is wanted"),
        ({"conv1": np.zeros(16, int)}, "of conv1 is not an order of the numbers 0 to 15"),
    ]:
        with pytest.raises(ValueError, match=message):
            permute_variables(variables, permutations)
    with pytest.raises(ValueError, match="params/head/kernel is absent"):
        permutations = random_permutations(find_spaces(variables), 0)
        permute_variables(without_head(variables), permutations, find_spaces(variables))
    for matrix, message in [
        (np.zeros((3, 4)), r"correlations of conv1: shape \(3, 4\)"),
        (np.full((3, 3), np.nan), "correlations of conv1 hold NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            activation_matching({"conv1": matrix})
