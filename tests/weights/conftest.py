import functools

import jax
import numpy as np
import pytest

from medmerge_jax.models import create_model


def random_variables(name, num_classes=5, seed=0):
    """Variables of a model with random values everywhere; no network is compiled for it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes(name, num_classes)
    )


@functools.cache
def shapes(name, num_classes):
    images = np.zeros((1, 32, 32, 3), np.float32)
    return jax.eval_shape(create_model(name, num_classes).init, jax.random.key(0), images)


@pytest.fixture
def variables():
    """Of a resnet20 with 5 classes."""
    return random_variables("resnet20")


@pytest.fixture
def assert_same():
    def check(found, wanted):
        paths = jax.tree_util.tree_leaves_with_path
        found, wanted = dict(paths(found)), dict(paths(wanted))
        assert found.keys() == wanted.keys()
        for path, leaf in wanted.items():
            assert found[path].dtype == np.float32
            np.testing.assert_array_equal(found[path], leaf, err_msg=str(path))

    return check


@pytest.fixture
def make_variables():
    return random_variables
