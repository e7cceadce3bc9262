import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmerge_jax.data import Split
from medmerge_jax.errors import UserError
from medmerge_jax.images import cache, cached_pixels, decode
from medmerge_jax.models.preprocessing import PLAIN, Rendering
from medmerge_jax.storage import atomic, locks

N = 50


@pytest.fixture
def split(tmp_path, write_images):
    paths = write_images(*(tmp_path / "images" / f"{i}.png" for i in range(N)))
    return split_of(paths)


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded."""
    seen = []
    real = decode.read_image

    def read_image(path, *how):
        seen.append(path)
        return real(path, *how)

    monkeypatch.setattr(cache, "read_image", read_image)
    return seen


def split_of(paths):
    return Split(tuple(path.name for path in paths), tuple(paths), np.zeros(len(paths), np.int32))


def archived(tmp_path, decoded):
    """A split of decoded images from one archive, whose content nobody reads."""
    archive = tmp_path / "archive.npz"
    if not archive.exists():
        archive.touch()
    labels = np.zeros(len(decoded), np.int32)
    return Split(
        tuple(map(str, range(len(decoded)))), (archive,) * len(decoded), labels, None, decoded
    )


def cache_of(tmp_path, pattern="*.npy"):
    return sorted((tmp_path / "cache").glob(pattern))


@pytest.mark.parametrize("workers", [1, 3, None])
@pytest.mark.parametrize("size, resize", [(8, "squash"), (5, "crop")])
def test_pixels_are_those_of_read_image_in_order(tmp_path, split, workers, size, resize):
    pixels = cached_pixels(split, size, resize, tmp_path / "cache", workers)
    expected = np.stack([decode.read_image(path, size, resize) for path in split.paths])
    assert pixels.array.dtype == np.uint8
    np.testing.assert_array_equal(pixels.array, expected)
    assert pixels.sha256 == hashlib.sha256(expected.tobytes()).hexdigest()
    assert not pixels.array.flags.writeable


def test_the_pixels_are_on_the_disk_before_they_have_their_name(tmp_path, split, monkeypatch):
    """Or a machine that loses its power would find a cache that looks whole and holds zeros."""
    synced, fsync = {}, os.fsync

    def record(handle):
        state = os.fstat(handle)
        synced[state.st_ino] = (state.st_size, bool(cache_of(tmp_path, "*.npy")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    (path,) = cache_of(tmp_path, "*.npy")
    assert synced[path.stat().st_ino] == (path.stat().st_size, False)


def test_a_second_call_decodes_and_writes_nothing(tmp_path, split, decoded, monkeypatch):
    first = cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert sorted(decoded) == sorted(split.paths)
    decoded.clear()
    monkeypatch.setattr(locks, "waited_for", None)  # a complete cache may be read-only
    second = cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert not decoded
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.array, second.array)


def test_another_set_of_equal_names_sizes_and_times_is_another_set(tmp_path, split, decoded):
    """As two downloads whose files are uncompressed and came out of archives."""
    first = cached_pixels(split, 8, "squash", tmp_path / "cache")
    others = []
    for path in split.paths:
        others.append(tmp_path / "second" / "images" / path.name)
        others[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 10, 10)).save(others[-1])
    size = max(path.stat().st_size for path in (*split.paths, *others))
    for path in (*split.paths, *others):
        os.truncate(path, size)  # what follows an image's end is not read
        os.utime(path, ns=(0, 0))
    first = cached_pixels(split, 8, "squash", tmp_path / "cache")
    second = cached_pixels(split_of(others), 8, "squash", tmp_path / "cache")
    assert np.array_equal(second.array[7, 4, 4], (200, 10, 10))
    assert second.sha256 != first.sha256
    decoded.clear()
    assert cached_pixels(split, 8, "squash", tmp_path / "cache").sha256 == first.sha256
    assert not decoded


@pytest.mark.parametrize("swapped", ["the content", "the folder"])
def test_files_that_are_changed_in_place_with_their_times_kept(tmp_path, split, decoded, swapped):
    """`rsync --inplace --times`, or a folder that takes another's place."""
    before = np.array(cached_pixels(split, 8, "squash", tmp_path / "cache").array)
    state = split.paths[5].stat()
    if swapped == "the content":
        data = split.paths[6].read_bytes().ljust(state.st_size, b"\0")
        split.paths[5].write_bytes(data)
        split.paths[5].write_bytes(data[: state.st_size])
    else:
        (tmp_path / "images").rename(tmp_path / "moved")
        split = split_of([tmp_path / "moved" / path.name for path in split.paths])
    os.utime(split.paths[5], ns=(state.st_atime_ns, state.st_mtime_ns))
    decoded.clear()
    after = cached_pixels(split, 8, "squash", tmp_path / "cache").array
    assert sorted(decoded) == sorted(split.paths)
    np.testing.assert_array_equal(after[6:], before[6:])


