"""Batches with augmented images."""

import jax
import numpy as np
import pytest
from helpers.parameters import some_quick

from medmerge_jax.images.augment import POLICIES, augment, epoch_key
from medmerge_jax.training.augmentation import _augmented, augmented_batch


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    return {
        "inputs": images,
        "labels": np.array([0, 1, 2, 1], np.int32),
        "indices": np.array([7, 0, 3, 90], np.int32),
    }


@pytest.mark.parametrize("policy", some_quick(POLICIES, "minimal"))
def test_only_images_change_and_each_by_its_number(batch, policy):
    policy, key = POLICIES[policy], epoch_key(0, 3)
    found = augmented_batch(policy, None, batch, key)
    assert {**found, "inputs": 0} == {**batch, "inputs": 0}
    wanted = augment(policy, batch["inputs"], batch["indices"], key)
    np.testing.assert_array_equal(found["inputs"], wanted)
    assert not np.array_equal(found["inputs"], batch["inputs"])


def test_parts_of_a_batch_are_augmented_as_the_whole(batch):
    policy, key = POLICIES["minimal"], epoch_key(0, 3)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in ([0, 1], [2, 3])]
    found = augmented_batch(policy, None, tuple(parts), key)
    whole = augmented_batch(policy, None, batch, key)
    np.testing.assert_array_equal(
        np.concatenate([part["inputs"] for part in found]), whole["inputs"]
    )


def test_an_epoch_does_not_compile_anew(batch):
    augmented_batch(POLICIES["minimal"], None, batch, epoch_key(0, 0))
    compiled = _augmented._cache_size()
    for epoch in range(1, 4):
        augmented_batch(POLICIES["minimal"], None, batch, epoch_key(0, epoch))
    assert _augmented._cache_size() == compiled


def test_features_are_refused(batch):
    batch["inputs"] = jax.numpy.asarray(batch["inputs"], jax.numpy.float32)
    with pytest.raises(ValueError, match="uint8 images are wanted; features were"):
        augmented_batch(POLICIES["minimal"], None, batch, epoch_key(0, 0))
