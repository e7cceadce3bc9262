"""Results as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from medmerge_jax.evaluation.metrics import METRICS, titles
from medmerge_jax.runtime.inert import markdown, visible

UNDEFINED = "-"

Cells = tuple[list[str], list[list[str]]]
"""Column titles, and the cells of each row."""


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: a line per recipe and start, mean ± standard deviation over seeds.

    Nothing marks the largest mean: over few seeds and images that says little, see
    `differences_table`.

    Args:
      rows: `{"recipe", "start", metric: {"mean", "std", "values"} or None, ...}`, as in
        results.json. A metric that is None in every row still has its column.

    Returns:
      Lines of equal width without a newline at the end.
    """
    head, cells = comparison_cells(rows)
    return _markdown([head, *cells], left=2)


def comparison_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Column titles, and the cells of each row."""
    names = [name for name, metric in METRICS.items() if metric.compared]
    cells = [
        [str(row["recipe"]), str(row["start"]), *(_mean_std(row.get(name)) for name in names)]
        for row in rows
    ]
    return ["recipe", "start", *(titles()[name] for name in names)], cells


def comparison_title(results: Mapping[str, Any]) -> str:
    """What the table of a study shows."""
    seeds = results.get("seeds", [])
    if len(seeds) < 2:
        return "Test split"
    return f"Test split, mean ± standard deviation over seeds {', '.join(map(str, seeds))}"


def differences_table(found: Mapping[str, Any]) -> str:
    """A Markdown table of the differences between rows and their reference, with its title.

    Args:
      found: `{"reference", "metric", "rows": [{"recipe", "start", metric: {"difference", "low",
        "high", "p"} or None, ...}]}`, as `differences` in results.json.
    """
    head, cells = differences_cells(found)
    return f"{differences_title(found)}\n\n{_markdown([head, *cells], left=2)}"


def differences_title(found: Mapping[str, Any]) -> str:
    """What the table of differences shows."""
    return (
        f"Difference to {visible(found['reference'])} on the same seeds and test images, paired "
        "bootstrap over both"
    )


def differences_cells(found: Mapping[str, Any]) -> Cells:
    """Column titles, and the cells of each row."""
    metric = found["metric"]
    cells = []
    for row in found["rows"]:
        value = row.get(metric)
        shown = [UNDEFINED] * 3
        if value is not None:
            interval = f"{value['low']:+.3f} to {value['high']:+.3f}"
            shown = [f"{value['difference']:+.3f}", interval, f"{value['p']:.3f}"]
        cells.append([str(row["recipe"]), str(row["start"]), *shown])
    return ["recipe", "start", titles()[metric], "95 % interval", "p"], cells


def results_text(results: Mapping[str, Any]) -> str:
    """What the program prints of results.json: a comparison's table, or a run's metrics.

    Args:
      results: The content of a results.json.

    Returns:
      A Markdown table under a line that says what it shows; several lines.
    """
    if "table" in results:
        text = f"{comparison_title(results)}\n\n{comparison_table(results['table'])}"
        if found := results.get("differences"):
            text += f"\n\n{differences_table(found)}"
        for name, rows in results.get("evaluate_on", {}).items():
            text += f"\n\nOn {visible(name)}\n\n{comparison_table(rows)}"
        return text
    head, lines = metric_cells(results)
    names = [str(results[key]) for key in ("recipe", "start", "architecture") if key in results]
    title = visible(f"{', '.join(names)}, seed {results.get('seed')}")
    return f"{title}\n\n{_markdown([head, *lines], left=1)}"


def metric_cells(results: Mapping[str, Any]) -> Cells:
    """Column titles, and a row for each metric of a single run: its value on each split.

    The further data sets that it was evaluated on come after the splits.
    """
    columns = {split: results[split] for split in ("val", "test") if split in results}
    columns.update(results.get("evaluate_on", {}))
    names = dict.fromkeys(name for values in columns.values() for name in values)
    shown = {"num_examples": "images", **titles()}
    lines = [
        [shown.get(name, name), *(metric_value(values.get(name)) for values in columns.values())]
        for name in names
    ]
    return ["metric", *columns], lines


def interval_cells(results: Mapping[str, Any]) -> Cells:
    """A row for each metric of the test images that has a bootstrap interval."""
    told = results["statistics"]
    rows = [
        [titles().get(name, name), metric_value(results["test"].get(name)), _range(interval)]
        for name, interval in told["intervals"].items()
    ]
    return ["metric", "test", f"95 % bootstrap interval over {told['resampled']}"], rows


def class_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """A row for each class, see `statistics.per_class`."""
    names = ["class", "positives", "precision", "recall", "specificity", "f1", "auc",
             "average_precision"]  # fmt: skip
    shown = {"f1": "F1", "auc": "AUC"}
    return [shown.get(name, name.replace("_", " ")) for name in names], [
        [metric_value(row[name]) for name in names] for row in rows
    ]


def threshold_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Two rows for each class, see `statistics.at_thresholds`."""
    rules = {"youden": "largest sum of both", "specificity_95": "specificity 0.95"}
    cells = [
        [row["class"], rule, *_of_threshold(row[name])]
        for row in rows
        for name, rule in rules.items()
    ]
    return ["class", "on validation", "threshold", "sensitivity", "specificity"], cells


