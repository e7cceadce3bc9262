"""What a stage compiles, it compiles in its first epoch, once; and its epochs wait for no host."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick, some_slow
from helpers.tiny_network import TwoLayers

from medmerge_jax.data import ResidentBatches, StreamedBatches
from medmerge_jax.images.augment import POLICIES
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import LinearHead, Preprocessing
from medmerge_jax.models.network import Network
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training import parameterization
from medmerge_jax.training.blocks import by_block
from medmerge_jax.training.loop import train_stage
from medmerge_jax.training.stage import Stage

CLASSES, SIZE = 3, 8
MODEL = TwoLayers(CLASSES)
MERGED, ACCUMULATED = "merge linear probe", "fine-tuning, accumulated"
STAGES = {
    "fine-tuning": {},
    MERGED: {},
    "linear probe": {},
    "linear probe on features": {},
    "fine-tuning, augmented": {"policy": "medium"},
    ACCUMULATED: {"accumulate": 3},
    "fine-tuning, the last epoch": {"select": "last"},
}


@pytest.fixture(scope="module")
def parents():
    init = jax.jit(MODEL.init)
    return [init(jax.random.key(seed), jnp.zeros((1, SIZE, SIZE, 3))) for seed in (0, 1)]


@pytest.fixture
def run(parents, tmp_path):
    """Trains a stage of three epochs of three steps and returns its batches for training."""

    def call(stage, kind=ResidentBatches, wrap=lambda batches: batches, **changes):
        changes = {**STAGES[stage], **changes}
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (20, SIZE, SIZE, 3), np.uint8)
        labels = rng.integers(0, CLASSES, 20, np.int32)
        network = Network(MODEL, Preprocessing(16, mean=(0.5,) * 3, std=(0.25,) * 3))
        if stage == "linear probe on features":
            images = rng.normal(size=(20, 5)).astype(np.float32)
            head = LinearHead(CLASSES).init(jax.random.key(0), images[:1])
            network, start = Network(LinearHead(CLASSES)), parameterization.fine_tune(head)
        elif stage == MERGED:
            start = parameterization.merge_linear_probe(parents, parents[0]["params"]["head"])
        elif stage == "linear probe":
            start = parameterization.linear_probe(parents[0])
        else:
            depths = {path: int("head" in path) for path in flatten(parents[0]["params"])}
            start = by_block(
                parameterization.fine_tune(parents[0]),
                depths,
                layer_decay=changes.get("layer_decay", 1.0),
            )
        options = {"accumulate": changes.get("accumulate", 1)}
        batches = {
            "train": wrap(kind(images, labels, 6, **options)),
            "val": kind(images[:11], labels[:11], 6, **options),
        }
        settings = Stage(
            name="stage",
            epochs=changes.get("epochs", 3),
            learning_rate=changes.get("rate", 1e-3),
            weight_decay=changes.get("decay", 1e-2),
            schedule="cosine",
            warmup_epochs=1,
            checkpoint_seconds=0.0,
            select=changes.get("select", "best"),
            metric="loss",
            augmentation=POLICIES.get(changes.get("policy")),
        )
        directory = RunDirectory(tmp_path / changes.get("name", "run"))
        with contextlib.closing(directory):
            train_stage(
                settings,
                start,
                network,
                batches.__getitem__,
                directory,
                seed=changes.get("seed", 0),
                multilabel=False,
                class_weights=np.ones(CLASSES),
            )

    return call


def around_epochs(batches, enter):
    """Has everything between the first batch of an epoch and its last step inside `enter(epoch)`.

    The loop's steps too: what is entered in a thread stays while a generator waits.
    """
    epoch_of = batches.epoch

    def epoch(seed, number, start=0):
        with enter(number):
            yield from epoch_of(seed, number, start)

    batches.epoch = epoch
    return batches


@pytest.mark.parametrize("kind", some_slow((ResidentBatches, StreamedBatches), StreamedBatches))
@pytest.mark.parametrize("stage", some_quick(STAGES, MERGED, ACCUMULATED))
def test_nothing_compiles_after_the_first_epoch_and_no_step_waits_for_the_host(
    run, events, stage, kind
):
    """Validation, copies and checkpoints count as well, up to the model that is returned.

    Inside an epoch only what is put on the device in so many words goes there: rows and batches.
    """
    compiled, guarded = [], []

    @contextlib.contextmanager
    def watch(epoch):
        compiled.append(events["compiled"])
        with jax.transfer_guard("disallow"):
            yield
        guarded.append(epoch)

    jax.clear_caches()  # or what another test compiled would not be missed
    run(stage, kind, lambda batches: around_epochs(batches, watch))
    first, *later = np.diff([*compiled, events["compiled"]])
    assert first >= 2  # the step, and prediction
    assert later == [0, 0]
    assert guarded == [0, 1, 2]


@pytest.mark.parametrize("stage", some_slow((MERGED, "fine-tuning", ACCUMULATED), "fine-tuning"))
def test_all_seeds_rates_decays_and_lengths_share_what_was_compiled(run, events, stage):
    run(stage)
    before = events["compiled"]
    run(stage, name="another", seed=1, rate=3e-4, decay=0.1, layer_decay=0.5, epochs=2)
    assert events["compiled"] == before


def test_the_guard_would_notice_a_number_from_the_host():
    double = jax.jit(lambda x: 2 * x)
    with jax.transfer_guard("disallow"):
        double(jax.device_put(np.float32(1)))
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            double(np.float32(1))
