"""The tables of a report, each with its name and what it shows."""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medmerge_jax.analysis import exports, published
from medmerge_jax.analysis.tables import (
    UNDEFINED,
    Cells,
    calibration_cells,
    class_cells,
    comparison_cells,
    comparison_title,
    differences_cells,
    differences_title,
    interval_cells,
    metric_cells,
    metric_value,
    threshold_cells,
)
from medmerge_jax.evaluation.metrics import confusion_matrix, titles
from medmerge_jax.evaluation.predictions import Predictions, class_names
from medmerge_jax.weights.card import shareable

_MOST_CLASSES = 20
"""Columns of a confusion matrix."""


class Table(NamedTuple):
    """A table of the report.

    Attributes:
      title: Above it; "" where it continues what is above.
      note: A sentence about it, or "".
      cells: Its head and rows.
      name: Of the files that it is saved as.
    """

    title: str
    note: str
    cells: Cells
    name: str

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers."""
        return exports.numeric(*self.cells)

    @property
    def csv(self) -> str:
        """For a spreadsheet."""
        return exports.csv_text(self.cells)

    @property
    def latex(self) -> str:
        """For a paper."""
        return exports.latex_text(self.note or self.title, self.cells)


def result_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """What came out, of a study or of a run."""
    if "table" not in results:
        cells = metric_cells(results)
        if cells[1]:
            yield Table("Results", "", cells, "results")
        yield from _statistics(results)
        return
    note = f"{comparison_title(results)}."
    yield Table("Test results", note, comparison_cells(results["table"]), "test_results")
    if found := results.get("differences"):
        note = f"{differences_title(found)}."
        yield Table("Differences", note, differences_cells(found), "differences")
    for number, (name, rows) in enumerate(results.get("evaluate_on", {}).items(), 1):
        yield Table(f"On {name}", "", comparison_cells(rows), f"further_{number}")
    yield from _of_jobs(results)


def _of_jobs(results: Mapping[str, Any]) -> Iterator[Table]:
    if told := results.get("explanations"):
        title = "Soups that are worse than their best member"
        yield Table(title, "", (["soup", "why"], _pairs(told)), "soups")
    if members := _members(results):
        yield Table("Members", "", members, "members")
    if failed := results.get("failed"):
        reasons = _pairs(shareable(failed))  # which may name files of this machine
        yield Table("Jobs that failed", "", (["job", "reason"], reasons), "failed")


def _statistics(results: Mapping[str, Any]) -> Iterator[Table]:
    """Runs of an earlier version have none."""
    told = results.get("statistics")
    if not told:
        return
    title = "How certain the test results are"
    yield Table(title, "", interval_cells(results), "intervals")
    named = _named(results, class_cells(told["per_class"]))
    yield Table("By class (test)", "", named, "by_class")
    title = "At thresholds of the validation images (test)"
    named = _named(results, threshold_cells(told["thresholds"]))
    yield Table(title, "", named, "thresholds")
    yield Table("Calibration", "", calibration_cells(told["calibration"]), "calibration")
    if told["by_group"] is not None:
        title = "By group: mean probabilities of its images"
        yield Table(title, "", metric_cells({"test": told["by_group"]}), "by_group")


def shown_classes(data: Mapping[str, Any]) -> dict[str, str]:
    """What the report calls a class, by its name: "0" may be "0 none"."""
    names = data.get("classes", [])
    return dict(zip(names, data.get("shown_classes", names), strict=True))


def _named(results: Mapping[str, Any], cells: Cells) -> Cells:
    """Of classes, whose names are in the first column."""
    shown_as = shown_classes(results.get("data", {}))
    head, rows = cells
    return head, [[shown_as.get(name, name), *rest] for name, *rest in rows]


def confusion_table(test: Predictions, data: Mapping[str, Any]) -> Table | None:
    """Counts of each label and prediction, and their shares of the label; None of many classes."""
    shown_as = shown_classes(data)
    names = class_names(test.classes, test.num_classes)
    classes = [shown_as.get(name, name) for name in names]
    if test.multilabel or len(classes) > _MOST_CLASSES:
        return None
    counts = confusion_matrix(test)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = [
        [name, *(f"{n} ({share:.0%})" if n else "0" for n, share in zip(*of, strict=True))]
        for name, of in zip(classes, zip(counts, shares, strict=True), strict=True)
    ]
    note = "Rows are labels, columns predictions; a share is of the label's images."
    return Table("Confusion matrix (test)", note, (["label", *classes], rows), "confusion_matrix")


def _members(results: Mapping[str, Any]) -> Cells | None:
    """The single models of a study: what they cost, and the metric that ranks them."""
    members, metric = results.get("members", {}), results.get("metric", "")
    done = {name: one for name, one in members.items() if "error" not in one}
    if not done:
        return None
    title = titles().get(metric, metric)
    rows = [
        [name, str(one["epochs"]), f"{one['seconds']:.0f}"]
        + [metric_value(one[split].get(metric)) for split in ("val", "test")]
        for name, one in done.items()
    ]
    return ["member", "epochs", "seconds", f"{title}, val", f"{title}, test"], rows


def stage_table(
    results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Iterator[Table]:
    """A table of the stages, each with its median throughput; of a run without stages none."""
    stages = results.get("stages", [])
    if not stages:
        return
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
    cells = [[shown(row.get(name)) for name in names] for row in rows]
    yield Table("Stages", "", ([name.replace("_", " ") for name in names], cells), "stages")


def count_table(data: Mapping[str, Any]) -> Iterator[Table]:
    """Images by class (rows, for there may be a hundred) and split, if they are known."""
    counts = data.get("counts", {})
    if not counts:
        return
    named = [str(name) for name in data.get("classes", [])]
    classes = list(dict.fromkeys([*named, *itertools.chain.from_iterable(counts.values())]))
    shown_as = shown_classes(data)
    rows = [
        [shown_as.get(name, name), *(str(by.get(name, 0)) for by in counts.values())]
        for name in classes
    ]
    yield Table("Data", "Images of each class.", (["class", *counts], rows), "data")


def overlap_table(audit: Mapping[str, Any]) -> Iterator[Table]:
    """What is in two places: groups, images of two splits, images of a parent's training."""
    if not audit:
        return
    groups = audit["groups"] or {"by_splits": {}}
    rows = [
        [f"groups in {places}", str(count), UNDEFINED, UNDEFINED]
        for places, count in groups["by_splits"].items()
    ]
    shared = [(f"{pair['of']} images in {pair['in']}", pair) for pair in audit["duplicates"]]
    for parent, parts in audit["parents"].items():
        shared += [
            (f"{split} images that parent {parent} was trained on", part)
            for split, part in (parts or {}).items()
            if isinstance(part, Mapping)
        ]
    for title, part in shared:
        examples = ", ".join(" = ".join(pair) for pair in part["examples"])
        rows.append([title, str(part["images"]), str(part["exact"]), examples or UNDEFINED])
    if rows:
        head = ["in two places", "number", "of equal pixels", "such as"]
        yield Table("", "", (head, rows), "overlaps")


