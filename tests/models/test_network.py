"""What a network is given is what its weights were trained on."""

import jax.numpy as jnp
import numpy as np
import pytest

from medmerge_jax.models import LinearHead, get_spec
from medmerge_jax.models.network import Network


@pytest.fixture
def network():
    return Network(LinearHead(2), get_spec("resnet18").preprocessing)


def test_images_are_normalised_as_torchvision_does(torch, transforms, network, rng):
    images = rng.integers(0, 256, (3, 5, 4, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    normalise = transforms.Normalize(network.preprocessing.mean, network.preprocessing.std)
    wanted = np.stack(
        [normalise(transforms.functional.to_tensor(image)).permute(1, 2, 0) for image in images]
    )
    found = network.normalise(jnp.asarray(images))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_black_and_white_are_the_published_numbers(network):
    """Without PyTorch too: (0 − 0.485) / 0.229 and (1 − 0.406) / 0.225."""
    black, white = (
        np.asarray(network.normalise(jnp.full((1, 1, 1, 3), value, jnp.uint8))).ravel()
        for value in (0, 255)
    )
    assert black[0] == pytest.approx(-2.117904, abs=1e-5)
    assert white[2] == pytest.approx(2.64, abs=1e-5)


def test_what_is_no_image_stays_as_it_is(network):
    features = jnp.arange(6.0).reshape(2, 3)
    assert network.normalise(features) is features
