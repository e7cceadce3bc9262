"""Grids of fine-tunings from one warm-up, and the soups of what they leave."""

import ast
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medmerge_jax.config import Config, fields, shown
from medmerge_jax.errors import nearest
from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.studies.jobs import Job, Outcome, Outcomes, different, study
from medmerge_jax.studies.rows import evaluated, scores

WARMUP = "warmup"
"""The job that makes what all members start from, its head above all."""

SOUPS = ("uniform", "greedy", "GoU", "GoG")
"""Of all models, and, of groups, greedy soups of uniform ones and of greedy ones."""

BEST = "best single, by validation"
"""Names the row of the model that one would take if there were no soups."""

_AXES = {"learning_rate": "ft.learning_rate", "augmentation": "augmentation", "seed": "seed"}


def with_field(config: Config, path: str, value: Any) -> Config:
    """The config with another value of a field, "ft.learning_rate"."""
    name, _, rest = path.partition(".")
    if rest:
        value = with_field(getattr(config, name), rest, value)
    changed: Config = dataclasses.replace(config, **{name: value})
    return changed


def parse_axis(axis: str) -> tuple[str, list[Any]]:
    """The field and the values of an axis.

    >>> parse_axis("weight_decay=0.01|0.1"), parse_axis("merge.granularity=kernel|layer")
    (('weight_decay', [0.01, 0.1]), ('merge.granularity', ['kernel', 'layer']))
    """
    path, _, values = axis.partition("=")
    return path.strip(), [_value(one.strip()) for one in values.split("|") if one.strip()]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _axis_mistakes(axis: str) -> Iterator[str]:
    """What is wrong with an axis."""
    path, values = parse_axis(axis)
    types = {one.path: type(one.value) for one in fields(Config())}
    if path not in types:
        yield f"grid.axes has {shown(axis)}: {path!r} is no field: {nearest(path, list(types))}"
        return
    if path in ("recipe", "start", "head", *_AXES.values()) or path.partition(".")[0] in _OTHERS:
        yield f"grid.axes has {shown(axis)}: {path} cannot differ between members of a grid"
    if not values or len(set(map(repr, values))) < len(values):
        yield f"grid.axes has {shown(axis)}: wanted are different values, as 'seed=0|1|2'"
    for value in values:
        kind = types[path]
        if type(value) is not kind and not (kind is float and type(value) is int):
            yield f"grid.axes has {shown(axis)}: {shown(value)} is no {kind.__name__}"


_OTHERS = ("compare", "data", "fold_soup", "grid", "help", "sources", "soup", "study")


def mistakes(config: Config) -> Iterator[str]:
    """What is wrong with the fields of the studies here and of fission_fusion."""
    for name in ("learning_rates", "augmentations", "seeds"):
        yield from different(f"grid.{name}", getattr(config.grid, name))
    for axis in config.grid.axes:
        yield from _axis_mistakes(axis)
    yield from group_mistakes(config)
    if config.fgg.cycle % 2:
        yield f"fgg.cycle = {config.fgg.cycle}: an even number of epochs is wanted"


def group_mistakes(config: Config) -> Iterator[str]:
    """What is wrong with `soup.group_by`."""
    paths, group = [one.path for one in fields(config)], config.soup.group_by
    if group and group not in paths:
        yield f"soup.group_by = {group!r}: {nearest(group, paths)}"


def warmup(config: Config) -> Job:
    """The warm-up of a study; its learning rate and epochs are those of `lp`."""
    settings = config.grid
    return Job(
        WARMUP,
        dataclasses.replace(
            config, recipe=settings.warmup, augmentation=settings.warmup_augmentation
        ),
    )


def member(config: Config, name: str, recipe: str, **values: Any) -> Job:
    """A job that trains on from the warm-up with its head; values of fields by path."""
    parents = {WARMUP: f"job:{WARMUP}"}
    config = dataclasses.replace(config, recipe=recipe, parents=parents, start=WARMUP, head="keep")
    for path, value in values.items():
        config = with_field(config, path, value)
    return Job(name, config)


def soup(config: Config, name: str, kind: str, members: Mapping[str, str]) -> Job:
    """A job that averages the models of others, given as parents are."""
    settings = dataclasses.replace(config.soup, kind=kind)
    changes: dict[str, Any] = {"recipe": "soup", "parents": dict(members), "soup": settings}
    return Job(f"soups/{name}", dataclasses.replace(config, **changes))


def soups(config: Config, groups: Mapping[str, Mapping[str, str]]) -> list[Job]:
    """All soups of grouped models: uniform and greedy of all, of each group, GoU and GoG.

    Args:
      config: Of the study.
      groups: Models by name, as values of parents, by group; one group makes no hierarchy.
    """
    everything = {
        f"{group} {name}".strip(): value
        for group, models in groups.items()
        for name, value in models.items()
    }
    jobs = [soup(config, kind, kind, everything) for kind in ("uniform", "greedy")]
    if len(groups) < 2:
        return jobs
    for kind, level in (("uniform", "GoU"), ("greedy", "GoG")):
        inner = [soup(config, f"{kind}-{name}", kind, of) for name, of in groups.items()]
        members = {name: f"job:{job.name}" for name, job in zip(groups, inner, strict=True)}
        jobs += [*inner, soup(config, level, "greedy", members)]
    return jobs


