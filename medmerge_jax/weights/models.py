"""Models on disk: weights with torchvision's names, and a card that says what they are."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import get_spec, list_models
from medmerge_jax.models.preprocessing import Preprocessing, Rendering
from medmerge_jax.runtime.progress import say
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage.atomic import write_json, write_text
from medmerge_jax.storage.folders import replace_directory
from medmerge_jax.weights.card import readme, shareable
from medmerge_jax.weights.files import read_state_dicts, write_safetensors
from medmerge_jax.weights.fit import NO_STATISTICS, StateDicts
from medmerge_jax.weights.hub import fetch
from medmerge_jax.weights.imagenet import find_imagenet_weights
from medmerge_jax.weights.layout import (
    CARD_FILE,
    HASHES_FILE,
    README_FILE,
    WEIGHTS_FILE,
    read_card,
    read_hashes,
    weight_file,
    write_hashes,
)
from medmerge_jax.weights.lazy import read_all
from medmerge_jax.weights.names import (
    Variables,
    fitting_architectures,
    variables_and_notes,
    variables_to_torch,
)
from medmerge_jax.weights.references import hub_reference, is_on_hub, split_choice

FORMAT = 1
"""Of model directories; files of former versions say none."""


def load_weights(architecture: str, path: str | PathLike[str]) -> Variables:
    """Flax variables from a file with torchvision's tensor names.

    Args:
      architecture: One of `models.list_models()`.
      path: `.safetensors`, `.npz`, or a `.pth`/`.pt` of `torch.save`, which is read without
        PyTorch and without running its code; a model or run directory; or one of the Hugging Face
        hub, `hf://ORG/NAME`. The head may have any number of classes or lack.

    Returns:
      `{"params": ..., "batch_stats": ...}`, nested dicts of float32 NumPy arrays.

    Raises:
      UserError: The file cannot be read, or its tensors are not those of the architecture.
    """
    get_spec(architecture)
    file, choice, _ = _find(path)
    state_dicts = read_state_dicts(file)
    variables, notes = variables_and_notes(architecture, state_dicts, str(file), choice)
    for note in notes:
        say(f"{file}: {note}")
    return read_all(variables)


def save_weights(
    path: str | PathLike[str], architecture: str, variables: Mapping[str, Any]
) -> None:
    """Writes a `.safetensors` file that torchvision loads with `strict=True`.

    Args:
      path: The file, written whole or not at all; its folder is made if need be.
      architecture: One of `models.list_models()`.
      variables: `{"params": ..., "batch_stats": ...}`, with a head or without.

    Raises:
      UserError: The suffix is another, or the variables are not those of the architecture.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are written as .safetensors, not {path.suffix!r}")
    write_safetensors(path, variables_to_torch(architecture, variables))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model, and all that is needed to use it.

    Attributes:
      architecture: One of `models.list_models()`.
      variables: `{"params": ..., "batch_stats": ...}`, with a head or without.
      preprocessing: Of the images that it was trained on.
      classes: Their names, in the order of the logits; empty where they are unknown.
      multilabel: Whether an image has any number of the classes, instead of exactly one.
      provenance: What else its `model.json` says or will say, such as recipe and parents.
      file: Where the weights were read; None of a model that was not.
      image_hashes: uint64 (n, 4), sorted: perceptual hashes of the images that it was trained on,
        by which a later run finds that it tests on them; None if they are unknown, or not to be
        told. `provenance["data_fingerprint"]` says of which data they are.
    """

    architecture: str
    variables: Mapping[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    multilabel: bool = False
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: Path | None = None
    image_hashes: np.ndarray | None = None

    @property
    def num_classes(self) -> int:
        """Number of logits; 0 without a head."""
        return int(np.size(self.variables["params"].get("head", {}).get("bias", ())))

    def card(self) -> dict[str, Any]:
        """The content of `model.json`, in which files have no folders, see `shareable`."""
        model = {
            "format": FORMAT,
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            **({"classes": self.classes} if self.classes else {}),
            "multilabel": self.multilabel,
            **_preprocessing_fields(self.preprocessing),
        }
        # The model's own fields come first, and no provenance replaces them.
        card: dict[str, Any] = shareable(
            {**model, "versions": package_versions(), **self.provenance, **model}
        )
        return card


def model_from_card(
    architecture: str, variables: Mapping[str, Any], card: Mapping[str, Any]
) -> Model:
    """A model of what a card says; the architecture's preprocessing where that says nothing."""
    published = get_spec(architecture).preprocessing
    preprocessing = Preprocessing(
        card.get("image_size", published.size),
        card.get("resize", published.resize),
        tuple(card.get("mean", published.mean)),
        tuple(card.get("std", published.std)),
        Rendering.of_card(card),
    )
    return Model(
        architecture,
        variables,
        preprocessing,
        tuple(card.get("classes", ())),
        card.get("multilabel", False),
        {key: card[key] for key in card if key not in _MODEL_FIELDS},
        Path(card["file"]) if "file" in card else None,
    )