def calibration_cells(calibration: Mapping[str, Any]) -> Cells:
    """A row for each measure, before and after the temperature."""
    before, after, heat = (calibration[name] for name in ("before", "after", "temperature"))
    columns = [before] if after is None else [before, after]
    heads = ["as trained", *([] if heat is None else [f"temperature {heat:.3g}"])]
    rows = [[titles()[name], *(metric_value(one[name]) for one in columns)] for name in before]
    return ["test", *heads], rows


def _of_threshold(found: Mapping[str, Any] | None) -> list[str]:
    names = ("threshold", "sensitivity", "specificity")
    return [UNDEFINED if found is None else metric_value(found[name]) for name in names]


def _range(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return UNDEFINED
    return f"{interval['low']:.4f} to {interval['high']:.4f}"


def evaluation_text(results: Mapping[str, Any], names: Sequence[str]) -> str:
    """What `evaluate` prints: a Markdown table with a column for each model.

    Args:
      results: The content of its JSON file.
      names: Of the models, in its order.
    """
    head, rows = evaluation_cells(results, names)
    return f"{visible(evaluation_title(results))}\n\n{_markdown([head, *rows], left=1)}"


def evaluation_title(results: Mapping[str, Any]) -> str:
    """What the table of `evaluate` shows."""
    data = results["data"]
    what = f"value [95 % bootstrap interval over {data['resampled']}]"
    return f"{data['name']}, {data['split']}: {what}"


def evaluation_cells(results: Mapping[str, Any], names: Sequence[str]) -> Cells:
    """Column titles, and a row for each metric."""
    models = results["models"]
    rows = [
        [title, *(_with_interval(one["metrics"][name], one["intervals"][name]) for one in models)]
        for name, title in titles().items()
    ]
    rows.append(["images", *(str(one["metrics"]["num_examples"]) for one in models)])
    return ["metric", *names], rows


def _with_interval(value: float | None, interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return metric_value(value)
    return f"{metric_value(value)} [{interval['low']:.4f}, {interval['high']:.4f}]"


def _mean_std(value: Mapping[str, Any] | None) -> str:
    if not value or value.get("mean") is None:
        return UNDEFINED
    std = value.get("std")
    return f"{value['mean']:.3f}" if std is None else f"{value['mean']:.3f} ± {std:.3f}"


def metric_value(value: Any) -> str:
    """In a cell."""
    if value is None:
        return UNDEFINED
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _markdown(lines: Sequence[Sequence[str]], left: int) -> str:
    """The first line is the title; all columns but the first `left` are aligned to the right."""
    escaped = [[markdown(cell) for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in escaped)) for i in range(len(escaped[0]))]

    def join(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def pad(line: Sequence[str]) -> str:
        return join(
            [
                cell.ljust(width) if i < left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
        )

    rule = join(["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join([pad(escaped[0]), rule, *map(pad, escaped[1:])])
