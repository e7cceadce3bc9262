"""A study: a function that makes jobs of a config, and one that makes a table of their outcomes."""

import dataclasses
import graphlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmerge_jax.config import Config, shown
from medmerge_jax.errors import UserError
from medmerge_jax.recipes import inputs
from medmerge_jax.recipes.recipes import RECIPES, needed_parents
from medmerge_jax.registry import Decorator, Registry


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a study, in a run directory of its own that is complete by itself."""

    name: str  # "lp_ft-b/seed0": the run directory, below that of the study; "" is the study's own
    config: Config

    @property
    def after(self) -> tuple[str, ...]:
        """Names of the jobs that it starts from."""
        values = [self.config.parents[name] for name in needed_parents(self.config)]
        return tuple(dict.fromkeys(filter(None, map(inputs.job_of, values))))

    @property
    def averages(self) -> bool:
        """Whether it can do without some of the jobs that it starts from."""
        return RECIPES[self.config.recipe].averages

    def without(self, failed: Mapping[str, str]) -> "Job":
        """The job without the parents that failed jobs should have made."""
        parents = {
            name: value
            for name, value in self.config.parents.items()
            if inputs.job_of(value) not in failed
        }
        return dataclasses.replace(self, config=dataclasses.replace(self.config, parents=parents))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job has come to."""

    job: Job
    folder: Path  # its run directory
    results: Mapping[str, Any] | None  # its results.json; None if it failed
    error: str = ""  # why it failed


Outcomes = Mapping[str, Outcome]


@dataclasses.dataclass(frozen=True)
class StudyEntry:
    """An entry of `STUDIES`."""

    function: Callable[[Config], list[Job]]
    reduce: Callable[[Config, Outcomes], dict[str, Any]]  # its own fields of results.json
    extends: tuple[str, ...]  # groups of fields that may change while a study goes on
    # What is wrong with its own fields, of which each has a possible value: a line each.
    mistakes: Callable[[Config], Iterable[str]]


ALONE = ("compare", "grid", "fold_soup", "study", "sources", "help")
"""Fields of a job's config that make no difference to it: how many others there are, and where."""

FREE = (*ALONE, "log_to")
"""Fields that may be others when a job is resumed."""

STUDIES: Registry[StudyEntry] = Registry("study")

study = Decorator(STUDIES, StudyEntry)
"""Registers a function under its name, a value of `recipe`; its docstring says what it does.

The function makes the jobs of a config, in an order in which they can be run. A parent's value
"job:NAME" is the model of that job, "job:NAME::KEPT" one that it has kept. Facts: see `StudyEntry`.
"""


def different(path: str, values: Sequence[Any]) -> Iterator[str]:
    """A mistake, if the field at a path has no values or equal ones."""
    if not values or len(set(values)) < len(values):
        yield f"{path} = {shown(values)}: one or more different ones are wanted"


def plan(config: Config) -> dict[str, Job]:
    """All jobs of a config by name: its sources, and its study's or itself; the latter are last."""
    jobs = [Job(f"{inputs.SOURCES}{n}", config.sources[n]) for n in source_order(config)]
    if config.recipe in STUDIES:
        jobs += STUDIES[config.recipe].function(config)
    else:
        jobs.append(Job("", config))
    return {job.name: _alone(job, config.log_to) for job in jobs}


def source_order(config: Config) -> list[str]:
    """Names of the sources, each after those that it starts from; the same in all processes."""
    sources = {name: Job(name, one) for name, one in sorted(config.sources.items())}
    graph = {
        name: [one.removeprefix(inputs.SOURCES) for one in job.after]
        for name, job in sources.items()
    }
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        names = sorted(set(error.args[1]))
        raise UserError(
            f"sources {names} start from each other; one must start elsewhere"
        ) from error
    return [name for name in order if name in sources]


def _alone(job: Job, log_to: tuple[str, ...]) -> Job:
    """With the defaults of `ALONE`, and with the loggers of the whole."""
    if not job.name:
        return job
    defaults = {name: getattr(Config(), name) for name in ALONE}
    config = dataclasses.replace(job.config, **defaults, log_to=log_to)
    return dataclasses.replace(job, config=config)
