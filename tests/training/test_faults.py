"""What may go wrong while a stage trains: it ends cleanly, and the last good state is kept."""

import dataclasses
import errno
import os
import signal
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick, some_slow

from medmerge_jax.data import ResidentBatches
from medmerge_jax.errors import DivergedError, OutOfMemoryError, UserError
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import LinearHead
from medmerge_jax.models.layers import dense_head
from medmerge_jax.models.network import Network
from medmerge_jax.runtime import preemption
from medmerge_jax.storage.checkpoints import StageCheckpoints
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training import loop, parameterization
from medmerge_jax.training.loop import train_stage
from medmerge_jax.training.stage import Stage

CLASSES, FEATURES, STEPS = 3, 8, 3
STAGE = Stage(name="lp", epochs=3, learning_rate=0.05, checkpoint_seconds=0.0)


@pytest.fixture
def data(rng):
    labels = rng.integers(0, CLASSES, 30)
    features = rng.normal(size=(30, FEATURES)) + labels[:, None] * 0.3
    return features.astype(np.float32), labels.astype(np.int32)


@pytest.fixture
def train(data, tmp_path):
    head = LinearHead(CLASSES).init(jax.random.key(0), jnp.zeros((1, FEATURES)))

    def call(name="run", stage=STAGE, train=None, val=None, model=None, rngs=()):
        whole = ResidentBatches(*data, 8)
        batches = {"train": train or whole, "val": val or whole}
        directory = RunDirectory(tmp_path / name)
        try:
            return train_stage(
                stage,
                parameterization.fine_tune(head),
                Network(model or LinearHead(CLASSES), rngs=rngs),
                batches.__getitem__,
                directory,
                seed=0,
                multilabel=False,
                class_weights=np.ones(CLASSES),
            )
        finally:
            directory.close()

    return call


@pytest.fixture
def signals(monkeypatch):
    """Handled as in the program; afterwards as before."""
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    listener = signal.set_wakeup_fd(-1)
    monkeypatch.setattr(preemption._Noted, "name", "")
    for number in preemption.SIGNALS:
        signal.signal(number, preemption.note)
    yield monkeypatch
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(listener)


def restarted(signals):
    """A new process has no signal noted."""
    signals.setattr(preemption._Noted, "name", "")


class Signalled(ResidentBatches):
    """Sends a signal when the batch `at` of training, or of validation, is asked for."""

    def __init__(self, *args, number, at):
        super().__init__(*args)
        self.number, self.at, self.asked = number, at, 0

    def epoch(self, seed, epoch, start=0):
        return self._count(super().epoch(seed, epoch, start))

    def ordered(self):
        return self._count(super().ordered())

    def _count(self, batches):
        for batch in batches:
            if self.asked == self.at:
                os.kill(os.getpid(), self.number)
            self.asked += 1
            yield batch


@pytest.fixture
def steps(monkeypatch):
    """The steps of all stages that were trained."""
    taken, train_step = [], loop.train_step

    def count(*arguments):
        taken.append(int(arguments[1].step))
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", count)
    return taken


