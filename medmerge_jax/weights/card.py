"""What a model says of itself to others, without saying on whose machine it was made."""

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from medmerge_jax.runtime.inert import markdown
from medmerge_jax.weights.references import is_on_hub

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
    """Of a path; other texts as they are, and what is on the hub."""
    if is_on_hub(path):
        return path
    return PurePath(path.replace("\\", "/")).name or path.strip("/.~")


def readme(
    card: Mapping[str, Any], usage: Mapping[str, str] | None = None, *, hashes: int = 0
) -> str:
    """A model card for the Hugging Face hub.

    Args:
      card: The content of `model.json`.
      usage: Python code by what it is for, such as the name of a library; by default that of this
        program.
      hashes: Of how many training images hashes lie beside it, see `Model.image_hashes`.
    """
    licence = str(card.get("licence", ""))
    named = LICENCE.fullmatch(licence.lower())
    code = [
        f"{markdown(title)}:\n\n```python\n{text}\n```\n"
        for title, text in (usage or {"medmerge-jax": OWN_USAGE}).items()
    ]
    return _README.format(
        licence=f"license: {json.dumps(named[0])}\n" if named else "",
        tags=json.dumps(["medmerge", "image-classification", card["architecture"]]),
        usage="\n".join(code),
        architecture=card["architecture"],
        table=_table({name: card[name] for name in _SHOWN if card.get(name) is not None}),
        results=_results(card.get("results")),
        parents=_parents(card.get("parents")),
        hashes=_HASHES.format(count=hashes) if hashes else "",
        to_fill_in="" if licence else _NO_LICENCE,
    )


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {markdown(name)} | {_cell(value)} |" for name, value in rows.items())


def _results(results: Any) -> str:
    """A section with the metrics that the run has measured."""
    if not isinstance(results, Mapping) or not isinstance(results.get("metrics"), Mapping):
        return ""
    metrics = {
        name: f"{value:.4f}" if isinstance(value, float) else value
        for name, value in results["metrics"].items()
        if value is not None
    }
    where = f"On the {_cell(results.get('split'))} split of {_cell(results.get('data'))}:"
    return f"\n## Results\n\n{where}\n\n| | |\n|---|---|\n{_table(metrics)}\n"


def _parents(parents: Any) -> str:
    """A section with a line for each."""
    lines = []
    for name, parent in parents.items() if isinstance(parents, Mapping) else ():
        if isinstance(parent, Mapping):
            origin, source = str(parent.get("origin")), parent.get("source", "unknown")
            line = f"- {_cell(name)}: {_cell(origin if is_on_hub(origin) else source)}"
            details = [str(parent["fingerprint"])[:16]] if "fingerprint" in parent else []
            details += [f"licence {parent['licence']}"] if parent.get("licence") else []
            lines.append(f"{line} ({_cell(', '.join(details))})" if details else line)
    return "\n".join(["", "## Parents", "", *lines, ""]) if lines else ""


def _cell(value: Any) -> str:
    """On one line, without what Markdown or HTML would read."""
    return markdown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


FOLDER = "the folder of this file"

OWN_USAGE = f"""\
import medmerge_jax as mm

model = mm.load_model("{FOLDER}")
probabilities = mm.predict(model, ["image.png"])"""

_SHOWN = (
    *("architecture", "classes", "multilabel", "image_size", "resize", "mean", "std"),
    *("intensity", "window", "background"),
    *("recipe", "seed", "data_fingerprint", "licence"),
)

LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
"""As the hub spells them: mit, cc-by-nc-4.0."""

_NO_LICENCE = """
No licence is named. Whoever publishes this model names one in the head of this file (`license:`),
mindful of those of its parents and of the data.
"""

_HASHES = """
`image_hashes.npz` has perceptual hashes of {count} images that it or a parent was trained on, 256
bits each, sorted and without names, by which a later experiment finds that it tests on them. No
picture can be read from one, only coarse light and dark; but whoever has a picture can tell
whether it is among them. The model works without this file.
"""

_README = """\
---
{licence}library_name: medmerge-jax
pipeline_tag: image-classification
tags: {tags}
---

# {architecture}

What an image becomes before the model sees it, and what each output means, in order:

| | |
|---|---|
{table}
{results}{parents}
## Use

{usage}{hashes}{to_fill_in}
For research; it is no medical device.
"""
