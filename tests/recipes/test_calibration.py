"""Which images mergers look at and batch norms are calibrated on."""

import numpy as np
import pytest

from medmerge_jax.data import ResidentBatches
from medmerge_jax.data.batches import epoch_order
from medmerge_jax.models import LinearHead, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.recipes.calibration import calibration_batches


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("count", [3, 4, 7, 8, 100])
def test_they_are_the_first_training_images_in_the_order_of_the_seed(rng, count, accumulate):
    """As many as are asked for, or those of the full batches, normalised."""
    pixels, labels = rng.integers(0, 256, (10, 2, 2, 3), np.uint8), np.zeros(10, np.int32)
    preprocessing = get_spec("resnet18").preprocessing
    network = Network(LinearHead(2), preprocessing)
    batches = ResidentBatches(pixels, labels, 4, accumulate=accumulate)
    found = np.concatenate(list(calibration_batches(network, batches, 5, count)))
    rows = epoch_order(10, 5, 0)[: min(count, 8)]
    wanted = (pixels[rows] / 255 - preprocessing.mean) / preprocessing.std
    np.testing.assert_allclose(found, wanted, atol=1e-5)
