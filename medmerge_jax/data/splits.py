"""Splits that keep the classes' proportions and never part a group."""

import re
from collections.abc import Sequence

import numpy as np

from medmerge_jax.errors import UserError

SPLITS = ("train", "val", "test")

EVALUATED = (*SPLITS, "all")
"""What may be evaluated on: a split, or the images of all."""

_SPELLINGS = (
    ("train", "training", "trn", "trainval", "trainvalid", "trainvalidation", "trainingvalidation"),
    ("val", "valid", "validation", "validate", "validating", "dev", "eval"),
    ("test", "testing", "tst", "holdout", "heldout"),
)
"""What folders and tables call the splits, as `plain` makes it. What holds train and val together
is train: val is taken from it."""

_BESIDE = ("dataset", "data", "set", "split", "images", "image", "imgs", "img", "folder")
"""May stand before or behind the name of a split: train_set, Test Images."""

_LOOKS_LIKE_SPLIT = re.compile(
    r"(?:^|_)(?:"
    r"(?:train|training|trainval|test|testing|val|valid|validation|holdout)_?(?:\d*|[a-e])"
    r"|(?:fold|cv|part|split|subset|set)_?(?:\d+|[a-e])"
    r"|(?:batch|chunk|shard|images|imgs|archive|volume|zip|download)_?\d+"
    r"|unlabell?ed"
    r")(?:_|$)"
)
"""Of names in lower case with "_" between words."""


def plain(name: str) -> str:
    """A name without case, spaces, underscores and other marks, to compare it with others.

    >>> plain("Patient ID") == plain("patient_id") == plain("patientId")
    True
    """
    return re.sub(r"[\W_]+", "", name).casefold()


def split_of(name: str) -> int | None:
    """The index into `SPLITS` of the split that a folder or a cell names; None if it names none.

    >>> [split_of(name) for name in ("Training", "val_set", "Test images", "cat")]
    [0, 1, 2, None]
    """
    key = plain(name)
    keys = {key}
    for word in _BESIDE:
        keys |= {key.removesuffix(word), key.removeprefix(word)}
    found = [index for index, names in enumerate(_SPELLINGS) if keys & set(names)]
    return found[0] if found else None


def holds_validation(name: str) -> bool:
    """Whether a name of a training split says that validation images are in it too."""
    return split_of(name) == 0 and "val" in plain(name)


def looks_like_split(name: str) -> bool:
    """Whether a name is that of a split, or like that of a split, a fold or part of a download.

    >>> [looks_like_split(name) for name in ("test2", "fold_1", "HAM_part_2", "Grade 1", "contest")]
    [True, True, True, False, False]
    """
    words = re.sub(r"[\W_]+", "_", name).casefold()
    return split_of(name) is not None or bool(_LOOKS_LIKE_SPLIT.search(words))


def stratified_group_split(
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray | None,
    fractions: Sequence[float] | np.ndarray,
    seed: int,
) -> np.ndarray:
    """Assigns examples to train, val and test by iterative stratification over groups.

    Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", 2011: the
    rarest remaining label first, each of its groups to the split that lacks most of that label;
    ties go to the split that lacks most examples. Here a group counts with all its examples,
    larger ones first, and the last groups of a class go to the splits that have none of it, so
    that a class of three or more groups is in every split. (Where groups have several classes
    at once this can be impossible, and is not promised.)

    The result depends on the arguments only, not on the platform or numpy's version.

    Args:
      labels: int (n,) class indices, or (n, classes) of 0, 1 and NaN (counted as 0).
      groups: (n,) names, or None for a group per example.
      fractions: Of train, val and test: ≥ 0, train > 0, sum 1. A split of 0 stays empty.
      seed: Any integer.

    Returns:
      int (n,): 0 train, 1 val, 2 test.

    Raises:
      UserError: The fractions are not as above.

    >>> labels, groups = np.array([0, 0, 0, 0, 1, 1, 1, 1]), list("aabcdeff")
    >>> stratified_group_split(labels, groups, (0.5, 0.25, 0.25), seed=0)
    array([0, 0, 2, 1, 2, 1, 0, 0])
    """
    return _assign_groups(labels, groups, np.asarray(check_fractions(fractions)), seed)


