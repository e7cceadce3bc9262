import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick

from medmerge_jax.models.layers import Conv, max_pool

AS_USERS_DO = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 9, 6, 2), (2, 1, 5, 1), (1, 112, 112, 4)])
def test_max_pool_and_its_gradient_are_those_of_pytorch_also_where_values_are_equal(shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, shape).astype(np.float32)  # nearly every window has its maximum twice
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    wanted = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
    cotangent = rng.normal(size=wanted.shape).astype(np.float32)
    wanted.backward(torch.tensor(cotangent))

    found, pull_back = jax.vjp(max_pool, x)
    (gradient,) = pull_back(jnp.asarray(cotangent.transpose(0, 2, 3, 1)))

    np.testing.assert_array_equal(found, wanted.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize(
    "shape", some_quick([(2, 8, 8, 3), (1, 9, 6, 2), (2, 1, 5, 1)], (1, 9, 6, 2))
)
def test_max_pool_and_its_gradient_are_those_of_windows_of_three(shape):
    """Without PyTorch too: below zero, so that a border of zeros would be the largest."""
    rng = np.random.default_rng(0)
    x = rng.integers(-5, -1, shape).astype(np.float32)
    found, pull_back = jax.vjp(max_pool, x)
    cotangent = rng.normal(size=found.shape).astype(np.float32)
    wanted, gradient = np.zeros_like(found), np.zeros_like(x)
    for n, i, j, c in np.ndindex(found.shape):
        top, left = max(2 * i - 1, 0), max(2 * j - 1, 0)
        window = x[n, top : 2 * i + 2, left : 2 * j + 2, c]
        row, column = np.unravel_index(window.argmax(), window.shape)  # the first of equals
        wanted[n, i, j, c] = window[row, column]
        gradient[n, top + row, left + column, c] += cotangent[n, i, j, c]
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(pull_back(jnp.asarray(cotangent))[0], gradient, atol=1e-6)


def test_what_is_not_a_number_is_seen_by_all_windows_that_have_it():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)
    x[0, 3, 3] = np.nan  # in four windows
    x[0, 0, 0] = -np.inf
    wanted = torch.nn.functional.max_pool2d(torch.tensor(x.transpose(0, 3, 1, 2)), 3, 2, 1)
    found = np.asarray(max_pool(jnp.asarray(x)))
    np.testing.assert_array_equal(found, wanted.numpy().transpose(0, 2, 3, 1))
    assert np.isnan(found).sum() == 4


@pytest.mark.parametrize(("stride", "side"), [(1, 6), (2, 6), (2, 7)])
def test_a_convolution_of_size_one_is_a_convolution(stride, side):
    x = np.random.default_rng(0).normal(size=(2, side, side, 5)).astype(np.float32)
    conv = Conv(4, 1, stride)
    variables = conv.init(jax.random.key(0), x)
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = variables["params"]["kernel"]
    strides = (stride, stride)
    wanted = jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=numbers)
    np.testing.assert_allclose(conv.apply(variables, x), wanted, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 5), 3),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (((2, 2), 3), ((1, 1), 3), ((7, 7), 3), ((4, 5), 5), ((3, 3), 7))
        ),
    ],
)
def test_a_convolution_of_a_small_map_is_a_convolution(stride, shape, size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape, 5)).astype(np.float32)
    conv = Conv(64, size, stride)
    variables = conv.init(jax.random.key(0), x)

    def plain(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        padding = [(size // 2, size // 2)] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=numbers
        )

    def ours(kernel, x):
        return conv.apply({"params": {"kernel": kernel}}, x)

    inputs = (variables["params"]["kernel"], x)
    wanted = jax.eval_shape(plain, *inputs)
    cotangent = rng.normal(size=wanted.shape).astype(np.float32)

    @jax.jit
    def values_and_gradients(inputs, cotangent):
        pulls = [jax.vjp(function, *inputs) for function in (ours, plain)]
        return [(value, pull_back(cotangent)) for value, pull_back in pulls]

    (found, gradients), (wanted, wanted_gradients) = values_and_gradients(inputs, cotangent)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "batch", "features", "stride"),
    [(3, 2, 3, 1), (5, 1, 3, 1), (3, 2, 4, 1), (3, 2, 3, 2)],
)
def test_a_convolution_has_its_derivatives(size, batch, features, stride):
    """In reverse and in forward mode, twice, and mapped."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, dx = (jnp.asarray(rng.normal(size=(batch, 6, 5, 4))) for _ in range(2))
        kernel, dkernel = (
            jnp.asarray(rng.normal(size=(size, size, 4, features))) for _ in range(2)
        )
        conv = Conv(features, size, stride, jnp.float64)

        def plain(x, kernel):
            numbers, padding = ("NHWC", "HWIO", "NHWC"), [(size // 2, size // 2)] * 2
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), padding, dimension_numbers=numbers
            )

        def ours(x, kernel):
            return conv.apply({"params": {"kernel": kernel}}, x)

        def derivatives(function):
            def loss(x, kernel):
                return jnp.sum(jnp.sin(function(x, kernel)))

            def gradients(x, kernel):
                return jax.grad(loss, (0, 1))(x, kernel)

            mapped = jax.vmap(gradients, (None, 0))(x, jnp.stack([kernel, dkernel]))
            forwards = jax.jvp(function, (x, kernel), (dx, dkernel))
            twice = jax.jvp(gradients, (x, kernel), (dx, dkernel))
            return gradients(x, kernel), mapped, forwards, twice

        found, wanted = jax.jit(lambda: (derivatives(ours), derivatives(plain)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, wanted)


def test_the_gradient_of_a_kernel_computes_no_activation_anew():
    """On a CPU, where XLA otherwise does, in the order of axes that it wants."""
    x, conv = jnp.ones((2, 8, 8, 16)), Conv(16, 3)
    variables = conv.init(jax.random.key(0), x)

    def loss(variables, x):
        return jnp.sum(conv.apply(variables, jnp.maximum(x, 0)) ** 2)

    program = jax.jit(jax.grad(loss)).lower(variables, x).compile(AS_USERS_DO).as_text()
    assert len(re.findall(r" maximum\(", program)) == 1


def test_the_gradient_of_a_kernel_with_few_filters_has_as_many_as_input_channels():
    """On a CPU, where the other way round half of a vector is empty."""
    x, conv = jnp.ones((2, 8, 8, 48)), Conv(16, 3)
    variables = conv.init(jax.random.key(0), x)
    program = jax.jit(jax.grad(lambda variables: jnp.sum(conv.apply(variables, x) ** 2)))
    text = program.lower(variables).as_text()
    convolutions = re.findall(r"stablehlo.convolution.*-> tensor<([0-9x]+)xf32>", text)
    assert convolutions == ["2x8x8x16", "16x3x3x48"]


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3)])
def test_small_maps_are_products_of_matrices_on_a_processor_only(platform, convolutions):
    """Forwards, and for both gradients."""
    x, conv = jnp.ones((2, 4, 4, 8)), Conv(64, 3)
    variables = conv.init(jax.random.key(0), x)

    def step(variables, x):
        y, pull_back = jax.vjp(conv.apply, variables, x)
        return pull_back(y)

    traced = jax.jit(step).trace(variables, x)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.convolution") == convolutions
