"""The smallest studies that train: drawn images and a network of one layer."""

import ml_collections
import pytest
from helpers import tiny_config, tiny_network

from medmerge_jax.config import default_evaluate_on


@pytest.fixture(scope="package")
def study_cache(tmp_path_factory):
    """A cache folder for all studies of these tests: they decode and compile the same."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="package")
def make_config(study_cache):
    """A config of a study by its name, and other values of fields."""

    def make(recipe, **values):
        config = tiny_config.get_config()
        tiny_network.register_architecture()
        config.architecture, config.recipe = tiny_network.ARCHITECTURE, recipe
        config.grid.learning_rates = (1e-1, 1e-2)
        config.grid.augmentations = ("none",)
        config.grid.warmup_augmentation = "none"
        config.fgg.epochs = 5
        config.fgg.learning_rate = 1e-2
        config.soup.metric = "loss"
        config.soup.num_images = 16
        elsewhere = default_evaluate_on()
        elsewhere.data.kind, elsewhere.data.synthetic.counts = "synthetic", (4, 4, 8)
        elsewhere.data.synthetic.appearance = 3
        with config.unlocked():
            config.evaluate_on = ml_collections.ConfigDict({"elsewhere": elsewhere})
        config.update_from_flattened_dict(values)
        return config

    return make
