"""Arrays that are read when they are asked for, so that a large model need not be held."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is read anew whenever NumPy asks for it, and is not kept.

    `np.asarray(array)` reads it. JAX takes no such arrays, see `read_all`.

    Attributes:
      shape: Known without reading.
      dtype: Likewise.
      read: Returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array; a copy is one anyway."""
        return np.asarray(self.read(), dtype)


def read_all(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with NumPy's arrays in place of lazy ones, each read once.

    >>> lazy = LazyArray((2,), np.dtype(np.float32), lambda: np.ones(2, np.float32))
    >>> read_all({"params": {"bias": lazy}, "batch_stats": {}})
    {'params': {'bias': array([1., 1.], dtype=float32)}, 'batch_stats': {}}
    """
    return {
        name: read_all(node)
        if isinstance(node, Mapping)
        else (np.asarray(node) if isinstance(node, LazyArray) else node)
        for name, node in tree.items()
    }
