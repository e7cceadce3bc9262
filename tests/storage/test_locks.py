"""Locks where the file system has them and where it has none; holders that live or were killed."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.storage import locks
from medmerge_jax.storage.run_directory import RunDirectory

HOLDER = """
import errno, fcntl, sys, time
from pathlib import Path
from medmerge_jax.storage import locks

if sys.argv[2] == "none":
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")
    fcntl.flock = flock
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["flock", "none"])
def system(request, monkeypatch):
    """A file system with locks, and one without."""
    if request.param == "none":
        without_locks(monkeypatch, errno.ENOLCK)
    return request.param


def without_locks(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def holder(tmp_path, system):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock"), system]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_holds_it_is_named_and_when_killed_does_so_no_more(tmp_path, holder, system):
    for _ in range(2):
        with pytest.raises(locks.InUseError) as refused, locks.held(tmp_path / ".lock"):
            raise AssertionError("two processes have it")
        assert str(refused.value).startswith(f"process {holder.pid} on {platform.node()}")
    with pytest.raises(UserError, match=rf"{tmp_path} is in use by process {holder.pid} on"):
        RunDirectory(tmp_path).locked().__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locks.held(tmp_path / ".lock") as is_there:
        assert is_there()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_run_starts_on_a_file_system_without_locks(tmp_path, monkeypatch, number):
    without_locks(monkeypatch, number)
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        directory.write_json("config.json", {})
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*, delete "):
            RunDirectory(tmp_path / "run").locked().__enter__()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_marker_of_another_host_is_respected(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.ENOSYS)
    (tmp_path / ".lock.holder").write_text("7\nelsewhere\n12345\n")
    with pytest.raises(locks.InUseError, match=r"process 7 on elsewhere .*delete .*holder"):
        locks.held(tmp_path / ".lock").__enter__()


def test_other_errors_are_not_taken_for_another_process(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory(tmp_path).locked().__enter__()


def test_a_directory_that_vanished_is_noticed(tmp_path, system):
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        directory.check_there()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="has vanished"):
            directory.check_there()
        (tmp_path / "run").mkdir()
        for name in (".lock", ".lock.holder"):  # another process's
            (tmp_path / "run" / name).write_text("7\nelsewhere\n")
        with pytest.raises(UserError, match="has vanished"):
            directory.check_there()


def test_a_failed_start_leaves_no_directory(tmp_path, system):
    with pytest.raises(UserError), RunDirectory(tmp_path / "run").locked():
        raise UserError("no")
    assert not (tmp_path / "run").exists()


def test_lock_files_have_the_permissions_of_the_umask(tmp_path, system):
    before = os.umask(0o027)
    try:
        with locks.held(tmp_path / ".lock"):
            (path,) = Path(tmp_path).iterdir()
            assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_waiting_ends_when_the_lock_is_free(tmp_path, holder, system):
    if system == "none":
        with locks.waited_for(tmp_path / ".lock") as locked:
            assert not locked
        return
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    handler = signal.signal(signal.SIGALRM, lambda *_: holder.kill())
    with locks.waited_for(tmp_path / ".lock") as locked:
        assert locked
        assert holder.wait() == -signal.SIGKILL
    signal.signal(signal.SIGALRM, handler)
