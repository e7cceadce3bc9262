"""Where a stage stands, in memory and in its checkpoints."""

import time
from typing import Any

import jax
import numpy as np

from medmerge_jax.errors import DivergedError
from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.merging.trees import flatten, unflatten
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage.checkpoints import StageCheckpoints
from medmerge_jax.training.stage import Stage
from medmerge_jax.training.step import TrainState, copy_tree


class Progress:
    """How far a stage is: from the newest checkpoint if there is one, else at its beginning."""

    def __init__(self, stage: Stage, state: TrainState, checkpoints: StageCheckpoints):
        self.stage, self.state = stage, state
        self._best = copy_tree(self._result()) if stage.select == "best" else ()
        self.values: dict[str, Any] = {  # that a checkpoint has beside its arrays
            "epoch": 0,
            "step": 0,
            "epoch_seconds": 0.0,
            "seconds": 0.0,
            "images": 0,
            "best_epoch": 0,
            "best_value": None,
            "epochs_without_progress": 0,
            "finished": False,
        }
        self._checkpoints = checkpoints
        self._last_save = time.monotonic()  # what a short stage would lose is soon done again
        restored = checkpoints.restore(lambda values: _nested(self._tree(values)))
        if restored is not None:
            tree, values = restored
            tree = _flat_like(self._tree(values), tree)
            self.values.update(values)
            self._best = tree["best"]
            self.state = tree.get("state", self.state)
            say(f"{stage.name}: resumed after {self.position()} of {stage.epochs}")
        self.steps_per_epoch = 0  # until there are batches, as also the next
        self.rates: dict[str, np.ndarray] = {}  # of every step, by part of what is trained
        self._saved = (self.epoch, self.step)
        self.saved_position = self.position() if restored else ""

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.values["epoch"]

    @property
    def step(self) -> int:
        """Steps of the next epoch that are done; all of them if only its validation is not."""
        return self.values["step"]

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return self.values["finished"]

    def position(self) -> str:
        """Where the stage is, in words."""
        return f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"epoch {self.epoch}"

    @property
    def selected(self) -> tuple[Any, ...]:
        """After the selected epoch: what was trained, running statistics, and the optimiser.

        The last only if the stage is to keep it.
        """
        return self._best or self._result()

    def _result(self) -> tuple[Any, ...]:
        """What would be selected now."""
        state = self.state
        optimizer = (state.opt_state,) if self.stage.keep_optimizer else ()
        return (state.trainable, state.batch_stats, *optimizer)

    def advance(self, state: TrainState) -> None:
        """Takes the state after one more step."""
        self.state = state
        self.values["step"] += 1

    def finish_epoch(self, value: float | None, images: int) -> None:
        """Counts an epoch with its value of the stage's metric, and saves it if it is time to."""
        values, stage = self.values, self.stage
        values["seconds"] += values["epoch_seconds"]
        values["images"] += images
        values.update(epoch=self.epoch + 1, step=0, epoch_seconds=0.0)
        if self._is_best(value):
            values.update(best_epoch=self.epoch, best_value=value, epochs_without_progress=0)
            if stage.select == "best":
                self._best = copy_tree(self._result())
        elif value is not None and self._gain(value) < -stage.patience_delta:
            values["epochs_without_progress"] += 1
        stopped = 0 < stage.patience <= values["epochs_without_progress"]
        values["finished"] = stopped or self.epoch == stage.epochs
        if stopped:
            say(f"{stage.name}: ends after epoch {self.epoch}, {stage.patience} without progress")
        if self.finished and stage.select == "best" and values["best_value"] is None:
            say(
                f"{stage.name}: {stage.metric} was undefined on the validation images in every "
                f"epoch, so the last epoch, {self.epoch}, is taken; select.metric names another"
            )
        since = time.monotonic() - self._last_save
        # All processes save, or none: the clock of one decides.
        due = processes.from_first(lambda: since >= stage.checkpoint_seconds)
        if self.finished or due:
            self._save()

    def save_inside_epoch(self) -> None:
        """Saves what there is and waits for the disk; a DivergedError if it is not finite."""
        if (self.epoch, self.step) != self._saved:
            self.check_losses()
            if not _all_finite((self.state.trainable, self.state.batch_stats)):
                raise self.diverged(f"the weights were not finite after {self.position()}")
            self._save()
        self._checkpoints.wait()

    def check_losses(self) -> float:
        """The sum of this epoch's; raises a DivergedError if one was not finite."""
        loss_sum, bad_step = jax.device_get((self.state.loss_sum, self.state.bad_step))
        if bad_step >= 0:
            epoch = int(bad_step) // self.steps_per_epoch
            what = f"the loss was not finite at step {bad_step + 1} (epoch {epoch + 1}, learning "
            raise self.diverged(f"{what}rate {self.rates['params'][bad_step]:.3g})")
        return float(loss_sum)

    def diverged(self, what: str) -> DivergedError:
        """The error that says so, what is kept and what to do."""
        saved = self.saved_position
        kept = f"the checkpoint after {saved} is kept" if saved else "there is no checkpoint yet"
        return DivergedError(
            f"stage {self.stage.name}: {what}; {kept}. "
            "Lower the stage's learning_rate or raise its warmup_epochs, in a new --workdir."
        )

    def _save(self) -> None:
        # Numbers that grow, also from the last step of an epoch to the end of its validation.
        number = self.epoch * (self.steps_per_epoch + 1) + self.step
        tree = self._tree(self.values)
        if "state" in tree:  # its buffers are donated to the next step: the writer gets a copy
            tree["state"] = copy_tree(self.state)
        self._checkpoints.save(number, _nested(tree), dict(self.values))
        self._last_save = time.monotonic()
        self._saved, self.saved_position = (self.epoch, self.step), self.position()

    def _is_best(self, value: float | None) -> bool:
        """Of equals the first is; as long as the metric is undefined, the newest epoch."""
        if self.values["best_value"] is None:
            return True
        return value is not None and self._gain(value) > 0

    def _gain(self, value: float) -> float:
        """By how much the value is better than the best so far."""
        difference = value - self.values["best_value"]
        return difference if METRICS[self.stage.metric].higher_is_better else -difference

    def _tree(self, values: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint with these values holds: once finished, only what is selected."""
        if values.get("finished"):
            return {"best": self.selected}
        return {"state": self.state, "best": self._best}


def _nested(tree: Any) -> Any:
    """As checkpoints have it: each dict of arrays by path is nested there."""
    return jax.tree.map(lambda x: unflatten(x) if _is_flat(x) else x, tree, is_leaf=_is_flat)


def _flat_like(like: Any, tree: Any) -> Any:
    """Undoes `_nested`; the structure is that of `like`."""
    return jax.tree.map(
        lambda x, node: flatten(node) if _is_flat(x) else node, like, tree, is_leaf=_is_flat
    )


def _is_flat(tree: Any) -> bool:
    return isinstance(tree, dict) and jax.tree_util.all_leaves(tree.values())


def _all_finite(tree: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))
