"""One model of a cross-validation: the mean of its folds' models, which cost as much as one to use.

A warm-up trains a head on the images of the train split. From it one model is fine-tuned for each
fold and seed, on all train and val images but those of the fold, which select its epoch. The
uniform soup of all is the result. No image is left that no member was trained on, but the test
images: so members are not chosen by their score, and the soup is judged on the test images alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from medmerge_jax.config import Config
from medmerge_jax.studies import grid
from medmerge_jax.studies.jobs import Job, Outcomes, different, study


def _members(config: Config) -> list[Job]:
    settings = config.fold_soup
    return [
        grid.member(
            config,
            f"folds/{fold}-seed{seed}",
            "ft",
            **{"data.folds": settings.folds, "data.fold": fold, "seed": seed},
        )
        for seed in settings.seeds
        for fold in range(settings.folds)
    ]


def _reduce(config: Config, outcomes: Outcomes) -> dict[str, Any]:
    return grid.table(config, outcomes, [job.name for job in _members(config)])


def _mistakes(config: Config) -> Iterator[str]:
    yield from different("fold_soup.seeds", config.fold_soup.seeds)
    if config.data.folds:
        yield f"data.folds = {config.data.folds}: fold_soup.folds says how many, and makes them"


@study(reduce=_reduce, extends=("fold_soup",), mistakes=_mistakes)
def fold_soup(config: Config) -> list[Job]:
    """Fine-tunes a model for each fold of a cross-validation and each seed, and averages them."""
    jobs = _members(config)
    models = {job.name.rpartition("/")[2]: f"job:{job.name}" for job in jobs}
    # Its own val images are known to its members: nothing is to be chosen by them.
    soup = dataclasses.replace(config.soup, recalibrate=_unless_chosen(config.soup.recalibrate))
    return [
        grid.warmup(config),
        *jobs,
        grid.soup(dataclasses.replace(config, soup=soup), "uniform", "uniform", models),
    ]


def _unless_chosen(recalibrate: str) -> str:
    return "never" if recalibrate == "if_better" else recalibrate
