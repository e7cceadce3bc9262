"""From config fields to data and parents."""

import dataclasses
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax import weights
from medmerge_jax.config import Config, Data
from medmerge_jax.data import (
    DataSet,
    ImageHashes,
    audit_data_set,
    hash_images,
    image_folder,
    image_table,
    official,
    official_data_set,
    write_synthetic,
)
from medmerge_jax.data.audit import EXAMPLES, overlapping, short_text, without
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.data.synthetic import TITLES
from medmerge_jax.errors import UserError
from medmerge_jax.images import Pixels, cached_pixels, intensity
from medmerge_jax.images.cache import UnreadableError, unreadable_text
from medmerge_jax.merging import zeros_parent
from medmerge_jax.merging.trees import without_head
from medmerge_jax.models import create_model, get_spec, list_models
from medmerge_jax.models.preprocessing import DEEPEST, Preprocessing, Rendering
from medmerge_jax.runtime.progress import Bar, say
from medmerge_jax.storage import atomic
from medmerge_jax.training.parameterization import Tree

Parent = tuple[Tree, dict[str, Any]]


_SKIPPED = 0.01
"""The share of unreadable images that may be left out."""

DATA_KINDS = {
    "folder": ("root",),
    "table": ("root", "table"),
    "official": ("root", "split_table"),
    "synthetic": (),
}
"""The ways of giving images and labels, and the paths in `config.data` that each needs."""


SOURCE, JOB = "source:", "job:"
"""How a parent's value begins that names one of `config.sources`, or another job of the study."""

SOURCES = "sources/"
"""How the names of the jobs begin that are sources."""


def job_of(value: str) -> str:
    """The job whose model a parent's value names, by its folder in the study; "" for none.

    >>> job_of("source:b"), job_of("job:fgg/1e-05::fgg-5"), job_of("b.pth")
    ('sources/b', 'fgg/1e-05', '')
    """
    if value.startswith(SOURCE):
        return f"{SOURCES}{value.removeprefix(SOURCE)}"
    return value.removeprefix(JOB).partition("::")[0] if value.startswith(JOB) else ""


def location(value: str, folder: Path) -> str:
    """Where the model lies that a parent's value names; a job's in the folder of the study."""
    job, kept = job_of(value), value.partition("::")[2]
    if not job:
        return value
    return os.fspath(folder / job / "kept" / kept if kept else folder / job)


def with_architecture(config: Config, order: Iterable[str] = ()) -> Config:
    """The config; an empty architecture, of it or its sources, is that of the parents.

    Args:
      config: Of the experiment.
      order: Its sources, each after those that it starts from.

    Raises:
      UserError: No parent says one, or two say different ones.
    """
    sources = dict(config.sources)
    for name in order:
        if name in sources:
            sources[name] = _with_architecture(sources[name], sources)
    return _with_architecture(dataclasses.replace(config, sources=sources), sources)


def _with_architecture(config: Config, sources: dict[str, Config]) -> Config:
    if config.architecture:
        return config
    found: dict[str, str] = {}
    for name, value in config.parents.items():
        source = sources.get(value.removeprefix(SOURCE)) if value.startswith(SOURCE) else None
        if source is not None:
            found[name] = source.architecture
        elif value not in ("", "imagenet", "random", "zeros") and not value.startswith(SOURCE):
            lacking = config.estimate_statistics
            found[name] = weights.find_architecture(value, lacking=lacking)
    found = {name: one for name, one in found.items() if one}
    if len(set(found.values())) != 1:
        said = ", ".join(f"{name} is a {one}" for name, one in found.items())
        raise UserError(
            f"config.architecture is empty, and {said or 'no parent says one'}: set it to one of "
            f"{', '.join(list_models())}"
        )
    name, architecture = next(iter(found.items()))
    say(f"architecture {architecture}: as parent {name} says; config.architecture overrules it")
    return dataclasses.replace(config, architecture=architecture)


def load_data(config: Config, workdir: Path) -> DataSet:
    """The data set that `config.data` describes; drawn images are made in the workdir."""
    dataset, data = _read_data(config, workdir), config.data
    if data.folds:
        dataset = dataset.in_folds(data.folds, data.fold, data.split_seed)
    ordinal = dataset.ordinal if data.ordinal is None else data.ordinal
    for note in dataset.notes:
        say(f"data {data.name}: {note}")
    return dataclasses.replace(dataset, name=data.name, ordinal=ordinal)


