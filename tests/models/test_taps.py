import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick
from helpers.torch_reference import reference, state

from medmerge_jax.errors import UserError
from medmerge_jax.merging import flatten
from medmerge_jax.merging.correlation import correlation, covariance
from medmerge_jax.merging.permutations import permute_variables, random_permutations
from medmerge_jax.merging.spaces import find_spaces
from medmerge_jax.models.densenet import DenseNet
from medmerge_jax.models.resnet import CifarResNet
from medmerge_jax.models.taps import collect_moments
from medmerge_jax.weights import variables_from_torch

MODELS = {"resnet": CifarResNet(1, 4), "densenet": DenseNet((1, 2), 4, 8, 4)}


@functools.cache
def parents_of(model):
    """Three."""
    init = jax.jit(model.init)
    return [init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3))) for seed in range(3)]


@pytest.fixture
def images(rng):
    return rng.normal(size=(7, 32, 32, 3)).astype(np.float32)


def moments_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, moments in wanted.items():
        np.testing.assert_array_equal(found[name].num_samples, moments.num_samples)
        scale = np.abs(covariance(moments)).max()
        np.testing.assert_allclose(covariance(found[name]), covariance(moments), atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["resnet20", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_equals_activations_of_pytorch(torch, torchvision, images, name):
    networks = [reference(torch, torchvision, name, 4) for _ in range(2)]
    with torch.no_grad():
        for weights in networks[1].parameters():
            order = torch.randperm(weights.numel())
            weights.copy_(weights.flatten()[order].reshape(weights.shape))
    parents = [variables_from_torch(name, state(network), "the reference") for network in networks]
    spaces = find_spaces(parents[0])
    found = collect_moments(name, parents, spaces, images, 3)

    outputs = []
    for network in networks:
        outputs.append({})
        for path, module in network.named_modules():
            # A copy, as torchvision's next ReLU is in place.
            def keep(module, inputs, out, path=path, into=outputs[-1]):
                into[path.replace(".", "/")] = out.clone()

            module.register_forward_hook(keep)
        with torch.no_grad():
            network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    for space in spaces:
        within = total = 0
        for tap in space.taps:
            maps = [out[tap.module].numpy().transpose(0, 2, 3, 1) for out in outputs]
            units = [m[..., tap.positions].reshape(-1, space.size) for m in maps]
            samples = np.concatenate(units, axis=-1).astype(np.float64)
            samples = np.maximum(samples, 0) if tap.activation else samples
            within = within + len(samples) * np.cov(samples.T, bias=True)
            total += len(samples)
        error = np.linalg.norm(covariance(found[space.name]) - within / total)
        assert error < 1e-4 * np.linalg.norm(within / total), space.name


@pytest.mark.slow  # each size compiles
@pytest.mark.parametrize("kind", MODELS)
def test_batches_of_any_size_give_the_same(images, kind):
    parents = parents_of(MODELS[kind])[:2]
    spaces = find_spaces(parents[0])
    wanted = collect_moments(MODELS[kind], parents, spaces, images, 7)
    for batch_size in (3, 100):
        moments_equal(collect_moments(MODELS[kind], parents, spaces, images, batch_size), wanted)


@pytest.mark.parametrize("kind", some_quick(MODELS, "resnet"))
def test_units_in_another_order_are_so_in_the_correlation(images, kind):
    a = parents_of(MODELS[kind])[0]
    spaces = find_spaces(a)
    orders = random_permutations(spaces, 0)
    moments = collect_moments(MODELS[kind], [a, permute_variables(a, orders)], spaces, images, 4)
    for space in spaces:
        found = correlation(moments[space.name])
        own = found[: space.size, : space.size]
        np.testing.assert_allclose(
            found[: space.size, space.size :], own[:, orders[space.name]], atol=1e-4
        )


@pytest.mark.slow
def test_heads_are_not_used_and_parents_not_changed(images):
    model = MODELS["resnet"]
    a, b, _ = parents_of(model)
    spaces = find_spaces(a)
    wanted = collect_moments(model, [a, b], spaces, images)
    before = jax.tree.map(np.array, b)
    headless = {**a, "params": {k: x for k, x in a["params"].items() if k != "head"}}
    c = parents_of(CifarResNet(1, 9))[0]
    more = {**b, "params": {**b["params"], "head": c["params"]["head"]}}
    found = collect_moments(CifarResNet(1, 0), [headless, more], spaces, images)
    moments_equal(found, wanted)
    for path, leaf in flatten(before).items():
        np.testing.assert_array_equal(flatten(b)[path], leaf)


def test_running_statistics_are_in_use(images):
    model = MODELS["resnet"]
    a = parents_of(model)[0]
    (space, *_) = find_spaces(a)
    other = {**a, "batch_stats": jax.tree.map(lambda x: x + 3, a["batch_stats"])}
    first, second = (
        covariance(collect_moments(model, [v], [space], images)[space.name]) for v in (a, other)
    )
    assert (second.diagonal() < first.diagonal()).all()


@pytest.mark.slow
def test_only_the_given_spaces_are_observed(images):
    model = MODELS["resnet"]
    parents = parents_of(model)[:2]
    spaces = find_spaces(parents[0])
    wanted = collect_moments(model, parents, spaces, images)
    found = collect_moments(model, parents, spaces[1:3], images)
    moments_equal(found, {space.name: wanted[space.name] for space in spaces[1:3]})
    assert found[spaces[1].name].comoment.shape == (2 * spaces[1].size,) * 2


def test_bad_arguments_are_refused(images):
    a = parents_of(MODELS["resnet"])[0]
    spaces = find_spaces(a)
    for parents, x, size, found in (
        ([], images, 4, "0 parents"),
        ([a], images[:0], 4, "0 images"),
        ([a], images, 0, "0 at a time"),
    ):
        with pytest.raises(ValueError, match=found):
            collect_moments(MODELS["resnet"], parents, spaces, x, size)
    with pytest.raises(UserError, match="resnet21"):
        collect_moments("resnet21", [a], spaces, images)
