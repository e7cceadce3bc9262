"""Centred kernel alignment, against the formulas written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_network
from helpers.random_models import variables_of

from medmerge_jax.analysis.cka import Source, cka, grams
from medmerge_jax.models import create_model
from medmerge_jax.models.feature_maps import list_feature_maps
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing


def unbiased_hsic(k, n_):
    """Song et al., 2012, equation 5."""
    k, n_ = (x - np.diag(np.diag(x)) for x in (k, n_))
    n, one = len(k), np.ones(len(k))
    total = np.trace(k @ n_) + (one @ k @ one) * (one @ n_ @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * one @ k @ n_ @ one) / (n * (n - 3))


def by_hand(batches):
    """Nguyen et al., 2021, equation 3, of batches of features (n, width) of each layer."""
    layers = range(len(batches[0]))
    hsic = np.array([[sum(unbiased_hsic(b[i] @ b[i].T, b[j] @ b[j].T) for b in batches)
                      for j in layers] for i in layers])  # fmt: skip
    return hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))


def products(batches):
    return [np.stack([of @ of.T for of in batch]) for batch in batches]


@pytest.fixture
def batches(rng):
    """Two batches of three layers that are alike in part."""
    made = []
    for n in (7, 6):
        first = rng.normal(size=(n, 20))
        made.append([first, first[:, :5] + 0.5 * rng.normal(size=(n, 5)), rng.normal(size=(n, 3))])
    return made


def test_the_formula(batches):
    found = cka(products(batches))
    np.testing.assert_allclose(found, by_hand(batches), rtol=1e-10)
    np.testing.assert_allclose(found, found.T)
    assert found[0, 1] > 0.2


def test_a_layer_is_like_itself_rotated_moved_and_scaled(batches, rng):
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    shift = rng.normal(size=20)
    changed = [[batch[0], 3 * batch[0] @ rotation + shift] for batch in batches]
    np.testing.assert_allclose(cka(products(changed)), np.ones((2, 2)), rtol=1e-9)
    squeezed = [[batch[0], batch[0] * np.linspace(0.1, 3, 20)] for batch in batches]
    assert cka(products(squeezed))[0, 1] < 0.99


def test_unrelated_layers_are_at_zero_whatever_their_width(rng):
    wide = [[rng.normal(size=(16, 500)), rng.normal(size=(16, 500))] for _ in range(30)]
    assert abs(cka(products(wide))[0, 1]) < 0.05


def test_a_constant_layer_is_like_nothing(batches):
    dead = [[batch[0], np.ones_like(batch[0])] for batch in batches]
    found = cka(products(dead))
    assert found[0, 0] == pytest.approx(1)
    assert np.isnan([found[0, 1], found[1, 0], found[1, 1]]).all()


def test_too_few_images():
    with pytest.raises(ValueError, match="3 images in a batch; 4 or more"):
        cka([np.ones((1, 3, 3))])
    with pytest.raises(ValueError, match="0 batches"):
        cka([])


@pytest.mark.parametrize("batch_size", [11, 8])
def test_layers_of_networks(rng, batch_size):
    """Of 11 images, in batches of 8 at most, which makes 6 and 5."""
    tiny_network.register_architecture()
    network = Network(create_model(tiny_network.ARCHITECTURE, 0), Preprocessing(16))
    layers = list_feature_maps(tiny_network.ARCHITECTURE, 16)
    pixels = rng.integers(0, 256, (11, 16, 16, 3), np.uint8)
    models = [variables_of(seed, 0, tiny_network.ARCHITECTURE) for seed in range(2)]
    found = cka(grams([Source(network, v, layers, pixels) for v in models], batch_size))
    features = []
    for variables in models:
        images = network.normalise(jnp.asarray(pixels))
        _, state = network.model.apply(
            variables, images, capture_intermediates=True, mutable="intermediates"
        )
        taken = state["intermediates"]
        features += [np.asarray(taken[name]["__call__"][0], np.float64).reshape(11, -1)
                     for name in ("conv", "norm")]  # fmt: skip
    parts = [slice(0, 11)] if batch_size == 11 else [slice(0, 6), slice(6, 11)]
    wanted = by_hand([[x[part] - x[part].mean(axis=0) for x in features] for part in parts])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
