"""The settings that the papers give, and what of a config differs from them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from medmerge_jax.config import Config, fields
from medmerge_jax.weights.card import shareable


class Published(NamedTuple):
    """What a paper, or its code, says.

    Attributes:
      name: Of the method.
      source: Where it is published.
      settings: Values by field, "lp.epochs".
    """

    name: str
    source: str
    settings: Mapping[str, Any]


_DEFAULTS = {one.path: one.value for one in fields(Config())}

_APART = (
    *("help", "parents", "recipe", "sources", "start", "evaluate_on", "study", "compare"),
    *("data", "seed", "checkpoint_seconds"),
)
"""What an experiment is about and how its jobs are run: no settings of a method."""

_OF_DATA = ("data.split_by", "data.resize", "data.exclude_overlap")

_BY_DATA = ("soup.metric", "class_weights")
"""For which FissionFusion has another value on each data set."""

_VARIED = ("augmentation", "seed", "ft.learning_rate")
"""Among the members of a grid."""


def _defaults(*paths: str) -> dict[str, Any]:
    """Of fields whose default is what the paper says."""
    return {path: _DEFAULTS[path] for path in paths}


MEDMERGE = Published(
    "MedMerge",
    "arXiv 2403.11646",
    {
        **_defaults(
            *("architecture", "image_size", "augmentation", "head", "class_weights"),
            *("lp.learning_rate", "lp.epochs", "ft.learning_rate", "ft.epochs"),
            *("merge.granularity", "merge.constraint", "merge.init", "merge.learning_rate"),
            "merge.train_batch_norm",
        ),
        "parents.c": "imagenet",
        "data.split_by": "image",
    },
)

FISSION_FUSION = Published(
    "FissionFusion",
    "arXiv 2403.13341 and its code",
    {
        **_defaults(
            *("image_size", "weight_decay", "data.resize", "select.epoch", "soup.recalibrate"),
            *("grid.warmup", "grid.warmup_augmentation", "grid.learning_rates"),
            *("grid.augmentations", "grid.seeds"),
            *("fgg.epochs", "fgg.cycle", "fgg.learning_rate", "fgg.lowest"),
        ),
        "architecture": "resnet50",
        "batch_size": 128,
        "augmentation": "heavy",
        "seed": 1,
        "select.metric": "loss",
        "lp.learning_rate": 1e-3,
        "lp.epochs": 10,
        "lp.schedule": "cosine",
        "lp.patience": 10,
        "lp.patience_delta": 1e-3,
        "ft.epochs": 50,
        "ft.schedule": "cosine",
        "ft.patience": 8,
        "ft.patience_delta": 1e-3,
    },
)

_ALSO = {
    ("MedMerge", "architecture"): "resnet50",
    ("FissionFusion", "architecture"): "deit_base_patch16_224",
}
"""Further values that the papers have: their second networks."""

_OF_SOUPS = ("fission_fusion", "grid_search", "fgg", "soup", "hierarchical_soup")


def published(config: Mapping[str, Any]) -> Published:
    """Whose settings a config is compared with, by its recipe; config as config.json has it."""
    recipe, parents = config.get("recipe"), config.get("parents", {})
    of_study = any(str(value).startswith("job:") for value in parents.values())
    return FISSION_FUSION if recipe in _OF_SOUPS or of_study else MEDMERGE


def differences(config: Mapping[str, Any], *, grouped: bool = False) -> Iterator[list[str]]:
    """Of each field that is not as published: its name, and three values.

    That of the paper, "-" where it does not say; the default; and that of the config. A field of
    which the paper says nothing is there if it is not at its default.

    Args:
      config: As config.json has it.
      grouped: Whether images of one patient are known, so that splits may or may not mind them.
    """
    settings = _settings(config, grouped)
    for path in dict.fromkeys([*_DEFAULTS, *settings]):
        if path not in settings and _is_apart(path, published(config)):
            continue
        default = _DEFAULTS.get(path)
        value = _value(config, path, default)
        said = settings.get(path, default)
        also = _ALSO.get((published(config).name, path))
        if _shown(value) != _shown(said) and value != also:
            published_as = _shown(said) if path in settings else "-"
            yield [path, published_as, _shown(default), _shown(_shared(path, value))]


def _is_apart(path: str, told: Published) -> bool:
    """Whether a field that is not published is nothing to compare either."""
    varied = told is FISSION_FUSION and path in (*_VARIED, *_BY_DATA)
    return varied or (path.split(".")[0] in _APART and path not in _OF_DATA)


def _settings(config: Mapping[str, Any], grouped: bool) -> dict[str, Any]:
    """The published ones that mean something for a config."""
    told = published(config)
    settings = dict(told.settings)
    if told is FISSION_FUSION and config.get("recipe") not in ("fission_fusion", "fgg"):
        for path in _VARIED:
            settings.pop(path, None)
    if not (grouped and config.get("data", {}).get("kind") == "official"):
        settings.pop("data.split_by", None)
    return settings


def _value(config: Mapping[str, Any], path: str, default: Any) -> Any:
    """Of a field; an earlier version, which did not have it, did what is the default now."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    if path == "merge_ft.options":
        return {name: one for name, one in value.items() if one is not None}  # None: its default
    return value


def _shared(path: str, value: Any) -> Any:
    """Without the folders of a parent."""
    return shareable(value, "source" if path.startswith("parents.") else path)


def _shown(value: Any) -> str:
    """As in JSON, without the quotation marks of a text."""
    if value is None or value == "":
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
