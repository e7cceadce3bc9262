"""The loop: it resumes bit for bit, chooses the epoch asked for, and keeps the last good state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.parameters import some_quick, some_slow
from helpers.tiny_network import OneLayer

from medmerge_jax.data import ResidentBatches, StreamedBatches
from medmerge_jax.errors import DivergedError, UserError
from medmerge_jax.evaluation.predict import evaluate, predict
from medmerge_jax.images.augment import POLICIES, epoch_key
from medmerge_jax.merging.trees import flatten, unflatten, without_head
from medmerge_jax.models import LinearHead, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.storage.checkpoints import StageCheckpoints
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training import loop, parameterization
from medmerge_jax.training.loop import train_stage
from medmerge_jax.training.progress import Progress
from medmerge_jax.training.schedules import learning_rates
from medmerge_jax.training.stage import Stage
from medmerge_jax.training.step import TrainState, copy_tree

CLASSES, FEATURES = 3, 8
STAGE = Stage(name="lp", epochs=4, learning_rate=0.05, checkpoint_seconds=0.0)
AT_ITS_END = dataclasses.replace(STAGE, checkpoint_seconds=1e9)
"""With a checkpoint at the end alone."""
MODEL = Network(LinearHead(CLASSES))


@pytest.fixture
def data(rng):
    labels = rng.integers(0, CLASSES, 30)
    features = rng.normal(size=(30, FEATURES)) + labels[:, None] * 0.3
    return features.astype(np.float32), labels.astype(np.int32)


@pytest.fixture
def start():
    head = LinearHead(CLASSES).init(jax.random.key(0), jnp.zeros((1, FEATURES)))
    return parameterization.fine_tune(head)


@pytest.fixture
def train(data, start, tmp_path):
    def call(stage=STAGE, name="run", batches=None, start=start, network=MODEL, seed=0):
        whole = ResidentBatches(*data, 8)
        directory = RunDirectory(tmp_path / name)
        try:
            return train_stage(
                stage,
                start,
                network,
                batches or (lambda split: whole),
                directory,
                seed=seed,
                multilabel=False,
                class_weights=np.ones(CLASSES),
            )
        finally:
            directory.close()

    return call


class Killed(BaseException):
    """Like a signal: nothing catches it."""


class Interrupted(ResidentBatches):
    """Ends the process, so to speak, at one step of one epoch."""

    def __init__(self, *args, at):
        super().__init__(*args)
        self.at = at

    def epoch(self, seed, epoch, start=0):
        for step, batch in enumerate(super().epoch(seed, epoch, start)):
            if (epoch, step) == self.at:
                raise Killed
            yield batch


@pytest.mark.parametrize("at", some_quick([(0, 1), (1, 0), (2, 2), (3, 1)], (2, 2)))
@pytest.mark.parametrize("select", ["best", "last"])
def test_what_was_interrupted_ends_as_if_it_had_not_been(train, data, tmp_path, at, select):
    stage = dataclasses.replace(STAGE, select=select)
    whole = train(stage, "whole")
    with pytest.raises(Killed):
        train(stage, "cut", lambda split: Interrupted(*data, 8, at=at))
    resumed = train(stage, "cut")
    assert_same(resumed.variables, whole.variables)
    records = [RunDirectory(tmp_path / name).records() for name in ("whole", "cut")]
    for ours, theirs in zip(*records, strict=True):
        for time in ("seconds", "images_per_second"):
            del ours[time], theirs[time]
        assert ours == theirs
    summaries = [
        dict(result.summary, seconds=None, images_per_second=None) for result in (whole, resumed)
    ]
    assert summaries[0] == summaries[1]


def test_checkpoints_are_those_of_the_first_version(train, data, monkeypatch):
    """The same arrays, and values without those that came later: such a run goes on."""
    trees, save = [], StageCheckpoints.save

    def save_old(self, number, tree, values):
        trees.append(tree)
        later = {"epochs_without_progress"}
        save(self, number, tree, {k: v for k, v in values.items() if k not in later})

    whole = train(name="whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageCheckpoints, "save", save_old)
        train(name="cut", batches=lambda split: Interrupted(*data, 8, at=(2, 1)))
    assert_same(train(name="cut").variables, whole.variables)
    head = {"head": {"bias": 0, "kernel": 0}}
    adam = optax.ScaleByAdamState(0, {"params": head}, {"params": head})
    state = (0, {"params": head}, {}, (adam, optax.EmptyState()), 0, 0)
    expected = {"state": TrainState(*state), "best": ({"params": head}, {})}
    assert jax.tree.structure(trees[-1]) == jax.tree.structure(expected)


def test_an_epoch_with_a_checkpoint_has_its_line(train, tmp_path, monkeypatch):
    """Killed between the two, whichever comes first, no line of metrics.jsonl is missing."""
    log, moments = RunDirectory.log, []

    def killed(self, record, layers):
        moments.append(record["epoch"])
        if moments == [1, 2]:
            raise Killed
        log(self, record, layers)

    monkeypatch.setattr(RunDirectory, "log", killed)
    with pytest.raises(Killed):
        train()
    train()
    epochs = [record["epoch"] for record in RunDirectory(tmp_path / "run").records()]
    assert epochs == [1, 2, 3, 4]


@pytest.mark.parametrize("select", ["best", "last"])
def test_a_finished_stage_asks_for_no_data(train, select):
    stage = dataclasses.replace(STAGE, select=select, learning_rate=0.5)
    whole = train(stage)

    def none(split):
        raise AssertionError("batches were asked for")

    again = train(stage, batches=none)
    assert_same(again.variables, whole.variables)
    assert_same(again.trainable, whole.trainable)
    assert again.summary == whole.summary


def test_a_finished_stage_keeps_only_what_it_selected(train, tmp_path):
    whole = train()
    nested = {"params": unflatten(whole.trainable["params"])}
    selected = {"best": (nested, whole.variables["batch_stats"])}
    with StageCheckpoints(tmp_path / "run" / "checkpoints" / STAGE.name) as checkpoints:
        tree, values = checkpoints.restore(lambda values: selected)  # or Orbax refuses
    assert_same(tree["best"][0], nested)
    assert values["finished"]


def test_the_best_epoch_or_the_last(train, tmp_path):
    stage = dataclasses.replace(AT_ITS_END, epochs=12, learning_rate=0.5, metric="loss")
    best = train(dataclasses.replace(stage, select="best"), "best")
    last = train(dataclasses.replace(stage, select="last"), "last")
    losses = [record["val_loss"] for record in RunDirectory(tmp_path / "best").records()]
    assert best.summary["selected_epoch"] == 1 + int(np.argmin(losses)) < 12
    assert last.summary["selected_epoch"] == 12
    shorter = dataclasses.replace(stage, epochs=best.summary["selected_epoch"], select="last")
    assert_same(train(shorter, "shorter").variables, best.variables)


def test_every_step_has_its_settings_and_every_line_is_of_its_epoch(
    train, data, tmp_path, monkeypatch
):
    """Rates go on from epoch to epoch, sums do not; what is validated is the validation split."""
    rates, decays, losses = [], [], []

    def spy(task, state, frozen, batch, rate, decay, *rest):
        state, loss = train_step(task, state, frozen, batch, rate, decay, *rest)
        rates.append(float(rate["params"]))
        decays.append(float(decay["params"]))
        losses.append(float(loss))
        return state, loss

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", spy)
    splits = {"train": ResidentBatches(*data, 8), "val": ResidentBatches(-data[0], data[1], 8)}
    stage = dataclasses.replace(
        STAGE, epochs=3, schedule="cosine", warmup_epochs=1, weight_decay=0.03, select="last"
    )
    result = train(stage, batches=splits.__getitem__)
    assert rates == learning_rates("cosine", 0.05, 9, warmup_steps=3).tolist()
    assert decays == [float(np.float32(0.03))] * 9
    records = RunDirectory(tmp_path / "run").records()
    assert [record["learning_rate"] for record in records] == rates[2::3]
    means = np.reshape(losses, (3, 3)).mean(1)
    np.testing.assert_allclose([record["train_loss"] for record in records], means, rtol=1e-6)
    expected = evaluate(MODEL, result.variables, splits["val"], multilabel=False)
    assert records[-1]["val_loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_part_with_a_rate_and_a_decay_of_its_own_is_trained_by_them(train, start):
    """The schedule and its warm-up are those of the stage."""
    stage = dataclasses.replace(STAGE, schedule="cosine", warmup_epochs=1, select="last")
    own = {"learning_rate": {"params": 0.2}, "weight_decay": {"params": 0.3}}
    found = train(stage, "own", start=dataclasses.replace(start, **own))
    stage = dataclasses.replace(stage, learning_rate=0.2, weight_decay=0.3)
    assert_same(found.variables, train(stage, "all").variables)


def test_a_kept_model_is_whole_or_not_there(tmp_path, monkeypatch):
    def killed(file, **arrays):
        file.write(b"half")
        raise Killed

    with StageCheckpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(np, "savez", killed)
        with pytest.raises(Killed):
            checkpoints.keep(2, {"params": {}})
    assert not list(tmp_path.glob("*.npz"))


def scripted(monkeypatch, values, metric="loss"):
    """Has validation find these values, one an epoch."""
    given = iter(values)
    monkeypatch.setattr(loop, "evaluate", lambda *_: {metric: next(given)})


@pytest.mark.parametrize(
    ("metric", "values", "selected"),
    [
        ("loss", [0.5, 0.3, 0.3, 0.4], 2),  # the lowest; of equals the first
        ("accuracy", [0.5, 0.7, 0.7, 0.6], 2),
        ("kappa", [None, None, -0.5, -0.5], 3),  # the first that is defined
        ("kappa", [None] * 4, 4),  # the last, and it is said
    ],
)
def test_which_epoch_is_the_best(train, monkeypatch, capfd, metric, values, selected):
    scripted(monkeypatch, values, metric)
    result = train(dataclasses.replace(AT_ITS_END, metric=metric))
    said = "kappa was undefined on the validation images in every epoch, so the last epoch, 4,"
    assert (said in capfd.readouterr().err) == (set(values) == {None})
    assert result.summary["selected_epoch"] == selected
    assert result.summary[f"best_val_{metric}"] == values[selected - 1]
    shorter = dataclasses.replace(AT_ITS_END, epochs=selected, select="last", metric=metric)
    scripted(monkeypatch, values, metric)
    assert_same(train(shorter, "shorter").variables, result.variables)


PATIENT = dataclasses.replace(AT_ITS_END, epochs=8, metric="loss", patience=2, patience_delta=0.01)


@pytest.mark.parametrize(
    ("metric", "values", "epochs"),
    [
        ("loss", [0.5, 0.6, 0.6], 3),  # worse by more than the delta, twice
        ("loss", [0.5, 0.6, 0.49, 0.6, 0.6], 5),  # a new best begins the count anew
        ("loss", [0.5, 0.505, 0.505, 0.6, 0.5, 0.505, 0.6], 7),  # others leave it as it is
        ("accuracy", [0.5, 0.4, 0.4], 3),
        ("accuracy", [0.5, 0.6, 0.7, 0.8, 0.7, 0.795, 0.7], 7),
        ("kappa", [None, None, 0.5, None, 0.4, None, 0.4], 7),
        ("loss", [0.5, 0.6, 0.505, 0.5, 0.505, 0.5, 0.505, 0.5], 8),
    ],
)
@pytest.mark.parametrize("select", some_slow(("best", "last"), "last"))
def test_a_stage_ends_for_want_of_progress(train, monkeypatch, metric, values, epochs, select):
    stage = dataclasses.replace(PATIENT, metric=metric, select=select)
    scripted(monkeypatch, values, metric)
    result = train(stage)
    assert result.summary["epochs"] == epochs == len(values)
    again = train(stage)  # finished, it asks for nothing
    assert again.summary == result.summary
    assert_same(again.variables, result.variables)


def test_without_patience_all_epochs_are_trained(train, monkeypatch):
    scripted(monkeypatch, range(8))
    assert train(dataclasses.replace(PATIENT, patience=0)).summary["epochs"] == 8


@pytest.mark.parametrize("at", some_quick([(1, 1), (3, 0), (4, 2)], (4, 2)))
def test_the_count_of_patience_survives_an_interruption(train, data, monkeypatch, at):
    values = [0.5, 0.6, 0.4, 0.6, 0.5]
    stage = dataclasses.replace(PATIENT, checkpoint_seconds=0.0)
    scripted(monkeypatch, values)
    whole = train(stage, "whole")
    scripted(monkeypatch, values)
    with pytest.raises(Killed):
        train(stage, "cut", lambda split: Interrupted(*data, 8, at=at))
    scripted(monkeypatch, values[at[0] :])
    resumed = train(stage, "cut")
    assert resumed.summary["epochs"] == whole.summary["epochs"] == 5
    assert_same(resumed.variables, whole.variables)


@pytest.mark.parametrize(("select", "selected"), [("best", 2), ("last", 4)])
def test_the_optimizer_is_that_after_the_selected_epoch(train, monkeypatch, select, selected):
    """Where a stage is to leave it; also of a stage that was finished before."""
    states, train_step = [], loop.train_step

    def spy(*arguments):
        state, loss = train_step(*arguments)
        states.append(copy_tree(state.opt_state))
        return state, loss

    monkeypatch.setattr(loop, "train_step", spy)
    scripted(monkeypatch, 2 * [0.5, 0.3, 0.4, 0.4])  # of two runs
    stage = dataclasses.replace(STAGE, select=select, metric="loss", keep_optimizer=True)
    for _ in range(2):
        result = train(stage)
        jax.tree.map(np.testing.assert_array_equal, result.opt_state, states[3 * selected - 1])
    assert train(dataclasses.replace(stage, keep_optimizer=False), "none").opt_state is None


@pytest.mark.parametrize("at", some_quick([None, (1, 2), (2, 0), (2, 2)], (2, 0)))
def test_kept_epochs_are_results(train, data, tmp_path, at):
    """Also of a stage that was killed and went on, and of one that was finished before."""
    stage = dataclasses.replace(STAGE, keep=(2, 3, 9), checkpoint_seconds=0.0 if at else 1e9)
    if at:
        with pytest.raises(Killed):
            train(stage, "run", lambda split: Interrupted(*data, 8, at=at))
    for _ in range(2):
        kept = train(stage).kept
        assert list(kept) == [2, 3]
        for epoch, variables in kept.items():
            shorter = dataclasses.replace(STAGE, epochs=epoch, select="last")
            assert_same(variables, train(shorter, f"only {epoch}").variables)


def test_an_epoch_with_a_checkpoint_has_left_its_model(train, monkeypatch):
    """Killed between the two, whichever comes first, it is there after the stage went on."""
    keep, moments = StageCheckpoints.keep, []

    def killed(self, epoch, variables):
        moments.append(epoch)
        if moments == [2]:
            raise Killed
        keep(self, epoch, variables)

    monkeypatch.setattr(StageCheckpoints, "keep", killed)
    stage = dataclasses.replace(STAGE, keep=(2,))
    with pytest.raises(Killed):
        train(stage)
    assert list(train(stage).kept) == [2]


def test_a_kept_model_that_is_damaged_is_named(train, tmp_path):
    stage = dataclasses.replace(STAGE, keep=(2,))
    kernel = train(stage).kept[2]["params"]["head"]["kernel"]
    (path,) = tmp_path.rglob("2.model.npz")
    content = bytearray(path.read_bytes())
    content[content.index(kernel.tobytes()) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"2\.model\.npz"):
        train(stage)


def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_last_good_epoch(train, monkeypatch):
    good = train(dataclasses.replace(STAGE, epochs=2, select="last"), "good")
    rates = Stage.rates

    def explode(stage, steps_per_epoch, highest):
        values = rates(stage, steps_per_epoch, highest)
        values[7:] = np.inf  # there are three steps in an epoch
        return values

    stage = dataclasses.replace(STAGE, select="last")
    with monkeypatch.context() as patch, pytest.raises(DivergedError) as error:
        patch.setattr(Stage, "rates", explode)
        train(stage, "bad")
    assert "stage lp: the loss was not finite at step 9 (epoch 3" in str(error.value)
    assert "the checkpoint after epoch 2 is kept" in str(error.value)

    # What was kept is the state after two epochs, from which it can go on.
    def stop(split):
        raise Killed

    restored = []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "collapse", None)
        original = Progress.__init__

        def record(self, *args):
            original(self, *args)
            restored.append(self)

        patch.setattr(Progress, "__init__", record)
        train(stage, "bad", stop)
    assert restored[0].epoch == 2
    assert_same(unflatten(restored[0].state.trainable["params"]), good.variables["params"])


@pytest.fixture
def images(rng):
    labels = rng.integers(0, CLASSES, 20, np.int32)
    return rng.integers(0, 256, (20, 16, 16, 3), np.uint8), labels


@pytest.fixture(scope="module")
def network():
    return Network(OneLayer(CLASSES), get_spec("resnet20").preprocessing)


@pytest.fixture(scope="module")
def variables(network):
    return jax.jit(network.model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize("policy", some_slow((None, "medium"), "medium"))
def test_streamed_and_resident_images_train_to_the_same_bits(
    train, images, network, variables, policy
):
    images, labels = images
    start = parameterization.fine_tune(variables)
    stage = Stage(name="ft", epochs=2, learning_rate=1e-3, augmentation=POLICIES.get(policy))
    results = []
    for batches in (
        ResidentBatches(images, labels, 8),
        StreamedBatches(images, labels, 8),
    ):
        kind = type(batches).__name__
        result = train(stage, kind, lambda split, batches=batches: batches, start, network)
        results.append((result.variables, predict(network, result.variables, batches)))
    assert_same(*(variables for variables, _ in results))
    np.testing.assert_array_equal(*(logits for _, logits in results))
    assert not np.array_equal(
        results[0][0]["params"]["conv"]["kernel"], variables["params"]["conv"]["kernel"]
    )


@pytest.mark.slow
def test_augmented_training_goes_on_as_if_it_had_not_been_interrupted(
    train, images, network, variables
):
    """And an epoch's images are not those of another, nor of another seed, nor the plain ones."""
    start = parameterization.fine_tune(variables)
    policy = POLICIES["heavy"]
    stage = dataclasses.replace(STAGE, name="ft", epochs=3, select="last", augmentation=policy)
    data = ResidentBatches(*images, 8)
    whole = train(stage, "whole", lambda split: data, start, network)
    with pytest.raises(Killed):
        cut = Interrupted(*images, 8, at=(2, 1))
        train(stage, "cut", lambda split: cut, start, network)
    assert_same(train(stage, "cut", lambda split: data, start, network).variables, whole.variables)
    plain = dataclasses.replace(stage, augmentation=None)
    others = train(plain, "plain", lambda split: data, start, network)
    kernels = [result.variables["params"]["conv"]["kernel"] for result in (whole, others)]
    assert not np.array_equal(*kernels)


