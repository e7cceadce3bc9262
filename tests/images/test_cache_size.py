"""The bound of the cache: what goes first, and that nothing goes which a process uses."""

import errno
import fcntl
import os
import subprocess
import sys

import numpy as np
import pytest

from medmerge_jax.data import Split
from medmerge_jax.errors import UserError
from medmerge_jax.images import cache_size, cached_pixels
from medmerge_jax.storage import locks

SIDE = 100
BYTES = SIDE * SIDE * 3

READER = """
import sys, time
from pathlib import Path
import numpy as np
from medmerge_jax.images import cache_size

path = Path(sys.argv[1])
assert cache_size.use(path)
array = np.load(path, mmap_mode="r")
print("used", flush=True)
sys.stdin.readline()
print(int(array.sum()), flush=True)
"""


@pytest.fixture(autouse=True)
def new_process():
    """What a test used is in use no more."""
    yield
    release()


@pytest.fixture
def limit(monkeypatch):
    """Sets the bound in images of the tests' size."""
    return lambda images: monkeypatch.setenv(cache_size.LIMIT, f"{images * BYTES / 1e9:.9f}")


@pytest.fixture
def decode(tmp_path):
    """Decodes images of a number, each an array of its own, and says where it is."""

    def call(number, count=1):
        archive = tmp_path / f"{number}.npz"
        if not archive.exists():
            archive.touch()
        pixels = np.full((count, SIDE, SIDE, 3), number, np.uint8)
        ids, labels = tuple(map(str, range(count))), np.zeros(count, np.int32)
        split = Split(ids, (archive,) * count, labels, None, pixels)
        found = cached_pixels(split, SIDE, "squash", tmp_path / "cache")
        return find(tmp_path, found.array)

    return call


def find(tmp_path, array):
    (path,) = [p for p in arrays(tmp_path) if np.array_equal(np.load(p), array)]
    return path


def arrays(tmp_path):
    return set((tmp_path / "cache").glob("*.npy"))


def release():
    for file in cache_size._in_use.values():
        os.close(file)
    cache_size._in_use.clear()


def test_without_the_variable_nothing_goes(tmp_path, decode):
    assert len({decode(number) for number in range(5)}) == len(arrays(tmp_path)) == 5


def test_what_was_not_used_for_longest_goes(tmp_path, decode, limit):
    paths = [decode(number) for number in range(3)]
    for age, path in enumerate((paths[1], paths[0], paths[2])):
        os.utime(path, (1e9 + age, 1e9 + age))
    assert decode(1) == paths[1]  # which is used last now
    release()
    limit(3.1)
    newest = decode(3)
    assert arrays(tmp_path) == {paths[1], paths[2], newest}
    assert not paths[0].with_suffix(".json").exists()
    release()
    larger = decode(4, count=2)
    assert larger in arrays(tmp_path) and len(arrays(tmp_path)) == 2


def test_what_went_is_decoded_again(tmp_path, decode, limit):
    limit(1.1)
    first = decode(0)
    release()
    decode(1)
    assert not first.exists()
    release()
    assert decode(0) == first


def test_what_this_process_uses_stays(tmp_path, decode, limit):
    limit(2.1)
    paths = {decode(0), decode(1)}
    with pytest.raises(UserError, match=r"6\.03e-05 GB that are in use.*MEDMERGE_JAX_CACHE_GB"):
        decode(2)
    assert arrays(tmp_path) == paths
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_what_another_process_uses_stays_until_it_ends(tmp_path, decode, limit):
    paths = [decode(5), decode(6)]
    release()
    os.utime(paths[0], (1e9, 1e9))
    command = [sys.executable, "-c", READER, str(paths[0])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout.readline() == "used\n"
        os.utime(paths[0], (1e9, 1e9))
        limit(2.1)
        decode(7)
        assert paths[0].exists() and not paths[1].exists()
        assert reader.communicate("\n")[0] == f"{5 * BYTES}\n"
    release()
    decode(8)
    assert not paths[0].exists()


def test_what_a_killed_process_left_of_an_array_goes_but_not_what_one_makes(
    tmp_path, decode, limit
):
    part = tmp_path / "cache" / ".abc.part"
    part.mkdir(parents=True)
    (part / "pixels.npy").write_bytes(bytes(BYTES))
    limit(1.5)
    with locks.waited_for(tmp_path / "cache" / "abc.lock"), pytest.raises(UserError):
        decode(0)
    assert part.exists()
    decode(0)
    assert not part.exists()


def test_without_locks_nothing_goes(tmp_path, decode, limit, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    decode(0)
    limit(1.5)
    with pytest.raises(UserError, match="in use"):
        decode(1)
    assert len(arrays(tmp_path)) == 1


@pytest.mark.parametrize("given", ["ten", "-1", "0", "nan", "inf"])
def test_a_bound_that_is_none(given, decode, monkeypatch):
    monkeypatch.setenv(cache_size.LIMIT, given)
    with pytest.raises(UserError, match=f"MEDMERGE_JAX_CACHE_GB = '{given}': a positive number"):
        decode(0)
