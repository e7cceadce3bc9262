"""A run or a comparison as one HTML file, with its figures inside."""

import base64
import importlib.resources
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medmerge_jax.analysis.tables import (
    Cells,
    calibration_cells,
    class_cells,
    comparison_cells,
    comparison_title,
    differences_cells,
    differences_title,
    interval_cells,
    metric_cells,
    threshold_cells,
)
from medmerge_jax.evaluation.metrics import METRICS, titles
from medmerge_jax.storage.atomic import read_json, write_text
from medmerge_jax.weights.card import shareable

_FIRST = "comparison"
"""The figure that stands at the top."""

_FIGURES = (
    *("coefficients", "learning_curves", "confusion_matrix"),
    *("threshold_curves", "reliability"),
)
"""What stands first, in this order."""


def write_report(run_directory: Path) -> None:
    """Writes report.html of a run directory: self-contained, loads nothing from anywhere.

    It shows what there is of results.json (of a run or a comparison), config.json, metrics.jsonl,
    data_audit.json and figures/*.png; of a comparison also the coefficients of the first seed of
    its runs. Missing files leave out their part.

    Args:
      run_directory: Where these files are and report.html goes.

    Raises:
      ValueError, TypeError, LookupError or AttributeError: A file is not as this program writes it.
    """
    import jinja2

    results = _read_json(run_directory / "results.json")
    config = _read_json(run_directory / "config.json")
    audit = _read_json(run_directory / "data_audit.json")
    template = importlib.resources.files("medmerge_jax.analysis").joinpath("report.html.j2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        text = environment.from_string(template.read_text(encoding="utf-8")).render(
            title=_title(results, run_directory),
            headline=headline(results),
            first=_embedded(run_directory / "figures" / f"{_FIRST}.png"),
            facts=_facts(results),
            comparison=comparison_cells(results["table"]) if "table" in results else None,
            comparison_title=comparison_title(results),
            further={
                name: comparison_cells(rows)
                for name, rows in results.get("evaluate_on", {}).items()
                if "table" in results
            },
            differences=_differences(results.get("differences")),
            explanations=list(results.get("explanations", {}).items()),
            members=_members(results),
            failed=list(results.get("failed", {}).items()),
            metrics=None if "table" in results else metric_cells(results),
            statistics=list(_statistics(results)),
            stages=_stages(results, _read_lines(run_directory / "metrics.jsonl")),
            counts=_counts(results.get("data", {})),
            notes=audit.get("notes", []),
            audit=audit.get("summary", []),
            overlaps=_overlaps(audit) if audit else None,
            parents=_parents(shareable(results.get("parents", {}), "parents")),
            figures=_figures(run_directory, "table" in results),
            versions=results.get("versions", config.get("versions", {})),
            config=json.dumps(shareable(config.get("config", config)), indent=2) if config else "",
        )
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from error

    write_text(run_directory / "report.html", text)


def _statistics(results: Mapping[str, Any]) -> Iterator[tuple[str, Cells]]:
    """Title and table of each part; runs of an earlier version have none."""
    told = results.get("statistics")
    if not told:
        return
    yield "How certain the test results are", interval_cells(results)
    yield "By class (test)", class_cells(told["per_class"])
    yield "At thresholds of the validation images (test)", threshold_cells(told["thresholds"])
    yield "Calibration", calibration_cells(told["calibration"])
    if told["by_group"] is not None:
        yield "By group: mean probabilities of its images", metric_cells({"test": told["by_group"]})


def _differences(found: Mapping[str, Any] | None) -> tuple[str, Any] | None:
    return (differences_title(found), differences_cells(found)) if found else None


def _members(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """The single models of a study: what they cost, and the metric that ranks them."""
    members, metric = results.get("members", {}), results.get("metric", "")
    done = {name: one for name, one in members.items() if "error" not in one}
    if not done:
        return None
    title = titles().get(metric, metric)
    rows = [
        [name, str(one["epochs"]), f"{one['seconds']:.0f}"]
        + [str(_shown(one[split].get(metric))) for split in ("val", "test")]
        for name, one in done.items()
    ]
    return ["member", "epochs", "seconds", f"{title}, val", f"{title}, test"], rows


def _title(results: Mapping[str, Any], run_directory: Path) -> str:
    name = results.get("data", {}).get("name", run_directory.name)
    recipe = results.get("recipe")
    if recipe is None:
        return f"{name}: no results yet"
    return f"{name}: {'comparison' if recipe == 'compare' else recipe.replace('_', ' ')}"


def headline(results: Mapping[str, Any]) -> str:
    """What came out, in a sentence; empty where that is not known."""
    data, told = results.get("data", {}), results.get("statistics")
    if "table" in results:
        return _best_row(results)
    name = "macro_f1" if results.get("test", {}).get("macro_f1") is not None else "accuracy"
    value = results.get("test", {}).get(name)
    if value is None:
        return ""
    interval = (told or {}).get("intervals", {}).get(name)
    within = f" (95 % interval {interval['low']:.3f} to {interval['high']:.3f})" if interval else ""
    images = results["test"].get("num_examples")
    on = f" on {images} test images" if images else ""
    return (
        f"{results.get('recipe', '')} from {results.get('start', '')}: "
        f"{titles().get(name, name)} {value:.3f}{within}{on} of {data.get('name', '')}."
    )


def _best_row(results: Mapping[str, Any]) -> str:
    """The row of the best mean, and whether it can be told from the reference."""
    differences = results.get("differences") or {}
    metric = differences.get("metric") or results.get("metric") or "macro_f1"
    rows = [row for row in results["table"] if row.get(metric)]
    entry = METRICS.get(metric)
    if not rows or entry is None:
        return ""
    sign = 1 if entry.higher_is_better else -1
    best = max(rows, key=lambda row: sign * row[metric]["mean"])
    named, title = f"{best['recipe']} from {best['start']}", titles()[metric]
    what = f"has the best {title} of the test images"
    text = f"Of {len(rows)} rows {named} {what}, {_mean_of(best[metric])}"
    if named == differences.get("reference"):
        return f"{text}: it is the reference itself."
    for row in differences.get("rows", ()):
        found = row.get(metric)
        if (row["recipe"], row["start"]) == (best["recipe"], best["start"]) and found:
            apart = found["low"] > 0 or found["high"] < 0
            verdict = "told apart from" if apart else "not told apart from"
            return (
                f"{text}; it is {verdict} the reference {differences['reference']}, "
                f"{found['difference']:+.3f} (95 % interval {found['low']:+.3f} to "
                f"{found['high']:+.3f})."
            )
    return f"{text}."


def _mean_of(found: Mapping[str, Any]) -> str:
    if found.get("std") is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} ± {found['std']:.3f} over {len(found['values'])} seeds"


