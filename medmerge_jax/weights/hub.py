"""Models of the Hugging Face hub, fetched without running anything of them."""

import functools
import hashlib
import logging
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from medmerge_jax.errors import UserError
from medmerge_jax.runtime.progress import say
from medmerge_jax.weights.layout import (
    CARD_FILE,
    HASHES_FILE,
    README_FILE,
    TIMM_FILE,
    WEIGHTS_FILE,
)
from medmerge_jax.weights.references import HUB, HubReference

SECONDS = 3.0
"""That the hub has to answer in."""

PAGE = "https://huggingface.co/"

_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz")
"""Suffixes of what may be fetched as weights; all are read without running code of theirs."""

_BESIDE = (CARD_FILE, TIMM_FILE, HASHES_FILE, README_FILE)
"""What is fetched with a weight file of the same folder."""

_LICENCE = re.compile(r"^license:[ \t]*([a-z0-9][a-z0-9.-]*)[ \t]*$", re.MULTILINE)
"""In the head of a model card."""

_HEAD = 2**14
"""Characters of a model card that are searched for it."""

_LISTED = 8
_FORBIDDEN = (401, 403)


class UnreachableError(UserError):
    """The hub does not answer, and what is wanted was not fetched before."""


class Fetched(NamedTuple):
    """A weight file of the hub on this machine.

    Attributes:
      file: In huggingface_hub's cache; what belongs to it lies beside it.
      origin: The reference with the commit and the file, by which it is found again.
      sha256: Of the file's content, hexadecimal.
      licence: That its model card names; "" if it names none.
    """

    file: Path
    origin: HubReference
    sha256: str
    licence: str


@functools.cache
def fetch(reference: HubReference) -> Fetched:
    """The weights that are meant, and the files beside them that say what they are.

    The hub is asked once and has `SECONDS` to answer; without it, what was fetched before is taken.
    A process goes on with the commit that it found first.

    Args:
      reference: Of a weight file, or of a folder: its `model.safetensors`, that of its folder
        `model`, or its only weight file, also of folders below.

    Raises:
      UnreachableError: The hub does not answer, and there is no copy on this machine.
      UserError: There is no such model, it is not for everybody, there are several weight files to
        choose from or none, or the download is damaged.
    """
    try:
        # Imported here: it takes a while, and only this needs it.
        import huggingface_hub
    except ImportError as error:
        raise UnreachableError(
            f"{reference}: the package huggingface_hub is missing; pip install huggingface_hub"
        ) from error
    # It warns of every retry; what came of them is said below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        info = huggingface_hub.HfApi().model_info(
            reference.repository, revision=reference.revision or None, timeout=SECONDS
        )
    except Exception as error:  # No network, a proxy, no such repository, ...
        _refuse(reference, error)
        return _described(reference, *_cached(reference, error))
    names = [file.rfilename for file in info.siblings or ()]
    wanted = _choose(reference, names)
    say(f"{reference}: {wanted} is fetched from the Hugging Face hub, if it is not here")
    try:
        path = _download(reference, wanted, names)
    except Exception as error:
        _refuse(reference, error)
        raise UnreachableError(f"{reference}: cannot be fetched ({reason(error)})") from error
    return _described(reference, path, wanted)


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def is_forbidden(error: Exception) -> bool:
    """Whether the hub has answered that this is not for whoever asks."""
    return getattr(getattr(error, "response", None), "status_code", 0) in _FORBIDDEN


def _refuse(reference: HubReference, error: Exception) -> None:
    """Raises a UserError if the hub has answered, and has no such thing for us."""
    from huggingface_hub import errors

    where = f"{HUB}{reference.repository}"
    if isinstance(error, errors.RevisionNotFoundError):
        raise UserError(f"{where}: has no branch, tag or commit {reference.revision!r}") from error
    if isinstance(error, errors.GatedRepoError):
        raise UserError(
            f"{where}: is open to those alone who have asked its owner, on "
            f"{PAGE}{reference.repository}; then log in with `hf auth login`"
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError) or is_forbidden(error):
        raise UserError(
            f"{where}: the Hugging Face hub has no such model, or it is private; if you may see "
            "it, log in with `hf auth login`"
        ) from error


