"""The tables of a report: what they hold, and what hostile names are in them."""

import csv
import io
import json
import re

import pytest
from helpers.reports import HOSTILE, Page, finished_run, finished_study

from medmerge_jax.analysis import write_report
from medmerge_jax.runtime.inert import visible


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The report of a run whose every class has a hostile name."""
    folder = tmp_path_factory.mktemp("hostile")
    finished_run(folder, HOSTILE)
    return Page(folder / "report.html")


def test_hostile_names_are_text(hostile):
    assert hostile.open == []
    assert hostile.images == []
    assert len(hostile.scripts) == 1
    assert not hostile.tags & {"b", "a", "i"}
    for name in HOSTILE:
        assert hostile.text.count(visible(name)) >= 4, name
    assert all(one.isprintable() or one == "\n" for one in hostile.text)


def test_hostile_names_are_cells_for_spreadsheets_and_papers(hostile):
    texts = dict(hostile.buttons)
    assert len(texts) == len(hostile.buttons)  # no two files of a name
    for file, text in texts.items():
        if file.endswith(".csv"):
            lines = list(csv.reader(io.StringIO(text)))
            assert len({len(line) for line in lines}) == 1
            cells = [cell for line in lines for cell in line]
            numbers = re.compile(r"[+-]?[0-9.]+(e-?[0-9]+)?")
            assert not [x for x in cells if x[:1] in "=+-@\t\r" and x and not numbers.fullmatch(x)]
        else:
            body = text.partition("\n")[2]
            assert not re.search(r"(?<!\\)[%#]|\\input|(?<!\\)\$x", body)
            assert text.count("\n") == len(text.splitlines())
    rows = list(csv.reader(io.StringIO(texts["by_class.csv"])))
    assert [row[0].removeprefix("'") for row in rows[1:]] == list(map(visible, HOSTILE))


def test_every_table_can_be_sorted_and_saved(tmp_path):
    finished_study(tmp_path, members=3)
    page = Page(tmp_path / "report.html")
    tables = re.findall(r"<table>.*?</table>", page.source, re.DOTALL)
    assert len(tables) == len(page.buttons) // 2 >= 6
    for table in tables:
        heads = re.findall(r"<th [^>]*>(.*?)</th>", table, re.DOTALL)
        assert heads
        assert all(head.startswith('<button type="button">') for head in heads)
    assert {file.rpartition(".")[2] for file, _ in page.buttons} == {"tex", "csv"}
    assert '<th scope="col" class="number"><button type="button">macro F1<' in page.source
    assert '<th scope="col"><button type="button">recipe<' in page.source


@pytest.mark.parametrize(("members", "broken"), [(3, []), (48, ["Members"])])
def test_of_a_study_members_are_counted_and_only_long_tables_break_in_print(
    tmp_path, members, broken
):
    finished_study(tmp_path, members=members)
    page = Page(tmp_path / "report.html")
    assert re.search(rf"members\s+{members}\s+image size", page.text)
    assert re.findall(r'class="wide long" [^>]*aria-label="(\w+)"', page.source) == broken


def test_what_a_run_has_cost_and_what_differs_from_the_paper(tmp_path):
    finished_run(tmp_path)
    page = Page(tmp_path / "report.html")
    text = re.sub(r"\s+", " ", page.text)
    for wanted in (
        "images seen in training 720", "steps 90", "epochs 8", "wall time, seconds 61.5",
        "What differs from MedMerge", "lp.epochs 50 50 4", "arXiv 2403.11646",
        "healthy 2", "train 90, val 90, test 90", "f0" * 32,
    ):  # fmt: skip
        assert wanted in text, wanted


def test_a_confusion_matrix_has_counts_and_shares(tmp_path):
    results = finished_run(tmp_path)
    texts = dict(Page(tmp_path / "report.html").buttons)
    _, *rows = csv.reader(io.StringIO(texts["confusion_matrix.csv"]))
    for name, of_class, cells in zip(
        ("healthy", "ill", "unclear"), results["statistics"]["per_class"], rows, strict=True
    ):
        counts = [int(cell.split(" ")[0]) for cell in cells[1:]]
        assert cells[0] == name
        assert sum(counts) == of_class["positives"]
        right = ["healthy", "ill", "unclear"].index(name)
        assert counts[right] / sum(counts) == pytest.approx(of_class["recall"])
        assert cells[1 + right].endswith(f" ({of_class['recall']:.0%})")


def test_classes_are_called_what_they_mean(tmp_path):
    results = finished_run(tmp_path, classes=("0", "1"))
    results["data"]["shown_classes"] = ["0 none", "1 mild"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.text.count("0 none") >= 4  # by class, confusion matrix twice, data
    assert dict(page.buttons)["data.csv"].startswith("class,train,val,test\n0 none,30,")


def test_a_report_names_no_folder_of_the_machine(tmp_path):
    results = finished_study(tmp_path, members=3)
    results["failed"] = {"grid/a": "/home/ann/runs/grid/a/metrics.jsonl, line 3: is no record"}
    results["parents"] = {"b": {"source": "/home/ann/b.pth", "notes": ["of /home/ann/c/b.pth"]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    recorded = json.loads((tmp_path / "config.json").read_text())
    recorded["config"]["data"]["root"] = recorded["config"]["parents"]["b"] = "/home/ann/images"
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    write_report(tmp_path)
    source = (tmp_path / "report.html").read_text()
    assert "metrics.jsonl, line 3" in source
    assert "home/ann" not in source
    assert str(tmp_path.parent) not in source


def test_the_headline_takes_nothing_that_was_chosen_by_the_test_images(tmp_path):
    results = finished_study(tmp_path, members=3)
    best = {"mean": 0.99, "std": None, "values": [0.99]}
    oracle = {"recipe": "best single, by test", "start": "lr1", "macro_f1": best}
    results["table"].append(oracle)
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    source = (tmp_path / "report.html").read_text()
    headline = re.search(r'<p class="headline">(.*?)</p>', source, re.DOTALL)[1]
    assert "lp_ft from b" in headline
    assert "by test" not in headline


def test_a_report_of_48_members_is_small(tmp_path):
    finished_study(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5e6