def stratified_group_folds(
    labels: np.ndarray, groups: Sequence[str] | np.ndarray | None, folds: int, seed: int
) -> np.ndarray:
    """The fold of each example, int (n,) from 0 on: as `stratified_group_split` into equal parts.

    >>> stratified_group_folds(np.array([0, 0, 0, 1, 1, 1]), list("aabcde"), 3, seed=0).tolist()
    [0, 0, 1, 2, 0, 1]
    """
    return _assign_groups(labels, groups, np.full(folds, 1 / folds), seed)


def _assign_groups(
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray | None,
    shares: np.ndarray,
    seed: int,
) -> np.ndarray:
    positives = _positives(np.asarray(labels))
    num_examples = len(positives)
    if groups is None:
        group_of = np.arange(num_examples)
    else:
        group_of = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    num_groups = int(group_of.max()) + 1 if num_examples else 0
    counts = np.zeros((num_groups, positives.shape[1]), np.int64)
    np.add.at(counts, group_of, positives)
    sizes = np.bincount(group_of, minlength=num_groups)
    # numpy promises that raw bits stay the same in all versions; permutations may change.
    raw = np.random.Philox(key=seed % 2**64).random_raw(num_groups)
    shuffled = np.argsort(raw, kind="stable")
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    return _Assigner(counts, sizes, shares).run(order)[group_of]


def check_fractions(fractions: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """The fractions as floats.

    Raises:
      UserError: They are not three numbers ≥ 0 that sum to 1, the first above 0.
    """
    shares = tuple(float(value) for value in fractions)
    good = len(shares) == 3 and min(shares) >= 0 and shares[0] > 0
    if not good or not abs(sum(shares) - 1) <= 1e-6:  # NaN is refused too.
        raise UserError(
            f"fractions of train, val and test: {shares}; three numbers ≥ 0 that sum to 1 are "
            "wanted, the first above 0"
        )
    return shares


class _Assigner:
    """The state of the greedy assignment of groups to splits, or folds."""

    def __init__(self, counts: np.ndarray, sizes: np.ndarray, shares: np.ndarray):
        self.counts, self.sizes = counts, sizes
        self.assigned = np.full(len(counts), -1)
        # Examples that each split still lacks, (classes, splits) by class and (splits,) in all.
        self.lacking = np.outer(counts.sum(axis=0), shares)
        self.lacking_examples = sizes.sum() * shares
        self.open = shares > 0
        # Groups of each class that each split has, (classes, splits), and that are unassigned.
        self.has = np.zeros((counts.shape[1], len(shares)), np.int64)
        self.left = np.count_nonzero(counts, axis=0)

    def run(self, order: np.ndarray) -> np.ndarray:
        """Assigns all groups, in `order` within a class."""
        members = [order[self.counts[order, label] > 0] for label in range(self.counts.shape[1])]
        remaining = set(np.flatnonzero(self.left))
        while remaining:
            label = min(remaining, key=lambda one: (self.left[one], one))
            remaining.discard(label)
            for group in members[label]:
                if self.assigned[group] < 0:
                    self._assign(group, self._best_split(group, self.lacking[label]))
            remaining = {one for one in remaining if self.left[one]}
        for group in order[self.assigned[order] < 0]:
            self._assign(group, self._best_split(group, self.lacking_examples))
        return self.assigned

    def _best_split(self, group: int, lacking: np.ndarray) -> int:
        candidates = self.open
        for label in np.flatnonzero(self.counts[group]):
            without = self.open & (self.has[label] == 0)
            if self.left[label] <= np.count_nonzero(without) and np.any(candidates & without):
                candidates = candidates & without
        # Sums that are equal but for the order of their subtractions must tie: they are rounded.
        return max(
            np.flatnonzero(candidates).tolist(),
            key=lambda split: (
                round(float(lacking[split]), 6),
                round(float(self.lacking_examples[split]), 6),
            ),
        )

    def _assign(self, group: int, split: int) -> None:
        self.assigned[group] = split
        self.lacking[:, split] -= self.counts[group]
        self.lacking_examples[split] -= self.sizes[group]
        present = self.counts[group] > 0
        self.has[present, split] += 1
        self.left[present] -= 1


def _positives(labels: np.ndarray) -> np.ndarray:
    """Integer (n, classes) of 0 and 1."""
    if labels.ndim == 1:
        labels = labels[:, None] == np.arange(labels.max(initial=-1) + 1)
    return (np.nan_to_num(labels) > 0).astype(np.int64)
