"""From an image file to an augmented array: decoding, the cache on the disk, augmentation."""

from medmerge_jax.images.cache import Pixels, cached_pixels
from medmerge_jax.images.decode import read_image

__all__ = ["Pixels", "cached_pixels", "read_image"]
