"""Rows out of a file: those of the mapping, and an error where the mapping would kill."""

import jax
import numpy as np
import pytest

from medmerge_jax.data import ResidentBatches, StreamedBatches
from medmerge_jax.errors import UserError
from medmerge_jax.storage.rows import FileRows, file_rows

LABELS = np.arange(40, dtype=np.int32) % 3


@pytest.fixture
def mapped(rng, tmp_path):
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (40, 9, 9, 3), np.uint8))
    return np.load(tmp_path / "images.npy", mmap_mode="r")


def test_rows_are_those_of_the_array(mapped, rng):
    rows = file_rows(mapped)
    assert isinstance(rows, FileRows)
    order = rng.permutation(40)[:17].astype(np.int32)
    np.testing.assert_array_equal(rows[order], mapped[order])
    np.testing.assert_array_equal(rows.whole(), mapped)
    assert (rows.shape, rows.dtype, len(rows)) == (mapped.shape, mapped.dtype, 40)


def test_parts_of_a_mapping_are_read_through_it(mapped):
    """A part says of itself that it begins where the whole does."""
    np.testing.assert_array_equal(file_rows(mapped[7:]), mapped[7:])
    np.testing.assert_array_equal(file_rows(mapped[::2]), mapped[::2])


@pytest.mark.parametrize("kind", [ResidentBatches, StreamedBatches])
def test_a_file_that_is_deleted_in_mid_epoch_is_read_to_its_end(mapped, tmp_path, kind):
    wanted = np.array(mapped)
    batches = kind(mapped, LABELS, 8)
    for step, batch in enumerate(batches.epoch(0, 0)):
        if step == 1:
            (tmp_path / "images.npy").unlink()
        np.testing.assert_array_equal(batch["inputs"], wanted[np.asarray(batch["indices"])])
    assert step == 4


def test_a_file_that_is_cut_short_in_mid_epoch(mapped, tmp_path, monkeypatch):
    monkeypatch.setattr("medmerge_jax.data.batches._THREADS", 1)
    monkeypatch.setattr("medmerge_jax.data.batches._READ_AHEAD", 1)
    batches = StreamedBatches(mapped, LABELS, 2)
    with pytest.raises(UserError, match=r"images\.npy: the decoded images cannot be read any more"):
        for step, batch in enumerate(batches.epoch(0, 0)):
            jax.block_until_ready(batch)
            if step == 1:
                with (tmp_path / "images.npy").open("r+b") as file:
                    file.truncate(200)


def test_resident_images_need_no_file(mapped, tmp_path):
    wanted = np.array(mapped)
    batches = ResidentBatches(mapped, LABELS, 8)
    with (tmp_path / "images.npy").open("r+b") as file:
        file.truncate(200)
    for batch in batches.epoch(0, 0):
        np.testing.assert_array_equal(batch["inputs"], wanted[np.asarray(batch["indices"])])
