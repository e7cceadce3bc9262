"""Whether a config makes sense, and what there is to choose from."""

import dataclasses
import glob
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from medmerge_jax.config import (
    AnyConfig,
    Config,
    Data,
    Field,
    fields,
    parse,
    raise_mistakes,
    shown,
)
from medmerge_jax.data.batches import LOADERS
from medmerge_jax.data.official import layout
from medmerge_jax.data.splits import EVALUATED, SPLITS
from medmerge_jax.data.synthetic import KINDS as DRAWINGS
from medmerge_jax.errors import UserError, nearest
from medmerge_jax.evaluation.evaluate import UNMAPPED
from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.images.augment import POLICIES
from medmerge_jax.images.decode import RESIZES
from medmerge_jax.merging import CONSTRAINTS, GRANULARITIES
from medmerge_jax.merging.coefficients import start_values
from medmerge_jax.models import list_models
from medmerge_jax.models.mergers import (
    FROM_PARENTS,
    MERGERS,
    check_options,
    merger_options,
    repair_refusal,
    unknown_units,
)
from medmerge_jax.models.registry import MODELS
from medmerge_jax.recipes.inputs import DATA_KINDS
from medmerge_jax.recipes.recipes import RECIPES
from medmerge_jax.storage.loggers import LOGGERS
from medmerge_jax.studies.executors import EXECUTORS
from medmerge_jax.studies.jobs import STUDIES
from medmerge_jax.training.parameterization import DECAYS
from medmerge_jax.training.schedules import SCHEDULES

CHOICES: dict[str, Callable[[], Collection[str]]] = {
    "architecture": list_models,
    "augmentation": lambda: ("none", *POLICIES),
    "constraint": lambda: CONSTRAINTS,
    "decay": lambda: DECAYS,
    "drawing": lambda: DRAWINGS,
    "granularity": lambda: GRANULARITIES,
    "images to evaluate on": lambda: EVALUATED,
    "kind of data": lambda: DATA_KINDS,
    "loader": lambda: LOADERS,
    "logger": lambda: LOGGERS,
    "merger": lambda: MERGERS,
    "metric": lambda: METRICS,
    "executor": lambda: EXECUTORS,
    "recipe": lambda: (*RECIPES, *STUDIES),
    "resize": lambda: RESIZES,
    "run recipe": lambda: RECIPES,
    "schedule": lambda: SCHEDULES,
    "unmapped": lambda: UNMAPPED,
}
"""What fields of `config` take, by the names that stand there. Functions, because a user's file may
register more."""


def check_config(config: AnyConfig) -> Config:
    """The typed config; all options of mergers are in it, None where they are not given.

    A parent "runs/grid/*" stands for all that match, each a parent with a name of its own.

    Raises:
      UserError: Names every field that is unknown, missing or unusable.
    """
    parsed = _with_matches(parse(config))
    raise_mistakes(list(_mistakes(parsed)))
    return _with_options(parsed)


def choices_of(field: Field) -> Collection[str]:
    """All values that a field, or each of its parts, takes; none if it takes any."""
    choices = field.choices
    return CHOICES[choices]() if isinstance(choices, str) and choices else choices


def option_names() -> list[str]:
    """Of the fields of `merge_ft.options`: the options of all mergers."""
    names = dict.fromkeys(name for method in MERGERS for name in merger_options(method))
    return [name for name in names if name not in FROM_PARENTS]


def used_mergers(config: Config) -> tuple[str, ...]:
    """The methods of `mm.merge` that the recipe, or the jobs of the study, will call."""
    used = (one.merge_ft.method for one in _runs(config) if RECIPES[one.recipe].merges)
    return tuple(dict.fromkeys(used))


def _runs(config: Config) -> list[Config]:
    """The configs of the study's jobs, or the config itself."""
    if config.recipe not in STUDIES:
        return [config]
    return [job.config for job in STUDIES[config.recipe].function(config)]


def _with_matches(config: Config) -> Config:
    """Parents that match patterns, by what differs in their paths; what matches nothing stays."""
    parents: dict[str, str] = {}
    for name, value in config.parents.items():
        path = Path(value).expanduser()
        found = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(value) else []  # noqa: PTH207  # which wants folder and pattern apart
        if not found or path.exists():
            parents[name] = value
            continue
        above = os.path.commonpath([one.parent for one in found])
        parents.update({str(one.relative_to(above)): str(one) for one in found})
    return dataclasses.replace(config, parents=parents)


