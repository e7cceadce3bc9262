"""ImageNet-1k weights by the name of the architecture."""

import dataclasses
import hashlib
import logging
import os
from pathlib import Path

from medmerge_jax.errors import UserError
from medmerge_jax.models import ModelSpec, get_spec
from medmerge_jax.storage.atomic import cache_folder
from medmerge_jax.weights.hub import UnreachableError, fetch
from medmerge_jax.weights.layout import WEIGHTS_FILE
from medmerge_jax.weights.references import HubReference


@dataclasses.dataclass(frozen=True)
class LocatedWeights:
    """A file of weights on this machine."""

    path: Path
    sha256: str  # of its content, hexadecimal
    origin: str  # where it was found, for the user


def find_imagenet_weights(architecture: str) -> LocatedWeights:
    """Finds an architecture's ImageNet-1k weights on this machine, or else downloads them.

    They are torchvision's, of transformers their authors'. Looks in this library's folder of
    weights (`$MEDMERGE_JAX_CACHE/weights`, by default `~/.cache/medmerge_jax/weights`), in
    PyTorch's own cache, and on the Hugging Face hub, whose `timm/<architecture>.tv_in1k` are the
    same weights under the same names.

    Raises:
      UserError: There are none for this architecture, a file is not what its name says, or it
        is nowhere and cannot be downloaded; names the file wanted and where to put it.
    """
    spec = get_spec(architecture)
    if spec.hub_id is None:
        raise UserError(
            f"there are no ImageNet weights of {architecture}, a network for "
            f"{spec.preprocessing.size}-pixel images. Give the path of a weight "
            "file, or take an ImageNet architecture such as resnet18"
        )
    own = [cache_folder("weights") / f"{architecture}{end}" for end in (".safetensors", ".pth")]
    cached = None if spec.torch_file is None else _torch_cache() / spec.torch_file
    if path := next(filter(Path.is_file, own), None):
        located = LocatedWeights(path, _sha256(path), "folder of weights")
    else:
        located = _in_torch_cache(cached) or _from_hub(spec, spec.hub_id, cached)
    logging.getLogger(__name__).info(
        "%s weights: %s (%s), sha256 %s", architecture, located.path, located.origin, located.sha256
    )
    return located


def _in_torch_cache(path: Path | None) -> LocatedWeights | None:
    if path is None or not path.is_file():
        return None
    sha256 = _sha256(path)
    digits = path.stem.rpartition("-")[2]
    if not sha256.startswith(digits):
        raise UserError(
            f"{path}: its sha256 begins with {sha256[: len(digits)]}, not with the {digits} of "
            "its name: the file is damaged or another. Delete it and fetch it again"
        )
    return LocatedWeights(path, sha256, "PyTorch's cache")


def _torch_cache() -> Path:
    home = os.environ.get("TORCH_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(home).expanduser() if home else cache / "torch") / "hub" / "checkpoints"


def _from_hub(spec: ModelSpec, hub_id: str, torch_path: Path | None) -> LocatedWeights:
    try:
        fetched = fetch(HubReference(hub_id, path=WEIGHTS_FILE))
    except UnreachableError as error:
        raise UserError(
            f"the ImageNet weights of {spec.name} are not on this machine and cannot be "
            f"downloaded: {error}\nOr fetch one of these elsewhere:\n"
            f"  {WEIGHTS_FILE} of {hub_id} on the Hugging Face hub, and put it at "
            f"{cache_folder('weights') / (spec.name + '.safetensors')}"
            + (
                f"\n  {torch_path.name} of PyTorch, and put it at {torch_path}"
                if torch_path
                else ""
            )
        ) from error
    return LocatedWeights(fetched.file, fetched.sha256, str(fetched.origin))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
