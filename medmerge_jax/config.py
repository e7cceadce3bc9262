"""The fields of an experiment: the type, default, choices, range and line of each, once.

Config files build on what `default_config()` returns, a ConfigDict, and the command line changes
it; `parse` makes a `Config` of it, which is what everything inside takes. Whether its values make
sense together is for `studies.checks`, which knows what mergers, models and metrics there are.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import ml_collections
from ml_collections import config_dict

from medmerge_jax.errors import UserError, nearest

MOST = 2**31 - 1
"""The largest number that a field takes which says what it takes at least."""

_DEEPEST = 8
_LONGEST = 200
"""Characters that messages show of a value."""
_MOST_MISTAKES = 50
"""That a message lists: the fields of a config, about."""

_COMPARED = ("ft", "lp", "lp_ft", "lp_bn_ft", "medmerge")
_MERGED = ("uniform", "weight_matching", "zipit")
_RATES = (1e-3, 5e-4, 1e-4, 5e-5, 1e-5, 5e-6, 1e-6, 1e-7)
_PRECISIONS = ("auto", "float32", "bfloat16")
_MEANINGS = ("", "zero", "one", "unknown")
ClassNames = str | tuple[str, ...] | list[str]
Option = bool | int | float | str | tuple[Any, ...] | list[Any] | None


def field(
    default: Any,
    doc: str,
    *,
    choices: str | tuple[str, ...] = "",
    at_least: int | None = None,
    at_most: int = MOST,
) -> Any:
    """A field of a group, with a line that says what it means, and what it takes, see `Field`.

    A group is the default of a field of fields.
    """
    metadata = {"doc": doc, "choices": choices, "at_least": at_least, "at_most": at_most}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Images that the program draws."""

    kind: str = field("fundus", "what is drawn", choices="drawing")
    appearance: int = field(0, "of the clinic: cameras and light differ")
    counts: tuple[int, ...] = field((400, 100, 100), "images of train, val and test")
    seed: int = field(0, "of the drawing")


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images and labels, and how they are split."""

    name: str = field("images", "names the data in messages, and which official data set it is")
    kind: str = field("folder", "how images and labels are given", choices="kind of data")
    root: str = field("", "the image folder; with a table, the folder that its images are in")
    variant: str = field("", "of an official data set; empty is its first one")
    split_table: str = field("", "of an official data set: CSV with filename, class, split")
    split_by: str = field("group", "of an official data set", choices=("group", "image"))
    table: str = field("", "CSV with image, label(s), and optionally split and group")
    image_column: str = field("", "of the table; empty: found by its usual names")
    label_columns: tuple[str, ...] = field((), "of the table; empty: found by its usual names")
    split_column: str = field("", "of the table; empty: found by its usual names; none: no column")
    group_column: str = field("", "of the table; empty: found by its usual names; none: no column")
    missing_labels: str = field(
        "error", "rows of a table without a label", choices=("error", "drop")
    )
    exclude: tuple[str, ...] = field((), "patterns of files and folders left out, as *_mask*")
    uncertain: str = field("", "what -1 of several labels counts as", choices=_MEANINGS)
    blank: str = field("", "what an empty one of several labels counts as", choices=_MEANINGS)
    classes: tuple[str, ...] = field((), "names in order; empty: all that occur, sorted")
    multilabel: bool = field(False, "whether an image has any number of the classes")
    ordinal: bool | None = field(None, "whether classes have an order; None: as their names say")
    fractions: tuple[float, ...] = field((0.8, 0.1, 0.1), "of the splits that the data lacks")
    split_seed: int = field(0, "of the splits that are made")
    folds: int = field(0, "parts of train and val, one of which is val; 0: none", at_least=0)
    fold: int = field(0, "which of the folds is val, from 0", at_least=0)
    exclude_overlap: bool = field(False, "remove val and test images that a parent has seen")
    resize: str = field("squash", "to the square, or the centre of it", choices="resize")
    intensity: int = field(
        0, "white of 16-bit images; 0: as their greatest value says", at_least=0, at_most=65535
    )
    window: tuple[float, ...] = field((), "values of deep images that are black and white")
    background: str = field("black", "under transparent pixels", choices=("black", "white"))
    unreadable: str = field(
        "error", "skip: leave files out, at most 1 in 100", choices=("error", "skip")
    )
    loader: str = field("auto", "resident on the device if it fits", choices="loader")
    synthetic: Synthetic = field(Synthetic(), "of drawn images")


@dataclasses.dataclass(frozen=True)
class EvaluateOn:
    """A further data set that every run is evaluated on, beside its own test split.

    `classes` is `{class of this data set: class, or classes, of the run's}`, as
    `{"malignant": ("MEL", "BCC")}`; empty: those of one name belong together.
    """

    data: Data = field(Data(), "images and labels; they are prepared as the run's own")
    split: str = field("test", "of it", choices="images to evaluate on")
    classes: dict[str, ClassNames] = field({}, "the run's class(es) of each of its; empty: by name")
    unmapped: str = field("error", "classes without a partner", choices="unmapped")


@dataclasses.dataclass(frozen=True)
class Merge:
    """The merge linear probe."""

    granularity: str = field("kernel", "what has a coefficient of its own", choices="granularity")
    constraint: str = field("none", "on coefficients", choices="constraint")
    train_batch_norm: bool = field(True, "whether the batch norms train beside the coefficients")
    init: tuple[float, ...] = field((), "parents' weights at first, in order of name; empty: equal")
    learning_rate: float = field(0.0, "of the coefficients, its peak; 0: lp's", at_least=0)
    decay_to: str = field("zero", "where weight decay pulls coefficients", choices="decay")


@dataclasses.dataclass(frozen=True)
class MergeFt:
    """The recipe merge_ft, and every other recipe that merges without training."""

    method: str = field("weight_matching", "the merger, see `mm.merge`", choices="merger")
    options: dict[str, Option] = field({}, "of the merger; None is its default")
    ancestor: str = field(
        "", "of task_arithmetic, ties, dare: the parent that the others were trained from"
    )
    num_images: int = field(512, "training images that the merger looks at", at_least=1)
    recalibrate: bool = field(True, "re-estimate the batch norms' statistics on these images")
    repair: bool = field(False, "rescale a transformer's layers on these images (REPAIR)")


@dataclasses.dataclass(frozen=True)
class Stage:
    """How long and how fast a stage trains."""

    learning_rate: float = field(1e-4, "its peak", at_least=0)
    epochs: int = field(50, "passes over the training images", at_least=1)
    schedule: str = field("constant", "of the learning rate", choices="schedule")
    warmup_epochs: float = field(0.0, "of linear warm-up; may be a fraction", at_least=0)
    patience: int = field(0, "worse epochs that end the stage; 0: none do", at_least=0)
    patience_delta: float = field(0.0, "by how much of the metric they are worse", at_least=0)
    keep: tuple[int, ...] = field((), "epochs whose models are results too", at_least=1)


@dataclasses.dataclass(frozen=True)
class FineTune(Stage):
    """What a stage says, and which blocks train at which rate."""

    blocks: int = field(0, "last ones that train, and what follows; 0: all, stem too", at_least=0)
    layer_decay: float = field(
        1.0, "of the rate, from each block to the one before", at_least=0, at_most=1
    )


@dataclasses.dataclass(frozen=True)
class Select:
    """Which epoch of a stage is its result."""

    epoch: str = field("best", "by the validation metric, or last", choices=("best", "last"))
    metric: str = field("macro_f1", "by which epochs are compared", choices="metric")


@dataclasses.dataclass(frozen=True)
class Compare:
    """The study compare: recipes side by side."""

    recipes: tuple[str, ...] = field(_COMPARED, "rows of the table", choices="run recipe")
    mergers: tuple[str, ...] = field(_MERGED, "of merge_ft, a row each", choices="merger")
    seeds: tuple[int, ...] = field((0, 1, 2), "of the runs of each row", at_least=0)
    reference: str = field(
        "", "row, as lp_ft-b, that the others are compared with; empty: lp_bn_ft of the start"
    )


@dataclasses.dataclass(frozen=True)
class Grid:
    """The studies grid_search and fission_fusion: members that start from one warm-up."""

    warmup: str = field("lp_drift", "makes what all members start from", choices="run recipe")
    warmup_augmentation: str = field("minimal", "of the warm-up", choices="augmentation")
    learning_rates: tuple[float, ...] = field(_RATES, "of ft, a member or more each", at_least=0)
    augmentations: tuple[str, ...] = field(
        ("minimal", "medium", "heavy"), "of grid_search", choices="augmentation"
    )
    seeds: tuple[int, ...] = field((0, 1), "of grid_search", at_least=0)
    axes: tuple[str, ...] = field((), "of further fields, as 'weight_decay=0.01|0.1'")


@dataclasses.dataclass(frozen=True)
class Fgg:
    """Fast geometric generation: further epochs, whose rate falls and rises again and again."""

    epochs: int = field(
        17, "after fine-tuning; models are kept where the rate is lowest", at_least=1
    )
    cycle: int = field(4, "epochs in which the rate falls and rises once", at_least=2)
    learning_rate: float = field(1e-5, "the highest", at_least=0)
    lowest: float = field(1e-8, "the lowest rate", at_least=0)


@dataclasses.dataclass(frozen=True)
class FoldSoup:
    """The study fold_soup."""

    folds: int = field(5, "members of each seed, each of which lacks another fold", at_least=2)
    seeds: tuple[int, ...] = field((0,), "of the members of each fold", at_least=0)


@dataclasses.dataclass(frozen=True)
class Soup:
    """Averages of models."""

    kind: str = field("greedy", "of the recipe soup", choices=("uniform", "greedy", "learned"))
    metric: str = field("macro_f1", "of the validation images, to rank models by", choices="metric")
    recalibrate: str = field(
        "never",
        "whether batch norms' statistics are estimated anew after averaging",
        choices=("always", "never", "if_better"),
    )
    num_images: int = field(2048, "training images for that", at_least=1)
    group_by: str = field("", "a field: soups of members with equal values, then of those soups")
    any_heads: bool = field(False, "also average models whose heads began differently")


@dataclasses.dataclass(frozen=True)
class Study:
    """How the jobs of a study are run; results do not depend on it."""

    executor: str = field(
        "here", "this process, several on this machine, or SLURM", choices="executor"
    )
    workers: int = field(
        1, "processes, or tasks of the SLURM array, that share the jobs", at_least=1
    )
    partition: str = field("", "of SLURM; empty: its default")
    account: str = field("", "that SLURM charges; empty: its default")
    gpus: int = field(1, "of each SLURM task", at_least=0)
    cpus: int = field(4, "of each SLURM task", at_least=1)
    memory: int = field(0, "of each SLURM task in GiB; 0: SLURM's default", at_least=0)
    minutes: int = field(1440, "of each SLURM task, which is then queued again", at_least=5)


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment. The paper's values (MedMerge, arXiv 2403.11646) where it gives one.

    A parent is one of: a path (a model directory, a run directory, a weight file, or "FILE::NAME"
    for one of several models in it); "hf://ORG/NAME", with "@REVISION" and "/FILE" or "/FOLDER"
    behind it if need be (of the Hugging Face hub); "imagenet" (the architecture's ImageNet-1k
    weights, torchvision's where it has them); "random"; "zeros" (the paper's ablation);
    "source:NAME" (the model of `sources.NAME`, an experiment of its own that is run first). Parents
    are merged in the order of their names; the last one gets one minus the other coefficients.
    """

    recipe: str = field("medmerge", "what is done, see the README", choices="recipe")
    architecture: str = field(
        "densenet121", "of the model; empty: as its parents say", choices="architecture"
    )
    drop_path: float = field(
        0.0, "stochastic depth in training, of transformers: DeiT's is 0.1", at_least=0, at_most=1
    )
    image_size: int = field(224, "side of the images in pixels", at_least=1)
    seed: int = field(0, "of heads, orders and augmentation", at_least=0)
    parents: dict[str, str] = field({"b": "", "c": "imagenet"}, "models to start from, by name")
    start: str = field("b", "the parent that recipes with one parent start from")
    head: str = field("new", "drawn from the seed, or the start's own", choices=("new", "keep"))
    estimate_statistics: bool = field(
        False, "of parents' batch norms that lack them, on merge_ft.num_images training images"
    )
    sources: dict[str, "Config"] = field({}, "experiments that make parents, by name")
    help: str = field("", "said where something that the config names is missing")
    data: Data = field(Data(), "images and labels")
    evaluate_on: dict[str, EvaluateOn] = field(
        {}, "further data sets, by name, each with its own data"
    )
    merge: Merge = field(Merge(), "of the merge linear probe")
    merge_ft: MergeFt = field(MergeFt(), "of merging without training")
    lp: Stage = field(Stage(), "the linear probe, and the merge linear probe")
    ft: FineTune = field(FineTune(learning_rate=1e-5), "fine-tuning")
    batch_size: int = field(64, "of all devices together; the paper does not say", at_least=1)
    accumulate: int = field(1, "parts of each batch; batch norms see the parts", at_least=1)
    weight_decay: float = field(1e-2, "of AdamW; the default of the paper's framework", at_least=0)
    class_weights: str = field(
        "none", "of the loss; rare classes count more", choices=("none", "balanced", "by_frequency")
    )
    augmentation: str = field("none", "of training images", choices="augmentation")
    precision: str = field("auto", "auto: bfloat16 on a GPU", choices=_PRECISIONS)
    select: Select = field(Select(), "of the epoch")
    checkpoint_seconds: float = field(30.0, "least time between two checkpoints", at_least=0)
    log_to: tuple[str, ...] = field(
        ("tensorboard",), "what is told of each epoch, beside metrics.jsonl", choices="logger"
    )
    compare: Compare = field(Compare(), "of the study compare")
    grid: Grid = field(Grid(), "of the studies grid_search and fission_fusion")
    fgg: Fgg = field(Fgg(), "of the recipe fgg and the study fission_fusion")
    fold_soup: FoldSoup = field(FoldSoup(), "of the study fold_soup")
    soup: Soup = field(Soup(), "of soups")
    study: Study = field(Study(), "how the jobs of a study are run")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field with its value in a config."""

    path: str  # "lp.epochs"
    kind: Any
    value: Any
    doc: str
    choices: str | tuple[str, ...]  # all values, or the name of their list in `checks.CHOICES`
    at_least: int | None  # of a number; None for any
    at_most: int


def fields(group: Any, prefix: str = "") -> Iterator[Field]:
    """All fields of a config or one of its groups, in order, without those of its sources."""
    kinds = typing.get_type_hints(type(group))
    for one in dataclasses.fields(group):
        path, value = f"{prefix}{one.name}", getattr(group, one.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{path}.")
        else:
            yield Field(path, kinds[one.name], value, **one.metadata)


def default_config() -> ml_collections.ConfigDict:
    """The fields of `Config` with their defaults, for config files to change."""
    return _config_dict(Config()).lock()


def default_evaluate_on() -> ml_collections.ConfigDict:
    """The fields of `EvaluateOn` with their defaults, for an entry of `config.evaluate_on`."""
    config = _config_dict(EvaluateOn()).lock()
    config.classes.unlock()  # names of classes are its fields
    return config


class _Options(ml_collections.ConfigDict):  # type: ignore[misc]  # it has no types
    """Takes any field, for only `studies.checks` knows the mergers and their options."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, "type_safe": False})

    def lock(self) -> ml_collections.ConfigDict:
        return self

    def get_type(self, key: str) -> type:
        """That of a literal on the command line."""
        return object