def _facts(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = ("recipe", "start", "architecture", "seed", "seeds", "wall_seconds")
    facts = [(name.replace("_", " "), results[name]) for name in names if name in results]
    fingerprint = results.get("data", {}).get("fingerprint")
    return [*facts, ("data fingerprint", fingerprint)] if fingerprint else facts


def _stages(
    results: Mapping[str, Any], records: list[dict[str, Any]]
) -> tuple[list[str], list[list[Any]]] | None:
    """A table of the stages, each with its median throughput."""
    stages = results.get("stages", [])
    if not stages:
        return None
    names = list(dict.fromkeys(name for stage in stages for name in stage))
    rows = []
    for stage in stages:
        speeds = [
            record["images_per_second"]
            for record in records
            if record.get("stage") == stage.get("name") and record.get("images_per_second")
        ]
        values = {**stage}
        if speeds:
            values.setdefault("images_per_second", round(statistics.median(speeds), 1))
        rows.append(values)
    if any("images_per_second" in row for row in rows) and "images_per_second" not in names:
        names.append("images_per_second")
    cells = [[_shown(row.get(name)) for name in names] for row in rows]
    return [name.replace("_", " ") for name in names], cells


def _shown(value: Any) -> Any:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else value


def _counts(data: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]] | None:
    """Images by split (rows) and class (columns)."""
    counts = data.get("counts", {})
    if not counts:
        return None
    named = [str(name) for name in data.get("classes", [])]
    classes = list(dict.fromkeys([*named, *itertools.chain.from_iterable(counts.values())]))
    rows = [[split, *(by.get(name, 0) for name in classes)] for split, by in counts.items()]
    return ["split", *classes], rows


def _overlaps(audit: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """What is in two places: groups, images of two splits, images of a parent's training."""
    groups = audit["groups"] or {"by_splits": {}}
    rows = [[f"groups in {places}", count, "", ""] for places, count in groups["by_splits"].items()]
    shared = [(f"{pair['of']} images in {pair['in']}", pair) for pair in audit["duplicates"]]
    for parent, parts in audit["parents"].items():
        shared += [
            (f"{split} images that parent {parent} was trained on", part)
            for split, part in (parts or {}).items()
            if isinstance(part, Mapping)
        ]
    for title, part in shared:
        examples = ", ".join(" = ".join(pair) for pair in part["examples"])
        rows.append([title, part["images"], part["exact"], examples])
    return ["in two places", "number", "of equal pixels", "such as"], rows


def _parents(parents: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Of each parent: name, where it came from, what was inferred, and the rest of its card."""
    lines = []
    for name, card in parents.items():
        rest = {k: v for k, v in card.items() if k != "source" and not isinstance(v, dict | list)}
        details = ", ".join(f"{key} {value}" for key, value in rest.items())
        lines.append((name, str(card.get("source", "")), "; ".join(card.get("notes", ())), details))
    return lines


def _figures(run_directory: Path, is_comparison: bool) -> list[tuple[str, str]]:
    """(caption, base64 of the PNG) of each figure."""
    own = {path.stem: path for path in sorted((run_directory / "figures").glob("*.png"))}
    own.pop(_FIRST, None)
    names = [name for name in _FIGURES if name in own]
    names += [name for name in own if name not in names]
    paths = {name.replace("_", " "): own[name] for name in names}
    if is_comparison:
        drawn = run_directory.glob("*/seed*/figures/coefficients.png")
        runs = {(path.parts[-4], len(path.parts[-3]), path.parts[-3]): path for path in drawn}
        for (name, *_), path in sorted(runs.items()):  # seed2 goes before seed10
            paths.setdefault(f"coefficients of {name}", path)
    return [(name, _embedded(path)) for name, path in paths.items()]


def _embedded(path: Path) -> str:
    """Base64 of a file; "" where there is none."""
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except FileNotFoundError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if the file is missing or not yet whole."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file."""
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]
