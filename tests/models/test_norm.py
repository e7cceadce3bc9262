"""The derivatives of batch norm that are written down are those that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmerge_jax.models.densenet import DenseBlock
from medmerge_jax.models.norm import EPSILON, affine, statistics


def as_defined(x, scale, bias):
    mean = jnp.mean(x, (0, 1, 2))
    var = jnp.mean((x - mean) ** 2, (0, 1, 2))
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias, mean, var


def ours(x, scale, bias):
    mean, var = statistics(x)
    return affine(x, mean, var, scale, bias), mean, var


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


@pytest.mark.parametrize(
    "derivative", [jax.grad, jax.jacfwd, pytest.param(jax.hessian, marks=pytest.mark.slow)]
)
def test_derivatives_of_first_and_second_order(arguments, derivative):
    found = jax.jit(derivative(scalar(ours), argnums=(0, 1, 2)))(*arguments)
    wanted = jax.jit(derivative(scalar(as_defined), argnums=(0, 1, 2)))(*arguments)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


def test_of_every_example_alone_under_vmap(arguments):
    x, scale, bias = arguments
    each = x[:, None]
    gradient = jax.jit(jax.grad(scalar(ours)))
    found = jax.jit(jax.vmap(gradient, (0, None, None)))(each, scale, bias)
    wanted = [gradient(one, scale, bias) for one in each]
    np.testing.assert_allclose(found, jnp.stack(wanted), rtol=1e-12)


def test_a_dense_block_knows_the_statistics_of_what_it_returns():
    block = DenseBlock(depth=3, growth=4, dtype=jnp.float32)
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(2, 5, 5, 6)).astype(np.float32)
    variables = jax.jit(block.init, static_argnums=2)(jax.random.key(0), x, True)
    apply = jax.jit(block.apply, static_argnums=2, static_argnames="mutable")
    (y, found), _ = apply(variables, x, False, mutable="batch_stats")
    assert y.shape == (2, 5, 5, 6 + 3 * 4)
    for one, other in zip(found, statistics(y), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert block.apply(variables, x, use_running_average=True)[1] is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_and_their_gradient_have_the_types_of_training(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 4)), dtype)
    found, pull_back = jax.vjp(statistics, x)
    assert [each.dtype for each in found] == [jnp.float32] * 2
    assert pull_back(found)[0].dtype == dtype
