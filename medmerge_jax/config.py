"""The fields of an experiment, and the check that a config makes sense."""

from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from medmerge_jax.errors import UserError, nearest

RECIPES = (
    "ft",
    "lp",
    "lp_ft",
    "lp_bn_ft",
    "medmerge",
    "medmerge_aligned",
    "merge_ft",
    "compare",
)
ONE_PARENT = ("ft", "lp", "lp_ft", "lp_bn_ft")
"""The recipes that start from the parent `config.start`."""

MERGERS = (
    "uniform",
    "weighted",
    "slerp",
    "task_arithmetic",
    "fisher",
    "weight_matching",
    "activation_matching",
    "zipit",
    "matched_averaging",
)
"""What `recipes.mergers.list_mergers()` returns, without importing JAX."""

AUGMENTATIONS = ("none", "minimal", "medium", "heavy")
_CHOICES = {
    "recipe": RECIPES,
    "augmentation": AUGMENTATIONS,
    "data.kind": ("folder", "table", "official", "synthetic"),
    "data.split_by": ("group", "image"),
    "data.resize": ("squash", "crop"),
    "data.loader": ("auto", "resident", "stream"),
    "merge.granularity": ("kernel", "layer", "slice", "parameter"),
    "merge.constraint": ("none", "clip", "sigmoid"),
    "merge_ft.method": MERGERS,
    "lp.schedule": ("constant", "cosine"),
    "ft.schedule": ("constant", "cosine"),
    "select.epoch": ("best", "last"),
    "select.metric": (
        "macro_f1",
        "accuracy",
        "balanced_accuracy",
        "macro_auc",
        "kappa",
        "loss",
    ),
    "class_weights": ("none", "balanced"),
    "precision": ("auto", "float32", "bfloat16"),
}
_FREE: dict[str, tuple[type, ...]] = {
    "parents": (str,),
    "sources": (ml_collections.ConfigDict,),
    "options": (bool, int, float, str, tuple, list, type(None)),
}
"""Fields whose own fields have names of the user's, and what these are."""

_SET = ("ancestor", "multilabel")
"""Options of mergers that the recipe knows itself."""

_AT_LEAST_ONE = (
    "batch_size",
    "accumulate",
    "image_size",
    "lp.epochs",
    "ft.epochs",
    "merge_ft.num_images",
)
_NOT_NEGATIVE = (
    "seed",
    "weight_decay",
    "lp.learning_rate",
    "ft.learning_rate",
    "lp.warmup_epochs",
    "ft.warmup_epochs",
    "checkpoint_seconds",
)


_MOST = 2**31 - 1
_DEEPEST = 8
_LONGEST = 200
"""Characters that messages show of a value."""


