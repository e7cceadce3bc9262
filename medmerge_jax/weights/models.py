"""Models on disk: weights with torchvision's names, and a card that says what they are."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import get_spec, list_models
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage.atomic import read_json, write_json
from medmerge_jax.weights.files import read_tensors, write_safetensors
from medmerge_jax.weights.hub import find_imagenet_weights
from medmerge_jax.weights.names import (
    Variables,
    fitting_architectures,
    variables_from_torch,
    variables_to_torch,
)

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"


def load_weights(architecture: str, path: str | PathLike[str]) -> Variables:
    """Flax variables from a file with torchvision's tensor names.

    Args:
      architecture: One of `models.list_models()`.
      path: `.safetensors`, `.npz`, or a `.pth`/`.pt` of `torch.save`, which is read without
        PyTorch and without running its code; or a model or run directory. The head may have any
        number of classes or lack.

    Returns:
      `{"params": ..., "batch_stats": ...}`, nested dicts of float32 NumPy arrays.

    Raises:
      UserError: The file cannot be read, or its tensors are not those of the architecture.
    """
    get_spec(architecture)
    file = _weight_file(Path(path).expanduser())
    return variables_from_torch(architecture, read_tensors(file), str(file))


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
    tensors = variables_to_torch(architecture, variables)
    write_safetensors(path, tensors, {"format": "pt"})


def save_model(
    directory: str | PathLike[str],
    architecture: str,
    variables: Mapping[str, Any],
    card: Mapping[str, Any],
) -> None:
    """Writes a model directory: `model.safetensors` and `model.json`.

    Both are written to a folder beside it, which then takes its place, so that a model directory
    is never half a model. An existing one is replaced.

    Args:
      directory: To write.
      architecture: One of `models.list_models()`.
      variables: `{"params": ..., "batch_stats": ...}`.
      card: For `model.json`: num_classes, classes, image_size, mean, std, multilabel, parents,
        recipe, data_fingerprint. The architecture is added, and the versions of the packages
        if the card has none.

    Raises:
      UserError: The variables are not those of the architecture.
    """
    directory = Path(directory).expanduser()
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        new = scratch / "new"
        save_weights(new / WEIGHTS_FILE, architecture, variables)
        complete = {"architecture": architecture, "versions": package_versions(), **card}
        write_json(new / CARD_FILE, {**complete, "architecture": architecture})
        if directory.exists():
            directory.rename(scratch / "old")
        new.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_parent(source: str | PathLike[str], architecture: str) -> tuple[Variables, dict[str, Any]]:
    """A parent's variables and what is known of it.

    Args:
      source: "imagenet" (see `hub.find_imagenet_weights`), a model directory, a run directory
        (which holds one in `model/`), or a bare weight file; the card of `model.pth` is
        `model.json`.
      architecture: That is wanted.

    Returns:
      `{"params": ..., "batch_stats": ...}` and the card, which always has `architecture` and
      `file`.

    Raises:
      UserError: There is no such thing, or it is of another architecture.
    """
    get_spec(architecture)
    if source == "imagenet":
        return _imagenet_parent(architecture)
    file = _weight_file(Path(source).expanduser())
    card = _read_card(file)
    if card.get("architecture", architecture) != architecture:
        raise UserError(
            f"{file}: this is a {card['architecture']}, says the card beside it; "
            f"{architecture} is wanted. Merging needs parents of one architecture"
        )
    return load_weights(architecture, file), {
        "architecture": architecture,
        **card,
        "file": str(file),
    }


def find_architecture(source: str | PathLike[str]) -> str:
    """The architecture of a model directory, run directory or weight file.

    As its card says, or as its tensors' names and shapes do.

    Raises:
      UserError: There is no such file, or it fits no architecture.
    """
    file = _weight_file(Path(source).expanduser())
    card = _read_card(file)
    if "architecture" in card:
        return str(card["architecture"])
    fitting = fitting_architectures(read_tensors(file), str(file))
    if not fitting:
        raise UserError(
            f"{file}: its tensors fit none of {', '.join(list_models())}; weights with "
            "torchvision's names of one of these are wanted"
        )
    return fitting[0]


def model_fingerprint(variables: Mapping[str, Any]) -> str:
    """sha256, hexadecimal, of all paths, shapes, dtypes and values, whatever the trees' order."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(variables).items()):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _imagenet_parent(architecture: str) -> tuple[Variables, dict[str, Any]]:
    found = find_imagenet_weights(architecture)
    spec = get_spec(architecture)
    card = {
        "architecture": architecture,
        "num_classes": 1000,
        "image_size": spec.preprocessing.size,
        "mean": list(spec.preprocessing.mean),
        "std": list(spec.preprocessing.std),
        "data": "ImageNet-1k",
        "licence": spec.licence,
        "origin": found.origin,
        "sha256": found.sha256,
        "file": str(found.path),
    }
    return load_weights(architecture, found.path), card


def _weight_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.exists():
        folder = next(parent for parent in source.absolute().parents if parent.exists())
        raise UserError(f"{source}: there is no such file or folder; of its path {folder} is there")
    candidates = [source / WEIGHTS_FILE, source / "model" / WEIGHTS_FILE]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{source}: holds no model. Wanted {WEIGHTS_FILE} in it (a model directory) or "
        f"model/{WEIGHTS_FILE} (the directory of a finished run)"
    )


def _read_card(file: Path) -> dict[str, Any]:
    """The card that belongs to a weight file, empty if there is none."""
    path = file.with_suffix(".json")
    beside = file.parent / CARD_FILE
    # A folder's model.json speaks of its model.safetensors, if that is there.
    if not path.is_file() and beside.is_file() and not (file.parent / WEIGHTS_FILE).exists():
        path = beside
    if not path.is_file():
        return {}
    try:
        card = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: this is no JSON ({error}). Repair or remove it") from error
    if not isinstance(card, dict):
        raise UserError(f"{path}: holds a {type(card).__name__}; an object with fields is wanted")
    for field, (usable, wanted) in _CARD_FIELDS.items():
        if field in card and not usable(card[field]):
            raise UserError(
                f"{path}: {field} is {card[field]!r:.80}; {wanted} is wanted. Repair or remove it"
            )
    return card


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


# What this program reads of a card; the other fields are the users'.
_CARD_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (_is_text, "a name"),
    "num_classes": (_is_count, "a number of classes"),
    "classes": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "names"),
    "image_size": (lambda value: _is_count(value) and 0 < value < 2**14, "a number of pixels"),
    "mean": (_is_colour, "a number for each colour"),
    "std": (lambda value: _is_colour(value) and min(value) > 0, "a number above 0 for each colour"),
    "multilabel": (lambda value: isinstance(value, bool), "true or false"),
    "data_fingerprint": (_is_text, "a text"),
    "origin": (_is_text, "a text"),
    "sha256": (_is_text, "a text"),
}
