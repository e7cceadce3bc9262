"""Convolution, pooling and head with PyTorch's conventions in NHWC."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from medmerge_jax.merging.trees import at_least_float32

Array = jax.Array

# kaiming_normal_ of PyTorch, nonlinearity="relu".
KAIMING_FAN_OUT = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
KAIMING_FAN_IN = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Conv(nn.Module):
    """A convolution without bias, padded symmetrically by half its size as in PyTorch.

    `SAME` padding differs from this when the stride is 2: it pads the right side only.

    Attributes:
      features: Output channels.
      size: Odd side of the square kernel.
      stride: In both directions.
      dtype: Compute dtype; the kernel (size, size, c_in, features) is float32.
      kernel_init: Initialiser of the kernel.
    """

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Array] = KAIMING_FAN_OUT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (n, h, w, c_in) to (n, ⌈h/stride⌉, ⌈w/stride⌉, features)."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.size == 1:
            # As a product of two matrices, faster on a CPU. Of arrays with more axes, XLA would
            # transpose a copy for the kernel's gradient.
            x = x[:, :: self.stride, :: self.stride]
            y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
            return y.reshape(*x.shape[:-1], self.features)
        convolution = functools.partial(_convolution, stride=self.stride)
        if _PORTABLE.get():
            return convolution(x, kernel)
        on_cpu: Callable[[Array, Array], Array]
        if 4 * math.prod(-(-length // self.stride) for length in x.shape[1:3]) <= self.features:
            # Copying patches costs little beside their product with many filters. XLA's gradients
            # of such convolutions are slow on a CPU, and thirty times as slow if a map is smaller
            # than its kernel.
            on_cpu = functools.partial(_product_of_patches, stride=self.stride)
        else:
            on_cpu = functools.partial(_convolution_on_cpu, self.stride)
        return lax.platform_dependent(x, kernel, cpu=on_cpu, default=convolution)


_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """What is traced inside is one program for all platforms: converters know no other."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def _convolution(x: Array, kernel: Array, *, stride: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(kernel.shape[0] // 2, kernel.shape[0] // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _convolution_on_cpu(stride: int, x: Array, kernel: Array) -> Array:
    """The same convolution, whose kernel's gradient is computed by another program.

    For that gradient XLA convolves the input with the output's gradient, and transposes both for
    it. It fuses the transposition with whatever computes the input, which may be a chain of
    residual blocks: that chain is then computed again, one number at a time and across the memory.
    `_materialize` makes XLA transpose the input that is already in memory.
    """
    return _convolution(x, kernel, stride=stride)


@_convolution_on_cpu.defjvp
def _convolution_on_cpu_jvp(
    stride: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    size, _, channels, features = kernel.shape
    y = _convolution_on_cpu(stride, x, kernel)
    x = _materialize(x)
    if stride == 1 and features < channels:
        # Transposed twice, in reverse mode, it is `_kernel_gradient` itself.
        gradient = functools.partial(_kernel_gradient, x, size)
        (by_kernel,) = jax.linear_transpose(gradient, y)(dkernel)
    else:
        by_kernel = _convolution(x, dkernel, stride=stride)
    return y, _convolution_on_cpu(stride, dx, kernel) + _materialize(by_kernel)


def _materialize(x: Array) -> Array:
    """`x`, which is then in memory: XLA fuses nothing across a call that is not inlined."""
    with set_xla_metadata(inlineable="false"):
        return _as_it_is(x)


@jax.jit
def _as_it_is(x: Array) -> Array:
    return lax.optimization_barrier(x)  # JAX drops a call that does nothing


def _kernel_gradient(x: Array, size: int, dy: Array) -> Array:
    """Σ x · dy over all places, `x` moved by each offset of the kernel, with c_in filters.

    XLA by itself takes `dy` for the kernel: as many filters as output channels. Few
    filters leave a CPU's vector units half empty.
    """
    mirrored = lax.conv_general_dilated(
        dy,
        x,
        window_strides=(1, 1),
        padding=[(size // 2, size // 2)] * 2,
        dimension_numbers=("CHWN", "IHWO", "NHWC"),
    )  # (features, size, size, c_in), offsets from the last to the first
    return lax.rev(mirrored, (1, 2)).transpose(1, 2, 3, 0)


def _product_of_patches(x: Array, kernel: Array, *, stride: int) -> Array:
    """The same as a product of matrices, (n h w, size² c_in) and (size² c_in, features)."""
    size, _, channels, features = kernel.shape
    height, width = (-(-length // stride) for length in x.shape[1:3])
    margin = (size // 2, size // 2)
    padded = jnp.pad(x, [(0, 0), margin, margin, (0, 0)])
    patches = [
        padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
        for i in range(size)
        for j in range(size)
    ]
    columns = jnp.concatenate(patches, axis=-1).reshape(-1, size * size * channels)
    return (columns @ kernel.reshape(-1, features)).reshape(-1, height, width, features)


def max_pool(x: Array) -> Array:
    """Maximum over 3 x 3 with stride 2; the border is padded with -∞.

    Of equal values, the first in row-major order gets the gradient, as in PyTorch; not a number
    stays so. Written with slices, because the gradient of XLA's own window takes six times as long
    on a CPU.
    """
    for axis in (2, 1):
        sides = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
        last = 2 * ((x.shape[axis] - 1) // 2) + 1
        padded = jnp.pad(x, sides, constant_values=-jnp.inf)
        first, second, third = (
            lax.slice_in_dim(padded, i, i + last, stride=2, axis=axis) for i in range(3)
        )
        x = _larger(_larger(first, second), third)
    return x


def _larger(a: Array, b: Array) -> Array:
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def global_average(x: Array) -> Array:
    """(n, h, w, c) to (n, c), in float32 even if `x` is bfloat16."""
    return jnp.mean(at_least_float32(x), axis=(1, 2))


def dense_head(num_features: int, num_classes: int) -> nn.Dense:
    """The head of every model, initialised as PyTorch's `nn.Linear`.

    Weights and bias are uniform in ±1/√num_features.
    """
    bound = num_features**-0.5

    def uniform(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(num_classes, kernel_init=uniform, bias_init=uniform, name="head")


class LinearHead(nn.Module):
    """A model that is nothing but the head, for features that are computed beforehand.

    Attributes:
      num_classes: Number of logits.
    """

    num_classes: int

    @nn.compact
    def __call__(
        self, features: Array, train: bool = False, use_running_average: bool | None = None
    ) -> Array:
        """Maps (n, num_features) to (n, num_classes) float32, in training as in evaluation."""
        del train, use_running_average
        features = at_least_float32(jnp.asarray(features))
        return dense_head(features.shape[-1], self.num_classes)(features)
