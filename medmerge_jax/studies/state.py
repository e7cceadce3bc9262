"""jobs.json: what has become of each job of a study, for all processes that work on it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medmerge_jax.errors import UserError
from medmerge_jax.storage import atomic, locks

JOBS_FILE = "jobs.json"

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"


@dataclasses.dataclass
class Entry:
    """Of one job.

    Attributes:
      status: "waiting", "running", "done" or "failed"; a running one whose directory nobody holds
        was lost with its process.
      attempts: How often it was begun, or begun anew after a failure.
      lost: How often in a row its process was lost before it had finished another epoch.
      lines: Of metrics.jsonl, when it was begun the last time.
      seconds: Of work, when it is done.
      error: Why it failed.
      since: When the status became what it is, seconds since 1970.
    """

    status: str = WAITING
    attempts: int = 0
    lost: int = 0
    lines: int = 0
    seconds: float = 0.0
    error: str = ""
    since: float = 0.0

    def become(self, status: str, **values: Any) -> None:
        """Sets the status and other values."""
        self.status, self.since = status, round(time.time(), 3)
        for name, value in values.items():
            setattr(self, name, value)


class JobStates:
    """The entries of jobs.json in the directory of a study."""

    def __init__(self, folder: Path):
        self._path = folder / JOBS_FILE

    def read(self) -> dict[str, Entry]:
        """All entries by name; none if there is no file yet.

        Raises:
          UserError: The file is not as this program writes it.
        """
        if not self._path.exists():
            return {}
        kinds = {name: type(value) for name, value in vars(Entry()).items()}
        try:
            entries = {
                name: Entry(**{key: kinds[key](value) for key, value in entry.items()})
                for name, entry in atomic.read_json(self._path)["jobs"].items()
            }
        except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
            raise UserError(
                f"{self._path} is not as this program writes it ({error}); delete it, and finished "
                "jobs are found again by their results"
            ) from error
        return entries

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Entry]]:
        """The entries, to be changed while no other process does; they are written at the end."""
        with locks.waited_for(self._path.with_name(f".lock-{JOBS_FILE}")):
            entries = self.read()
            before = _plain(entries)
            try:
                yield entries
            finally:
                if _plain(entries) != before:
                    atomic.write_json(self._path, {"jobs": _plain(entries)})


def _plain(entries: Mapping[str, Entry]) -> dict[str, Any]:
    return {name: dataclasses.asdict(entry) for name, entry in entries.items()}