def _with_options(config: Config) -> Config:
    options = {**dict.fromkeys(option_names()), **config.merge_ft.options}
    return dataclasses.replace(
        config,
        merge_ft=dataclasses.replace(config.merge_ft, options=options),
        sources={name: _with_options(source) for name, source in config.sources.items()},
    )


def _mistakes(config: Config, prefix: str = "") -> Iterator[str]:
    """Of a config and of its sources, a line each."""
    yield from (f"{prefix}{line}" for line in _own_mistakes(config))
    if prefix and config.recipe in STUDIES:
        yield f"{prefix}recipe = {config.recipe!r}: a source is one run; {nearest('', RECIPES)}"
    for name, source in config.sources.items():
        yield from _mistakes(source, f"{prefix}sources.{name}.")


def _own_mistakes(config: Config) -> Iterator[str]:
    of_fields = [line for one in fields(config) for line in _field_mistakes(one)]
    yield from of_fields
    for name, stage in (("lp", config.lp), ("ft", config.ft)):
        if late := [epoch for epoch in stage.keep if epoch > stage.epochs]:
            yield f"{name}.keep = {shown(stage.keep)}: {late} come after {name}.epochs"
    yield from _data_mistakes(config.data)
    yield from _set_mistakes(config)
    if not of_fields and config.recipe in STUDIES:
        of_fields += STUDIES[config.recipe].mistakes(config)
        yield from of_fields
    if not of_fields:  # or there are no jobs to be looked at
        lines = (line for one in _runs(config) for line in _parent_mistakes(one))
        yield from dict.fromkeys(lines)
        yield from dict.fromkeys(line for one in _runs(config) for line in _block_mistakes(one))
        yield from _merger_mistakes(config)


def _field_mistakes(field: Field) -> Iterator[str]:
    choices = choices_of(field)
    several = isinstance(field.value, tuple)
    for value in field.value if several else [field.value]:
        is_value = f"{'has' if several else '='} {shown(value)}"
        inferred = field.path == "architecture" and value == ""  # from the parents
        if choices and value not in choices and not inferred:
            yield f"{field.path} {is_value}: {nearest(value, choices)}"
        # Written so that a NaN is none of these.
        if field.at_least is not None and not field.at_least <= value <= field.at_most:
            yield f"{field.path} {is_value}: {field.at_least} to {field.at_most} is wanted"


def _data_mistakes(data: Data) -> Iterator[str]:
    if data.window and not (len(data.window) == 2 and data.window[0] < data.window[1]):
        yield f"data.window = {shown(data.window)}: two numbers are wanted, the lower one first"
    elif data.window and not all(map(math.isfinite, data.window)):
        yield f"data.window = {shown(data.window)}: finite numbers are wanted"
    if data.window and data.intensity:
        yield "data.window and data.intensity: both say what is white; give one of them"
    if data.folds == 1 or data.fold >= max(data.folds, 1):
        yield (
            f"data.folds = {data.folds}, data.fold = {data.fold}: two or more folds are wanted, "
            "and one of them, from 0"
        )
    if len(data.synthetic.counts) != 3:
        yield f"data.synthetic.counts = {data.synthetic.counts}: train, val, test are wanted"
    if data.kind == "official":
        try:
            layout(data.name, data.variant)
        except UserError as error:
            yield f"data.name = {data.name!r}, data.variant = {data.variant!r}: {error}"
        return
    if not data.multilabel and (data.uncertain or data.blank):
        yield "data.uncertain, data.blank: are only for data.multilabel and for CheXpert"
    for name, value in (("variant", data.variant), ("split_table", data.split_table)):
        if value:
            yield f"data.{name} = {value!r}: is only for data.kind = 'official'"


def _set_mistakes(config: Config) -> Iterator[str]:
    """Of the further data sets."""
    for name, one in config.evaluate_on.items():
        if not re.fullmatch(r"[\w-]+", name) or name in SPLITS:
            yield f"evaluate_on.{name}: letters, digits, _ and - are wanted, and no split's name"
        lines = [line for field in fields(one) for line in _field_mistakes(field)]
        lines += _data_mistakes(one.data)
        yield from (f"evaluate_on.{name}.{line}" for line in lines)


