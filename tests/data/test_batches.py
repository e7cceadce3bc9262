import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest

from medmerge_jax.data import ResidentBatches, StreamedBatches, epoch_order, make_batches
from medmerge_jax.errors import UserError

N, SIZE = 23, 5


@pytest.fixture
def images(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (N, 6, 6, 3), np.uint8)
    np.save(tmp_path / "images.npy", array)
    return np.load(tmp_path / "images.npy", mmap_mode="r")


@pytest.fixture
def labels():
    return np.arange(N, dtype=np.int32)


@pytest.fixture(params=[ResidentBatches, StreamedBatches])
def kind(request):
    return request.param


def fetch(batches):
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() == {"inputs", "labels", "indices"}
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_the_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    for first, second in itertools.combinations(orders, 2):
        assert np.any(first != second)
    np.testing.assert_array_equal(epoch_order(100, 1, 2), orders[5])


def test_the_order_is_the_same_on_every_machine():
    assert epoch_order(10, 7, 3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_an_epoch_follows_the_order_and_drops_the_rest(kind, images, labels):
    batches = kind(images, labels, SIZE)
    assert (batches.num_examples, batches.batch_size, batches.steps_per_epoch) == (N, SIZE, 4)
    np.testing.assert_array_equal(batches.labels, labels)
    for epoch in range(2):
        order = epoch_order(N, 3, epoch)
        found = fetch(batches.epoch(3, epoch))
        assert len(found) == 4
        for step, batch in enumerate(found):
            rows = order[step * SIZE : (step + 1) * SIZE]
            np.testing.assert_array_equal(batch["inputs"], images[rows])
            np.testing.assert_array_equal(batch["labels"], labels[rows])
            np.testing.assert_array_equal(batch["indices"], rows)
            assert batch["indices"].dtype == np.int32


def test_batches_are_on_the_device(kind, images, labels):
    batch = next(iter(kind(images, labels, SIZE).epoch(0, 0)))
    assert all(isinstance(array, jax.Array) for array in batch.values())


@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_from_the_middle(kind, images, labels, start):
    batches = kind(images, labels, SIZE)
    found = fetch(batches.epoch(0, 1, start))
    assert len(found) == 4 - start
    if found:
        assert_same(found, fetch(batches.epoch(0, 1))[start:])


@pytest.mark.parametrize("form", ["images", "features", "several labels"])
@pytest.mark.parametrize("size", [1, SIZE, N])
def test_resident_and_streamed_are_the_same(images, labels, form, size):
    inputs = images if form != "features" else np.asarray(images, np.float32).reshape(N, -1) / 7
    if form == "several labels":
        labels = np.stack([labels % 2, np.full(N, np.nan)], axis=1).astype(np.float32)
    resident = ResidentBatches(inputs, labels, size)
    streamed = StreamedBatches(inputs, labels, size)
    for epoch in range(2):
        assert_same(fetch(resident.epoch(5, epoch)), fetch(streamed.epoch(5, epoch)))
    first, second = list(resident.ordered()), list(streamed.ordered())
    assert [valid for _, valid in first] == [valid for _, valid in second]
    assert_same(fetch(batch for batch, _ in first), fetch(batch for batch, _ in second))


@pytest.mark.parametrize("size, last", [(SIZE, 3), (N, N), (N - 1, 1), (1, 1)])
def test_all_in_order_with_the_last_batch_filled(kind, images, labels, size, last):
    found = list(kind(images, labels, size).ordered())
    valid = [count for _, count in found]
    assert valid == [size] * (len(found) - 1) + [last]
    arrays = fetch(batch for batch, _ in found)
    assert all(len(batch["labels"]) == size for batch in arrays)
    rows = np.concatenate(
        [batch["labels"][:count] for batch, count in zip(arrays, valid, strict=True)]
    )
    np.testing.assert_array_equal(rows, labels)
    np.testing.assert_array_equal(
        arrays[-1]["inputs"][last:], np.broadcast_to(images[0], (size - last, 6, 6, 3))
    )


def test_a_batch_is_at_most_all(kind, images, labels):
    batches = kind(images, labels, 100)
    assert (batches.batch_size, batches.steps_per_epoch) == (N, 1)
    (batch,) = fetch(batches.epoch(0, 0))
    np.testing.assert_array_equal(np.sort(batch["labels"]), labels)


def test_a_stream_may_be_left_early(images, labels):
    stream = StreamedBatches(images, labels, 2)
    for _ in range(5):
        assert next(iter(stream.epoch(0, 0)))["labels"].shape == (2,)


def test_the_budget_decides(images, labels):
    assert isinstance(make_batches(images, labels, SIZE), ResidentBatches)
    fits, does_not = images.nbytes, images.nbytes - 1
    assert isinstance(make_batches(images, labels, SIZE, budget_bytes=fits), ResidentBatches)
    assert isinstance(make_batches(images, labels, SIZE, budget_bytes=does_not), StreamedBatches)
    assert isinstance(make_batches(images, labels, SIZE, "resident", 0), ResidentBatches)
    assert isinstance(make_batches(images, labels, SIZE, "stream"), StreamedBatches)
    with pytest.raises(UserError, match="loader 'grain': one of auto, resident, stream is wanted"):
        make_batches(images, labels, SIZE, "grain")


def test_inputs_may_be_on_the_device_already(labels):
    features = jax.numpy.ones((N, 4))
    assert_same(
        fetch(make_batches(features, labels, SIZE).epoch(0, 0)),
        fetch(make_batches(features, labels, SIZE, "stream").epoch(0, 0)),
    )


@pytest.mark.parametrize("inputs, size", [(N - 1, SIZE), (0, SIZE), (N, 0)])
def test_sizes_that_do_not_fit(kind, images, labels, inputs, size):
    with pytest.raises(ValueError, match=f"{inputs} inputs, .* batch size {size}"):
        kind(images[:inputs], labels[: inputs or 0] if inputs == 0 else labels, size)


def test_grain_is_imported_only_for_streaming():
    code = "import sys, medmerge_jax.data; sys.exit('grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
