"""What augmentation does to an image, as torchvision does it to Pillow images.

Every function maps one uint8 image (h, w, 3) to another, with parameters that may be traced, so
that `jax.jit` and `jax.vmap` work on it. Resizing and blending are done in whole numbers, so that
neither the device nor the batch changes a bit of them, and most results are Pillow's to the bit.
Shears and rotations are computed in float32 and may differ from Pillow's float64 by one in a
channel.
"""

import jax
import jax.numpy as jnp
from jax import lax

Scalar = jax.Array | float
Integer = jax.Array | int

_WEIGHT_BITS = 16
_FACTOR_BITS = 20


def resized_crop(
    image: jax.Array,
    top: Integer,
    left: Integer,
    height: Integer,
    width: Integer,
    size: tuple[int, int],
) -> jax.Array:
    """Cuts a rectangle of whole pixels and resizes it, bilinear with antialiasing.

    Args:
      image: uint8 (h, w, 3).
      top: First row of the rectangle.
      left: First column.
      height: Rows of the rectangle, which lies inside the image.
      width: Columns.
      size: Height and width of the result.

    Returns:
      uint8 (*size, 3); rounded after the horizontal and after the vertical pass, as Pillow does.
    """
    rows = _resampling_weights(top, height, image.shape[0], size[0])
    columns = _resampling_weights(left, width, image.shape[1], size[1])
    # float32 adds these integers below 2²⁴ exactly in any order; the default precision of an
    # accelerator does not.
    exact = lax.Precision.HIGHEST
    wide = jnp.einsum("hwc,ow->hoc", image.astype(jnp.float32), columns, precision=exact)
    result = jnp.einsum("hwc,oh->owc", _rounded(wide), rows, precision=exact)
    return _rounded(result).astype(jnp.uint8)