def default_config() -> ml_collections.ConfigDict:
    """The paper's values (MedMerge, arXiv 2403.11646) where it gives one.

    A parent is one of: a path (a model directory, a run directory, a `.safetensors`, `.pth` or
    `.npz` file with torchvision's names); "imagenet" (torchvision's ImageNet-1k weights of the
    architecture); "random"; "zeros" (the paper's ablation); "source:NAME" (the model of
    `sources.NAME`, an experiment of its own that is run first). Parents are merged in the order
    of their names; the last one gets one minus the other coefficients.
    """
    config = ml_collections.ConfigDict()
    config.recipe = "medmerge"
    config.architecture = "densenet121"
    config.image_size = 224
    config.seed = 0
    config.parents = ml_collections.ConfigDict({"b": "", "c": "imagenet"})
    config.start = "b"  # the parent that the recipes with one parent start from
    config.sources = ml_collections.ConfigDict()
    config.help = ""  # said where something that the config names is missing

    config.data = ml_collections.ConfigDict()
    config.data.name = "images"
    config.data.kind = "folder"  # or "table", "official" (`name` says which), "synthetic"
    config.data.root = ""  # the image folder; with a table, where its images are
    config.data.variant = ""  # of an official data set; empty: its default
    config.data.split_table = ""  # of an official data set, CSV: filename, class, split
    config.data.split_by = "group"  # of an official data set; or "image", as the papers do
    config.data.table = ""  # CSV: image, label(s), optionally split and group
    config.data.image_column = ""  # empty: found by its usual names
    config.data.label_columns = ()
    config.data.split_column = ""
    config.data.group_column = ""
    config.data.classes = ()  # names in order; empty: all that occur, sorted
    config.data.multilabel = False
    config.data.fractions = (0.8, 0.1, 0.1)  # train, val, test, where the data has no split
    config.data.split_seed = 0
    config.data.exclude_overlap = False  # leave out val and test images of a parent's training
    config.data.resize = "squash"  # or "crop": shorter side, then the centre
    config.data.loader = "auto"  # "resident" on the device, or "stream"
    config.data.synthetic = ml_collections.ConfigDict()
    config.data.synthetic.kind = "fundus"
    config.data.synthetic.appearance = 0
    config.data.synthetic.counts = (400, 100, 100)
    config.data.synthetic.seed = 0

    config.merge = ml_collections.ConfigDict()
    config.merge.granularity = "kernel"  # or "layer", "slice", "parameter"
    config.merge.constraint = "none"  # or "clip", "sigmoid"
    config.merge.train_batch_norm = True

    config.merge_ft = ml_collections.ConfigDict()
    config.merge_ft.method = "weight_matching"  # of the recipe merge_ft, see `mm.merge`
    config.merge_ft.options = _merger_options()  # of the method; None is its default
    config.merge_ft.ancestor = ""  # of task_arithmetic: the parent that the others come from
    config.merge_ft.num_images = 512  # training images, without labels, that the merger looks at
    config.merge_ft.recalibrate = True  # batch norms, on these images

    config.lp = _stage(learning_rate=1e-4)  # linear probe, and merge linear probe
    config.ft = _stage(learning_rate=1e-5)  # fine-tuning
    config.batch_size = 64  # the paper does not say; of all devices together
    config.accumulate = 1  # parts of each batch, one after another; batch norms see the parts
    config.weight_decay = 1e-2  # the default of the paper's framework
    config.class_weights = "none"  # or "balanced"
    config.augmentation = "none"  # of training images: "minimal", "medium", "heavy"
    config.precision = "auto"  # bfloat16 compute on a GPU, float32 on a CPU
    config.select = ml_collections.ConfigDict()
    config.select.epoch = "best"  # by the validation metric, or "last"
    config.select.metric = "macro_f1"
    config.checkpoint_seconds = 30.0

    config.compare = ml_collections.ConfigDict()
    config.compare.recipes = ("ft", "lp", "lp_ft", "lp_bn_ft", "medmerge")
    config.compare.mergers = ("uniform", "weight_matching", "zipit")  # of merge_ft, a row each
    config.compare.seeds = (0, 1, 2)
    return config.lock()


def _merger_options() -> ml_collections.ConfigDict:
    kinds = {
        "weights": tuple,
        "t": float,
        "scale": object,  # a number, or one for each parent
        "coefficients": tuple,
        "floor": float,
        "alpha": float,
        "beta": float,
        "seed": int,
    }
    placeholders = {name: config_dict.placeholder(kind) for name, kind in kinds.items()}
    return ml_collections.ConfigDict(placeholders)


def _stage(learning_rate: float) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "learning_rate": learning_rate,
            "epochs": 50,
            "schedule": "constant",
            "warmup_epochs": 0.0,
        }
    )