def _config_dict(group: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for one in dataclasses.fields(group):
        value = getattr(group, one.name)
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif one.name == "options":
            # A reference, so that any ConfigDict may take its place.
            value = config_dict.FieldReference(_Options(), field_type=ml_collections.ConfigDict)
        elif value is None:
            value = config_dict.placeholder(bool)
        result[one.name] = value
    return result


AnyConfig: TypeAlias = ml_collections.ConfigDict | dict[str, Any] | Config
"""What `get_config()` of a config file returns, that as a dict, or what it was parsed to."""


def parse(config: AnyConfig) -> Config:
    """Typed values of a config file's config.

    Raises:
      UserError: Names every field that is missing, unknown or of another type; an unlocked config
        may have any.
    """
    if isinstance(config, Config):
        return config
    mistakes: list[str] = []
    parsed = _parse(Config, config, "", mistakes)
    raise_mistakes(mistakes)
    return typing.cast(Config, parsed)


def raise_mistakes(mistakes: list[str]) -> None:
    """Raises a UserError that says them, a line each, if there are any; of very many the first."""
    if mistakes:
        lines = ["the config cannot be used:", *mistakes[:_MOST_MISTAKES]]
        if len(mistakes) > _MOST_MISTAKES:
            lines.append(f"and {len(mistakes) - _MOST_MISTAKES} more")
        raise UserError("\n  ".join(lines))


def _parse(kind: Any, value: Any, path: str, mistakes: list[str]) -> Any:
    """The value as of a type; adds to the mistakes why it is not."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    several = inner if origin is types.UnionType else (kind,)
    kinds = [typing.get_origin(one) or one for one in several]
    if dataclasses.is_dataclass(kind) or origin is dict:
        if isinstance(value, ml_collections.ConfigDict | dict):
            if origin is not dict:
                return _parse_group(kind, value, f"{path}." if path else "", mistakes)
            names = sorted(value, key=str)
            return {n: _parse(inner[1], value[n], f"{path}.{n}", mistakes) for n in names}
        kinds = [ml_collections.ConfigDict]
    elif origin is tuple and isinstance(value, tuple | list):
        mistakes += [f"{path} has {one}" for one in _others(value, inner[0])]
        return tuple(value)
    mistakes += [f"{path} = {one}" for one in _others([value], *kinds)]
    return value


def _parse_group(group: Any, values: Any, prefix: str, mistakes: list[str]) -> Any:
    if prefix.count("sources.") > _DEEPEST:
        mistakes.append(f"{prefix[:80]}...: sources inside sources")
        return None
    kinds = typing.get_type_hints(group)
    mistakes += [f"{prefix}{name} is missing" for name in kinds if name not in values]
    mistakes += [
        f"{prefix}{name} is no field: {nearest(name, list(kinds))}"
        for name in sorted(set(values) - set(kinds), key=str)
    ]
    given = {name: kind for name, kind in kinds.items() if name in values}
    return group(**{n: _parse(given[n], values[n], f"{prefix}{n}", mistakes) for n in given})


def _others(values: typing.Iterable[Any], *kinds: type) -> Iterator[str]:
    """What is of none of the kinds; a whole number is a number too."""
    kinds = (*kinds, int) if float in kinds else kinds
    names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
    for value in values:
        if type(value) not in kinds and not (value is None and type(None) in kinds):
            yield f"{shown(value)}: wanted is {names}, not {type(value).__name__}"


def shown(value: Any) -> str:
    """A value in a message: on one line, and not all of an endless one."""
    try:
        return " ".join(repr(value)[:_LONGEST].split())
    except ValueError:  # a number of more digits than Python writes
        return "an enormous number"


def to_json(config: Any) -> dict[str, Any]:
    """A config, or a group of its fields, as config.json has it."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def from_json(recorded: Mapping[str, Any]) -> Config:
    """The config of a config.json, also of an earlier version, see `completed`."""
    return parse(completed(recorded))


def completed(recorded: Mapping[str, Any], group: Any = None) -> dict[str, Any]:
    """The config of a config.json; a field that its version did not have is its default.

    What stands there by names of the user's own, as parents do, stays as it is.

    >>> found = completed({"parents": {"c": "random"}, "sources": {"b": {"lp": {"epochs": 4}}}})
    >>> found["parents"], found["sources"]["b"]["lp"]["epochs"], found["ft"]["patience"]
    ({'c': 'random'}, 4, 0)
    """
    group = group or Config()
    named: dict[str, Any] = {"sources": Config(), "evaluate_on": EvaluateOn()}
    result = {**to_json(group), **recorded}
    for one in dataclasses.fields(group):
        value, default = result[one.name], getattr(group, one.name)
        if not isinstance(value, dict):
            continue
        if dataclasses.is_dataclass(default):
            result[one.name] = completed(value, default)
        elif one.name in named:
            result[one.name] = {
                name: completed(part, named[one.name]) if isinstance(part, dict) else part
                for name, part in value.items()
            }
    return result