def load_model(source: str | PathLike[str]) -> Model:
    """A model of a run, a model directory or a weight file.

    What a file says nothing about is inferred from its architecture, and said.

    Args:
      source: As of `load_parent`, but not "imagenet".

    Raises:
      UserError: There is no such model, it fits no architecture, or its card contradicts it.

    >>> import tempfile
    >>> from medmerge_jax.models import create_model
    >>> init = create_model("resnet20", num_classes=2).init
    >>> variables = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    >>> zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variables)
    >>> model = Model("resnet20", zeros, Preprocessing(32), ("healthy", "ill"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(f"{folder}/eyes", model)
    ...     load_model(f"{folder}/eyes").classes
    ('healthy', 'ill')
    """
    variables, card = load_parent(source)
    model = model_from_card(card["architecture"], variables, card)
    if model.file is not None:
        hashes = read_hashes(model.file, card.get("data_fingerprint", ""))
        model = dataclasses.replace(model, image_hashes=hashes)
    _check_classes(model, str(model.file))
    used = _preprocessing_fields(model.preprocessing)
    if missing := [f"{name} {value}" for name, value in used.items() if name not in card]:
        say(
            f"{model.file}: nothing says its preprocessing; {model.architecture}'s is taken: "
            + ", ".join(missing)
        )
    if note := card.get("preprocessing_note"):
        say(f"{model.file}: {note}")
    return model


def save_model(path: str | PathLike[str], model: Model) -> None:
    """Writes a model directory: `model.safetensors`, `model.json` and `README.md`.

    The weights have torchvision's names; the README is a model card of the Hugging Face hub. With
    `image_hashes` there is a file of these, too. All are written to a folder beside it, which then
    takes its place, so that a model directory is never half a model. An existing one is replaced.

    Args:
      path: The directory.
      model: What is written; of files that its provenance names, only the name, see `shareable`.

    Raises:
      UserError: The variables are not those of the architecture, or not of so many classes.

    >>> import tempfile
    >>> from medmerge_jax.models import create_model
    >>> init = create_model("resnet20", num_classes=0).init
    >>> variables = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    >>> zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variables)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(f"{folder}/eyes", Model("resnet20", zeros, Preprocessing(32)))
    ...     sorted(file.name for file in Path(folder, "eyes").iterdir())
    ['README.md', 'model.json', 'model.safetensors']
    """

    def write(new: Path) -> None:
        save_weights(new / WEIGHTS_FILE, model.architecture, model.variables)
        write_beside(new, model)

    directory = Path(path).expanduser()
    _check_classes(model, str(directory))
    replace_directory(directory, write, (WEIGHTS_FILE, CARD_FILE, README_FILE, HASHES_FILE))


def write_beside(folder: Path, model: Model, usage: Mapping[str, str] | None = None) -> None:
    """Writes what a model directory has beside the weights; for `usage` see `readme`."""
    card = model.card()
    write_json(folder / CARD_FILE, card)
    if model.image_hashes is not None:
        write_hashes(folder / HASHES_FILE, model.image_hashes, card.get("data_fingerprint", ""))
    hashes = 0 if model.image_hashes is None else len(model.image_hashes)
    write_text(folder / README_FILE, readme(card, usage, hashes=hashes))


def load_parent(
    source: str | PathLike[str], architecture: str | None = None, *, lacking: bool = False
) -> tuple[Variables, dict[str, Any]]:
    """A parent's variables and what is known of it.

    Args:
      source: "imagenet" (see `find_imagenet_weights`), a model directory, a run directory (which
        holds one in `model/`), a bare weight file, or one of the Hugging Face hub,
        `hf://ORG/NAME[@REVISION][/FILE or /FOLDER]` (see `hub.fetch`). The card of `model.pth` is
        `model.json`; without one timm's `config.json` is read.
      architecture: That is wanted; None for what the card, or else the tensors' names and shapes
        say, which "imagenet" has not.
      lacking: Whether its batch norms may lack their running statistics: "batch_stats" is then
        empty, for `models.statistics.with_statistics` to estimate.

    Returns:
      `{"params": ..., "batch_stats": ...}` and the card, which always has `architecture` and, with
      its whole path, `file`; of the hub also `origin` with the commit, and `sha256`.

    Raises:
      UserError: There is no such thing, it is of another architecture, or it fits none.
    """
    variables, card = open_parent(source, architecture, lacking=lacking)
    return read_all(variables), card


