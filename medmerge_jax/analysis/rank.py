"""Whether a layer prefers the parent that is the better start: Spearman's rank correlation.

MedMerge's paper argues so in words. Here a target is a point: how much better fine-tuning from
parent b is than from parent c, against the mean coefficient that the merge has learned.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

LEAST = 3
"""Targets; of two every correlation is ±1."""

_MOST_ENUMERATED = 8
"""Targets whose orders are all tried: 40,320."""

_DRAWN = 20_000
"""Orders that are drawn of more targets."""

_LEVEL = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class RankCorrelation:
    """Of n targets.

    Attributes:
      layers: What the coefficients are of.
      rho: (layers,) Spearman's, with mean ranks for ties; NaN where a layer or the scores are all
        equal.
      p: (layers,) two-sided, by permutation: the share of orders of the scores whose correlation is
        as far from zero.
      p_of_any: (layers,) likewise of the layer that is farthest from zero in each order: what is
        left of p when the best of so many layers is looked at (Westfall & Young, 1993).
      targets: n.
      smallest_p: That n targets can give.
    """

    layers: list[str]
    rho: np.ndarray
    p: np.ndarray
    p_of_any: np.ndarray
    targets: int
    smallest_p: float

    def warning(self) -> str:
        """What is to be said of a small n; "" if there is nothing."""
        if self.smallest_p <= _LEVEL:
            return ""
        return (
            f"{self.targets} targets are too few: no order of them has a p below "
            f"{self.smallest_p:.2f}, so that nothing can be told from chance; 5 or more are wanted"
        )


def rank_correlation(
    layers: Sequence[str], coefficients: np.ndarray, scores: np.ndarray, seed: int = 0
) -> RankCorrelation:
    """Correlates each layer's coefficients with the scores.

    Args:
      layers: Names.
      coefficients: (targets, layers) mean coefficient of parent b.
      scores: (targets,) by how much fine-tuning from b is better than from c.
      seed: Of the orders that are drawn where not all are tried.

    Raises:
      ValueError: There are fewer than 3 targets.
    """
    count = len(scores)
    if count < LEAST:
        raise ValueError(f"{count} targets; {LEAST} or more are wanted")
    ranks = _standardised(np.stack([rankdata(column) for column in coefficients.T], axis=1))
    ranked = _standardised(rankdata(scores)[:, None])[:, 0]
    rho = ranked @ ranks
    orders = _orders(count, seed)
    # All orders at once: (orders, layers).
    permuted = np.abs(ranked[orders] @ ranks)
    found = np.abs(rho) - 1e-12
    defined = np.isfinite(rho)
    p, p_of_any = np.full(len(rho), np.nan), np.full(len(rho), np.nan)
    if defined.any():
        greatest = permuted[:, defined].max(axis=1)
        p[defined] = _share(permuted[:, defined] >= found[defined], count)
        p_of_any[defined] = _share(greatest[:, None] >= found[defined], count)
    return RankCorrelation(list(layers), rho, p, p_of_any, count, 2 / math.factorial(count))


def _standardised(ranks: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and length 1; NaN where all are equal."""
    centred = ranks - ranks.mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    return np.asarray(centred / np.where(length > 0, length, np.nan))


def _orders(count: int, seed: int) -> np.ndarray:
    if count <= _MOST_ENUMERATED:
        return np.array(list(itertools.permutations(range(count))))
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(count), (_DRAWN, 1)), axis=1)


def _share(as_far: np.ndarray, count: int) -> np.ndarray:
    """Of orders; of drawn ones the order that was found is one more (Phipson & Smyth, 2010)."""
    if count <= _MOST_ENUMERATED:
        return np.asarray(as_far.mean(axis=0))
    return np.asarray((as_far.sum(axis=0) + 1) / (len(as_far) + 1))
