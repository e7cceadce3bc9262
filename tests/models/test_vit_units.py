"""The hidden units of vision transformers: what can be put in another order, and is found again."""

import itertools

import jax
import numpy as np
import pytest

import medmerge_jax as mm
from medmerge_jax.merging import alignment, correlation, permutations
from medmerge_jax.merging.spaces import Space
from medmerge_jax.merging.trees import flatten, unflatten
from medmerge_jax.models import create_model, get_spec, vit
from medmerge_jax.models.taps import collect_moments

TINY = "deit_tiny_patch16_224"
WIDTH, DEPTH, HEADS = 24, 2, 3
KINDS = ("stream", "units of perceptrons", "whole heads", "units inside heads", "all")


@pytest.fixture(scope="module")
def network():
    return vit.VisionTransformer(WIDTH, DEPTH, HEADS, num_classes=5, grid=2)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(network, images):
    rng = np.random.default_rng(1)
    shapes = flatten(jax.eval_shape(network.init, jax.random.key(0), images))
    # No two units alike, no norm of ones, and scores far from equal.
    return unflatten(
        {path: rng.normal(0.3, 0.5, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    )


@pytest.fixture(scope="module")
def spaces(variables):
    return vit.spaces(HEADS, variables)


@pytest.fixture(scope="module")
def logits(network, images):
    return jax.jit(lambda variables: network.apply(variables, images))


def planted(spaces, kind):
    """Random orders of one kind; all others are as they are."""
    orders = permutations.random_permutations(spaces, seed=3)
    of_heads = {name: order for name, order in orders.items() if "/attn/" in name}
    units, each = np.arange(WIDTH), WIDTH // HEADS
    match kind:
        case "stream":
            return {"patch_embed/proj": orders["patch_embed/proj"]}
        case "units of perceptrons":
            return {name: order for name, order in orders.items() if name.endswith("fc1")}
        case "whole heads":
            return {n: order // each * each + units % each for n, order in of_heads.items()}
        case "units inside heads":
            return {n: units // each * each + order % each for n, order in of_heads.items()}
    return orders


@pytest.mark.parametrize("distilled", [False, True])
def test_every_axis_of_hidden_units_is_in_one_space(images, distilled):
    network = vit.VisionTransformer(WIDTH, DEPTH, HEADS, 5, grid=2, distilled=distilled)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    counts = {
        path: [np.zeros(n, int) for n in leaf.shape] for path, leaf in flatten(shapes).items()
    }
    for space in vit.spaces(HEADS, shapes):
        assert len(space.taps) >= 1
        for place in space.places:
            np.add.at(counts[place.path][place.axis], place.positions, 1)
    hidden = {
        path: tuple(axis for axis, count in enumerate(axes) if count.any())
        for path, axes in counts.items()
    }
    for path, axes in counts.items():
        assert all(np.all(count == 1) for axis, count in enumerate(axes) if axis in hidden[path])
        last = len(axes) - 1
        wanted = (last - 1, last) if path.endswith("/kernel") else (last,)
        wanted = {"params/patch_embed/proj/kernel": (3,), "params/head/kernel": (0,)}.get(
            path, wanted
        )
        assert hidden[path] == (() if path == "params/head/bias" else wanted), path


@pytest.mark.parametrize("kind", KINDS)
def test_orders_of_each_kind_keep_the_function_and_are_found_again(variables, spaces, logits, kind):
    orders = planted(spaces, kind)
    permuted = mm.merging.permute_variables(variables, orders, spaces)
    layer = "attn/qkv" if "heads" in kind else "mlp/fc1"
    kernels = [flatten(v)[f"params/blocks/1/{layer}/kernel"] for v in (variables, permuted)]
    assert not np.array_equal(*kernels)
    before, after = logits(variables), logits(permuted)
    scale = float(np.abs(before).max())
    np.testing.assert_allclose(after, before, atol=1e-5 * scale)
    for start in alignment.STARTS:
        found = alignment.weight_matching(variables, permuted, spaces=spaces, start=start)
        inverse = permutations.invert_permutations(orders)
        wanted = permutations.identity_permutations(spaces) | inverse
        assert all(np.array_equal(found[name], order) for name, order in wanted.items())


def test_activations_are_matched_by_head_too(network, variables, spaces, images):
    orders = permutations.random_permutations(spaces, seed=4)
    permuted = mm.merging.permute_variables(variables, orders, spaces)
    moments = collect_moments(network, [variables, permuted], spaces, images)
    blocks = {}
    for name, of_units in moments.items():
        matrix = correlation(of_units)
        size = len(matrix) // 2
        blocks[name] = matrix[:size, size:]
    found = alignment.activation_matching(blocks, spaces)
    for name, order in permutations.invert_permutations(orders).items():
        np.testing.assert_array_equal(found[name], order, err_msg=name)


def test_heads_and_their_units_are_assigned_together(rng):
    """The exact best, against all orders that keep three heads of two units together."""
    spaces = [Space(name, 6, (), (), heads=3, attention="attn") for name in ("qk", "v")]
    gains = {space.name: rng.normal(size=(6, 6)) for space in spaces}
    found = alignment.activation_matching(gains, spaces)

    def total(orders):
        return sum(gains[name][np.arange(6), order].sum() for name, order in orders.items())

    best = -np.inf
    turns = list(itertools.product([(0, 1), (1, 0)], repeat=3))
    for heads in itertools.permutations(range(3)):
        for of_qk, of_v in itertools.product(turns, repeat=2):
            orders = {
                name: np.concatenate(
                    [2 * j + np.array(turn) for j, turn in zip(heads, within, strict=True)]
                )
                for name, within in (("qk", of_qk), ("v", of_v))
            }
            best = max(best, total(orders))
    assert total(found) == pytest.approx(best, abs=1e-12)


def test_orders_that_take_heads_apart_are_refused(variables, spaces):
    orders = permutations.identity_permutations(spaces)
    name, other = "blocks/0/attn/qk", "blocks/0/attn/v"
    apart = np.roll(orders[name], 1)
    with pytest.raises(ValueError, match=f"permutation of {name} takes units of its 3 heads apart"):
        mm.merging.permute_variables(variables, {name: apart}, spaces)
    swapped = np.roll(orders[name], WIDTH // HEADS)
    with pytest.raises(ValueError, match=f"permutations of {name} and {other} exchange different"):
        mm.merging.permute_variables(variables, {name: swapped}, spaces)


@pytest.mark.parametrize("method", ["zipit", "matched_averaging"])
def test_what_takes_units_one_by_one_is_refused(method):
    with pytest.raises(ValueError, match="3 heads, which can only be exchanged whole, and this"):
        mm.merge(method, TINY, [])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weight_matching", "activation_matching"])
def test_a_deit_merged_with_a_permuted_copy_of_itself_keeps_its_function(rng, method):
    images = rng.normal(size=(4, 224, 224, 3)).astype(np.float32)
    model = create_model(TINY, 5)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    spaces = get_spec(TINY).spaces(variables)
    permuted = mm.merging.permute_variables(
        variables, permutations.random_permutations(spaces, seed=5), spaces
    )
    logits = jax.jit(lambda variables: model.apply(variables, images))
    before, scale = logits(variables), float(np.abs(logits(variables)).max())
    merged = mm.merge(method, TINY, (variables, permuted), images)
    np.testing.assert_allclose(logits(merged), before, atol=1e-5 * scale)
    mean = mm.merge("uniform", TINY, (variables, permuted))
    assert float(np.abs(logits(mean) - before).max()) > 0.01 * scale