def published_table(config: Mapping[str, Any], grouped: bool) -> Iterator[Table]:
    """What differs from the paper, of a config as config.json has it."""
    if not config:
        return
    paper = published.published(config)
    rows = list(published.differences(config, grouped=grouped))
    title = f"What differs from {paper.name}"
    note = f"As published in {paper.source}. Of what it does not say, what is not the default."
    if not rows:
        note = f"Nothing: all settings are those published in {paper.source}, or the defaults."
    head = ["field", "published", "default", "here"]
    yield Table(title, note, (head, rows), "differs_from_paper")


def cost_table(results: Mapping[str, Any]) -> Iterator[Table]:
    """Time and training, and of a study that of its jobs together."""
    told, jobs = results.get("training", {}), results.get("jobs", ())
    values = {
        "wall time, seconds": results.get("wall_seconds"),
        "of it training steps, seconds": told.get("seconds"),
        "epochs": told.get("epochs"),
        "steps": told.get("steps"),
        "images seen in training": told.get("images"),
        "jobs": len(jobs) or None,
    }
    rows = [[name, str(value)] for name, value in values.items() if value is not None]
    if rows:
        note = "Of all jobs together, but for those that made the parents." if jobs else ""
        yield Table("Cost", note, (["what", "number"], rows), "cost")


def version_table(versions: Mapping[str, Any]) -> Iterator[Table]:
    """Of the packages that the numbers depend on, if they are known."""
    if versions:
        yield Table("Versions", "", (["package", "version"], _pairs(versions)), "versions")


def shown(value: Any) -> str:
    """A JSON value in a cell."""
    if value is None:
        return UNDEFINED
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def _pairs(values: Mapping[str, Any]) -> list[list[str]]:
    return [[str(name), str(value)] for name, value in values.items()]
