"""A worker: one process that takes jobs of a study, one after another, until none is left.

Any number may work on a study at once, on one machine or on many that share its directory. They
meet nowhere but in the directory: each job is held by a lock, and what became of it is in
jobs.json. So a worker may be killed or join at any time.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from medmerge_jax.errors import DivergedError, OutOfMemoryError, UserError
from medmerge_jax.recipes import prepare
from medmerge_jax.recipes.experiment import Inputs, Prepared
from medmerge_jax.recipes.recipes import needed_parents
from medmerge_jax.recipes.run import finished, run_recipe
from medmerge_jax.runtime import preemption, processes
from medmerge_jax.runtime.progress import duration, say, work_on_part
from medmerge_jax.storage.run_directory import InUseError, RunDirectory
from medmerge_jax.studies.jobs import FREE, Job
from medmerge_jax.studies.state import DONE, FAILED, RUNNING, WAITING, Entry, JobStates

_POLL = 1.0
"""Seconds from one look for a job to the next, while others are at work."""

_LOST = 10
"""So often in a row a job's process may be lost before another epoch is finished."""

_MEMORY_ATTEMPTS = 2
"""Of a job that is out of memory, which another process on the same device may have taken."""


class Pool:
    """What the jobs of one process start from: those on the same images share them.

    Args:
      folder: Of the study.
      target: What the study's own jobs start from, see `prepare`.
      sources: The same of single jobs, by name.
    """

    def __init__(self, folder: Path, target: Prepared, sources: Mapping[str, Prepared]):
        self._folder, self._sources = folder, dict(sources)
        self._prepared = {_images(target): target}
        self._shared: dict[object, prepare.Shared] = {}

    def inputs(self, job: Job) -> Inputs:
        """Everything that a job starts from; the jobs before it are finished."""
        key = _images(job)
        if job.name in self._sources:
            return prepare.load_inputs(self._sources.pop(job.name))
        if key not in self._prepared:
            names = needed_parents(job.config)
            self._prepared[key] = prepare.prepare(job.config, names, self._folder, {})
        ready = self._prepared[key]
        parents = {
            name: parent
            for name, parent in ready.parents.items()
            if job.config.parents.get(name) == ready.config.parents[name]
        }
        ready = dataclasses.replace(ready, config=job.config, parents=parents)
        return prepare.load_inputs(ready, self._shared.setdefault(key, prepare.Shared()))

    def forget(self, jobs: list[Job]) -> None:
        """Frees the images that none of these jobs needs."""
        needed = {_images(job) for job in jobs}
        names = {job.name for job in jobs}
        self._sources = {name: one for name, one in self._sources.items() if name in names}
        self._prepared = {key: one for key, one in self._prepared.items() if key in needed}
        self._shared = {key: one for key, one in self._shared.items() if key in needed}


def _images(one: Prepared | Job) -> object:
    """What decides over the images of a job, decoded and split."""
    config = one.config
    return repr((config.data, config.image_size, config.select, config.evaluate_on))


