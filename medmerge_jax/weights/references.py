"""How a model is named: a path, or one on the Hugging Face hub, and what of its file is wanted."""

import dataclasses
import re
from pathlib import Path
from urllib.parse import quote, unquote

from medmerge_jax.errors import UserError

CHOICE = "::"
"""Between a file and the state dict in it, or the prefix of the names, that is to be taken."""

HUB = "hf://"
"""How the name of a model on the Hugging Face hub begins."""

_SPELLING = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<path>[^/].*?))?/?", re.ASCII
)


@dataclasses.dataclass(frozen=True)
class HubReference:
    """A model on the Hugging Face hub, spelled as huggingface_hub spells it.

    Attributes:
      repository: "ORG/NAME".
      revision: A branch, a tag or a commit; "" is the main branch.
      path: A file or a folder in it; "" is all of it.
    """

    repository: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{HUB}{self.repository}{at}{f'/{self.path}' if self.path else ''}"


def is_on_hub(source: str) -> bool:
    """Whether a model's name is one of the Hugging Face hub.

    >>> is_on_hub("hf://org/name"), is_on_hub("runs/b")
    (True, False)
    """
    return source.startswith(HUB)


def hub_reference(source: str) -> HubReference:
    """Of `hf://ORG/NAME`, with `@REVISION` and `/FILE` or `/FOLDER` behind it if need be.

    A `/` in a revision is written `%2F`.

    Raises:
      UserError: It is spelled in another way.

    >>> hub_reference("hf://org/name@v1/best/model.safetensors")
    HubReference(repository='org/name', revision='v1', path='best/model.safetensors')
    """
    found = _SPELLING.fullmatch(source.removeprefix(HUB))
    if not found or ".." in source.split("/"):
        raise UserError(
            f"{source}: {HUB}ORG/NAME is wanted, with @REVISION and then /FILE or /FOLDER behind "
            "it if need be"
        )
    return HubReference(found["repository"], unquote(found["revision"] or ""), found["path"] or "")


def split_choice(source: str) -> tuple[str, str]:
    """A file, and what of it is wanted, or "".

    >>> split_choice("run/checkpoint.pth::state_dict_ema")
    ('run/checkpoint.pth', 'state_dict_ema')
    """
    file, _, choice = source.partition(CHOICE)
    return file, choice


def path_of(source: str) -> Path:
    """The file or folder of a parent, without what of it is wanted."""
    return Path(split_choice(source)[0]).expanduser()
