"""Feature maps: which there are, and that they are what the network computes."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from helpers.random_models import variables_of
from helpers.tiny_config import ARCHITECTURE

from medmerge_jax.merging.spaces import find_spaces
from medmerge_jax.models import create_model
from medmerge_jax.models.feature_maps import feature_maps, list_feature_maps
from medmerge_jax.models.network import Network


@pytest.mark.parametrize(
    ("name", "first", "last", "blocks"),
    [
        ("resnet20", ("bn1", True), "layer3", ["layer1/0", "layer2", "layer3/2"]),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("resnet50", ("bn1", True), "layer4", ["layer1/2", "layer4/0/downsample"]),
                ("densenet121", ("features/norm0", True), "features", ["features/transition2"]),
            )
        ),
    ],
)
def test_layers_come_in_the_order_in_which_they_return(name, first, last, blocks):
    found = list_feature_maps(name, 64)
    modules = [one.module for one in found]
    tapped = [one for one in found if one.tapped]
    assert (tapped[0].module, tapped[0].relu) == first
    assert modules[-1] == last
    places = [modules.index(block) for block in blocks]
    assert places == sorted(places)
    assert "" not in modules and "head" not in modules
    assert len(set(modules)) == len(modules)


def test_what_is_tapped_is_what_the_spaces_tap():
    variables = variables_of(0)
    taps = {tap.module for space in find_spaces(variables) for tap in space.taps}
    assert {one.module for one in list_feature_maps("resnet20", 32) if one.tapped} == taps


def test_maps_are_the_activations_at_the_taps(rng):
    """Of each block what its own call returns, and after a norm the ReLU that follows."""
    tiny_config.register_architecture()
    variables = variables_of(0, 0, ARCHITECTURE)
    network = Network(create_model(ARCHITECTURE, 0))
    wanted = [one for one in list_feature_maps(ARCHITECTURE, 16)
              if one.module in ("bn1", "layer1/0", "layer2/0/bn2", "layer3")]  # fmt: skip
    images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
    found = feature_maps(network, wanted, variables, images)
    seen, order = {}, [one.module for one in wanted]

    def note(call, args, kwargs, context):
        result = call(*args, **kwargs)
        seen["/".join(context.module.path)] = result
        return result

    with nn.intercept_methods(note):
        network.model.apply(variables, images)
    assert order == ["bn1", "layer1/0", "layer2/0/bn2", "layer3"]
    for one, of in zip(wanted, found, strict=True):
        assert of.shape == (2, *one.shape)
        plain = seen[one.module]
        np.testing.assert_allclose(of, nn.relu(plain) if one.relu else plain, rtol=1e-3, atol=1e-4)
    assert [one.relu for one in wanted] == [True, False, False, False]
    np.testing.assert_allclose(found[3].mean(axis=(1, 2)), seen[""], rtol=1e-3, atol=1e-4)