def _choose(reference: HubReference, names: Collection[str]) -> str:
    """The weight file that is meant, of all files of the repository."""
    if reference.path in names:
        if not reference.path.endswith(_WEIGHTS):
            raise UserError(f"{reference}: a weight file ({', '.join(_WEIGHTS)}) is wanted")
        return reference.path
    prefix = _prefix(reference)
    if usual := next((name for name in _usual(reference) if name in names), ""):
        return usual
    files = sorted(name for name in names if name.startswith(prefix) and name.endswith(_WEIGHTS))
    found = [name for name in files if "/" not in name.removeprefix(prefix)] or files
    if len(found) == 1:
        return found[0]
    if not found:
        there = ", ".join(sorted(names)[:_LISTED]) or "nothing"
        raise UserError(
            f"{reference}: has no weight file ({', '.join(_WEIGHTS)}); what is there begins with "
            f"{there}"
        )
    at = HubReference(reference.repository, reference.revision)
    raise UserError(
        f"{reference}: has {len(found)} weight files; say which one is wanted, as\n  "
        + "\n  ".join(f"{at}/{name}" for name in found[:_LISTED])
    )


def _prefix(reference: HubReference) -> str:
    return f"{reference.path}/" if reference.path else ""


def _usual(reference: HubReference) -> tuple[str, ...]:
    """The weight files of a model directory, as other libraries have it, and of a run directory."""
    return f"{_prefix(reference)}{WEIGHTS_FILE}", f"{_prefix(reference)}model/{WEIGHTS_FILE}"


def _download(reference: HubReference, wanted: str, names: Collection[str]) -> Path:
    """Fetches a file and what belongs to it, the file last: where it is, all is."""
    from huggingface_hub import hf_hub_download

    own = PurePosixPath(wanted)
    beside = {str(own.with_name(name)) for name in (f"{own.stem}.json", *_BESIDE)}
    revision, path = reference.revision or None, Path()
    for name in (*sorted(beside & set(names)), wanted):
        path = Path(
            hf_hub_download(reference.repository, name, revision=revision, etag_timeout=SECONDS)
        )
        revision = _snapshot(path, name).name  # all are of one commit
    return path


def _snapshot(path: Path, name: str) -> Path:
    """The folder of the cache, called as the commit, that has the file of this name."""
    return path.parents[len(PurePosixPath(name).parts) - 1]


def _cached(reference: HubReference, error: Exception) -> tuple[Path, str]:
    """A copy on this machine and its name; of a folder the usual one, as others may not be here.

    Raises:
      UnreachableError: There is none.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    is_file = reference.path.endswith(_WEIGHTS)
    for name in (reference.path,) if is_file else _usual(reference):
        found = try_to_load_from_cache(
            reference.repository, name, revision=reference.revision or None
        )
        if isinstance(found, str):
            say(f"{reference}: the hub does not answer ({reason(error)}); the copy here is taken")
            return Path(found), name
    other = "" if is_file else f"; a file that was fetched before is found as {reference}/FILE"
    raise UnreachableError(
        f"{reference}: is not on this machine and cannot be fetched ({reason(error)}). Give the "
        "same command once where the hub can be reached, with the same folder of copies, "
        f"{constants.HF_HUB_CACHE}{other}"
    ) from error


def _described(reference: HubReference, path: Path, name: str) -> Fetched:
    """What is known of a file in the cache.

    Raises:
      UserError: It is not what the hub says it is.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # The cache links to the content under the checksum that the hub announced.
    announced = path.resolve().name
    if len(announced) == 64 and announced != sha256:
        raise UserError(
            f"{path}: its sha256 is {sha256}, not {announced} as the hub says: the download is "
            "damaged. Delete it and try again"
        )
    origin = HubReference(reference.repository, _snapshot(path, name).name, name)
    return Fetched(path, origin, sha256, _licence(path.with_name(README_FILE)))


def _licence(card: Path) -> str:
    if not card.is_file():
        return ""
    with card.open(errors="replace") as file:
        head, _, _ = file.read(_HEAD).removeprefix("---\n").partition("\n---")
    found = _LICENCE.search(head)
    return found[1] if found else ""
