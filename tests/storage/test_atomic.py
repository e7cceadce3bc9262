"""That a file is whole, readable and on the disk before it has its name."""

import os
import stat

import pytest

from medmerge_jax.storage.atomic import write_atomically, write_json


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    return path


def test_readers_see_the_old_file_until_the_new_one_is_whole(path):
    with path.open("rb") as reader:

        def write(file):
            file.write(b"new " * 10**5)
            file.flush()
            assert path.read_bytes() == b"old"

        write_atomically(path, write)
        assert reader.read() == b"old"  # who had it open reads it to its end
    assert path.read_bytes() == b"new " * 10**5
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path):
    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.json"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_value_that_is_no_json_leaves_the_old_file(path):
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_are_as_readable_as_those_of_open(tmp_path, mask):
    """And not for their owner alone, as temporary files are."""
    before = os.umask(mask)
    try:
        write_json(tmp_path / "ours.json", {})
        (tmp_path / "theirs.json").write_text("{}")
    finally:
        os.umask(before)
    ours, theirs = (
        stat.S_IMODE((tmp_path / f"{n}.json").stat().st_mode) for n in ("ours", "theirs")
    )
    assert ours == theirs == 0o666 & ~mask


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    """Or a machine that loses its power after the rename keeps an empty file."""
    path, synced, fsync = tmp_path / "a", [], os.fsync

    def record(handle):
        state = os.fstat(handle)
        synced.append((state.st_ino, state.st_size, path.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(path, lambda file: file.write(b"whole"))
    assert (path.stat().st_ino, 5, False) in synced