@pytest.mark.parametrize("select", some_slow(("best", "last"), "last"))
@pytest.mark.parametrize("at", some_quick((0, 1, 2, 3, 5, 8), 3, 5))
def test_stopped_at_a_step_it_goes_on_with_the_next(
    train, data, tmp_path, signals, steps, at, select
):
    stage = dataclasses.replace(STAGE, select=select, schedule="linear")
    whole = train("whole", stage)
    steps.clear()
    cut = Signalled(*data, 8, number=signal.SIGTERM, at=at)
    with pytest.raises(preemption.Preempted) as stopped:
        train("cut", stage, train=cut)
    epoch, step = divmod(at, STEPS)
    where = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
    assert str(stopped.value) == f"SIGTERM in lp, after {where}"
    restarted(signals)
    resumed = train("cut", stage)
    assert steps == list(range(STAGE.epochs * STEPS))  # none twice
    assert_same(resumed, whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


class Dropping(nn.Module):
    """A head behind dropout."""

    @nn.compact
    def __call__(self, features, train=False, use_running_average=None):
        features = nn.Dropout(0.5, deterministic=not train)(features)
        return dense_head(FEATURES, CLASSES)(features)


def test_stopped_inside_an_epoch_it_draws_what_it_would_have_drawn(train, data, signals):
    drawing = {"model": Dropping(), "rngs": ("dropout",)}
    whole = train("whole", **drawing)
    with pytest.raises(preemption.Preempted):
        train("cut", train=Signalled(*data, 8, number=signal.SIGTERM, at=4), **drawing)
    restarted(signals)
    assert_same(train("cut", **drawing), whole)


@pytest.mark.parametrize("at", some_quick((0, 3, 6, 11), 3))
def test_stopped_while_it_validates_it_trains_no_step_again(
    train, data, tmp_path, signals, steps, at
):
    whole = train("whole")
    steps.clear()
    cut = Signalled(*data, 8, number=signal.SIGUSR1, at=at)
    with pytest.raises(preemption.Preempted, match="SIGUSR1"):
        train("cut", val=cut)
    assert cut.asked == at + 1  # it does not wait for the end of the validation
    restarted(signals)
    resumed = train("cut")
    assert steps == list(range(STAGE.epochs * STEPS))
    assert_same(resumed, whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_ctrl_c_saves_too(train, data, tmp_path, signals):
    whole = train("whole")
    with pytest.raises(preemption.Preempted, match="Ctrl-C in lp, after step 1 of epoch 2"):
        train("cut", train=Signalled(*data, 8, number=signal.SIGINT, at=4))
    assert preemption.exit_status() == 130
    restarted(signals)
    assert preemption.exit_status() == preemption.EXIT_STATUS
    assert_same(train("cut"), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_stopped_again_and_again(train, data, tmp_path, signals, steps):
    """Also where checkpoints are rare, and in the first step after each start."""
    stage = dataclasses.replace(STAGE, checkpoint_seconds=1e9)
    whole = train("whole", stage)
    steps.clear()
    starts = 0
    while starts < 100:
        starts += 1
        restarted(signals)
        try:
            resumed = train("cut", stage, Signalled(*data, 8, number=signal.SIGTERM, at=1))
            break
        except preemption.Preempted:
            continue
    assert starts == STAGE.epochs * STEPS
    assert steps == list(range(STAGE.epochs * STEPS))
    assert_same(resumed, whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_signal_in_the_last_moment_of_a_stage(signals):
    with pytest.raises(preemption.Preempted), preemption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        reached = True
    assert reached


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a bit of the arrays": lambda folder: flip(largest_file(folder)),
    "half of the arrays": lambda folder: truncate(largest_file(folder)),
    "no arrays": lambda folder: largest_file(folder).unlink(),
    "a bit of the metadata": lambda folder: flip(folder / "_CHECKPOINT_METADATA"),
    "no metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
}


@pytest.mark.parametrize(
    "damage", some_quick(DAMAGES, "a bit of the arrays", "a bit of the metadata")
)
# Inside an epoch, and where the stage was finished.
@pytest.mark.parametrize("at", some_slow((4, None), None))
def test_a_damaged_checkpoint_and_the_one_before(
    train, data, tmp_path, signals, steps, capfd, damage, at
):
    whole = train("whole")
    if at is None:
        train("cut")
    else:
        with pytest.raises(preemption.Preempted):
            train("cut", train=Signalled(*data, 8, number=signal.SIGTERM, at=at))
        restarted(signals)
    folder = tmp_path / "cut" / "checkpoints" / "lp"
    before, newest = sorted(int(path.name) for path in folder.iterdir() if path.is_dir())
    DAMAGES[damage](folder / str(newest))
    steps.clear()
    capfd.readouterr()
    resumed = train("cut")
    said = capfd.readouterr().err
    assert f"{newest} is damaged" in said
    assert f"before it there is number {before}" in said
    assert f"lp: resumed after epoch {1 if at else 2} of 3" in said
    assert steps[0] == (STEPS if at else 2 * STEPS)
    assert_same(resumed, whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert (folder / f"{newest}.damaged").is_dir()


def test_all_checkpoints_damaged(train, tmp_path, steps, capfd):
    whole = train()
    folder = tmp_path / "run" / "checkpoints" / "lp"
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        flip(largest_file(path))
    steps.clear()
    assert_same(train(), whole)
    assert "before it there is none" in capfd.readouterr().err
    assert steps == list(range(STAGE.epochs * STEPS))


def test_a_damaged_checkpoint_without_checksums(train, tmp_path, capfd):
    """The process was killed between the two."""
    whole = train()
    folder = tmp_path / "run" / "checkpoints" / "lp"
    newest = max((p for p in folder.iterdir() if p.is_dir()), key=lambda p: int(p.name))
    newest.with_suffix(".json").unlink()
    truncate(largest_file(newest))
    assert_same(train(), whole)
    assert "is damaged (" in capfd.readouterr().err


def test_two_checkpoints_are_kept_with_their_checksums(train, tmp_path):
    train(stage=dataclasses.replace(STAGE, epochs=5))
    folder = tmp_path / "run" / "checkpoints" / "lp"
    assert {path.name for path in folder.iterdir()} == {"16", "16.json", "20", "20.json"}


def test_no_weights_are_saved_that_are_not_finite(train, data, signals, monkeypatch):
    """A finite loss may have a gradient that is not: the state before it is kept."""
    train_step = loop.train_step

    def broken(*arguments):
        state, loss = train_step(*arguments)
        if int(state.step) == 5:
            state = state._replace(trainable=jax.tree.map(lambda x: x * jnp.nan, state.trainable))
        return state, loss

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", broken)
        with pytest.raises(DivergedError) as error:
            train("cut", train=Signalled(*data, 8, number=signal.SIGTERM, at=5))
    assert "the weights were not finite after step 2 of epoch 2" in str(error.value)
    assert "the checkpoint after epoch 1 is kept" in str(error.value)
    restarted(signals)
    assert_same(train("cut"), train("whole"))


class Greedy(nn.Module):
    """Wants more memory than there are addresses."""

    num_classes: int

    @nn.compact
    def __call__(self, inputs, train=False, use_running_average=True):
        logits = nn.Dense(self.num_classes, name="head")(inputs)
        wide = jnp.broadcast_to(inputs[:, :1, None], (len(inputs), 2**22, 2**22))
        return logits + 1e-9 * (jax.lax.sort(wide, dimension=1)[:, :1, 0])


def test_out_of_memory_says_which_batch_size_to_try(train, tmp_path):
    with pytest.raises(OutOfMemoryError) as error:
        train(model=Greedy(CLASSES))
    message = str(error.value)
    assert "stage lp: out of memory with batch_size = 8" in message
    assert "Try batch_size = 4" in message
    assert "accumulate" in message


# Orbax closes its event loop before TensorStore has told it how all the writes ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_workdir_that_vanished_is_not_made_anew(train, data, tmp_path):
    """And a checkpoint that is being written neither hides that nor brings it back."""

    class Vanishing(ResidentBatches):
        def epoch(self, seed, epoch, start=0):
            if epoch == 2:
                (tmp_path / "run").rename(tmp_path / "elsewhere")
            return super().epoch(seed, epoch, start)

    whole = train("whole")
    with (
        pytest.raises(UserError, match="run has vanished"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        train(train=Vanishing(*data, 8))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert_same(train("elsewhere"), whole)
    assert lines(tmp_path / "elsewhere") == lines(tmp_path / "whole")


@pytest.mark.parametrize(("text", "kind"), [("none found in {}/4", OSError), ("?", ValueError)])
def test_files_that_orbax_misses_are_gone(tmp_path, monkeypatch, text, kind):
    """It does not raise an OSError when somebody removes what it has just written."""
    failing = mock.Mock(side_effect=ValueError(text.format(tmp_path)))
    with StageCheckpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "save_async", failing)
        with pytest.raises(kind) as raised:
            checkpoints.save(4, {"x": jnp.zeros(1)}, {})
    if kind is OSError:
        assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(tmp_path))


def lines(run):
    """metrics.jsonl without times."""
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in r.items() if k not in times} for r in RunDirectory(run).records()]


def assert_same(found, wanted):
    for name in ("variables", "trainable"):
        ours, theirs = flatten(getattr(found, name)), flatten(getattr(wanted, name))
        assert ours.keys() == theirs.keys()
        for path in ours:
            np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    times = {"seconds": None, "images_per_second": None}
    assert {**found.summary, **times} == {**wanted.summary, **times}