def _read_data(config: Config, workdir: Path) -> DataSet:
    data, root = config.data, Path(config.data.root).expanduser()
    splits: dict[str, Any] = {"fractions": data.fractions, "seed": data.split_seed}
    meanings: dict[str, Any] = {"uncertain": data.uncertain, "blank": data.blank}
    if data.kind == "table":
        return image_table(
            Path(data.table).expanduser(),
            root,
            image_column=data.image_column,
            label_columns=data.label_columns,
            split_column=data.split_column,
            group_column=data.group_column,
            classes=data.classes,
            multilabel=data.multilabel,
            missing_labels=data.missing_labels,
            exclude=data.exclude,
            **meanings,
            **splits,
        )
    if data.kind == "official":
        table = Path(data.split_table).expanduser() if data.split_table else ""
        splits.update(variant=data.variant, split_by=data.split_by, split_table=table)
        return official_data_set(data.name, root, **meanings, **splits)
    if data.kind == "synthetic":
        root = workdir / "data" / data.name
        atomic.remove_leftovers(root.parent, [data.name])  # of a process killed while it drew
        counts = dict(zip(SPLITS, data.synthetic.counts, strict=True))
        drawn = {"seed": data.synthetic.seed, "appearance": data.synthetic.appearance}
        write_synthetic(root, data.synthetic.kind, counts, size=config.image_size, **drawn)
        drawn_set = image_folder(root, data.classes or None, **splits)
        return dataclasses.replace(drawn_set, titles=TITLES.get(data.synthetic.kind, {}))
    return image_folder(root, data.classes or None, exclude=data.exclude, **splits)


def missing_data(data: Data) -> list[str]:
    """One line for each path of `config.data` that is not there."""
    lines = []
    for field in DATA_KINDS[data.kind]:
        value = getattr(data, field)
        if value and not Path(value).expanduser().exists():
            lines.append(f"data.{field} = {value}: there is no such file or folder")
        elif not value and field != "split_table":  # which is not needed
            lines.append(f"data.{field} is empty: give a path, --config.data.{field}=PATH")
        else:
            continue
        if data.kind == "official" and field == "root":
            instructions = official.LAYOUTS[data.name].instructions.rstrip()
            lines[-1] += f". What is wanted:\n{textwrap.indent(instructions, '    ')}"
    return lines


def decode(config: Config, dataset: DataSet) -> tuple[DataSet, dict[str, Pixels], Rendering]:
    """The images of each split, decoded once and kept on the disk, and how they were rendered.

    The data set has what was inferred in its notes, and lacks images that could not be read if
    `config.data.unreadable` is "skip".

    Raises:
      UserError: Images cannot be read; it names those of all splits.
    """
    rendering, inferred = rendering_of(config.data, dataset)
    for note in inferred:
        say(f"data {config.data.name}: {note}")
    dataset = dataclasses.replace(dataset, notes=(*dataset.notes, *inferred))
    look = Preprocessing(config.image_size, config.data.resize, rendering=rendering)
    before = dataset
    dataset, pixels = decode_as(config.data, dataset, look)
    if dataset is not before:
        dataset.check()
    return dataset, pixels, rendering


def decode_as(
    data: Data, dataset: DataSet, look: Preprocessing
) -> tuple[DataSet, dict[str, Pixels]]:
    """The images of the splits that there are, prepared in this way; see `decode`."""
    total, skipped = sum(map(len, dataset.splits.values())), list[str]()
    while True:  # Files that are not there are found first, then those that cannot be decoded.
        pixels, unreadable = {}, dict[str, dict[int, str]]()
        for name in dataset.splits:
            try:
                pixels[name] = _decode_split(dataset, name, look)
            except UnreadableError as error:
                unreadable[name] = error.problems
        if not unreadable:
            break
        problems = [line for rows in unreadable.values() for line in rows.values()]
        skipped += problems
        _check_unreadable(data, problems if data.unreadable == "error" else skipped, total)
        rows = {
            name: np.isin(np.arange(len(split)), list(unreadable.get(name, ())))
            for name, split in dataset.splits.items()
        }
        dataset = without(dataset, rows)
    if not skipped:
        return dataset, pixels
    note = (
        f"{len(skipped)} of {total} images cannot be read and are left out (data.unreadable = "
        f"'skip'){EXAMPLES}{'; '.join(skipped)}"
    )
    say(f"data {data.name}: {note}")
    return dataclasses.replace(dataset, notes=(*dataset.notes, note)), pixels


def _decode_split(dataset: DataSet, name: str, look: Preprocessing) -> Pixels:
    split = dataset.splits[name]
    with Bar(f"decoding {dataset.name} {name}", len(split), "images") as bar:
        return cached_pixels(
            split,
            look.size,
            look.resize,
            atomic.cache_folder("images"),
            progress=bar.to,
            rendering=look.rendering,
        )