def test_the_key_of_an_epoch_is_of_its_seed_and_number(
    train, images, network, variables, monkeypatch
):
    keys = []

    def spy(*arguments):
        keys.append(tuple(jax.random.key_data(arguments[-1]).tolist()))
        return augmented_batch(*arguments)

    augmented_batch = loop.augmented_batch
    monkeypatch.setattr(loop, "augmented_batch", spy)
    data, start = ResidentBatches(*images, 8), parameterization.linear_probe(variables)
    stage = dataclasses.replace(STAGE, epochs=2, augmentation=POLICIES["minimal"])
    for seed in (0, 1):
        train(stage, f"seed{seed}", lambda split: data, start, network, seed)
    wanted = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1) for _ in range(2)]
    assert keys == [tuple(jax.random.key_data(epoch_key(*one)).tolist()) for one in wanted]
    assert len(set(keys)) == 4


def test_what_is_evaluated_is_not_augmented(train, images, network, variables, tmp_path):
    data, start = ResidentBatches(*images, 8), parameterization.fine_tune(variables)
    stage = dataclasses.replace(STAGE, epochs=2, select="last", augmentation=POLICIES["minimal"])
    result = train(stage, "run", lambda split: data, start, network)
    plain = ResidentBatches(*images, 8)
    wanted = evaluate(network, result.variables, plain, multilabel=False)
    record = RunDirectory(tmp_path / "run").records()[-1]
    assert record["val_loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert record["val_accuracy"] == wanted["accuracy"]


def test_features_are_not_augmented(train):
    stage = dataclasses.replace(STAGE, augmentation=POLICIES["minimal"])
    with pytest.raises(ValueError, match="features were computed from images"):
        train(stage)


def test_a_probe_on_features_is_the_probe_through_the_frozen_network(
    train, images, network, variables
):
    images, labels = images
    pixels = ResidentBatches(images, labels, 8)
    whole = train(STAGE, "whole", lambda split: pixels, parameterization.linear_probe(variables),
                  network)  # fmt: skip

    extractor = dataclasses.replace(network, model=OneLayer(0))
    features = predict(extractor, without_head(variables), pixels)
    head = parameterization.fine_tune({"params": {"head": variables["params"]["head"]}})
    cached = ResidentBatches(features, labels, 8)
    ours = train(STAGE, "cached", lambda split: cached, head)
    for path, leaf in flatten(ours.variables["params"]).items():
        np.testing.assert_allclose(leaf, flatten(whole.variables["params"])[path], rtol=1e-4,
                                   atol=1e-6)  # fmt: skip
    assert_same(whole.variables["batch_stats"], variables["batch_stats"])
    kernels = [tree["params"]["conv"]["kernel"] for tree in (whole.variables, variables)]
    np.testing.assert_array_equal(*kernels)


def assert_same(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)
