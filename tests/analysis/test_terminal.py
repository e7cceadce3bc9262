"""Results on a terminal: lines that fit, and no word of them broken."""

import re

import pytest

from medmerge_jax.analysis import results_text
from medmerge_jax.analysis.terminal import narrow_table, terminal_evaluation, terminal_text
from medmerge_jax.evaluation.metrics import METRICS, titles

NAMES = [name for name, metric in METRICS.items() if metric.compared]


def row(recipe, start, mean=0.51234, **more):
    values = {"mean": mean, "std": 0.0331, "values": [mean, mean]}
    return {"recipe": recipe, "start": start, **dict.fromkeys(NAMES, values), **more}


def study(*rows, **more):
    return {"recipe": "compare", "seeds": [0, 1], "table": list(rows), **more}


QUICKSTART = study(row("ft", "b"), row("lp_bn_ft", "c"), row("medmerge", "b+c"))
DIFFERENCES = {
    "reference": "lp_bn_ft from b",
    "metric": "macro_f1",
    "rows": [
        {"recipe": "ft", "start": "b",
         "macro_f1": {"difference": -0.05, "low": -0.1, "high": 0.01, "p": 0.3}},
    ],
}  # fmt: skip


def words(text):
    """All that is not the frame of a table; a mean with its deviation is one word."""
    return set(re.sub(r"\||-{3,}:?|─+", " ", text.replace(" ± ", "±")).split())


@pytest.mark.parametrize("width", [80, 100, 60, 40, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(width):
    found = {**QUICKSTART, "differences": DIFFERENCES, "evaluate_on": {"idrid": [row("ft", "b")]}}
    text = terminal_text(found, width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("quadratic", "balanced", "accuracy", "medmerge", "lp_bn_ft", "b+c", "difference",
                 "idrid", "-0.050"):  # fmt: skip
        assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text, re.IGNORECASE), word


def test_at_80_columns_the_quickstart_is_one_table_of_three_decimals():
    text = terminal_text(QUICKSTART, 80)
    assert text.count("recipe") == 1
    (line,) = [line for line in text.splitlines() if line.startswith("medmerge")]
    assert line.split()[2:] == ["0.512±0.033"] * len(NAMES)


def test_a_wide_terminal_has_every_word_of_the_markdown():
    assert words(terminal_text(QUICKSTART, 300)) == words(results_text(QUICKSTART))


def test_what_does_not_fit_into_one_table_is_in_several_with_all_names():
    long = study(row("merge_ft weight_matching", "clinic_1+clinic_2+imagenet"), row("ft", "b"))
    text = terminal_text(long, 60)
    tables = text.count("recipe")
    assert tables > 1
    assert text.count("clinic_1+clinic_2+imagenet") == tables
    assert len(re.findall(r"0\.512 ± 0\.033", text)) == 2 * len(NAMES)  # there is room for it
    assert max(map(len, text.splitlines())) <= 60


def test_a_single_run():
    run = {"recipe": "ft", "start": "b", "architecture": "resnet20", "seed": 3,
           "val": {"accuracy": 0.25, "macro_auc": None}, "test": {"accuracy": 0.5, "macro_auc": 1},
           "evaluate_on": {f"hospital_{n}": {"accuracy": 0.125} for n in range(9)}}  # fmt: skip
    lines = terminal_text(run, 80).splitlines()
    assert lines[0] == "ft, b, resnet20, seed 3"
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:3] == ["accuracy", "0.2500", "0.5000"] for line in lines)
    assert "hospital_8" in "\n".join(lines)


def test_an_evaluation_of_several_models():
    numbers = dict.fromkeys(titles(), -0.54321)
    interval = {"low": -0.61234, "high": -0.50001}
    model = {
        "metrics": {**numbers, "num_examples": 30},
        "intervals": {**dict.fromkeys(numbers, interval), "accuracy": None},
    }
    data = {"name": "images", "split": "test", "resampled": "images"}
    found = {"data": data, "models": [model] * 3}
    text = terminal_evaluation(found, ["runs/ft", "runs/medmerge", "hospital"], 80)
    lines = text.splitlines()
    assert lines[0] == "images, test: value [95 % bootstrap interval over images]"
    assert max(map(len, lines)) <= 80
    assert text.count("macro F1  ") == 2  # in two parts
    assert text.count("[-0.6123, -0.5000]") == 3 * (len(numbers) - 1)
    assert {"runs/ft", "runs/medmerge", "hospital", "30"} <= words(text)


def test_hostile_names_do_nothing_to_the_terminal():
    text = terminal_text(study(row("ft", "\x1b[2J\x1b]0;x\x07\u202eb")), 80)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"\x1b[2J" in text


def test_columns_are_aligned():
    table = narrow_table((["name", "long title", "n"], [["a b", "1", "22"], ["c", "", "3"]]), 1, 80)
    assert table.splitlines() == [
        "       long", "name  title   n", "────  ─────  ──", "a b       1  22", "c             3",
    ]  # fmt: skip
