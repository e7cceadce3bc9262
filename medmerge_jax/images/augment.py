"""Random augmentation on the device, a function of the image, the seed, the epoch and its index.

Neither the batch size nor the number of devices nor where training was resumed changes what
becomes of an image. The policies are FissionFusion's (Sanjeev et al., arXiv 2403.13341), with what
its published code does where the paper leaves it open: torchvision's transforms of uint8 images,
no hue in the colour jitter, bilinear interpolation in RandAugment. Unlike there, the crop is taken
from the image that was decoded to the network's size already, not from the original.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from medmerge_jax.images import operations as ops

_CROP_TRIES = 10
_ASPECT_RATIOS = (3 / 4, 4 / 3)
_MAGNITUDE_BINS = 31


@dataclasses.dataclass(frozen=True)
class Policy:
    """What happens to an image, in this order.

    Attributes:
      crop_scale: Least and largest area of the crop relative to the image. An area above 1 does
        not fit: it is drawn again, see `draw_crop`. It never zooms out.
      flip: Probability of a horizontal flip.
      brightness: The factor is uniform in 1 ± this; so are the next two. The operations of this
        colour jitter that are not 0 are applied in a random order.
      contrast: As `brightness`.
      saturation: As `brightness`.
      operations: How many of RandAugment's operations follow; each may be drawn repeatedly.
      magnitude: Of these, 0 to 30.
    """

    crop_scale: tuple[float, float]
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    operations: int = 0
    magnitude: int = 0


POLICIES = {
    "minimal": Policy(crop_scale=(0.9, 1.0)),
    "medium": Policy(
        crop_scale=(0.08, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4
    ),
    "heavy": Policy(crop_scale=(0.7, 1.2), operations=2, magnitude=15),
}
"""FissionFusion's, by the names that a config gives them."""

RAND_AUGMENT = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""The operations of torchvision's RandAugment (Cubuk et al., 2019), in its order."""


def epoch_key(seed: int, epoch: int) -> jax.Array:
    """The key of all random choices in an epoch, for `augment`."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), epoch)


def augment(policy: Policy, images: jax.Array, indices: jax.Array, key: jax.Array) -> jax.Array:
    """Augments a batch.

    Args:
      policy: What to do.
      images: uint8 (n, h, w, 3).
      indices: int32 (n,): which examples of the data set these are.
      key: Of the epoch, see `epoch_key`.

    Returns:
      uint8 (n, h, w, 3).

    >>> images, indices = jnp.zeros((2, 16, 16, 3), jnp.uint8), jnp.arange(2)
    >>> augment(POLICIES["minimal"], images, indices, epoch_key(seed=0, epoch=3)).shape
    (2, 16, 16, 3)
    """

    def augment_one(image: jax.Array, index: jax.Array) -> jax.Array:
        return augment_image(policy, image, jax.random.fold_in(key, index))

    # `vmap` computes every operation for every image and keeps one result, a loop computes only the
    # operations that were drawn. So a CPU loops; an accelerator would be idle most of the time.
    return lax.platform_dependent(
        images,
        indices,
        cpu=lambda *batch: lax.map(lambda example: augment_one(*example), batch),
        default=jax.vmap(augment_one),
    )


def augment_image(policy: Policy, image: jax.Array, key: jax.Array) -> jax.Array:
    """Augments one image, uint8 (h, w, 3)."""
    height, width, _ = image.shape
    crop_key, flip_key, jitter_key, operations_key = jax.random.split(key, 4)
    crop = draw_crop(crop_key, height, width, policy.crop_scale)
    image = ops.resized_crop(image, *crop, (height, width))
    if policy.flip:
        image = jnp.where(draw_flip(flip_key, policy.flip), image[:, ::-1], image)
    adjustments = [adjust for adjust, _ in _jitter_steps(policy)]
    if adjustments:
        order, factors = draw_jitter(policy, jitter_key)
        for step in order:
            image = lax.switch(step, adjustments, image, factors[step])
    for number in range(policy.operations):
        operation, sign = draw_operation(jax.random.fold_in(operations_key, number))
        image = rand_augment_operation(image, operation, sign, policy.magnitude)
    return image


def draw_crop(
    key: jax.Array, height: int, width: int, scale: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws the rectangle of torchvision's RandomResizedCrop.

    An area, uniform in `scale`, and an aspect ratio, log-uniform in 3/4 … 4/3, are drawn up to ten
    times until the rectangle fits; if none does it is the whole image (of an image that is longer
    than these ratios, its centre). With FissionFusion's scale (0.7, 1.2) one draw in three fits a
    square image, and one image in 60 stays whole.

    Args:
      key: Of this image.
      height: Of the image.
      width: Of the image.
      scale: Least and largest area, relative to the image.

    Returns:
      top, left, height and width, int32 scalars.
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    areas = height * width * jax.random.uniform(area_key, (_CROP_TRIES,), jnp.float32, *scale)
    low, high = map(math.log, _ASPECT_RATIOS)
    ratios = jnp.exp(jax.random.uniform(ratio_key, (_CROP_TRIES,), jnp.float32, low, high))
    heights = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = jnp.argmax(fits)
    crop_height, crop_width = heights[first], widths[first]
    top = jax.random.randint(top_key, (), 0, height - crop_height + 1)
    left = jax.random.randint(left_key, (), 0, width - crop_width + 1)
    # The largest central rectangle of an allowed aspect ratio.
    rows = min(height, round(width / _ASPECT_RATIOS[0]))
    columns = min(width, round(height * _ASPECT_RATIOS[1]))
    centre = jnp.array([(height - rows) // 2, (width - columns) // 2, rows, columns])
    drawn = jnp.stack([top, left, crop_height, crop_width])
    top, left, crop_height, crop_width = jnp.where(jnp.any(fits), drawn, centre)
    return top, left, crop_height, crop_width


def draw_flip(key: jax.Array, probability: float) -> jax.Array:
    """Whether torchvision's RandomHorizontalFlip flips, bool."""
    return jax.random.bernoulli(key, probability)


