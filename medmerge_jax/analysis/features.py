"""Which channels of a layer are worth looking at in several models."""

from collections.abc import Sequence

import numpy as np


def strongest_channels(maps: Sequence[np.ndarray], count: int) -> list[int]:
    """The channels that vary most over the places of images, by the mean of all models.

    The same for all models, because a merged filter is a mean of its parents' filters of the same
    number.

    Args:
      maps: Of each model, (n, h, w, channels).
      count: The most that are wanted.

    Returns:
      Descending; of equal ones the first.
    """
    variation = np.mean([of_model.std(axis=(1, 2)).mean(axis=0) for of_model in maps], axis=0)
    return [int(channel) for channel in np.argsort(-variation, kind="stable")[:count]]