def open_parent(
    source: str | PathLike[str], architecture: str | None = None, *, lacking: bool = False
) -> tuple[Variables, dict[str, Any]]:
    """As `load_parent`, with leaves that may be `LazyArray`s, read whenever they are asked for."""
    if architecture is not None:
        get_spec(architecture)
        if source == "imagenet":
            return _imagenet_parent(architecture)
    file, choice, known = _find(source)
    card = {"architecture": architecture, **known}
    if architecture not in (None, card["architecture"]):
        raise UserError(
            f"{file}: this is a {card['architecture']}, says the card beside it; "
            f"{architecture} is wanted. Merging needs parents of one architecture"
        )
    state_dicts = read_state_dicts(file)
    if card["architecture"] is None:
        card["architecture"] = _fitting(state_dicts, file, lacking)
    variables, notes = variables_and_notes(
        card["architecture"], state_dicts, str(file), choice, lacking=lacking
    )
    for note in notes:
        say(f"{file}: {note}")
    return variables, {**card, **({"notes": list(notes)} if notes else {})}


class _Found(NamedTuple):
    file: Path
    choice: str  # what of the file is wanted, see `fit`
    card: dict[str, Any]  # with `file`, and what the hub says


def _find(source: str | PathLike[str]) -> _Found:
    """The weight file of a model, wherever it is, and what is known of it."""
    name, choice = split_choice(os.fspath(source))
    if not is_on_hub(name):
        file = weight_file(Path(name).expanduser())
        return _Found(file, choice, {**read_card(file), "file": str(file)})
    fetched = fetch(hub_reference(name))
    of_hub = {"origin": str(fetched.origin), "sha256": fetched.sha256, "file": str(fetched.file)}
    if fetched.licence:
        of_hub["licence"] = fetched.licence
    return _Found(fetched.file, choice, {**read_card(fetched.file), **of_hub})


def load_card(source: str | PathLike[str]) -> dict[str, Any]:
    """What is known of a model without reading it: its card, with `file`, its whole path.

    Raises:
      UserError: There is no such model, or its card is damaged.
    """
    return _find(source).card


def find_architecture(source: str | PathLike[str], *, lacking: bool = False) -> str:
    """The architecture of a parent, as its card says or as its tensors do; see `load_parent`.

    Raises:
      UserError: There is no such file, or it fits no architecture.
    """
    file, _, card = _find(source)
    return card.get("architecture") or _fitting(read_state_dicts(file), file, lacking)


def _fitting(state_dicts: StateDicts, file: Path, lacking: bool) -> str:
    fitting = fitting_architectures(state_dicts, lacking=lacking)
    if not fitting:
        if fitting_architectures(state_dicts, lacking=True):
            raise UserError(f"{file}: {NO_STATISTICS}")
        raise UserError(
            f"{file}: its tensors fit none of {', '.join(list_models())}; weights with "
            "torchvision's names of one of these are wanted"
        )
    return fitting[0]


def _check_classes(model: Model, where: str) -> None:
    if model.classes and len(model.classes) != model.num_classes:
        raise UserError(
            f"{where}: the model has {model.num_classes} logits and the names of "
            f"{len(model.classes)} classes, {list(model.classes)}; correct the names"
        )


def model_fingerprint(variables: Mapping[str, Any]) -> str:
    """sha256, hexadecimal, of all paths, shapes, dtypes and values, whatever the trees' order."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(variables).items()):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _imagenet_parent(architecture: str) -> tuple[Variables, dict[str, Any]]:
    located, spec = find_imagenet_weights(architecture), get_spec(architecture)
    card = {
        "architecture": architecture,
        "num_classes": 1000,
        "image_size": spec.preprocessing.size,
        "resize": spec.preprocessing.resize,
        "mean": list(spec.preprocessing.mean),
        "std": list(spec.preprocessing.std),
        "data": "ImageNet-1k",
        "licence": spec.licence,
        "origin": located.origin,
        "sha256": located.sha256,
        "file": str(located.path),
    }
    return load_weights(architecture, located.path), card


def _preprocessing_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    """As the card has them."""
    return {
        "image_size": preprocessing.size,
        **{name: getattr(preprocessing, name) for name in ("resize", "mean", "std")},
        **preprocessing.rendering.card(),
    }


_MODEL_FIELDS = (
    "format", "architecture", "num_classes", "classes", "multilabel", "image_size", "resize",
    "mean", "std", "intensity", "window", "background", "file",
)  # fmt: skip
