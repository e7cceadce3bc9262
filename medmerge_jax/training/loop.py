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
from medmerge_jax.evaluation.predict import STEPS_IN_FLIGHT, evaluate, explain_memory
from medmerge_jax.images.augment import epoch_key
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models.network import Network
from medmerge_jax.runtime import preemption
from medmerge_jax.runtime.mesh import broadcast_from_first, replicate, replicate_key, unreplicate
from medmerge_jax.runtime.progress import Bar, say, say_once
from medmerge_jax.storage.checkpoints import StageCheckpoints
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training.accumulation import accumulated_step
from medmerge_jax.training.augmentation import augmented_batch
from medmerge_jax.training.hints import few_steps, still_loss
from medmerge_jax.training.parameterization import Blend, Parameterization, Tree
from medmerge_jax.training.progress import Progress
from medmerge_jax.training.stage import Stage, StageResult
from medmerge_jax.training.step import Task, collapse, init_state, train_step


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

    The batches are those of the split "train" or "val"; a finished stage does not ask for them. The
    seed is that of the order of the training images, and of their augmentation. What `multilabel`
    and the class weights mean is said at `loss.weighted_loss`.

    Raises:
      DivergedError: The loss is no longer finite. The last checkpoint is of a good state.
      OutOfMemoryError: The batch is too large.
      Preempted: After a signal, see `preemption`. A checkpoint inside the epoch is on the disk.
    """
    task = Task(network, start.assemble, start.train_batch_norm, multilabel, start.still_norms)
    directory.check_there()
    with (
        preemption.deferred(),
        StageCheckpoints(directory.path / "checkpoints" / stage.name) as checkpoints,
    ):
        # What was computed before, as by a merger, may differ in the last bit between processes.
        trees = {name: getattr(start, name) for name in ("trainable", "frozen", "batch_stats")}
        start = dataclasses.replace(start, **broadcast_from_first(trees))
        frozen = replicate(start.frozen, network.mesh)
        progress = Progress(stage, replicate(init_state(start), network.mesh), checkpoints)
        directory.rewind(stage.name, progress.epoch)
        if progress.finished:
            return _result(task, progress, frozen, checkpoints)
        train, validation = batches("train"), batches("val")
        steps, images = train.steps_per_epoch, train.steps_per_epoch * train.batch_size
        progress.steps_per_epoch, progress.rates = steps, _rates(stage, start, steps)
        decays = {p: start.weight_decay.get(p, stage.weight_decay) for p in start.trainable}
        constants = replicate(
            [jax.tree.map(np.float32, decays), np.asarray(class_weights, np.float32)], network.mesh
        )
        say_once(few_steps(stage, steps, train.batch_size))
        with Bar(stage.name, stage.epochs * images, "images", "compiling") as bar:
            bar.skip(progress.epoch * images + progress.step * train.batch_size)
            try:
                while not progress.finished:
                    with explain_memory(f"stage {stage.name}", train.batch_size):
                        record = _train_epoch(task, progress, frozen, train, constants, seed, bar)
                    bar.wait("validating")
                    state = progress.state
                    variables = _collapsed(task, state.trainable, frozen, state.batch_stats)
                    metrics = _validate(progress, network, variables, validation, multilabel)
                    # Before the checkpoint: what is logged too much is dropped on resuming.
                    layers = _by_layer(task, state.trainable, frozen)
                    directory.log({**record, **{f"val_{k}": v for k, v in metrics.items()}}, layers)
                    if record["epoch"] in stage.keep:  # before it, too
                        checkpoints.keep(record["epoch"], variables)
                    progress.finish_epoch(metrics[stage.metric], images)
                    _say_epoch(stage, record, metrics)
            except preemption.Preempted as stopped:
                progress.save_inside_epoch()
                raise preemption.Preempted(
                    f"{stopped} in {stage.name}, after {progress.position()}"
                ) from stopped
        say_once(still_loss(stage, directory.records()))
        return _result(task, progress, frozen, checkpoints)


def _rates(stage: Stage, start: Parameterization, steps: int) -> dict[str, np.ndarray]:
    """Learning rates of every step of the stage, for each part of what is trained."""
    return {part: stage.rates(steps, start.learning_rate.get(part)) for part in start.trainable}


def _train_epoch(
    task: Task,
    progress: Progress,
    frozen: Tree,
    train: Batches,
    constants: list[Any],
    seed: int,
    bar: Bar,
) -> dict[str, Any]:
    """One pass over the training split; moves `progress.state` on.

    The constants are weight decays and class weights, on the devices.
    """
    stage, mesh, rates = progress.stage, task.network.mesh, progress.rates
    epoch, steps, first = progress.epoch, train.steps_per_epoch, progress.step
    if first == 0:
        zero = replicate(jnp.zeros((), jnp.float32), mesh)
        progress.state = progress.state._replace(loss_sum=zero)
    key = None
    if stage.augmentation is not None or task.network.rngs:
        key = replicate_key(epoch_key(seed, epoch), mesh)
    # A step that draws nothing takes no key: with and without augmentation it is one program.
    drawn = key if task.network.rngs else None
    in_flight: collections.deque[jax.Array] = collections.deque()
    batches = train.epoch(seed, epoch, first) if first < steps else ()
    started = time.perf_counter()
    # All at once, so that no step waits for a transfer.
    rows = range(epoch * steps + first, (epoch + 1) * steps)
    on_device = replicate([{part: rates[part][row] for part in rates} for row in rows], mesh)
    try:
        for rate, batch in zip(on_device, batches, strict=True):
            preemption.check()
            if stage.augmentation is not None:
                batch = augmented_batch(stage.augmentation, mesh, batch, key)
            take_step: Any = accumulated_step if isinstance(batch, tuple) else train_step
            state, loss = take_step(task, progress.state, frozen, batch, rate, *constants, drawn)
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
        "learning_rate": float(rates["params"][rows.stop - 1]),
        "train_loss": loss_sum / steps,
        "seconds": round(seconds, 4),
        "images_per_second": round(steps * train.batch_size / seconds, 1),
        **_coefficient_summary(progress.state.trainable),
    }


def _collapsed(task: Task, trainable: Tree, frozen: Tree, batch_stats: Tree) -> Tree:
    """Variables of the ordinary model."""
    return {"params": collapse(task.assemble, trainable, frozen), "batch_stats": batch_stats}


def _validate(
    progress: Progress, network: Network, variables: Tree, validation: Batches, multilabel: bool
) -> dict[str, Any]:
    try:
        return evaluate(network, variables, validation, multilabel, progress.stage.ordinal)
    except FloatingPointError as error:
        what = f"validation after epoch {progress.epoch + 1}: {error}"
        raise progress.diverged(what) from error


def _result(
    task: Task, progress: Progress, frozen: Tree, checkpoints: StageCheckpoints
) -> StageResult:
    stage, values = progress.stage, progress.values
    trainable, batch_stats, *opt_state = progress.selected
    variables = _collapsed(task, trainable, frozen, batch_stats)
    if task.network.mesh is not None:
        variables, trainable, opt_state = unreplicate((variables, trainable, opt_state))
    summary = {
        "name": stage.name,
        "epochs": values["epoch"],
        "selected_epoch": values["best_epoch" if stage.select == "best" else "epoch"],
        "best_epoch": values["best_epoch"],
        f"best_val_{stage.metric}": values["best_value"],
        "images": values["images"],
        "seconds": round(values["seconds"], 3),
        "images_per_second": round(values["images"] / values["seconds"], 1),
    }
    kept = {e: checkpoints.kept(e) for e in sorted(stage.keep) if e <= values["epoch"]}
    return StageResult(variables, trainable, summary, kept, *opt_state)


def _coefficient_summary(trainable: Tree) -> dict[str, float]:
    coefficients = flatten(trainable.get("coefficients", {})).values()
    if not coefficients:
        return {}
    values = np.concatenate([np.ravel(leaf) for leaf in jax.device_get(list(coefficients))])
    return {f"coefficient_{x}": float(getattr(values, x)()) for x in ("mean", "min", "max")}


def _by_layer(task: Task, trainable: Tree, frozen: Tree) -> dict[str, list[list[float]]]:
    """Of a merge, mean, deviation, least and greatest weight of each parent in each layer."""
    if not isinstance(task.assemble, Blend):
        return {}
    summaries = {
        path: np.stack([getattr(of, x)(axis=1) for x in ("mean", "std", "min", "max")], axis=1)
        for path, of in task.assemble.weights(trainable, frozen).items()
    }
    return {
        path: [[float(f"{x:.7g}") for x in of_parent] for of_parent in summary]
        for path, summary in summaries.items()
    }


def _say_epoch(stage: Stage, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    value = metrics[stage.metric]
    shown = "undefined" if value is None else f"{value:.4f}"
    say(
        f"{stage.name} {record['epoch']}/{stage.epochs}: loss {record['train_loss']:.4f}, "
        f"val {stage.metric} {shown}, {record['images_per_second']:.0f} images/s"
    )
