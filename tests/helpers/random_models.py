"""Models of random numbers, about as large as in trained ones; nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import medmerge_jax as mm
from medmerge_jax.merging.trees import flatten, unflatten


@functools.cache
def variables_of(seed, num_classes=4, architecture="resnet20"):
    rng = np.random.default_rng(seed)
    model = mm.create_model(architecture, num_classes=num_classes)
    flat = flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    for path, leaf in flat.items():
        if path.endswith("kernel"):
            flat[path] = rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
        elif path.endswith("var"):
            flat[path] = rng.uniform(0.5, 1.5, leaf.shape)
        elif path.endswith("scale"):
            flat[path] = rng.uniform(0.1, 0.5, leaf.shape)
        else:
            flat[path] = rng.normal(0, 0.1, leaf.shape)
    return unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()})
