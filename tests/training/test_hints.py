"""Warnings of stages that hardly train, with what to try."""

import re

import pytest

from medmerge_jax.training.hints import FEW_STEPS, few_steps, still_loss
from medmerge_jax.training.stage import Stage

STAGE = Stage(name="merge_lp", group="lp", learning_rate=1e-4, epochs=5)


def records(*losses, stage="merge_lp"):
    return [{"stage": stage, "epoch": n, "train_loss": x} for n, x in enumerate(losses, 1)]


@pytest.mark.parametrize(("steps", "batch"), [(9, 16), (3, 64), (1, 64), (1, 2), (2, 4)])
def test_what_is_advised_gives_enough_steps(steps, batch):
    text = few_steps(STAGE, steps, batch)
    assert f"merge_lp makes {steps} step" in text
    smaller = re.search(r"batch_size = (\d+)", text)
    if smaller:
        assert 4 <= int(smaller[1]) < batch
    else:
        assert batch <= 4  # batch norms want several images
    epochs = int(re.search(r"lp\.epochs = (\d+)", text)[1])
    assert epochs * steps >= FEW_STEPS * STAGE.epochs


def test_a_smaller_batch_is_the_largest_that_suffices():
    assert "batch_size = 16," in few_steps(STAGE, 3, 64)  # 192 images: 12 steps of 16, 6 of 32


def test_enough_steps_are_no_news():
    assert few_steps(STAGE, FEW_STEPS, 64) == ""


def test_a_loss_that_hardly_moves():
    text = still_loss(STAGE, records(1.609, 1.608, 1.605) + records(3, 2, 1, stage="ft"))
    assert "from 1.6090 to 1.6050" in text
    assert "try lp.learning_rate = 0.001, or more epochs" in text


@pytest.mark.parametrize(
    "losses", [(), (1.6,), (1.6, 1.5), (1.5, 1.6), (0.0501, 0.05)]  # the last has come to its end
)  # fmt: skip
def test_a_loss_that_moves_or_of_which_nothing_is_known(losses):
    assert still_loss(STAGE, records(*losses)) == ""


def test_a_cyclic_rate_comes_back_by_itself():
    cyclic = Stage(name="fgg", group="fgg", cycle=4, epochs=8)
    assert still_loss(cyclic, records(1, 1, stage="fgg")) == ""
