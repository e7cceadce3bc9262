"""The derivative of the batch norm that is written down is the one that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmerge_jax.models.norm import EPSILON, normalise_batch


def as_defined(x, scale, bias):
    mean = jnp.mean(x, (0, 1, 2))
    var = jnp.mean((x - mean) ** 2, (0, 1, 2))
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias, mean, var


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(3.0, 2.0, size=(2, 3, 3, 4)))
        yield x, jnp.asarray(rng.normal(size=4)), jnp.asarray(rng.normal(size=4))


def scalar(function):
    """All three outputs in one number, none of them linearly."""

    def of(*arguments):
        outputs = function(*arguments)
        return sum(jnp.sum(jnp.sin(out * (i + 1))) for i, out in enumerate(outputs))

    return of


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd, jax.hessian])
def test_derivatives_of_first_and_second_order(arguments, derivative):
    found = derivative(scalar(normalise_batch), argnums=(0, 1, 2))(*arguments)
    wanted = derivative(scalar(as_defined), argnums=(0, 1, 2))(*arguments)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


def test_of_every_example_alone_under_vmap(arguments):
    x, scale, bias = arguments
    each = x[:, None]
    gradient = jax.grad(scalar(normalise_batch))
    found = jax.vmap(gradient, (0, None, None))(each, scale, bias)
    wanted = [gradient(one, scale, bias) for one in each]
    np.testing.assert_allclose(found, jnp.stack(wanted), rtol=1e-12)
