"""The files of a model on the disk, and what those beside the weights say of it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.models.preprocessing import BACKGROUNDS, DEEPEST, is_window
from medmerge_jax.storage.atomic import read_json, write_atomically
from medmerge_jax.storage.npz import read_npz

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
README_FILE = "README.md"
HASHES_FILE = "image_hashes.npz"
"""By which images that a model was trained on are recognised, see `data.hashing`."""
TIMM_FILE = "config.json"
"""That timm reads."""

_OF_TIMM = (WEIGHTS_FILE, "pytorch_model.bin")

RESIZES = {"center": "crop", "squash": "squash"}
"""Our words for timm's `crop_mode`."""


def weight_file(source: Path) -> Path:
    """Of a model directory, a run directory or a file.

    Raises:
      UserError: There is no such thing, or it holds no model.
    """
    if source.is_file():
        return source
    if not source.exists():
        folder = next(parent for parent in source.absolute().parents if parent.exists())
        raise UserError(f"{source}: there is no such file or folder; of its path {folder} is there")
    for file in (source / WEIGHTS_FILE, source / "model" / WEIGHTS_FILE):
        if file.is_file():
            return file
    raise UserError(
        f"{source}: holds no model. Wanted {WEIGHTS_FILE} in it (a model directory) or "
        f"model/{WEIGHTS_FILE} (the directory of a finished run)"
    )


def read_card(file: Path) -> dict[str, Any]:
    """The card that belongs to a weight file; without one timm's config, or else nothing.

    Raises:
      UserError: It is damaged, or a field is not what it should be.
    """
    path = file.with_suffix(".json")
    beside = file.parent / CARD_FILE
    # A folder's model.json speaks of its model.safetensors, if that is there.
    if not path.is_file() and beside.is_file() and not (file.parent / WEIGHTS_FILE).exists():
        path = beside
    if path.is_file():
        card = _read_object(path)
    else:
        path = file.with_name(TIMM_FILE)
        timms = file.name in _OF_TIMM and path.is_file()
        card = _card_of_timm(_read_object(path)) if timms else {}
    for field, (usable, kind) in _CARD_FIELDS.items():
        if field in card and not usable(card[field]):
            raise UserError(
                f"{path}: {field} is {card[field]!r:.80}; {kind} is wanted. Repair or remove it"
            )
    return card


def write_hashes(path: Path, perceptual: np.ndarray, fingerprint: str) -> None:
    """Writes hashes of images without any names, see `Model.image_hashes`.

    Args:
      path: The file.
      perceptual: uint64 (n, 4).
      fingerprint: Of the data, as the model's card has it.
    """
    rows, of_data = np.unique(perceptual, axis=0), np.asarray(fingerprint)
    write_atomically(
        path, lambda file: np.savez_compressed(file, perceptual=rows, fingerprint=of_data)
    )


def read_hashes(file: Path, fingerprint: str) -> np.ndarray | None:
    """The hashes beside a weight file, uint64 (n, 4); None if there are none of this data.

    Raises:
      UserError: They cannot be read.
    """
    path = file.with_name(HASHES_FILE)
    if not path.is_file():
        return None
    arrays = read_npz(path)
    if "ids" in arrays or str(arrays.get("fingerprint")) != fingerprint:
        return None  # of a run, with the names of the images; or of another model
    hashes = arrays.get("perceptual")
    if hashes is None or hashes.dtype != np.uint64 or hashes.shape[1:] != (4,):
        raise UserError(f"{path}: holds no hashes of images. Delete it to do without them")
    return hashes


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: this is no JSON ({error}). Repair or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}; an object with fields is wanted")
    return value


def _card_of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our card from timm's `config.json`; nothing if it is another program's."""
    if "architecture" not in config:
        return {}
    inner = config.get("pretrained_cfg")
    says = {**config, **(inner if isinstance(inner, dict) else {})}
    card = {
        name: says[name]
        for name in ("architecture", "num_classes", "mean", "std")
        if says.get(name) is not None
    }
    size = says.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        card["image_size"] = size[-1]
    mode = says.get("crop_mode", "center")
    if _is_text(mode) and mode in RESIZES:
        card["resize"] = RESIZES[mode]
    names = says.get("label_names")
    if isinstance(names, list) and len(names) == says.get("num_classes"):
        card["classes"] = names
    if differing := ", ".join(_differing(says)):
        card["preprocessing_note"] = f"timm prepares its images with {differing}; here it is not so"
    return card


def _differing(says: Mapping[str, Any]) -> Iterator[str]:
    """What timm does with an image before the model sees it, and this program does not."""
    usual = {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center"}
    for name, here in usual.items():
        found = says.get(name, here)
        if found not in (here, None, *(RESIZES if name == "crop_mode" else ())):
            yield f"{name} {found!r:.40}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and [type(x) in (int, float) for x in value] == [True] * 3


# What this program reads of a card; the other fields are the users'.
_CARD_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("architecture", "resize"), (_is_text, "a name")),
    "num_classes": (_is_count, "a number of classes"),
    "classes": (_are_texts, "names"),
    "image_size": (lambda value: _is_count(value) and 0 < value < 2**14, "a number of pixels"),
    "intensity": (lambda value: _is_count(value) and 0 < value <= DEEPEST, "1 to 65535"),
    "window": (is_window, "two numbers, the lower one first,"),
    "background": (lambda value: value in BACKGROUNDS, " or ".join(BACKGROUNDS)),
    "mean": (_is_colour, "a number for each colour"),
    "std": (lambda value: _is_colour(value) and min(value) > 0, "a number above 0 for each colour"),
    "multilabel": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("data_fingerprint", "origin", "sha256"), (_is_text, "a text")),
}
