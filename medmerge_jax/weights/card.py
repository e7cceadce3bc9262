"""What a model says of itself to others, without saying on whose machine it was made."""

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_PATHS = ("source", "file", "root", "table", "split_table", "ancestor")
"""Fields whose value is a path, or a word without one."""

_ABSOLUTE = re.compile(
    r"(?<![\w/.:])(?:~|[A-Za-z]:)?[/\\](?:[^/\\\n\"'<>|:;,()]+[/\\])+(?=[^/\\\s])"
)
"""The folders of a path somewhere in a text."""


def short_names(paths: list[str]) -> list[str]:
    """What models are called in figures: the last component of each path, or the last two.

    >>> short_names(["runs/a", "runs/b"]), short_names(["runs/a/seed0", "runs/b/seed0"])
    (['a', 'b'], ['a/seed0', 'b/seed0'])
    """
    names = [last_component(path) for path in paths]
    if len(set(names)) < len(names):  # run directories of one name
        names = ["/".join(PurePath(path).parts[-2:]) for path in paths]
    return names


def shareable(value: Any, field: str = "") -> Any:
    """The JSON value of a field, in which files are named by the last component of their paths.

    >>> shareable({"file": "/home/ann/runs/b/model.safetensors", "note": "see /home/ann/a.txt"})
    {'file': 'model.safetensors', 'note': 'see a.txt'}
    """
    if isinstance(value, Mapping):
        inner = "source" if field == "parents" else ""
        shared: dict[str, Any] = {}
        for key, entry in value.items():
            name = last_component(str(key)) if inner else str(key)
            while name in shared:  # two parents of one name, from two folders
                name += "'"
            shared[name] = shareable(entry, inner or name)
        return shared
    if isinstance(value, list | tuple):
        return [shareable(entry) for entry in value] if field != "classes" else list(value)
    if not isinstance(value, str):
        return value
    return last_component(value) if field in _PATHS else _ABSOLUTE.sub("", value)


def last_component(path: str) -> str:
    """Of a path; other texts as they are."""
    return PurePath(path.replace("\\", "/")).name or path.strip("/.~")


def readme(card: Mapping[str, Any], usage: Mapping[str, str] | None = None) -> str:
    """A model card for the Hugging Face hub.

    Args:
      card: The content of `model.json`.
      usage: Python code by what it is for, such as the name of a library; by default that of this
        program.
    """
    shown = {name: card[name] for name in _SHOWN if card.get(name) is not None}
    lines = [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    cards = card.get("parents")
    parents = [
        f"- `{_cell(name)}`: {_cell(parent.get('source', 'unknown'))}"
        + (f" ({_cell(str(parent['fingerprint'])[:16])})" if "fingerprint" in parent else "")
        for name, parent in (cards.items() if isinstance(cards, Mapping) else ())
        if isinstance(parent, Mapping)
    ]
    tags = json.dumps(["medmerge", "image-classification", card["architecture"]])
    code = [
        f"{_cell(title)}:\n\n```python\n{text}\n```\n"
        for title, text in (usage or {"medmerge-jax": OWN_USAGE}).items()
    ]
    return _README.format(
        tags=tags,
        usage="\n".join(code),
        architecture=card["architecture"],
        table="\n".join(lines),
        parents="\n".join(["", "## Parents", "", *parents, ""]) if parents else "",
    )


def _cell(value: Any) -> str:
    """On one line, without what Markdown or HTML would read."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([\\|<>`\[\]*_])", r"\\\1", " ".join(text.split()))


OWN_USAGE = """\
import medmerge_jax as mm

model = mm.load_model("the folder of this file")
probabilities = mm.predict(model, ["image.png"])"""

_SHOWN = (
    *("architecture", "classes", "multilabel", "image_size", "resize", "mean", "std"),
    *("intensity", "window", "background"),
    *("recipe", "seed", "data_fingerprint", "licence"),
)

_README = """\
---
library_name: medmerge-jax
pipeline_tag: image-classification
tags: {tags}
---

# {architecture}

What an image becomes before the model sees it, and what each output means, in order:

| | |
|---|---|
{table}
{parents}
## Use

{usage}
For research; it is no medical device.
"""
