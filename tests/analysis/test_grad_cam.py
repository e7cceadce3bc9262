"""Grad-CAM: its gradient against finite differences, its maps against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config, tiny_network
from helpers.random_models import variables_of
from helpers.tiny_config import ARCHITECTURE

from medmerge_jax.analysis.grad_cam import grad_cam, gradients
from medmerge_jax.models import create_model
from medmerge_jax.models.feature_maps import FeatureMap, feature_maps, list_feature_maps
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing


@pytest.fixture
def variables():
    tiny_network.register_architecture()
    return variables_of(0, 3, tiny_network.ARCHITECTURE)


def test_the_gradient_is_that_of_finite_differences(variables, rng):
    """In float64: each number of the convolution's output is moved, and the rest run by hand."""
    with jax.enable_x64(True):
        network = Network(create_model(tiny_network.ARCHITECTURE, 3, jnp.float64))
        double = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
        images = rng.normal(size=(2, 4, 4, 3))
        layer = FeatureMap("conv", (4, 4, 8))
        found = jax.device_get(
            gradients(network, layer, double, images, np.array([2, -1], np.int32))
        )
    gradient, maps, classes, logits = found
    assert gradient.dtype == np.float64

    def rest(features):
        norm, stats = double["params"]["norm"], double["batch_stats"]["norm"]
        scaled = (features - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        pooled = np.maximum(scaled * norm["scale"] + norm["bias"], 0).mean(axis=(0, 1))
        head = double["params"]["head"]
        return pooled @ head["kernel"] + head["bias"]

    for image in range(2):
        np.testing.assert_allclose(rest(maps[image]), logits[image], rtol=1e-6)
    assert classes.tolist() == [2, np.argmax(logits[1])]
    step = 1e-6
    for image, place in [(0, (1, 2, 3)), (1, (0, 0, 0)), (1, (3, 1, 7)), (0, (2, 2, 5))]:
        moved = []
        for sign in (1, -1):
            features = maps[image].copy()
            features[place] += sign * step
            moved.append(rest(features)[classes[image]])
        slope = (moved[0] - moved[1]) / (2 * step)
        assert gradient[image][place] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_map_is_the_sum_of_channels_by_their_mean_gradients(variables, rng):
    network = Network(create_model(tiny_network.ARCHITECTURE, 3), Preprocessing(16))
    layer = list_feature_maps(tiny_network.ARCHITECTURE, 16)[-1]
    pixels = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    found = grad_cam(network, variables, layer, pixels, 1)
    gradient, maps, *_ = gradients(network, layer, variables, pixels, np.ones(3, np.int32))
    for image in range(3):
        wanted = np.zeros((16, 16))
        for channel in range(8):
            weight = np.mean(gradient[image, :, :, channel])
            wanted += weight * np.asarray(maps[image, :, :, channel])
        np.testing.assert_allclose(found.maps[image], np.maximum(wanted, 0), atol=1e-6)
    assert found.classes.tolist() == [1, 1, 1]
    plain = network.model.apply(variables, network.normalise(jnp.asarray(pixels)))
    np.testing.assert_allclose(found.logits, plain, rtol=1e-5, atol=1e-6)
    alone = grad_cam(network, variables, layer, pixels[1:2], 1)
    np.testing.assert_allclose(alone.maps[0], found.maps[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"),
    [(ARCHITECTURE, 16), pytest.param("densenet121", 64, marks=pytest.mark.slow)],
)
def test_of_the_last_maps_it_is_their_sum_by_the_head(name, size, rng):
    """What follows is a mean and a linear head: class activation mapping (Zhou et al., 2016)."""
    tiny_config.register_architecture()
    variables = variables_of(0, 3, name)
    network = Network(create_model(name, 3), Preprocessing(size))
    layer = list_feature_maps(name, size)[-1]
    pixels = rng.integers(0, 256, (2, size, size, 3), np.uint8)
    found = grad_cam(network, variables, layer, pixels)
    (maps,) = feature_maps(network, [layer], variables, jnp.asarray(pixels))
    height, width, _ = layer.shape
    for image, of_class in enumerate(found.classes):
        weights = variables["params"]["head"]["kernel"][:, of_class] / (height * width)
        wanted = np.maximum(np.asarray(maps[image]) @ weights, 0)
        np.testing.assert_allclose(found.maps[image], wanted, rtol=1e-3, atol=1e-4 * wanted.max())
    logits = np.asarray(maps).mean(axis=(1, 2)) @ variables["params"]["head"]["kernel"]
    assert (
        found.classes.tolist()
        == np.argmax(logits + variables["params"]["head"]["bias"], 1).tolist()
    )