class Worker:
    """Works on the jobs of a study.

    Args:
      jobs: All of them by name, those that others start from first.
      folder: Of the study.
      pool: Of this process.
    """

    def __init__(self, jobs: Mapping[str, Job], folder: Path, pool: Pool):
        self._jobs, self._folder, self._pool = jobs, folder, pool
        self._states = JobStates(folder)
        self._held = contextlib.ExitStack()
        self.errors: dict[str, UserError] = {}  # of jobs that failed in this process

    def work(self) -> None:
        """Returns when every job is done or has failed, here or in another process.

        Raises:
          UserError: A job cannot be used, for a reason that would meet the others too.
        """
        while (name := processes.from_first(self._take)) is not None:
            try:
                self._run(self._ready(name))
            finally:
                self._held.close()
                work_on_part("")
            self._pool.forget([self._jobs[name] for name in processes.from_first(self.unfinished)])

    def unfinished(self) -> list[str]:
        """Names of the jobs that are neither done nor failed; jobs.json then has them all."""
        with self._states.changing() as entries:
            return self._left(entries)

    def _left(self, entries: dict[str, Entry]) -> list[str]:
        for name in self._jobs:  # in their order, for whoever reads the file
            entries.setdefault(name, Entry())
        return [name for name in self._jobs if not self._ended(name, entries)]

    def _ready(self, name: str) -> Job:
        """The job, of an average without the members that failed."""
        job = self._jobs[name]
        return job.without(processes.from_first(self.failed)) if job.averages else job

    def failed(self) -> dict[str, str]:
        """Why jobs failed, by name."""
        entries = self._states.read()
        return {
            name: entries[name].error
            for name in self._jobs
            if name in entries and entries[name].status == FAILED
        }

    def directory(self, name: str) -> RunDirectory:
        """Of a job."""
        return RunDirectory(self._folder / name, free=FREE, study=self._folder)

    def _ended(self, name: str, entries: Mapping[str, Entry]) -> bool:
        entry = entries.get(name, Entry())
        if entry.status != DONE:
            return entry.status == FAILED
        # Who deletes results wants the job to be run again.
        return (self._folder / name / "results.json").exists() and self._is_current(name, entries)

    def _is_current(self, name: str, entries: Mapping[str, Entry]) -> bool:
        """Whether an average is of the members that it should be of, as they are now."""
        job = self._jobs[name]
        if not job.averages:
            return True
        failed = {one: "" for one in job.after if entries.get(one, Entry()).status == FAILED}
        recorded = self.directory(name).read_json("config.json") or {}
        if recorded.get("config", {}).get("parents") != job.without(failed).config.parents:
            return False
        try:
            made, *members = (
                (self._folder / one / "results.json").stat().st_mtime
                for one in (name, *job.after)
                if one not in failed
            )
        except FileNotFoundError:  # a member is to be made again
            return False
        return made >= max(members, default=made)

    def _take(self) -> str | None:
        """Takes the lock of a job that can be run, and waits for one; None if none is left."""
        said = False
        while True:
            with self._states.changing() as entries:
                left = self._left(entries)
                for name in left:
                    if self._can_begin(name, entries) and self._hold(name):
                        if self._begin(name, entries):
                            return name
                        self._held.close()
                left = self._left(entries)
            if not left:
                return None
            if not said:
                say(f"waiting for jobs of other processes, {len(left)} of them not done")
            said = True
            time.sleep(_POLL)

    def _can_begin(self, name: str, entries: dict[str, Entry]) -> bool:
        """Whether all that a job starts from is there; one that never will be has failed."""
        job = self._jobs[name]
        if not all(self._ended(one, entries) for one in job.after):
            return False
        missing = [one for one in job.after if entries[one].status == FAILED]
        if not missing or (job.averages and len(missing) < len(job.after)):
            return True
        entry = entries.setdefault(name, Entry())
        entry.become(FAILED, error=f"it starts from {missing[0]}, which failed")
        return False

    def _hold(self, name: str) -> bool:
        """Whether nobody else is at work on a job; now this process is."""
        try:
            self.directory(name).hold(self._held)
        except InUseError:
            return False
        return True

    def _begin(self, name: str, entries: dict[str, Entry]) -> bool:
        """Notes that a job is begun; False if its process was lost again and again."""
        entry, lines = entries.setdefault(name, Entry()), len(self.directory(name).records())
        lost = entry.lost + 1 if entry.status == RUNNING and lines == entry.lines else 0
        if lost >= _LOST:
            entry.become(
                FAILED,
                error=f"its process was killed {lost} times before it had finished another epoch",
            )
            return False
        entry.become(RUNNING, attempts=entry.attempts + 1, lost=lost, lines=lines)
        return True

    def _say(self, name: str) -> None:
        """Which of the jobs is begun, and how long all that are left will take."""
        if len(self._jobs) == 1 or not processes.is_first():
            return
        entries = self._states.read()
        ended = [one for one in self._jobs if self._ended(one, entries)]
        working = max(sum(entry.status == RUNNING for entry in entries.values()), 1)
        seconds = self._seconds_left(entries, ended, working)
        left = "" if seconds is None else f", about {duration(seconds)} left"
        count = len(self._jobs)
        number = min(len(ended) + working, count)  # some may be lost
        say(f"{name or 'the run'}: job {number} of {count}{left}")
        work_on_part(f"{number}/{count}", seconds)

    def _seconds_left(
        self, entries: Mapping[str, Entry], ended: Collection[str], working: int
    ) -> float | None:
        """For all jobs that have not ended: as long as those of their recipe took, or any."""
        took: dict[str, list[float]] = {}
        for name in ended:
            if seconds := entries[name].seconds:
                took.setdefault(self._jobs[name].config.recipe, []).append(seconds)
        if not took:
            return None
        known = {recipe: statistics.fmean(times) for recipe, times in took.items()}
        usual = statistics.fmean(known.values())
        left = [job.config.recipe for name, job in self._jobs.items() if name not in ended]
        return sum(known.get(recipe, usual) for recipe in left) / working

    def _run(self, job: Job) -> None:
        directory = self.directory(job.name)
        try:
            results = finished(directory)
            if results is not None and not processes.from_first(lambda: self._still_holds(job)):
                processes.from_first(directory.start_anew)
                results = None
            if results is None:
                self._say(job.name)
                inputs, alone = self._pool.inputs(job), not job.name
                results = run_recipe(job.config, directory, inputs, curves=alone)
        except (DivergedError, OutOfMemoryError) as error:
            if len(self._jobs) == 1 or processes.count() > 1:
                raise
            self.errors[job.name] = error
            self._fail(job, error)
            return
        except (preemption.Preempted, KeyboardInterrupt):
            self._note(job.name, WAITING)  # it was not lost
            raise
        except UserError:
            self._note(job.name, WAITING)
            raise
        self._note(job.name, DONE, seconds=float(results["wall_seconds"]), error="", lost=0)

    def _still_holds(self, job: Job) -> bool:
        """Whether results that were found are those of the job."""
        return self._is_current(job.name, self._states.read())

    def _fail(self, job: Job, error: UserError) -> None:
        with self._states.changing() as entries:
            entry = entries[job.name]
            again = isinstance(error, OutOfMemoryError) and entry.attempts < _MEMORY_ATTEMPTS
            entry.become(WAITING if again else FAILED, error=str(error))
        then = "it will be tried once more" if again else "the other jobs go on"
        say(f"{job.name} failed: {error}; {then}")

    def _note(self, name: str, status: str, **values: object) -> None:
        def note() -> None:
            with self._states.changing() as entries:
                entries.setdefault(name, Entry()).become(status, **values)

        processes.from_first(note)
