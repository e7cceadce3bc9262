"""Locks between processes, also on file systems that have none."""

import contextlib
import errno
import fcntl
import functools
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from medmerge_jax.storage import atomic

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What `flock` fails with on a file system that has no locks."""

_SECONDS = 0.2
"""In which a marker is tried again: that of a process that has ended is removed at first."""


class InUseError(Exception):
    """Another process has the lock; the message says which."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[Callable[[], bool]]:
    """Holds the lock of the file `path`, in which it says who does; it ends with the process.

    Where the file system has no locks, a file `<path>.holder` is there for as long as the lock is
    held. The next process on the same host removes that of a killed one; that of a process on
    another host, which cannot be asked, is the user's to delete.

    Yields:
      Whether the file is still the one that is locked.

    Raises:
      InUseError: Another process has the lock.
      OSError: The file cannot be written.
    """
    lock: BaseFileLock = FileLock(
        path, thread_local=False, fallback_to_soft=False, on_acquired=_sign
    )
    try:
        if not _acquire(lock, timeout=0):
            path.unlink(missing_ok=True)  # nobody can have it
            path = path.with_name(f"{path.name}.holder")
            lock = SoftFileLock(path, thread_local=False)
            lock.acquire(timeout=_SECONDS)
    except Timeout:
        soft = isinstance(lock, SoftFileLock)
        holder = _marked(path) if soft else path.read_text().strip() or "another process"
        raise InUseError(holder) from None
    with path.open("rb") as file:
        try:
            yield functools.partial(atomic.is_at, path, file.fileno())
        finally:
            lock.release()


@contextlib.contextmanager
def waited_for(path: Path) -> Iterator[bool]:
    """Waits for the lock of a file; False where the file system has no locks."""
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        yield _acquire(lock)
    finally:
        lock.release()


def shared(path: Path) -> int:
    """The descriptor of a file with a lock that any number of processes have at once.

    It ends when the descriptor is closed, or with the process. Where the file system has no locks,
    the file is open without one.

    Raises:
      OSError: The file cannot be read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
    return file


@contextlib.contextmanager
def unless_held(path: Path) -> Iterator[bool]:
    """Holds the lock of a file that is there; False if any process has it, or there are no locks.

    Raises:
      OSError: The file cannot be written, or is not there.
    """
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (*_NO_LOCKS, errno.EWOULDBLOCK):
                raise
            yield False
        else:
            yield True


def _acquire(lock: BaseFileLock, timeout: float = -1) -> bool:
    """False where the file system has no locks."""
    try:
        lock.acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _sign(file: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _marked(path: Path) -> str:
    # filelock has process and host on the first two lines of its marker.
    process, host = [*path.read_text().split(), "?", "?"][:2]
    return f"process {process} on {host.split('?')[0]} (if that has ended, delete {path})"
