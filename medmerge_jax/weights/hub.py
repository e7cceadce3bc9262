"""ImageNet-1k weights by the name of the architecture."""

import dataclasses
import hashlib
import logging
import os
from pathlib import Path

from medmerge_jax.errors import UserError
from medmerge_jax.models import ModelSpec, get_spec
from medmerge_jax.storage.atomic import cache_folder

HUB_FILE = "model.safetensors"
_SECONDS = 3.0
"""That the hub has to answer in."""


@dataclasses.dataclass(frozen=True)
class LocatedWeights:
    """A file of weights on this machine."""

    path: Path
    sha256: str  # of its content, hexadecimal
    origin: str  # where it was found, for the user


def find_imagenet_weights(architecture: str) -> LocatedWeights:
    """Finds torchvision's ImageNet-1k weights on this machine, or else downloads them.

    Looks in this library's folder of weights (`$MEDMERGE_JAX_CACHE/weights`, by default
    `~/.cache/medmerge_jax/weights`), in PyTorch's own cache, and on the Hugging Face hub, whose
    `timm/<architecture>.tv_in1k` are the same weights under the same names.

    Raises:
      UserError: There are none for this architecture, a file is not what its name says, or it
        is nowhere and cannot be downloaded; names the file wanted and where to put it.
    """
    spec = get_spec(architecture)
    if spec.hub_id is None or spec.torch_file is None:
        raise UserError(
            f"there are no ImageNet weights of {architecture}, a network for "
            f"{spec.preprocessing.size}-pixel images. Give the path of a weight "
            "file, or take an ImageNet architecture such as resnet18"
        )
    own = [cache_folder("weights") / f"{architecture}{end}" for end in (".safetensors", ".pth")]
    cached = _torch_cache() / spec.torch_file
    if path := next(filter(Path.is_file, own), None):
        located = LocatedWeights(path, _sha256(path), "folder of weights")
    else:
        located = _in_torch_cache(cached) or _from_hub(spec, spec.hub_id, cached)
    logging.getLogger(__name__).info(
        "%s weights: %s (%s), sha256 %s", architecture, located.path, located.origin, located.sha256
    )
    return located


def _in_torch_cache(path: Path) -> LocatedWeights | None:
    if not path.is_file():
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


def _from_hub(spec: ModelSpec, hub_id: str, torch_path: Path) -> LocatedWeights:
    try:
        # Imported here: it takes a while, and only this needs it.
        from huggingface_hub import hf_hub_download

        # It warns of every retry; what came of them is said below.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        # Without network it would try for 24 s; what it has fetched before is taken at once.
        local = not _reachable(hub_id)
        path = Path(hf_hub_download(hub_id, HUB_FILE, local_files_only=local))
    except Exception as error:  # No network, no such library, a proxy, a full disk, ...
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the ImageNet weights of {spec.name} are not on this machine and cannot be "
            f"downloaded ({type(error).__name__}: {reason}). Fetch one of these elsewhere:\n"
            f"  {HUB_FILE} of {hub_id} on the Hugging Face hub, and put it at "
            f"{cache_folder('weights') / (spec.name + '.safetensors')}\n"
            f"  torchvision's {torch_path.name}, and put it at {torch_path}"
        ) from error
    sha256 = _sha256(path)
    # The hub's cache links to the content under the checksum that the hub announced.
    announced = path.resolve().name
    if len(announced) == 64 and announced != sha256:
        raise UserError(
            f"{path}: its sha256 is {sha256}, not {announced} as the hub says: the download is "
            "damaged. Delete it and try again"
        )
    return LocatedWeights(path, sha256, f"{hub_id} on the Hugging Face hub")


def _reachable(hub_id: str) -> bool:
    """Whether the hub answers in a few seconds, at the first attempt."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(hub_id, HUB_FILE), timeout=_SECONDS)
    except Exception:  # No network, a proxy, no such repository, ...
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