def _parent_mistakes(config: Config) -> Iterator[str]:
    recipe, values = RECIPES[config.recipe], dict(sorted(config.parents.items()))
    if recipe.averages:
        untrained = [n for n, value in values.items() if value in ("imagenet", "random", "zeros")]
        if untrained or not values:
            yield f"parents {untrained}: a soup wants one or more models of the data's classes"
        return
    if not recipe.one_parent and len(values) < 2:
        yield f"parents = {list(values)}: a merge wants two or more"
    if config.start not in values:
        yield f"start = {config.start!r}: {nearest(config.start, list(values))}"
    elif not recipe.one_parent:
        if set(values.values()) == {"zeros"}:
            yield "parents: all are zeros; one trained parent is wanted"
        yield from _init_mistakes(config)
    elif values[config.start] == "zeros":
        yield f"start = {config.start!r}: is a parent of zeros; a trained one is wanted"


def _block_mistakes(config: Config) -> Iterator[str]:
    """Of what the architecture's blocks are asked for, if it is known."""
    if config.architecture not in MODELS:
        return
    name, spec, wanted = config.architecture, MODELS[config.architecture], config.ft.blocks
    unknown = f"the blocks of {name} are not known, its ModelSpec has no `block`"
    if config.drop_path and not spec.drop_path:
        yield f"drop_path = {config.drop_path}: {name} has no stochastic depth; 0 is wanted"
    if config.ft.layer_decay != 1 and spec.block is None:
        yield f"ft.layer_decay = {config.ft.layer_decay}: {unknown}; 1 is wanted"
    if wanted and spec.block is None:
        yield f"ft.blocks = {wanted}: {unknown}; 0 is wanted"
    elif wanted and wanted > spec.num_blocks:
        has = f"{name} has {spec.num_blocks} blocks"
        yield f"ft.blocks = {wanted}: {has}; 0 trains all of them and the stem"


def _init_mistakes(config: Config) -> Iterator[str]:
    merge = config.merge
    if merge.constraint not in CONSTRAINTS or len(config.parents) < 2:
        return  # which is a mistake by itself
    try:
        start_values(merge.init, len(config.parents), merge.constraint)
    except ValueError as error:
        names = ", ".join(sorted(config.parents))
        yield f"merge.init = {shown(merge.init)}, of the parents {names}: {error}"


def _unit_mistakes(config: Config) -> Iterator[str]:
    """Of what permutes hidden units that the architecture does not know, or has in heads."""
    if config.architecture not in MODELS:
        return
    why = unknown_units(config.architecture, "heads")
    if why and any(one.recipe == "medmerge_aligned" for one in _runs(config)):
        yield f"recipe medmerge_aligned: {why.partition('; ')[0]}; take medmerge"
    for method in used_mergers(config):
        if method not in MERGERS:
            continue
        if why := unknown_units(config.architecture, MERGERS[method].permutes):
            yield f"merge_ft.method = {method!r}: {why}"


def _merger_mistakes(config: Config) -> Iterator[str]:
    yield from _unit_mistakes(config)
    methods = [method for method in used_mergers(config) if method in MERGERS]
    if not methods:
        return
    ancestor = config.merge_ft.ancestor
    untrained = [n for n, value in config.parents.items() if value in ("zeros", "random")]
    if "zeros" in config.parents.values():
        yield "parents: one is zeros, which only medmerge can merge; merge_ft wants trained ones"
    for method in methods:
        known = config.merge_ft.repair and config.architecture in MODELS
        if known and (why := repair_refusal(method, config.architecture)):
            yield f"merge_ft.repair = True: {why}"
        if MERGERS[method].needs_heads and untrained:
            yield (f"parents {untrained} have no head; the merger {method!r} wants trained parents")
        if "ancestor" in merger_options(method) and ancestor not in config.parents:
            yield f"merge_ft.ancestor = {ancestor!r}: {nearest(ancestor, list(config.parents))}"
    yield from _option_mistakes(config, methods)


def _option_mistakes(config: Config, methods: list[str]) -> Iterator[str]:
    given = {n: value for n, value in config.merge_ft.options.items() if value is not None}
    options = {method: set(merger_options(method)) - set(FROM_PARENTS) for method in methods}
    of_any = sorted(set.union(*options.values()))
    for name in sorted(set(given) - set(of_any)):
        hint = nearest(name, of_any) if of_any else f"{', '.join(methods)} has no options"
        yield f"merge_ft.options.{name}: {hint}"
    for method, names in options.items():
        count = len(config.parents) - ("ancestor" in merger_options(method))
        try:
            check_options(method, count, {n: given[n] for n in given if n in names})
        except ValueError as error:
            yield f"merge_ft.options, {method} of {count} parents: {error}"