def test_the_sampled_bytes_are_those_of_the_beginning_and_the_end(tmp_path, monkeypatch):
    """Where a file system has no times of change."""
    paths = []
    for number in range(300):
        paths.append(tmp_path / f"{number}.bmp")
        paths[-1].write_bytes(bytes(10))
    before = cache._sampled_bytes(paths)
    paths[0].write_bytes(bytes(9) + b"x")
    assert cache._sampled_bytes(paths) != before
    monkeypatch.setattr(cache, "_SAMPLE", 4)
    paths[0].write_bytes(bytes(10))
    middle = cache._sampled_bytes(paths)
    paths[0].write_bytes(bytes(4) + b"xx" + bytes(4))
    assert cache._sampled_bytes(paths) == middle
    paths[0].write_bytes(bytes(9) + b"x")
    assert cache._sampled_bytes(paths) != middle


@pytest.mark.parametrize(
    "other",
    [
        {"names": ("1.png", "0.png")},
        {"folder": "b"},
        {"content": b"other"},
        {"st_size": 9},
        {"st_mtime_ns": 9},
        {"st_ctime_ns": 9},
    ],
    ids=str,
)
def test_each_of_what_tells_files_apart_does_so_alone(tmp_path, monkeypatch, other):
    """The others may be equal, as the times of files written within a tick of the clock are."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()

    def state(names=("0.png", "1.png"), folder="a", content=b"bytes", **changed):
        paths = tuple(tmp_path / folder / name for name in sorted(names))
        for path in paths:
            path.write_bytes(content)
        stat = {"st_size": 1, "st_mtime_ns": 2, "st_ctime_ns": 3, **changed}
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", lambda path, **how: types.SimpleNamespace(**stat))
            return cache.state_of(Split(names, paths, np.zeros(2, np.int32)))

    assert state() == state() != state(**other)


def test_whatever_shapes_the_pixels_makes_another_cache(tmp_path, split, decoded, monkeypatch):
    def decodes(split=split, size=8, resize="squash", rendering=PLAIN):
        decoded.clear()
        cached_pixels(split, size, resize, tmp_path / "cache", rendering=rendering)
        return bool(decoded)

    assert decodes()
    assert decodes(size=9)
    assert decodes(resize="crop")
    assert decodes(rendering=Rendering(white=4095))
    assert decodes(rendering=Rendering(window=(0.0, 400.0)))
    assert decodes(rendering=Rendering(background="white"))
    assert decodes(split=split_of(split.paths[::-1]))
    assert decodes(split=split_of(split.paths[:-1]))
    state = split.paths[7].stat()
    os.utime(split.paths[7], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert decodes()
    with split.paths[8].open("ab") as file:
        file.write(b"more")
    assert decodes()
    monkeypatch.setattr("PIL.__version__", "0.0")
    assert decodes()
    monkeypatch.setattr(cache, "_FORMAT", -1)
    assert decodes()
    assert not decodes()


def test_names_and_sizes_alone_make_another_cache(tmp_path, split, decoded):
    """Where times of modification say nothing, as after `cp` or from an archive."""

    def pixels(paths=split.paths):
        for path in split.paths:
            os.utime(path, ns=(0, 0))
        decoded.clear()
        return cached_pixels(split_of(paths), 8, "squash", tmp_path / "cache").array

    size = max(path.stat().st_size for path in split.paths)
    for path in split.paths:
        os.truncate(path, size)  # what follows an image's end is not read
    straight = np.array(pixels())
    np.testing.assert_array_equal(pixels(split.paths[::-1]), straight[::-1])
    assert decoded
    Image.new("RGB", (8, 8), (50, 60, 70)).save(split.paths[3], compress_level=0)
    assert split.paths[3].stat().st_size != size
    np.testing.assert_array_equal(pixels()[3], np.full((8, 8, 3), (50, 60, 70)))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def extend(path):
    with path.open("ab") as file:
        file.write(b"x")


def empty(path):
    path.write_bytes(b"")


def scribble(path):
    path.write_bytes(b"no array" * (path.stat().st_size // 8))


def misshape(path):
    np.save(path, np.zeros((N, 4, 16, 3), np.uint8))


@pytest.mark.parametrize("damage", [truncate, extend, empty, scribble, misshape, Path.unlink])
@pytest.mark.parametrize("pattern", ["*.npy", "*.json"])
def test_a_damaged_cache_is_made_again(tmp_path, split, decoded, damage, pattern):
    if pattern == "*.json" and damage in (extend, truncate, misshape):
        damage = scribble
    good = np.array(cached_pixels(split, 8, "squash", tmp_path / "cache").array)
    decoded.clear()
    (path,) = cache_of(tmp_path, pattern)
    damage(path)
    again = cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert len(decoded) == N
    np.testing.assert_array_equal(again.array, good)
    decoded.clear()
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert not decoded


def test_all_unreadable_images_are_in_one_error(tmp_path, split, decoded):
    for path in split.paths[10:25]:
        path.write_text("This is no image.")
    split.paths[30].write_bytes(b"")
    with pytest.raises(UserError) as error:
        cached_pixels(split, 8, "squash", tmp_path / "cache", workers=3)
    lines = str(error.value).splitlines()
    assert lines[0] == f"16 of {N} images cannot be read:"
    damaged = [*split.paths[10:25], split.paths[30]]
    for path, line in zip(damaged, lines[1:], strict=True):
        assert str(path) in line
    assert all("is not an image" in line for line in lines[1:16])
    assert "the file is empty" in lines[16]
    assert not cache_of(tmp_path)
    assert not cache_of(tmp_path, ".*.npy.*")
    decoded.clear()
    with pytest.raises(cache.UnreadableError) as again:
        cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert sorted(decoded) == sorted(damaged)  # not the others, which may be 35,000
    assert again.value.problems == error.value.problems
    (noted,) = cache_of(tmp_path, "*.unreadable.json")
    assert json.loads(noted.read_text()) == [*range(10, 25), 30]


def test_images_that_become_readable_by_themselves(tmp_path, split, decoded, monkeypatch):
    """As when a decoder is installed: what is noted in the cache is tried again."""
    counted = cache.read_image
    with monkeypatch.context() as patched, pytest.raises(UserError, match="no decoder"):
        patched.setattr(cache, "read_image", no_decoder)
        cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert cache.read_image is counted
    pixels = cached_pixels(split, 8, "squash", tmp_path / "cache")
    np.testing.assert_array_equal(pixels.array[3], decode.read_image(split.paths[3], 8))


def no_decoder(path, *how):
    raise UserError(f"{path}: no decoder is installed")


def test_missing_images_are_in_one_error(tmp_path, split):
    for path in split.paths[3:5]:
        path.unlink()
    with pytest.raises(
        UserError, match=rf"2 of {N} images cannot be read:\n.*3\.png: No such file"
    ):
        cached_pixels(split, 8, "squash", tmp_path / "cache")


def test_a_split_without_images(tmp_path):
    with pytest.raises(UserError, match="without images"):
        cached_pixels(split_of([]), 8, "squash", tmp_path / "cache")


@pytest.mark.parametrize("shape", [(N, 11, 9), (N, 6, 6, 3)])
@pytest.mark.parametrize("size, resize", [(6, "squash"), (4, "crop")])
def test_pixels_that_come_decoded_are_resized(tmp_path, shape, size, resize):
    decoded = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    split = archived(tmp_path, decoded)
    pixels = cached_pixels(split, size, resize, tmp_path / "cache")
    colour = decoded if len(shape) == 4 else np.repeat(decoded[..., None], 3, axis=-1)
    for row in range(N):
        Image.fromarray(colour[row]).save(tmp_path / "one.png")
        expected = decode.read_image(tmp_path / "one.png", size, resize)
        np.testing.assert_array_equal(pixels.array[row], expected)


def test_the_cache_of_decoded_pixels_follows_their_archive(tmp_path):
    decoded = np.zeros((N, 4, 4), np.uint8)
    split = archived(tmp_path, decoded)
    first = cached_pixels(split, 4, "squash", tmp_path / "cache")
    changed = archived(tmp_path, decoded + 1)
    again = cached_pixels(changed, 4, "squash", tmp_path / "cache")  # the archive is the same
    assert again.sha256 == first.sha256
    os.utime(split.paths[0], ns=(0, 0))
    assert cached_pixels(changed, 4, "squash", tmp_path / "cache").array.min() == 1
    (tmp_path / "archive.npz").unlink()
    with pytest.raises(UserError, match=r"archive\.npz: No such file"):
        cached_pixels(changed, 4, "squash", tmp_path / "cache")


def test_progress(tmp_path, split):
    calls = []
    cached_pixels(
        split,
        8,
        "squash",
        tmp_path / "cache",
        progress=lambda *call: calls.append((call, threading.get_ident())),
    )
    assert {thread for _, thread in calls} == {threading.get_ident()}
    assert [call for call, _ in calls] == [(0, N), (16, N), (32, N), (48, N), (N, N)]
    calls.clear()
    cached_pixels(split, 8, "squash", tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert calls == [(N, N)]


@pytest.mark.parametrize(
    "number, words", [(errno.ENOSPC, "the disk is full"), (errno.EIO, "cannot be written")]
)
def test_a_full_disk_leaves_no_part(tmp_path, split, monkeypatch, number, words):
    real = atomic.write_atomically

    def write_atomically(path, write):
        def fail_late(file):
            write(file)
            raise OSError(number, os.strerror(number))

        real(path, fail_late)

    monkeypatch.setattr(atomic, "write_atomically", write_atomically)
    with pytest.raises(UserError, match=words) as error:
        cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert str(tmp_path / "cache") in str(error.value)
    assert "MEDMERGE_JAX_CACHE" in str(error.value)
    assert not [path for path in cache_of(tmp_path, "*") if path.suffix != ".lock"]


def test_a_cache_folder_that_cannot_be_made(tmp_path, split):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        cached_pixels(split, 8, "squash", tmp_path / "cache")


def interrupt_after(rows):
    def progress(done, total):
        if done >= rows:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def interrupted(tmp_path, split):
    """The folder of a part with 32 of the 50 images."""
    with pytest.raises(KeyboardInterrupt):
        cached_pixels(split, 8, "squash", tmp_path / "cache", progress=interrupt_after(32))
    (part,) = cache_of(tmp_path, ".*.part")
    assert len((part / "journal").read_text().splitlines()) == 2
    return part


@pytest.fixture
def uninterrupted(tmp_path, split):
    """The bytes of the array's file if nothing happens."""
    cached_pixels(split, 8, "squash", tmp_path / "other_cache")
    (path,) = (tmp_path / "other_cache").glob("*.npy")
    return path.read_bytes()