def rendering_of(data: Data, dataset: DataSet) -> tuple[Rendering, list[str]]:
    """How the numbers in the files become 8 bits, and what is to be said of it."""
    window = (data.window[0], data.window[1]) if data.window else None
    rendering = Rendering(data.intensity or DEEPEST, window, data.background)
    automatic = not data.intensity and window is None
    folder = atomic.cache_folder("images")
    measured = intensity.measure(dataset.splits.values(), folder, values=automatic)
    rendering = intensity.choose(measured, rendering, automatic=automatic)
    return rendering, list(intensity.notes(measured, rendering, automatic=automatic))


def _check_unreadable(data: Data, problems: list[str], total: int) -> None:
    most = int(_SKIPPED * total)
    if data.unreadable == "skip" and len(problems) <= most:
        return
    hint = f"data.unreadable = 'skip' leaves out {most} of {total} at most; these are more"
    if len(problems) <= most:
        hint = "data.unreadable = 'skip' leaves them out"
    raise UserError(f"{unreadable_text(problems, total)}\n{hint}")


def audit_data(
    config: Config,
    dataset: DataSet,
    pixels: dict[str, Pixels],
    parents: dict[str, ImageHashes | None],
) -> tuple[DataSet, dict[str, Pixels], ImageHashes, dict[str, Any]]:
    """Looks for images that two splits share, or that a parent was trained on, and reports them.

    With `config.data.exclude_overlap`, val and test images of the latter kind are left out of what
    is returned: the data set, its pixels, their hashes with those of the parents' training images.
    Of the parents these hashes are given, or None where they are not known.
    """
    hashes = hash_images(dataset, {n: p.array for n, p in pixels.items()}, config.data.resize)
    audit = audit_data_set(dataset, hashes, parents)
    if config.data.exclude_overlap:
        rows = overlapping(hashes, parents)
        dataset = without(dataset, rows)
        dataset.check()
        pixels = {
            name: dataclasses.replace(part, array=part.array[~rows[name]])
            if name in rows and rows[name].any()
            else part
            for name, part in pixels.items()
        }
        hashes = hashes.without(rows)
        audit = {
            **audit_data_set(dataset, hashes, parents),
            "excluded": {name: int(leave.sum()) for name, leave in rows.items()},
        }
    audit["summary"] = short_text(audit)
    for line in audit["summary"]:
        say(line)
    return dataset, pixels, hashes.inheriting([one for one in parents.values() if one]), audit


def load_parents(config: Config, names: list[str], folder: Path) -> dict[str, Parent]:
    """Variables and provenance of each named parent; of zeros without, see `fill_zeros`.

    The folder is that of the study, where the jobs are that parents name.

    Raises:
      UserError: One for all the parents that cannot be loaded.
    """

    def load(name: str) -> Parent:
        variables, card = load_parent(config, name, folder)
        say(f"parent {name}: {_provenance(card)}")
        return variables, card

    return _each(names, load)


def load_cards(config: Config, names: list[str], folder: Path) -> dict[str, Parent]:
    """As `load_parents`, but without variables, for those who open one parent at a time."""

    def load(name: str) -> Parent:
        value = config.parents[name]
        return {}, {**weights.load_card(location(value, folder)), "source": value}

    return _each(names, load)


