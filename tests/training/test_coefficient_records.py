"""What a merge records of its coefficients after every epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_network import OneLayer

from medmerge_jax.data import ResidentBatches
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.storage.run_directory import COEFFICIENTS, RunDirectory
from medmerge_jax.training import loop, parameterization
from medmerge_jax.training.stage import Stage

STAGE = Stage(name="merge_lp", epochs=2, learning_rate=0.05, checkpoint_seconds=0.0, select="last")


class Killed(BaseException):
    """Like a signal: nothing catches it."""


@pytest.fixture(scope="module")
def parents():
    init = jax.jit(OneLayer(2).init)
    return [init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3))) for seed in range(3)]


def train(folder, parents, constraint="none", end=None):
    rng = np.random.default_rng(0)
    batches = ResidentBatches(rng.integers(0, 256, (12, 8, 8, 3), np.uint8),
                              np.arange(12, dtype=np.int32) % 2, 4)  # fmt: skip
    taken = []

    class Ended(ResidentBatches):
        def epoch(self, seed, epoch, start=0):
            for batch in super().epoch(seed, epoch, start):
                taken.append(batch)
                if len(taken) == end:
                    raise Killed
                yield batch

    batches.__class__ = Ended
    start = parameterization.merge_linear_probe(
        parents, parents[0]["params"]["head"], constraint=constraint
    )
    directory = RunDirectory(folder)
    try:
        return loop.train_stage(
            STAGE, start, Network(OneLayer(2), Preprocessing(8)), lambda split: batches, directory,
            seed=0, multilabel=False, class_weights=np.ones(2),
        )  # fmt: skip
    finally:
        directory.close()


@pytest.mark.parametrize("constraint", ["sigmoid", pytest.param("none", marks=pytest.mark.slow)])
def test_the_last_record_is_of_the_learned_weights(tmp_path, parents, constraint):
    """Of three parents, the last being one minus the others."""
    raw = np.asarray(train(tmp_path, parents, constraint).trainable["coefficients"]["conv/kernel"])
    if constraint == "sigmoid":
        raw = np.exp(raw) / (1 + np.exp(raw).sum(axis=0))
    weights = np.concatenate([raw, 1 - raw.sum(axis=0, keepdims=True)])
    records = RunDirectory(tmp_path).records(COEFFICIENTS)
    assert [(one["stage"], one["epoch"]) for one in records] == [("merge_lp", e) for e in (1, 2)]
    wanted = [[w.mean(), w.std(), w.min(), w.max()] for w in weights]
    np.testing.assert_allclose(records[-1]["layers"]["conv/kernel"], wanted, rtol=1e-5, atol=1e-7)
    assert records[0] != records[1]


def test_what_was_interrupted_has_the_same_records(tmp_path, parents):
    train(tmp_path / "whole", parents[:2])
    with pytest.raises(Killed):
        train(tmp_path / "cut", parents[:2], end=5)
    train(tmp_path / "cut", parents[:2])
    whole, cut = (tmp_path / name / COEFFICIENTS for name in ("whole", "cut"))
    assert whole.read_text() == cut.read_text()