def draw_jitter(policy: Policy, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws the order and the factors of torchvision's ColorJitter.

    Returns:
      The order, a permutation int32 (k,) of the k operations of the policy that are not 0, in
      the order of its fields; and the factor of each operation, float32 (k,).
    """
    order_key, factor_key = jax.random.split(key)
    spreads = np.array([spread for _, spread in _jitter_steps(policy)], np.float32)
    lowest, highest = np.maximum(1 - spreads, 0), 1 + spreads
    factors = jax.random.uniform(factor_key, spreads.shape, jnp.float32, lowest, highest)
    return jax.random.permutation(order_key, len(spreads)), factors


def _jitter_steps(policy: Policy) -> list[tuple[Callable[..., jax.Array], float]]:
    steps = (
        (ops.adjust_brightness, policy.brightness),
        (ops.adjust_contrast, policy.contrast),
        (ops.adjust_saturation, policy.saturation),
    )
    return [(adjust, spread) for adjust, spread in steps if spread]


def draw_operation(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One of `RAND_AUGMENT`, uniformly, as int32; and the sign of its magnitude, 1.0 or −1.0."""
    operation_key, sign_key = jax.random.split(key)
    operation = jax.random.randint(operation_key, (), 0, len(RAND_AUGMENT))
    return operation, jax.random.rademacher(sign_key, (), jnp.float32)


def rand_augment_operation(
    image: jax.Array, operation: jax.Array, sign: jax.Array, magnitude: int
) -> jax.Array:
    """Applies one of `RAND_AUGMENT` as torchvision's RandAugment does.

    Args:
      image: uint8 (h, w, 3).
      operation: Index into `RAND_AUGMENT`.
      sign: 1.0 or −1.0; without effect on the operations that have no direction.
      magnitude: 0 to 30.
    """
    height, width, _ = image.shape
    level = magnitude / (_MAGNITUDE_BINS - 1)
    shear, turn = sign * 0.3 * level, sign * 30.0 * level
    right, down = (sign * int(150 / 331 * size * level) for size in (width, height))
    factor = 1 + sign * 0.9 * level
    moves = {
        "shear_x": jnp.array([1.0, shear, 0.0, 0.0, 1.0, 0.0], jnp.float32),
        "shear_y": jnp.array([1.0, 0.0, 0.0, shear, 1.0, 0.0], jnp.float32),
        "translate_x": jnp.array([1.0, 0.0, -right, 0.0, 1.0, 0.0], jnp.float32),
        "translate_y": jnp.array([1.0, 0.0, 0.0, 0.0, 1.0, -down], jnp.float32),
        "rotate": ops.rotation_matrix(turn, height, width),
    }
    # All operations that move pixels share a branch, since `vmap` computes every branch.
    first_move = RAND_AUGMENT.index("shear_x")
    matrices = jnp.stack([moves[name] for name in RAND_AUGMENT[first_move:][: len(moves)]])
    matrix = matrices[jnp.clip(operation - first_move, 0, len(moves) - 1)]
    branches: dict[str, Callable[[jax.Array], jax.Array]] = {
        "identity": lambda image: image,
        "move": lambda image: ops.affine(image, matrix),
        "brightness": lambda image: ops.adjust_brightness(image, factor),
        "color": lambda image: ops.adjust_saturation(image, factor),
        "contrast": lambda image: ops.adjust_contrast(image, factor),
        "sharpness": lambda image: ops.adjust_sharpness(image, factor),
        "posterize": lambda image: ops.posterize(image, 8 - round(4 * level)),
        "solarize": lambda image: ops.solarize(image, 255 * (1 - level)),
        "autocontrast": ops.autocontrast,
        "equalize": ops.equalize,
    }
    names = list(branches)
    branch_of = np.array([names.index("move" if n in moves else n) for n in RAND_AUGMENT])
    return lax.switch(jnp.asarray(branch_of)[operation], list(branches.values()), image)