def _each(names: list[str], load: Callable[[str], Parent]) -> dict[str, Parent]:
    parents: dict[str, Parent] = {}
    problems = []
    for name in names:
        try:
            parents[name] = load(name)
        except UserError as error:
            problems.append(f"parents.{name}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return parents


def _provenance(card: dict[str, Any]) -> str:
    """Where it comes from, and the checksum of what was downloaded or the model's fingerprint."""
    checksum = card.get("sha256") or card.get("fingerprint")
    origin: str = card.get("origin", card["source"])
    return f"{origin}, sha256 {checksum}" if checksum else origin


def load_parent(config: Config, name: str, folder: Path) -> Parent:
    """Variables and provenance of one parent, see `load_parents`; what is inferred is said."""
    value = config.parents[name]
    if value == "zeros":
        return {}, {"source": "zeros"}
    if value == "random":
        number = sorted(n for n, v in config.parents.items() if v == "random").index(name)
        said = f"random, seed {config.seed}" + (f", number {number + 1}" if number else "")
        return random_variables(config, number), {"source": said}
    path = location(value, folder)
    lacking = config.estimate_statistics
    variables, card = weights.load_parent(path, config.architecture, lacking=lacking)
    fingerprint = weights.model_fingerprint(variables)
    variables, card, adapted = weights.as_published(config.architecture, variables, card)
    others = list(_of_other_images(config, card))
    for note in [adapted, *others] if adapted else others:
        say(f"{card['file']}: {note}")
    notes = [*card.get("notes", []), *others]
    source = path if value.startswith(SOURCE) else value
    return variables, {**card, "notes": notes, "source": source, "fingerprint": fingerprint}


def open_parent(config: Config, name: str, folder: Path) -> Tree:
    """Variables of one parent that is a file, whose leaves may be `weights.LazyArray`s."""
    path = location(config.parents[name], folder)
    variables, card = weights.open_parent(
        path, config.architecture, lacking=config.estimate_statistics
    )
    return weights.as_published(config.architecture, variables, card)[0]


def _of_other_images(config: Config, card: dict[str, Any]) -> Iterator[str]:
    """How a parent's images were prepared otherwise than the config's are."""
    here = {"image_size": config.image_size, "resize": config.data.resize}
    for field, value in here.items():
        if card.get(field, value) != value:
            yield f"its images had {field} {card[field]}, here it is {value}"
    if "mean" not in card:
        yield "nothing says how its images were normalised; it is taken that they were as here"


def fill_zeros(parents: dict[str, Parent]) -> dict[str, Parent]:
    """Gives the parents of zeros the others' mean batch norms, so that the mean is theirs."""
    if all(variables for variables, _ in parents.values()):
        return parents
    backbones = [without_head(variables) for variables, _ in parents.values() if variables]
    mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *backbones)
    return {
        name: (variables or zeros_parent(mean), card) for name, (variables, card) in parents.items()
    }


def missing_parents(config: Config, names: list[str], sources: list[str]) -> list[str]:
    """One line for each of the parents `names` that cannot be there, without loading any."""
    lines = []
    for name in names:
        value = config.parents[name]
        if value.startswith(SOURCE):
            if value.removeprefix(SOURCE) not in sources:
                lines.append(f"parents.{name} = {value}: the config has no such source ({sources})")
        elif value == "imagenet":
            try:
                weights.find_imagenet_weights(config.architecture)
            except UserError as error:
                lines.append(f"parents.{name}: {error}")
        elif weights.is_on_hub(value):
            try:
                weights.load_card(value)
            except UserError as error:
                lines.append(f"parents.{name}: {error}")
        elif not value:
            lines.append(
                f"parents.{name} is empty: give a model directory, a run directory or a weight "
                f"file, --config.parents.{name}=PATH, or hf://ORG/NAME"
            )
        elif value not in ("zeros", "random") and not weights.path_of(value).exists():
            lines.append(f"parents.{name} = {value}: there is no such file or folder")
    return lines


def random_variables(config: Config, number: int = 0) -> Tree:
    """A backbone as initialised, from `config.seed`; several have numbers, and are not the same."""
    model = create_model(config.architecture, num_classes=0)
    size = get_spec(config.architecture).preprocessing.size
    images = jnp.zeros((1, size, size, 3))
    # It runs once, so that optimizing it takes longer than it saves.
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    key = jax.random.key(config.seed)
    variables: Tree = init(jax.random.fold_in(key, number) if number else key, images)
    return variables


def loss_weights(config: Config, dataset: DataSet) -> np.ndarray:
    """Class weights from the training split, as `training.loss.weighted_loss` takes them.

    "balanced" is n / (classes · n_c), as scikit-learn's; for several labels per image it is the
    negatives over the positives of each label. "by_frequency" is FissionFusion's (Sanjeev et al.,
    arXiv 2403.13341): w_c = (max n − n_c + mean n) / max n with n_c the positives of a label, or
    the images of a class; for several labels it weighs all of a label's loss. Their code divides by
    the greatest of the numerators instead, which is one factor for the whole loss.

    Returns:
      float32 (classes,); for "by_frequency" of several labels (1, classes).
    """
    labels = dataset.splits["train"].labels
    if config.class_weights == "none":
        return np.ones(dataset.num_classes, np.float32)
    if dataset.multilabel:
        counts = np.nansum(labels, axis=0)
    else:
        counts = np.bincount(labels, minlength=dataset.num_classes)
    if config.class_weights == "by_frequency":
        counts = counts if counts.any() else np.ones_like(counts)
        weights = (counts.max() - counts + counts.mean()) / counts.max()
        return np.asarray(weights[None] if dataset.multilabel else weights, np.float32)
    if dataset.multilabel:
        negatives = np.nansum(1 - labels, axis=0)
        return np.asarray(negatives / np.maximum(counts, 1), np.float32)
    return np.asarray(len(labels) / (dataset.num_classes * counts), np.float32)
