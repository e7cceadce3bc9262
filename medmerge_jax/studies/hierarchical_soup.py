"""Soups of runs that are there already: of all, of groups of them, and of the groups' soups.

The parents are the runs, or models that they have kept. Two runs are in one group if the field
`soup.group_by` had equal values in their configs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medmerge_jax import weights
from medmerge_jax.config import Config, from_json
from medmerge_jax.errors import UserError
from medmerge_jax.storage.atomic import read_json
from medmerge_jax.studies import grid
from medmerge_jax.studies.jobs import Job, Outcomes, study


def _reduce(config: Config, outcomes: Outcomes) -> dict[str, Any]:
    rows = grid.soup_rows(outcomes)
    greedy = outcomes["soups/greedy"].results
    if greedy is not None:
        best = greedy["soup"]["best"]
        rows.insert(0, grid.row(grid.BEST, best["member"], best["test"]))
    return {
        "seeds": [config.seed],
        "table": rows,
        "evaluate_on": {one: grid.soup_rows(outcomes, one) for one in config.evaluate_on},
        "metric": config.soup.metric,  # by which models are ranked
        "explanations": grid.explanations(outcomes),
    }


def _mistakes(config: Config) -> Iterator[str]:
    yield from grid.group_mistakes(config)
    if config.soup.group_by and len(config.parents) < 2:
        yield f"parents = {list(config.parents)}: groups want two or more models"


@study(reduce=_reduce, extends=(), mistakes=_mistakes)
def hierarchical_soup(config: Config) -> list[Job]:
    """Averages the parents, runs that are there, and groups of them by `soup.group_by` (GoU, GoG).

    Raises:
      UserError: A group is asked for, and nothing says with which config a parent was trained.
    """
    groups: dict[str, dict[str, str]] = {}
    for name, value in sorted(config.parents.items()):
        path = config.soup.group_by
        group = grid.group_of(_config_of(name, value), path) if path else ""
        groups.setdefault(group, {})[name] = value
    return grid.soups(config, groups)


def _config_of(name: str, value: str) -> Config:
    """Of the run whose model, RUN/model/ or RUN/kept/NAME/model/, a parent's value names."""
    model, run, kept, above = Path(weights.load_card(value)["file"]).absolute().parents[:4]
    path = (above if kept.name == "kept" else run) / "config.json"
    if model.name != "model" or not path.is_file():
        raise UserError(
            f"parents.{name} = {value}: no config.json says how it was trained; give the run "
            "directory, or set soup.group_by = '' for soups without groups"
        )
    try:
        return from_json(read_json(path)["config"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"parents.{name}: {path} is not as this program writes it ({error}); give another run, "
            "or set soup.group_by = ''"
        ) from error