def check_config(config: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Raises a UserError that names every field that is unknown, missing or unusable."""
    if prefix.count("sources.") > _DEEPEST:
        raise UserError(f"the config cannot be used:\n  {prefix[:80]}...: sources inside sources")
    problems = list(_misfits(config, default_config())) or list(_problems(config))
    if problems:
        raise UserError(
            "the config cannot be used:\n" + "\n".join(f"  {prefix}{line}" for line in problems)
        )
    for name, source in config.sources.items():
        check_config(source, f"{prefix}sources.{name}.")


def _misfits(
    config: ml_collections.ConfigDict, default: ml_collections.ConfigDict, prefix: str = ""
) -> Iterator[str]:
    """Fields that differ from the default's in name or type: an unlocked config may have any."""
    for name in sorted(set(default) - set(config)):
        yield f"{prefix}{name} is missing"
    for name in sorted(set(config) - set(default)):
        yield f"{prefix}{name} is no field: {nearest(name, sorted(default))}"
    for name in sorted(set(default) & set(config)):
        value, wanted = config[name], default[name]
        if isinstance(wanted, tuple) and isinstance(value, tuple | list):
            kind = type(wanted[0]) if wanted else str
            yield from (f"{prefix}{name} has {x}" for x in _others(value, kind))
        elif misfit := list(_others([value], type(wanted))):
            yield f"{prefix}{name} = {misfit[0]}"
        elif name in _FREE:
            fields = ((f"{prefix}{name}.{key}", value[key]) for key in value)
            yield from (
                f"{path} = {x}" for path, one in fields for x in _others([one], *_FREE[name])
            )
        elif isinstance(wanted, ml_collections.ConfigDict):
            yield from _misfits(value, wanted, f"{prefix}{name}.")


def _others(values: Iterable[Any], *kinds: type) -> Iterator[str]:
    """What is of none of the kinds; a whole number is a number too."""
    kinds = (*kinds, int) if float in kinds else kinds
    names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
    for value in values:
        if type(value) not in kinds:
            yield f"{_shown(value)}: wanted is {names}, not {type(value).__name__}"


def _shown(value: Any) -> str:
    try:
        return " ".join(repr(value)[:_LONGEST].split())
    except ValueError:  # a number of more digits than Python writes
        return "an enormous number"


def _problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    for field, choices in _CHOICES.items():
        value = _get(config, field)
        if value not in choices:
            yield f"{field} = {_shown(value)}: {nearest(value, choices)}"
    for field in _AT_LEAST_ONE:
        if not 1 <= _get(config, field) <= _MOST:
            yield f"{field} = {_shown(_get(config, field))}: 1 to {_MOST} is wanted"
    for field in _NOT_NEGATIVE:
        if not 0 <= _get(config, field) <= _MOST:  # also of a NaN
            yield f"{field} = {_shown(_get(config, field))}: 0 to {_MOST} is wanted"
    if len(config.data.synthetic.counts) != 3:
        yield f"data.synthetic.counts = {config.data.synthetic.counts}: train, val, test are wanted"
    yield from _official_problems(config.data)
    merges = config.recipe not in ONE_PARENT
    if merges and len(config.parents) < 2:
        yield f"parents = {list(config.parents)}: a merge wants two or more"
    if config.start not in config.parents:
        yield f"start = {config.start!r}: {nearest(config.start, list(config.parents))}"
    elif merges:
        if set(config.parents.values()) == {"zeros"}:
            yield "parents: all are zeros; one trained parent is wanted"
    elif config.parents[config.start] == "zeros":
        yield f"start = {config.start!r}: is a parent of zeros; a trained one is wanted"
    for recipe in config.compare.recipes:
        if recipe == "compare" or recipe not in RECIPES:
            yield f"compare.recipes has {recipe!r}: {nearest(recipe, RECIPES[:-1])}"
    yield from _merger_problems(config)
    seeds = config.compare.seeds
    if not seeds or len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) <= _MOST:
        yield f"compare.seeds = {_shown(seeds)}: one or more different seeds are wanted"


def used_mergers(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The methods of `mm.merge` that the recipe, or the comparison, will call."""
    if config.recipe == "merge_ft":
        return (config.merge_ft.method,)
    if config.recipe == "compare" and "merge_ft" in config.compare.recipes:
        return tuple(config.compare.mergers)
    return ()


def _merger_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    for method in config.compare.mergers:
        if method not in MERGERS:
            yield f"compare.mergers has {method!r}: {nearest(method, MERGERS)}"
    used = used_mergers(config)
    ancestor = config.merge_ft.ancestor
    untrained = [n for n, value in config.parents.items() if value in ("zeros", "random")]
    if used and "zeros" in config.parents.values():
        yield "parents: one is zeros, which only medmerge can merge; merge_ft wants trained ones"
    if "fisher" in used and untrained:
        yield f"parents {untrained} have no head; the merger 'fisher' wants trained parents"
    if "task_arithmetic" in used and ancestor not in config.parents:
        yield f"merge_ft.ancestor = {ancestor!r}: {nearest(ancestor, list(config.parents))}"
    if used and set(used) <= set(MERGERS):
        yield from _option_problems(config, used)


def _option_problems(config: ml_collections.ConfigDict, used: tuple[str, ...]) -> Iterator[str]:
    from medmerge_jax.models import mergers  # imports jax

    given = {n: value for n, value in config.merge_ft.options.items() if value is not None}
    known = {method: set(mergers.merger_options(method)) - set(_SET) for method in used}
    of_any = sorted(set.union(*known.values()))
    for name in sorted(set(given) - set(of_any)):
        wanted = nearest(name, of_any) if of_any else f"{', '.join(used)} has no options"
        yield f"merge_ft.options.{name}: {wanted}"
    for method in used:
        count = len(config.parents) - (method == "task_arithmetic")
        try:
            mergers.check_options(method, count, {n: given[n] for n in given if n in known[method]})
        except ValueError as error:
            yield f"merge_ft.options, {method} of {count} parents: {error}"


def _official_problems(data: ml_collections.ConfigDict) -> Iterator[str]:
    if data.kind != "official":
        for field in ("variant", "split_table"):
            if data[field]:
                yield f"data.{field} = {data[field]!r}: is only for data.kind = 'official'"
        return
    from medmerge_jax.data.official import layout  # imports jax, which config files need not

    try:
        layout(data.name, data.variant)
    except UserError as error:
        yield f"data.name = {data.name!r}, data.variant = {data.variant!r}: {error}"


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config