def _resampling_weights(
    start: Integer, length: Integer, num_inputs: int, num_outputs: int
) -> jax.Array:
    """(num_outputs, num_inputs): a triangle around each output's centre, inside the crop.

    Whole numbers, 2¹⁶ in each row but for their rounding. Pillow's have 22 bits.
    """
    outputs, inputs = jnp.arange(num_outputs)[:, None], jnp.arange(num_inputs) - start
    # In units of 1 / (2 num_outputs) of a pixel all distances are whole.
    distances = jnp.abs((2 * inputs + 1) * num_outputs - (2 * outputs + 1) * length)
    reach = 2 * jnp.maximum(length, num_outputs)
    inside = (inputs >= 0) & (inputs < length)
    weights = jnp.where(inside, jnp.maximum(reach - distances, 0), 0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return ((2**_WEIGHT_BITS * weights + total // 2) // total).astype(jnp.float32)


def _rounded(sums: jax.Array) -> jax.Array:
    return jnp.floor(sums / 2**_WEIGHT_BITS + 0.5)


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Looks every pixel up, bilinear, where an affine map sends it; black where that is outside.

    Args:
      image: uint8 (h, w, 3).
      matrix: float32 (6,): (a, b, c, d, e, f). The result at (x, y), the centre of a pixel, is
        the image at (a x + b y + c, d x + e y + f).
    """
    height, width, _ = image.shape
    a, b, c, d, e, f = matrix
    x, y = jnp.arange(width) + 0.5, (jnp.arange(height) + 0.5)[:, None]
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    packed = _pack(image).reshape(-1)

    left, above = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    dx, dy = (x - 0.5 - left)[..., None], (y - 0.5 - above)[..., None]

    def look_up(right: int, below: int) -> jax.Array:
        column = jnp.clip(left.astype(jnp.int32) + right, 0, width - 1)
        row = jnp.clip(above.astype(jnp.int32) + below, 0, height - 1)
        index = row * width + column
        return _unpack(packed.at[index].get(mode="promise_in_bounds")).astype(jnp.float32)

    def mix(below: int) -> jax.Array:
        start = look_up(0, below)
        return start + (look_up(1, below) - start) * dx

    upper = mix(0)
    result = upper + (mix(1) - upper) * dy
    return jnp.where(inside[..., None], result.astype(jnp.uint8), 0)


def _pack(image: jax.Array) -> jax.Array:
    """The three channels in one integer (h, w), so that one look-up fetches them."""
    channels = image.astype(jnp.int32)
    return channels[..., 0] | channels[..., 1] << 8 | channels[..., 2] << 16


def _unpack(packed: jax.Array) -> jax.Array:
    return jnp.stack([packed & 255, packed >> 8 & 255, packed >> 16], axis=-1)


def rotation_matrix(degrees: Scalar, height: int, width: int) -> jax.Array:
    """For `affine`: the image turns counter-clockwise around its centre."""
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    x, y = width / 2, height / 2
    return jnp.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y])


def adjust_brightness(image: jax.Array, factor: Scalar) -> jax.Array:
    """Factor 0 is black, 1 the image itself.

    >>> adjust_brightness(jnp.array([[[200, 100, 7]]], jnp.uint8), 0.5).tolist()
    [[[100, 50, 3]]]
    """
    return _blend(jnp.zeros_like(image), image, factor)


def adjust_saturation(image: jax.Array, factor: Scalar) -> jax.Array:
    """Factor 0 is grey, 1 the image itself. RandAugment calls it "Color"."""
    return _blend(_grey(image)[..., None], image, factor)


def adjust_contrast(image: jax.Array, factor: Scalar) -> jax.Array:
    """Factor 0 is the mean of the grey image everywhere, 1 the image itself."""
    grey = _grey(image)
    whole, rest = jnp.divmod(jnp.sum(grey), grey.size)
    return _blend(whole + (2 * rest >= grey.size), image, factor)


def adjust_sharpness(image: jax.Array, factor: Scalar) -> jax.Array:
    """Factor 0 is smoothed (except for the outermost pixels), 1 the image itself."""
    height, width, _ = image.shape
    if height <= 2 or width <= 2:
        return image
    pixels = image.astype(jnp.int32)
    three_rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    nine = three_rows[:, :-2] + three_rows[:, 1:-1] + three_rows[:, 2:]
    smooth = (2 * (nine + 4 * pixels[1:-1, 1:-1]) + 13) // 26  # In thirteenths, rounded.
    return _blend(pixels.at[1:-1, 1:-1].set(smooth), image, factor)


def posterize(image: jax.Array, bits: int) -> jax.Array:
    """Keeps the highest bits of every channel.

    >>> posterize(jnp.array([[[255, 100, 7]]], jnp.uint8), bits=2).tolist()
    [[[192, 64, 0]]]
    """
    return image & jnp.uint8(256 - 2 ** (8 - bits) if bits else 0)


def solarize(image: jax.Array, threshold: float) -> jax.Array:
    """Inverts what is not below the threshold, 0 to 255.

    >>> solarize(jnp.array([[[255, 128, 7]]], jnp.uint8), threshold=128).tolist()
    [[[0, 127, 7]]]
    """
    return jnp.where(image < threshold, image, 255 - image)


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel to 0 … 255; a channel of one value stays."""
    pixels = image.astype(jnp.int32)
    low, high = jnp.min(pixels, axis=(0, 1)), jnp.max(pixels, axis=(0, 1))
    stretched = 255 * (pixels - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, pixels).astype(jnp.uint8)


def equalize(image: jax.Array) -> jax.Array:
    """Makes the histogram of each channel flat."""

    def table(channel: jax.Array) -> jax.Array:
        counts = jnp.zeros(256, jnp.int32).at[channel.reshape(-1)].add(1)
        step = (channel.size - counts[jnp.max(channel)]) // 255
        below = jnp.cumsum(counts) - counts
        levels = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, levels, jnp.arange(256)).astype(jnp.uint8)

    channels = [image[..., channel] for channel in range(image.shape[-1])]
    return jnp.stack([table(channel)[channel] for channel in channels], axis=-1)


def _blend(degenerate: jax.Array, image: jax.Array, factor: Scalar) -> jax.Array:
    """From the degenerate image (0) through the image (1) and beyond; the fraction is cut off."""
    fixed = jnp.round(jnp.asarray(factor, jnp.float32) * 2**_FACTOR_BITS).astype(jnp.int32)
    start = degenerate.astype(jnp.int32)
    mixed = (start << _FACTOR_BITS) + fixed * (image.astype(jnp.int32) - start)
    # 128 makes up for the rounding of the factor where the result is a whole number.
    return jnp.clip((mixed + 128) >> _FACTOR_BITS, 0, 255).astype(jnp.uint8)


def _grey(image: jax.Array) -> jax.Array:
    """int32 (h, w): luma of ITU-R 601-2 in sixteen bits, as Pillow's mode L."""
    red, green, blue = jnp.moveaxis(image.astype(jnp.int32), -1, 0)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
