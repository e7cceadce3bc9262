"""A run directory: one process at a time, one config, and everything that the run leaves.

config.json             resolved config, package versions, data fingerprint
checkpoints/<stage>/    see `checkpoints`
data_audit.json         what is in two splits or in a parent's training data
image_hashes.npz        by which those who start from this model find such images
metrics.jsonl           one line per epoch and stage; TensorBoard events in events/
metrics.csv             the same as a table, of when a process last began a stage or ended
loggers.json            by which the services of config.log_to know the run; wandb/ of one of them
coefficients.jsonl      of each layer of a merge, one line per epoch and stage
kept/<stage>-<epoch>/   models of the epochs that a stage was to keep, each a parent like a run
merged.npz              what the recipe merge_ft has merged, until the run is finished
seconds.json            how long its processes have been at work, until the run is finished
predictions.npz         of the test split; predictions-<name>.npz of each of config.evaluate_on
coefficients.npz, model/, results.json, report.html, figures/
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmerge_jax.config import completed
from medmerge_jax.errors import UserError
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic, locks
from medmerge_jax.storage.csv_cells import csv_table
from medmerge_jax.storage.loggers import IDS_FILE, About, Loggers

Record = dict[str, Any]

_HELD: dict[Path, Callable[[], bool]] = {}
"""Of the directories that this process works in: whether they are there."""

_CLOCKS: dict[Path, float] = {}
"""When the runs that are at work began, had every process gone on where the last one ended."""

METRICS, COEFFICIENTS = "metrics.jsonl", "coefficients.jsonl"
"""Files with a line for each epoch of a stage."""

_SECONDS, _MERGED, _KEPT = "seconds.json", "merged.npz", "checkpoints/*/*.model.npz"

_WRITTEN = (
    "config.json", "data_audit.json", "image_hashes.npz", METRICS, COEFFICIENTS, "coefficients.npz",
    "metrics.csv", IDS_FILE, _MERGED, _SECONDS, "predictions.npz", "results.json", "report.html",
    "model",
    *(
        f"{figure}.{kind}"
        for figure in ("coefficients", "comparison", "confusion_matrix", "learning_curves",
                       "reliability", "threshold_curves")
        for kind in ("png", "svg", "pdf")
    ),
)  # fmt: skip


_POLL = 1.0
"""Seconds from one look at a lock to the next."""


class InUseError(UserError):
    """Another process is at work in a directory."""


class RunDirectory:
    """The files of one run. Does not create anything until something is written.

    Of several processes the first writes; the others may call everything, to no effect.

    Args:
      path: The directory.
      free: Fields and groups of the config that may be others whenever a run is resumed.
      study: Directory of the study that the run is a part of.
    """

    def __init__(self, path: Path, free: Sequence[str] = (), study: Path | None = None):
        self.path = path
        self._free = tuple(free)
        self._study = study if study != path else None
        self.figures = path / "figures"
        self._loggers: Loggers | None = None

    @contextlib.contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[None]:
        """Holds the directory against other processes; the lock dies with the process.

        Args:
          wait: For as long as another process holds it.

        Raises:
          InUseError: Another process holds it.
          UserError: The directory cannot be written.
        """
        with contextlib.ExitStack() as stack:
            processes.from_first(lambda: self._wait(stack) if wait else self.hold(stack))
            yield

    def _wait(self, stack: contextlib.ExitStack) -> None:
        said = False
        while True:
            try:
                return self.hold(stack)
            except InUseError as error:
                if not said:
                    say(f"waiting: {str(error).partition(';')[0]}")
                said = True
                time.sleep(_POLL)

    def hold(self, stack: contextlib.ExitStack) -> None:
        """As `locked`, until the stack is closed; for the first process alone."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _HELD[self.path] = stack.enter_context(locks.held(self.path / atomic.LOCK))
        except locks.InUseError as error:
            raise InUseError(
                f"workdir {self.path} is in use by {error}; wait for it to end, "
                "or choose another --workdir"
            ) from error
        except OSError as error:
            raise UserError(
                f"workdir {self.path} cannot be written ({error.strerror}); "
                "choose a folder of yours with --workdir"
            ) from error
        stack.callback(self._leave)
        if (self.path / "config.json").exists():  # else it may be any folder of the user's
            atomic.remove_leftovers(self.path, _WRITTEN)

    def _leave(self) -> None:
        """A start that failed before anything was written leaves no folder."""
        _save_clocks()
        _CLOCKS.pop(self.path, None)
        del _HELD[self.path]
        self.close()
        with contextlib.suppress(OSError):  # it is gone, or cannot be written any more
            files = list(self.path.iterdir())
            if all(file.name.startswith(atomic.LOCK) for file in files):
                for file in files:
                    file.unlink()
                self.path.rmdir()

    def check_there(self) -> None:
        """Raises a UserError if the locked directory has vanished: it would be made anew."""
        for path, is_there in _HELD.items():
            if not is_there():
                raise UserError(
                    f"workdir {path} has vanished while the run was at work in it. Put it back and "
                    "give the same command again: it goes on from the last checkpoint in it; "
                    "without it, it begins anew."
                )

    def start_clock(self) -> None:
        """Counts the run's seconds from here on, on top of those of the processes before."""
        before = (self.read_json(_SECONDS) or {}).get("wall_seconds")
        if type(before) is not float:  # a new run; or an old one, which has its epochs only
            before = sum(record.get("seconds", 0.0) for record in self.records())
        _CLOCKS[self.path] = time.monotonic() - before

    def wall_seconds(self) -> float:
        """How long the run's processes have been at work, all together."""
        return round(time.monotonic() - _CLOCKS[self.path], 3)

    def start_anew(self) -> None:
        """Removes everything that a run has left."""
        for name in (*_WRITTEN, "kept", "checkpoints", "events", "figures", "wandb"):
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def clean_up(self, results: Record) -> None:
        """Removes what a run with results needs no more: what is in model/ and kept/, too."""
        _CLOCKS.pop(self.path, None)
        if not processes.is_first():
            return
        for path in (self.path / _SECONDS, self.path / _MERGED, *self.path.glob(_KEPT)):
            path.unlink(missing_ok=True)
        for stage in results.get("stages", [])[-1:]:
            folder = self.path / "checkpoints" / stage["name"]
            # Damaged ones stay, to be looked at.
            for path in [path for path in folder.glob("*") if path.name.isdecimal()]:
                shutil.rmtree(path, ignore_errors=True)
                path.with_suffix(".json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
                folder.parent.rmdir()  # unless there are other stages'

    def check_config(self, config: Mapping[str, Any]) -> Record | None:
        """What config.json has, if it is there; a UserError names fields that differ from it."""
        recorded = self._recorded()
        differing = [
            f"  {field}: {_show(old)} there, {_show(new)} now"
            # A run of an earlier version does not say what has become a field since.
            for field, old, new in _differences(
                completed(recorded["config"] if recorded else config), completed(config)
            )
            if not any(f"{field}.".startswith(f"{free}.") for free in self._free)
        ]
        if differing:
            raise UserError(
                f"workdir {self.path} holds a run with another config:\n"
                + "\n".join(differing)
                + "\nUse the same config to resume it, or another --workdir."
            )
        return recorded

    def record_config(
        self,
        config: Mapping[str, Any],
        data_fingerprint: str,
        parents: Mapping[str, str],
        versions: Mapping[str, str],
    ) -> None:
        """Writes config.json of a new run; of an old one, checks that it began with the same.

        Parents are fingerprints of weights, as far as they are known; versions are not compared.

        Raises:
          UserError: The directory holds a run of another config, of other data, or of parents
            that have changed.
        """
        recorded = self.check_config(config)
        if recorded is None:
            now = {
                "config": config,
                "data_fingerprint": data_fingerprint,
                "parent_fingerprints": parents,
                "versions": versions,
            }
            self.write_json("config.json", now)
            return
        changed, before = [], recorded["parent_fingerprints"]
        if recorded["data_fingerprint"] != data_fingerprint:
            changed.append("other data: images, labels or splits")
        changed += [
            f"another parent {name}: its weights"
            for name, fingerprint in parents.items()
            if before.get(name, fingerprint) != fingerprint
        ]
        if changed:
            raise UserError(
                f"workdir {self.path} holds a run on {', on '.join(changed)} have changed since. "
                "Restore them to resume it, or use another --workdir."
            )
        if recorded["config"] != config:  # in what may be another
            self.write_json("config.json", {**recorded, "config": config})

    def _recorded(self) -> Record | None:
        recorded: Record | None = self.read_json("config.json")
        kinds = {"config": dict, "data_fingerprint": str, "parent_fingerprints": dict}
        for field, kind in kinds.items():
            if recorded is not None and not isinstance(recorded.get(field), kind):
                raise UserError(
                    f"{self.path / 'config.json'}: {field} is not as this program writes it; "
                    "restore the file, or use another --workdir"
                )
        return recorded

    def read_json(self, name: str) -> Any:
        """The file's object, or None if there is no such file."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            value = atomic.read_json(path)
            if not isinstance(value, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it to start anew") from error
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Writes `name` atomically."""
        self.check_there()
        if processes.is_first():
            atomic.write_json(self.path / name, value)

    def records(self, name: str = METRICS) -> list[Record]:
        """All lines of a file; a last line cut short by a crash is left out."""
        records = []
        for number, line in enumerate([x for x in self._lines(name) if x.endswith("\n")], 1):
            record = None
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("epoch")) is not int:
                raise UserError(
                    f"{self.path / name}, line {number}: {line[:80]!r} is no record of "
                    "an epoch; delete the line"
                )
            records.append(record)
        return records

    def rewind(self, stage: str, epoch: int) -> None:
        """Drops the lines of `stage` after `epoch`, which will be trained again.

        A last line cut short goes too, or the next one would be glued to it.
        """
        if not processes.is_first():
            return
        for name in (METRICS, COEFFICIENTS):
            records = self.records(name)
            kept = [r for r in records if r.get("stage") != stage or r["epoch"] <= epoch]
            if len(kept) < len(self._lines(name)):
                text = "".join(json.dumps(record) + "\n" for record in kept)
                atomic.write_text(self.path / name, text)
        self.write_csv()

    def _lines(self, name: str) -> list[str]:
        path = self.path / name
        text = path.read_text(errors="replace") if path.exists() else ""
        return text.splitlines(keepends=True)

    def log(self, record: Record, layers: Mapping[str, Any] | None = None) -> None:
        """Appends a line to metrics.jsonl, and tells the loggers its numbers.

        It has "stage" and "epoch" (from 1); the rest are numbers or None. What is said of each
        layer of a merge goes into coefficients.jsonl.
        """
        self.check_there()
        if not processes.is_first():
            return
        self._append(METRICS, record)
        if layers:
            named = {name: record[name] for name in ("stage", "epoch")}
            self._append(COEFFICIENTS, {**named, "layers": layers})
        _save_clocks()
        if self._loggers is None:
            self._loggers = Loggers(("tensorboard",), About(self.path))
        self._loggers.log(record)

    def begin_logging(self, log_to: Sequence[str], config: Mapping[str, Any]) -> None:
        """Opens loggers, see `loggers`; they see the config, so without anything of this machine.

        Raises:
          UserError: One cannot be opened.
        """
        if processes.is_first():
            study = self._study.absolute() if self._study else None
            path = self.path.absolute()
            name = path.relative_to(study).as_posix() if study else path.name
            about = About(self.path, name, study.name if study else "", config)
            self._loggers = Loggers(log_to, about)

    def write_csv(self) -> None:
        """Writes metrics.csv, whose lines are those of metrics.jsonl; columns may be added."""
        if processes.is_first() and (records := self.records()):
            atomic.write_text(self.path / "metrics.csv", csv_table(records))

    def close(self, results: Record | None = None) -> None:
        """Ends the loggers, which are told the results of a finished run."""
        loggers, self._loggers = self._loggers, None
        if loggers is not None:
            if results is None:  # an error is under way that is worth more than one met here
                with contextlib.suppress(OSError, UserError):
                    self.write_csv()
            loggers.close(results)

    def _append(self, name: str, record: Record) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def _save_clocks() -> None:
    """Of all runs that are at work: a comparison is while one of its parts is."""
    for path, began in _CLOCKS.items():
        if processes.is_first() and (path / "config.json").exists():  # or it would be made anew
            seconds = {"wall_seconds": round(time.monotonic() - began, 3)}
            with contextlib.suppress(OSError):  # nothing fails for want of a number
                atomic.write_json(path / _SECONDS, seconds)


def _differences(old: Any, new: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            path = f"{field}.{key}" if field else key
            yield from _differences(old.get(key), new.get(key), path)
    elif old != new:
        yield field, old, new


def _show(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)
