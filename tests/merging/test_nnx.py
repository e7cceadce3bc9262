"""The way of a flax.nnx user, as in the documentation of `merge_kernels`."""

import jax
import numpy as np
from flax import nnx

from medmerge_jax.merging import init_coefficients, merge_kernels


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List(
            [nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Conv(4, 4, (3, 3), rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, images):
        x = images
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(self.norm(x, use_running_average=True).mean(axis=(1, 2)))


def merge_into(model, parents, coefficient):
    states = [nnx.to_pure_dict(nnx.state(parent, nnx.Param)) for parent in parents]
    coefficients = jax.tree.map(lambda w: w * 2 * coefficient, init_coefficients(states[0]))
    merged = merge_kernels(states, coefficients)
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, merged)
    nnx.update(model, state)


def test_nnx_models_with_lists_of_layers():
    images = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    b, c, model = (Network(nnx.Rngs(seed)) for seed in range(3))
    for parent in (b, c):
        parent.head.kernel[...] = model.head.kernel[...]
    # Biases are zero in fresh parents and batch norms equal, so only the kernels decide.
    for coefficient, parent in [(1.0, b), (0.0, c)]:
        merge_into(model, (b, c), coefficient)
        np.testing.assert_allclose(model(images), parent(images), rtol=1e-5, atol=1e-6)
    merge_into(model, (b, c), 0.5)
    mean = (b.blocks[1].kernel[...] + c.blocks[1].kernel[...]) / 2
    np.testing.assert_array_equal(model.blocks[1].kernel[...], mean)
