"""A folder with a model, pushed to the Hugging Face hub."""

import glob
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from medmerge_jax.errors import UserError
from medmerge_jax.weights.hub import PAGE, SECONDS, is_forbidden, reason
from medmerge_jax.weights.references import HUB, HubReference

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_pushable(repository: str) -> None:
    """Sees to what is wanted before anything is computed.

    Raises:
      UserError: It is no "ORG/NAME", or this machine has no token of the hub.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"--hub {repository}: ORG/NAME is wanted, yours or your organisation's")
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise UserError(
            "--hub: the package huggingface_hub is missing; pip install huggingface_hub"
        ) from error
    if not get_token():
        raise UserError(
            f"--hub {repository}: this machine has no token of the Hugging Face hub. Log in with "
            "`hf auth login`, or set HF_TOKEN to one that may write"
        )


def push(
    folder: Path, repository: str, *, private: bool = False, replaced: Collection[str] = ()
) -> HubReference:
    """Uploads the files of a folder, in one commit; with the token of huggingface_hub's own.

    Args:
      folder: All its files, and nothing else, are uploaded. It has no folders.
      repository: "ORG/NAME", made if it is not there.
      private: Whether only its owners may see it; one that is public already is refused.
      replaced: Names of files that are removed there if the folder has none of that name. All
        others, such as a LICENSE, stay.

    Returns:
      By which the model is found again, with the commit.

    Raises:
      UserError: The hub does not answer, or whoever holds the token may not write there.
    """
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api: Any = HfApi()
    names = sorted(path.name for path in folder.iterdir())
    try:
        if _is_public(api, repository, private) and private:
            raise UserError(
                f"{HUB}{repository} is there and is public; make it private on {PAGE}{repository}/"
                f"settings, or leave out --private. {folder} is written, nothing is pushed"
            )
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Model of medmerge_jax",
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=[glob.escape(name) for name in replaced if name not in names],
        )
    except UserError:
        raise
    except Exception as error:
        _fail(folder, repository, error)
    return HubReference(repository, commit.oid)


def _is_public(api: Any, repository: str, private: bool) -> bool:
    """Of a repository, which is made if it is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:  # which is the one request that is told how long to wait
        return not api.model_info(repository, timeout=SECONDS).private
    except RepositoryNotFoundError:
        # None leaves it to the owner's settings.
        api.create_repo(repository, private=private or None, exist_ok=True)
        return not private


def _fail(folder: Path, repository: str, error: Exception) -> NoReturn:
    hint = "Give the same command again where the hub can be reached"
    if is_forbidden(error):
        hint = (
            "The token on this machine may not write there: take a name of your own or of an "
            "organisation that you belong to, and a token that may write (`hf auth login`)"
        )
    raise UserError(
        f"{folder} is written, but could not be pushed to {HUB}{repository} ({reason(error)}). "
        f"{hint}"
    ) from error