def members(config: Config) -> list[Job]:
    """Every combination of the axes, a fine-tuning each."""
    grid = config.grid
    axes: dict[str, Sequence[Any]] = {
        _AXES["learning_rate"]: grid.learning_rates,
        _AXES["augmentation"]: grid.augmentations,
        _AXES["seed"]: grid.seeds,
        **dict(map(parse_axis, grid.axes)),
    }
    jobs = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = "-".join(_label(path, value) for path, value in point.items())
        jobs.append(member(config, f"grid/{name}", "ft", **point))
    return jobs


def _label(path: str, value: Any) -> str:
    """Of a value in the name of a job."""
    short = {"ft.learning_rate": "lr", "augmentation": ""}.get(path, path.rpartition(".")[2])
    return f"{short}{value:g}" if isinstance(value, float) else f"{short}{value}"


def grouped(config: Config, jobs: Sequence[Job]) -> dict[str, dict[str, str]]:
    """The jobs' models by the value of `soup.group_by`, a group each; of one if that is empty."""
    groups: dict[str, dict[str, str]] = {}
    for job in jobs:
        group = groups.setdefault(group_of(job.config, config.soup.group_by), {})
        group[job.name.rpartition("/")[2]] = f"job:{job.name}"
    return groups


def group_of(member: Config, path: str) -> str:
    """The group of a member by the value of a field; "" if the path is empty."""
    value: Any = member
    for part in path.split(".") if path else ():
        value = getattr(value, part)
    return _label(path, value) if path else ""


def _reduce(config: Config, outcomes: Outcomes) -> dict[str, Any]:
    names = [job.name for job in members(config)]
    return table(config, outcomes, names)


def table(config: Config, outcomes: Outcomes, names: Sequence[str]) -> dict[str, Any]:
    """Fields of results.json: the best single model and every soup.

    The best is chosen on the validation images; beside it stands the best on the test images, an
    oracle, which is what published code compares soups with.

    Args:
      config: Of the study.
      outcomes: Of its jobs.
      names: Of the jobs that train single models.
    """
    return {
        "seeds": [config.seed],
        "table": _singles(config, outcomes, names) + soup_rows(outcomes),
        "evaluate_on": {
            one: _singles(config, outcomes, names, one) + soup_rows(outcomes, one)
            for one in config.evaluate_on
        },
        "metric": config.soup.metric,  # by which models are ranked
        "warmup": _summary(outcomes[WARMUP]),
        "members": {name: _summary(outcomes[name]) for name in names},
        "epochs": sum(_epochs(one) for one in outcomes.values()),
        "explanations": explanations(outcomes),
    }


def explanations(outcomes: Outcomes) -> dict[str, str]:
    """Why a soup is worse than its best member, by the name of its job."""
    return {
        name: one.results["soup"]["explanation"]
        for name, one in outcomes.items()
        if one.results is not None and "explanation" in one.results.get("soup", {})
    }


def _singles(
    config: Config, outcomes: Outcomes, names: Sequence[str], further: str = ""
) -> list[dict[str, Any]]:
    """Of the test images, or of one of the further data sets."""
    metric, rows = METRICS[config.soup.metric], []
    done = {n: one for n in names if (one := outcomes[n].results) is not None}
    for split, title in (("val", BEST), ("test", "best single, by test")):
        ranked = {
            name: value if metric.higher_is_better else -value
            for name, one in done.items()
            if (value := one[split][config.soup.metric]) is not None
        }
        if ranked:
            best = max(ranked, key=lambda name: ranked[name])
            single = None if further else done[best]
            name = best.rpartition("/")[2]
            rows.append(row(title, name, evaluated(done[best], further), single))
    return rows


def soup_rows(outcomes: Outcomes, further: str = "") -> list[dict[str, Any]]:
    """Of the test images, or of one of the further data sets, there as soups were taken."""
    rows = []
    for name in SOUPS:
        soup = outcomes.get(f"soups/{name}")
        if soup is not None and soup.results is not None:
            told = soup.results["soup"]
            chosen = f"{len(told['chosen'])} of {len(told['members'])}"
            variants = {variant: one["test"] for variant, one in told["variants"].items()}
            if further:
                variants = {told["taken"]: evaluated(soup.results, further)}
            for variant, metrics in variants.items():
                title = name if variant == "averaged" else f"{name}, {variant}"
                is_result = variant == told["taken"] and not further
                rows.append(row(title, chosen, metrics, soup.results if is_result else None))
    return rows


def row(
    title: str, start: str, metrics: Mapping[str, Any], single: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Of the table: a recipe, what it starts from, and its metrics on one run, see `scores`."""
    return {"recipe": title, "start": start, "seeds": [], **scores([metrics], single)}


def _summary(outcome: Outcome) -> dict[str, Any]:
    """Of a single model, for a list of them."""
    if outcome.results is None:
        return {"error": outcome.error}
    return {
        "epochs": _epochs(outcome),
        "seconds": outcome.results["wall_seconds"],
        **{split: dict(outcome.results[split]) for split in ("val", "test")},
    }


def _epochs(outcome: Outcome) -> int:
    stages = outcome.results["stages"] if outcome.results is not None else ()
    return sum(stage["epochs"] for stage in stages)


@study(reduce=_reduce, extends=("grid",), mistakes=mistakes)
def grid_search(config: Config) -> list[Job]:
    """Fine-tunes every combination of the grid from one warm-up, and makes soups of the members."""
    jobs = members(config)
    return [warmup(config), *jobs, *soups(config, grouped(config, jobs))]