def contents(tmp_path):
    return [path.suffix for path in cache_of(tmp_path, "*")]


def test_an_interrupted_build_stops_its_threads(interrupted):
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_an_interrupted_build_goes_on(tmp_path, split, uninterrupted, decoded, interrupted):
    decoded.clear()
    calls = []
    pixels = cached_pixels(
        split, 8, "squash", tmp_path / "cache", progress=lambda *call: calls.append(call)
    )
    assert sorted(decoded) == sorted(split.paths[32:])
    assert calls == [(32, N), (48, N), (N, N)]
    assert cache_of(tmp_path)[0].read_bytes() == uninterrupted
    assert pixels.sha256 == hashlib.sha256(np.array(pixels.array).data).hexdigest()
    assert sorted(contents(tmp_path)) == [".json", ".lock", ".npy"]


def test_an_interruption_after_the_last_image(tmp_path, split, uninterrupted, decoded, monkeypatch):
    def write_json(path, value):
        atomic.write_text(path, "{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(atomic, "write_json", write_json)
        cached_pixels(split, 8, "squash", tmp_path / "cache")
    decoded.clear()
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert not decoded
    assert cache_of(tmp_path)[0].read_bytes() == uninterrupted


def flip(position):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return damage


CHUNK_BYTES = 16 * 8 * 8 * 3


@pytest.mark.parametrize(
    "name, damage, kept",
    [
        ("journal", truncate, 16),
        ("journal", flip(3), 0),
        ("journal", flip(70), 16),
        ("journal", extend, 32),
        ("journal", scribble, 0),
        ("journal", empty, 0),
        ("journal", Path.unlink, 0),
        ("pixels.npy", truncate, 16),
        ("pixels.npy", flip(-1), 16),
        ("pixels.npy", flip(-CHUNK_BYTES - 1), 0),
        ("pixels.npy", flip(70), 0),  # the header
        ("pixels.npy", extend, 32),
        ("pixels.npy", scribble, 0),
        ("pixels.npy", empty, 0),
        ("pixels.npy", Path.unlink, 0),
    ],
)
def test_of_a_damaged_part_only_whole_rows_are_kept(
    tmp_path, split, uninterrupted, interrupted, decoded, name, damage, kept
):
    damage(interrupted / name)
    decoded.clear()
    # Twice: the part is also interrupted again, and must still be right.
    with pytest.raises(KeyboardInterrupt):
        cached_pixels(split, 8, "squash", tmp_path / "cache", progress=interrupt_after(48))
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert set(decoded) == set(split.paths[kept:])
    assert cache_of(tmp_path)[0].read_bytes() == uninterrupted


def test_an_image_that_changes_while_interrupted_is_noticed(tmp_path, split, decoded, interrupted):
    Image.new("RGB", (9, 9), (50, 60, 70)).save(split.paths[2])
    decoded.clear()
    pixels = cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert sorted(decoded) == sorted(split.paths)
    np.testing.assert_array_equal(pixels.array[2, 4, 4], (50, 60, 70))


def test_where_files_cannot_be_locked_nothing_is_shared(tmp_path, split, decoded, monkeypatch):
    @contextlib.contextmanager
    def unlocked(path):
        yield False

    monkeypatch.setattr(locks, "waited_for", unlocked)
    with pytest.raises(KeyboardInterrupt):
        cached_pixels(split, 8, "squash", tmp_path / "cache", progress=interrupt_after(32))
    assert contents(tmp_path) == []

    def another(done, total):  # process, in the middle of this one
        if done == 32:
            cached_pixels(split, 8, "squash", tmp_path / "cache")

    decoded.clear()
    pixels = cached_pixels(split, 8, "squash", tmp_path / "cache", progress=another)
    assert len(decoded) == 2 * N
    assert pixels.sha256 == hashlib.sha256(np.array(pixels.array).data).hexdigest()
    assert sorted(contents(tmp_path)) == [".json", ".npy"]


def test_a_disk_that_is_too_small_is_told_at_once(tmp_path, split, decoded, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=N * 192 - 1))
    with pytest.raises(UserError, match="the disk is full; the decoded images take 0 MB"):
        cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert not decoded
    assert contents(tmp_path) == [".lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=N * 192))
    cached_pixels(split, 8, "squash", tmp_path / "cache")


def test_a_disk_that_fills_up_meanwhile(tmp_path, split, uninterrupted):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # a file may not grow beyond
    try:
        with pytest.raises(UserError, match="the disk is full"):
            cached_pixels(split, 8, "squash", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == [".lock"]  # nothing that keeps the disk full
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert cache_of(tmp_path)[0].read_bytes() == uninterrupted


def test_leftovers_of_a_killed_process_are_removed(tmp_path, split):
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    (path,) = cache_of(tmp_path)
    path.rename(path.with_name(f".{path.name}.abc123"))
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert cache_of(tmp_path) == [path]
    assert not cache_of(tmp_path, ".*")


def _build_slowly(split, folder, log, hang_at):
    log.touch()
    real = decode.read_image

    def read_image(path, *how):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        time.sleep(600 if int(path.stem) >= hang_at else 0.005)
        return real(path, *how)

    cache.read_image = read_image
    pixels = cached_pixels(split, 8, "squash", folder, 2)
    assert hashlib.sha256(np.ascontiguousarray(pixels.array).data).hexdigest() == pixels.sha256


def start(split, folder, log, hang_at=N):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_build_slowly, args=(split, folder, log, hang_at))
    process.start()
    return process


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def hanging(tmp_path, split):
    """A process that has done 32 of the 50 images and does not come to an end."""
    process = start(split, tmp_path / "cache", tmp_path / "hanging", 32)
    wait_until(lambda: sum(map(lines, (tmp_path / "cache").glob(".*.part/journal"))) == 2)
    yield process
    process.kill()
    process.join(60)


@pytest.mark.slow
def test_two_processes_decode_once(tmp_path, split):
    processes = [start(split, tmp_path / "cache", tmp_path / "log") for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert lines(tmp_path / "log") == N


@pytest.mark.slow
def test_a_killed_process_is_gone_on_from(tmp_path, split, uninterrupted, decoded, hanging):
    hanging.kill()
    hanging.join(60)
    decoded.clear()
    cached_pixels(split, 8, "squash", tmp_path / "cache")
    assert sorted(decoded) == sorted(split.paths[32:])
    assert cache_of(tmp_path)[0].read_bytes() == uninterrupted
    assert sorted(contents(tmp_path)) == [".json", ".lock", ".npy"]


@pytest.mark.slow
def test_a_process_that_waits_goes_on_when_the_other_is_killed(
    tmp_path, split, uninterrupted, hanging
):
    waiting = start(split, tmp_path / "cache", tmp_path / "waiting")
    wait_until((tmp_path / "waiting").exists)
    time.sleep(0.1)
    assert not lines(tmp_path / "waiting")
    hanging.kill()
    waiting.join(60)
    assert waiting.exitcode == 0
    assert sorted((tmp_path / "waiting").read_text().split()) == sorted(split.ids[32:])
    assert cache_of(tmp_path)[0].read_bytes() == uninterrupted
