"""A run, a comparison or a study as one HTML file, with its figures inside."""

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medmerge_jax.analysis import report_tables as tables
from medmerge_jax.analysis.drawing import CSS_PIXELS, FORMATS
from medmerge_jax.analysis.headline import facts, headline, title_of
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.runtime.inert import visible
from medmerge_jax.storage.atomic import read_json, write_text
from medmerge_jax.weights.card import shareable

_SHOWS = {
    "comparison": "A row for each line of the table, a point for each seed; a bar is mean ± "
    "standard deviation over seeds, the line of a single run its 95 % bootstrap interval; the "
    "reference, if there is one, has another colour",
    "confusion_matrix": "Confusion matrix of the test images: counts, and shares of each label",
    "coefficients": "Mean weight of each convolution's kernels, from the input to the output",
    "learning_curves": "Loss, validation metrics and learning rate over the epochs of all stages",
    "threshold_curves": "Sensitivity over 1 − specificity, and precision over sensitivity",
    "reliability": "How often predictions of a confidence are right",
}
"""What figures show, in words and in the order of the report; others come after them."""


class Drawn(NamedTuple):
    """A figure of the report.

    Attributes:
      title: Above it.
      shows: What it shows, for those who do not see it too.
      image: Base64 of its PNG.
      width: Of CSS pixels, at which its text has the size of the report's; 0: not known.
      files: Where it also is, below the folder of the report.
    """

    title: str
    shows: str
    image: str
    width: int
    files: str


def write_report(run_directory: Path) -> None:
    """Writes report.html of a run directory: self-contained, loads nothing from anywhere.

    It shows what there is of results.json (of a run or a study), config.json, metrics.jsonl,
    data_audit.json, predictions.npz and figures/*.png; of a comparison also the coefficients of
    the first seed of its runs. Missing files leave out their part.

    Args:
      run_directory: Where these files are and report.html goes.

    Raises:
      ValueError, TypeError, LookupError or AttributeError: A file is not as this program writes it.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What is escaped already, as by the filter "e", keeps its lines.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    try:
        template = environment.from_string(_own("report.html.j2"))
        text = template.render(**_look(), **_content(run_directory))
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from error
    write_text(run_directory / "report.html", text)


def _look() -> dict[str, str]:
    """Style and script, and the hash by which a browser knows that it may run this one alone."""
    script = _own("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": _own("report.css"), "script": script, "script_hash": digest}


def _own(name: str) -> str:
    file = importlib.resources.files("medmerge_jax.analysis").joinpath(name)
    return file.read_text(encoding="utf-8")


def _content(folder: Path) -> dict[str, Any]:
    """What the template is filled with."""
    results = _read_json(folder / "results.json")
    recorded = _read_json(folder / "config.json")
    audit = _read_json(folder / "data_audit.json")
    config = recorded.get("config", recorded)
    figures = list(_figures(folder, is_study="table" in results))
    outcome = [*tables.result_tables(results), *_confusion(folder, results)]
    return {
        "title": title_of(results, folder.name),
        "headline": headline(results),
        "first": figures[:1] if results else [],
        "figures": figures[1:] if results else figures,
        "facts": facts(results, config, audit),
        "results": outcome + list(tables.stage_table(results, _read_lines(folder))),
        "parents": _parents(shareable(results.get("parents", {}), "parents")),
        "data": list(tables.count_table(results.get("data", {}))),
        "notes": audit.get("notes", []),
        "audit": audit.get("summary", []),
        "overlaps": list(tables.overlap_table(audit)),
        "published": list(tables.published_table(config, bool(audit.get("groups")))),
        "config": json.dumps(shareable(config), indent=2, ensure_ascii=False) if config else "",
        "fingerprint": results.get("data", {}).get("fingerprint", ""),
        "cost": list(tables.cost_table(results)),
        "versions": list(
            tables.version_table(results.get("versions", recorded.get("versions", {})))
        ),
    }


def _confusion(folder: Path, results: Mapping[str, Any]) -> Iterator[tables.Table]:
    path = folder / "predictions.npz"
    if "table" in results or not path.exists():
        return
    table = tables.confusion_table(Predictions.load(path), results.get("data", {}))
    if table is not None:
        yield table


def _parents(parents: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Of each parent: name, where it came from, what was inferred, and the rest of its card."""
    lines = []
    for name, card in parents.items():
        rest = {k: v for k, v in card.items() if k != "source" and not isinstance(v, dict | list)}
        details = ", ".join(f"{key} {value}" for key, value in rest.items())
        lines.append((name, str(card.get("source", "")), "; ".join(card.get("notes", ())), details))
    return lines


def _figures(folder: Path, *, is_study: bool) -> Iterator[Drawn]:
    """Those of the folder, the one that opens the report first, and those of a study's runs."""
    own = {path.stem: path for path in sorted((folder / "figures").glob("*.png"))}
    names = [name for name in _SHOWS if name in own]
    for name in [*names, *(name for name in own if name not in names)]:
        title = name.replace("_", " ").capitalize()
        yield _drawn(folder, own[name], title, _SHOWS.get(name, title))
    if is_study:
        found = folder.glob("*/seed*/figures/coefficients.png")
        runs = {(path.parts[-4], len(path.parts[-3]), path.parts[-3]): path for path in found}
        firsts: dict[str, Path] = {}
        for (name, *_), path in sorted(runs.items()):  # seed2 goes before seed10
            firsts.setdefault(name, path)
        for name, path in firsts.items():
            title = f"Coefficients of {name}"
            yield _drawn(folder, path, title, f"{title}: {_SHOWS['coefficients'].lower()}")


def _drawn(folder: Path, path: Path, title: str, shows: str) -> Drawn:
    content = path.read_bytes()
    pixels = int.from_bytes(content[16:20]) if content[:4] == b"\x89PNG" else 0
    files = [path.with_suffix(f".{name}") for name in FORMATS[1:]]
    there = [str(file.relative_to(folder)) for file in files if file.exists()]
    width = round(pixels * CSS_PIXELS)
    return Drawn(title, shows, base64.b64encode(content).decode(), width, " and ".join(there))


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if the file is missing or not yet whole."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]
