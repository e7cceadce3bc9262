"""The one training loop: a stage is a number of epochs of the one step."""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.data.batches import Batches
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import higher_is_better
from medmerge_jax.evaluation.predict import STEPS_IN_FLIGHT, evaluate, explain_memory
from medmerge_jax.images.augment import Policy, epoch_key
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models.network import Network
from medmerge_jax.runtime import preemption, processes
from medmerge_jax.runtime.mesh import as_in_first, on_one, replicate, replicate_key
from medmerge_jax.runtime.progress import Bar, say
from medmerge_jax.storage.checkpoints import StageCheckpoints
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training.parameterization import Parameterization, Tree
from medmerge_jax.training.schedules import learning_rates
from medmerge_jax.training.step import (
    Task,
    TrainState,
    accumulated_step,
    collapse,
    init_state,
    train_step,
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """How long and how a stage trains.

    Attributes:
      name: Names its checkpoints and its lines in metrics.jsonl.
      epochs: Passes over the training split.
      learning_rate: Peak.
      schedule: See `schedules.learning_rates`.
      warmup_epochs: Of linear warm-up, may be a fraction.
      weight_decay: Of AdamW.
      select: "best" epoch by validation `metric`, or the "last".
      metric: A name of `metrics.METRICS`.
      checkpoint_seconds: Least time between two checkpoints, and before the first; the last epoch
        always has one.
      augmentation: Of training images, or None; what is evaluated is never augmented.
    """

    name: str
    epochs: int
    learning_rate: float
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    weight_decay: float = 1e-2
    select: str = "best"
    metric: str = "macro_f1"
    checkpoint_seconds: float = 30.0
    augmentation: Policy | None = None


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage leaves.

    Attributes:
      variables: `{"params", "batch_stats"}` of an ordinary model, already collapsed.
      trainable: What was trained, see `Parameterization`; of a merge with its coefficients.
      summary: JSON values for results.json.
    """

    variables: Tree
    trainable: Tree
    summary: dict[str, Any]


def train_stage(
    stage: Stage,
    start: Parameterization,
    network: Network,
    batches: Callable[[str], Batches],
    directory: RunDirectory,
    *,
    seed: int,
    multilabel: bool,
    class_weights: np.ndarray,
) -> StageResult:
    """Trains, or goes on from the newest checkpoint, or returns what was finished before.

    Args:
      stage: How long and how.
      start: What is trained, from where.
      network: The model.
      batches: Of the split "train" or "val"; not called for a finished stage.
      directory: Takes checkpoints and metrics.
      seed: Of the order of the training images, and of their augmentation.
      multilabel: See `step.weighted_loss`.
      class_weights: (classes,), see `step.weighted_loss`.

    Raises:
      UserError: The loss is no longer finite. The last checkpoint is of a good state.
      Preempted: After a signal, see `preemption`. A checkpoint inside the epoch is on the disk.
    """
    task = Task(
        network,
        start.assemble,
        start.train_batch_norm,
        multilabel,
        stage.weight_decay,
        stage.augmentation,
    )
    directory.check_there()
    with (
        preemption.deferred(),
        StageCheckpoints(directory.path / "checkpoints" / stage.name) as checkpoints,
    ):
        start = _as_in_first(start)
        frozen = replicate(start.frozen, network.mesh)
        state = replicate(init_state(task, start), network.mesh)
        progress = _Progress(stage, task, state, checkpoints)
        directory.rewind(stage.name, progress.epoch)
        if progress.epoch == stage.epochs:
            return progress.result(frozen)
        train, validation = batches("train"), batches("val")
        progress.steps_per_epoch = train.steps_per_epoch
        rates = progress.rates = learning_rates(
            stage.schedule,
            stage.learning_rate,
            stage.epochs * train.steps_per_epoch,
            warmup_steps=round(stage.warmup_epochs * train.steps_per_epoch),
        )
        weights = replicate(jnp.asarray(class_weights, jnp.float32), network.mesh)
        total = stage.epochs * train.steps_per_epoch * train.batch_size
        with Bar(stage.name, total, "images") as bar:
            bar.skip((progress.epoch * train.steps_per_epoch + progress.step) * train.batch_size)
            try:
                while progress.epoch < stage.epochs:
                    with explain_memory(f"stage {stage.name}", train.batch_size):
                        record = _train_epoch(
                            stage, task, progress, frozen, train, rates, weights, seed, bar
                        )
                    metrics = _validate(stage, network, progress, frozen, validation, multilabel)
                    # Before the checkpoint: what is logged too much is dropped on resuming.
                    directory.log({**record, **{f"val_{k}": v for k, v in metrics.items()}})
                    images = train.steps_per_epoch * train.batch_size
                    progress.finish_epoch(metrics, images)
                    _say_epoch(stage, record, metrics)
            except preemption.Preempted as stopped:
                progress.save_inside_epoch()
                raise preemption.Preempted(
                    f"{stopped} in {stage.name}, after {progress.position()}"
                ) from stopped
        return progress.result(frozen)


def _as_in_first(start: Parameterization) -> Parameterization:
    """What was computed before, such as a merger, may differ in the last bit between processes."""
    trees = {name: getattr(start, name) for name in ("trainable", "frozen", "batch_stats")}
    return dataclasses.replace(start, **as_in_first(trees))


class _Progress:
    """Where a stage stands, in memory and in its checkpoints."""

    def __init__(self, stage: Stage, task: Task, state: TrainState, checkpoints: StageCheckpoints):
        self.stage, self.task, self.state = stage, task, state
        self.best = _copy((state.trainable, state.batch_stats)) if stage.select == "best" else ()
        self.values: dict[str, Any] = {
            "epoch": 0,
            "step": 0,
            "epoch_seconds": 0.0,
            "seconds": 0.0,
            "images": 0,
            "best_epoch": 0,
            "best_value": None,
            "finished": False,
        }
        self._checkpoints = checkpoints
        self._last_save = time.monotonic()  # what a short stage would lose is soon done again
        restored = checkpoints.restore(self._tree)
        if restored is not None:
            tree, values = restored
            self.values.update(values)
            self.best = tree["best"]
            self.state = tree.get("state", self.state)
            say(f"{stage.name}: resumed after {self.position()} of {stage.epochs}")
        self.steps_per_epoch, self.rates = 0, np.zeros(0)  # not known before there are batches
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

    def position(self) -> str:
        return f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"epoch {self.epoch}"

    def variables(self, frozen: Tree) -> Tree:
        params = collapse(self.task.assemble, self.state.trainable, frozen)
        return {"params": params, "batch_stats": self.state.batch_stats}

    def advance(self, state: TrainState) -> None:
        """Takes the state after one more step."""
        self.state = state
        self.values["step"] += 1

    def finish_epoch(self, metrics: dict[str, Any], images: int) -> None:
        values = self.values
        values["seconds"] += values["epoch_seconds"]
        values["images"] += images
        values.update(epoch=self.epoch + 1, step=0, epoch_seconds=0.0)
        if self._is_best(metrics[self.stage.metric]):
            values.update(best_epoch=self.epoch, best_value=metrics[self.stage.metric])
            if self.stage.select == "best":
                self.best = _copy((self.state.trainable, self.state.batch_stats))
        since = time.monotonic() - self._last_save
        # All processes save, or none: the clock of one decides.
        due = processes.from_first(lambda: since >= self.stage.checkpoint_seconds)
        values["finished"] = self.epoch == self.stage.epochs
        if values["finished"] or due:
            self._save()

    def save_inside_epoch(self) -> None:
        """Saves what there is, unless the newest checkpoint is of it; returns when it is there.

        Raises:
          UserError: What there is is not finite.
        """
        if (self.epoch, self.step) != self._saved:
            self.check_losses()
            if not _all_finite((self.state.trainable, self.state.batch_stats)):
                raise _diverged(self, f"the weights were not finite after {self.position()}")
            self._save()
        self._checkpoints.wait()

    def check_losses(self) -> float:
        """The sum of this epoch's; raises a UserError if one was not finite."""
        loss_sum, bad_step = jax.device_get((self.state.loss_sum, self.state.bad_step))
        if bad_step >= 0:
            epoch = int(bad_step) // self.steps_per_epoch
            what = f"the loss was not finite at step {bad_step + 1} (epoch {epoch + 1}, learning "
            raise _diverged(self, f"{what}rate {self.rates[bad_step]:.3g})")
        return float(loss_sum)

    def _save(self) -> None:
        # Numbers that grow, also from the last step of an epoch to the end of its validation.
        number = self.epoch * (self.steps_per_epoch + 1) + self.step
        tree = self._tree(self.values)
        if "state" in tree:  # its buffers are donated to the next step: the writer gets a copy
            tree["state"] = _copy(self.state)
        self._checkpoints.save(number, tree, dict(self.values))
        self._last_save = time.monotonic()
        self._saved, self.saved_position = (self.epoch, self.step), self.position()

    def result(self, frozen: Tree) -> StageResult:
        trainable, batch_stats = self._selected
        params = collapse(self.task.assemble, trainable, frozen)
        best = self.stage.select == "best"
        summary = {
            "name": self.stage.name,
            "epochs": self.stage.epochs,
            "selected_epoch": self.values["best_epoch" if best else "epoch"],
            "best_epoch": self.values["best_epoch"],
            f"best_val_{self.stage.metric}": self.values["best_value"],
            "seconds": round(self.values["seconds"], 3),
            "images_per_second": round(self.values["images"] / self.values["seconds"], 1),
        }
        variables = {"params": params, "batch_stats": batch_stats}
        if self.task.network.mesh is not None:
            variables, trainable = on_one((variables, trainable))
        return StageResult(variables, trainable, summary)

    def _is_best(self, value: float | None) -> bool:
        best = self.values["best_value"]
        if value is None or best is None:
            return self.values["best_epoch"] == 0 or (best is None and value is not None)
        return value > best if higher_is_better(self.stage.metric) else value < best

    @property
    def _selected(self) -> tuple[Tree, Tree]:
        """Of the best epoch or the last: what was trained, and the running statistics."""
        return self.best or (self.state.trainable, self.state.batch_stats)

    def _tree(self, values: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint with these values holds: once finished, only what `result` needs."""
        if values.get("finished"):
            return {"best": self._selected}
        return {"state": self.state, "best": self.best}


def _validate(
    stage: Stage,
    network: Network,
    progress: _Progress,
    frozen: Tree,
    validation: Batches,
    multilabel: bool,
) -> dict[str, Any]:
    try:
        return evaluate(network, progress.variables(frozen), validation, multilabel)
    except FloatingPointError as error:
        what = f"validation after epoch {progress.epoch + 1}: {error}"
        raise _diverged(progress, what) from error


def _diverged(progress: _Progress, what: str) -> UserError:
    saved = progress.saved_position
    kept = f"the checkpoint after {saved} is kept" if saved else "there is no checkpoint yet"
    return UserError(
        f"stage {progress.stage.name}: {what}; {kept}. "
        "Lower the stage's learning_rate or raise its warmup_epochs, in a new --workdir."
    )


def _train_epoch(
    stage: Stage,
    task: Task,
    progress: _Progress,
    frozen: Tree,
    train: Batches,
    rates: np.ndarray,
    class_weights: jax.Array,
    seed: int,
    bar: Bar,
) -> dict[str, Any]:
    """One pass over the training split; moves `progress.state` on."""
    epoch, steps, first = progress.epoch, train.steps_per_epoch, progress.step
    if first == 0:
        zero = replicate(jnp.zeros((), jnp.float32), task.network.mesh)
        progress.state = progress.state._replace(loss_sum=zero)
    key = None
    if stage.augmentation is not None:
        key = replicate_key(epoch_key(seed, epoch), task.network.mesh)
    in_flight: collections.deque[jax.Array] = collections.deque()
    batches = train.epoch(seed, epoch, first) if first < steps else ()
    started = time.perf_counter()
    # All at once, so that no step waits for a transfer.
    ours = replicate(list(rates[epoch * steps + first : (epoch + 1) * steps]), task.network.mesh)
    try:
        for rate, batch in zip(ours, batches, strict=True):
            preemption.check()
            now = (rate, class_weights, key)
            if isinstance(batch, tuple):
                state, loss = accumulated_step(task, progress.state, frozen, batch, *now)
            else:
                state, loss = train_step(task, progress.state, frozen, batch, *now)
            progress.advance(state)
            in_flight.append(loss)
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            bar.advance(train.batch_size, f"{stage.name} epoch {epoch + 1}/{stage.epochs}")
        loss_sum = progress.check_losses()
    finally:
        progress.values["epoch_seconds"] += time.perf_counter() - started
    seconds = progress.values["epoch_seconds"]
    return {
        "stage": stage.name,
        "epoch": epoch + 1,
        "learning_rate": float(rates[(epoch + 1) * steps - 1]),
        "train_loss": loss_sum / steps,
        "seconds": round(seconds, 4),
        "images_per_second": round(steps * train.batch_size / seconds, 1),
        **_coefficient_summary(progress.state.trainable),
    }


def _coefficient_summary(trainable: Tree) -> dict[str, float]:
    coefficients = flatten(trainable.get("coefficients", {})).values()
    if not coefficients:
        return {}
    values = np.concatenate([np.ravel(leaf) for leaf in jax.device_get(list(coefficients))])
    summary = {"mean": values.mean(), "min": values.min(), "max": values.max()}
    return {f"coefficient_{name}": float(value) for name, value in summary.items()}


def _say_epoch(stage: Stage, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    value = metrics[stage.metric]
    shown = "undefined" if value is None else f"{value:.4f}"
    say(
        f"{stage.name} {record['epoch']}/{stage.epochs}: loss {record['train_loss']:.4f}, "
        f"val {stage.metric} {shown}, {record['images_per_second']:.0f} images/s"
    )


def _all_finite(tree: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
