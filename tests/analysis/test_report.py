import base64
import hashlib
import html
import json
import re

import pytest
from helpers.reports import Page

from medmerge_jax.analysis import write_report

EVIL = "<script>alert('x')</script>&\"{{ 7 * 6 }}"
# A PNG of one pixel.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def results(name="aptos"):
    return {
        "recipe": "medmerge",
        "start": "b+c",
        "seed": 3,
        "architecture": "resnet20",
        "val": {"loss": 0.5, "accuracy": 0.8125, "kappa": None},
        "test": {"loss": 0.6, "accuracy": 0.7125, "kappa": None},
        "stages": [{"name": "ft", "epochs": 7, "best_epoch": 5, "seconds": 12.5}],
        "data": {
            "name": name,
            "fingerprint": "f00d",
            "classes": ["healthy", name],
            "counts": {"train": {"healthy": 301, name: 302}, "test": {"healthy": 41}},
        },
        "parents": {"b": {"source": name, "sha256": "beef", "versions": {"jax": "1"}}},
        "versions": {"jax": "0.10.2"},
        "wall_seconds": 61.5,
    }


def write(directory, **files):
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))


def add_figure(path, content=PIXEL):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_report_of_a_run(tmp_path):
    write(tmp_path, results=results(), config={"config": {"lp": {"epochs": 50}}})
    speeds = [100.0, 300.0, 200.0]
    lines = [json.dumps({"stage": "ft", "images_per_second": speed}) + "\n" for speed in speeds]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"stage": "ft", "ima')
    for name in ("a_feature_map", "learning_curves", "coefficients"):
        add_figure(tmp_path / "figures" / f"{name}.png")
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.open == []
    wanted = "aptos: medmerge|0.7125|0.8125|301|302|41|f00d|beef|0.10.2|12.5|200|61.5|resnet20|b+c"
    for text in wanted.split("|"):
        assert re.search(rf"\b{re.escape(text)}\b", page.text), text
    assert '"epochs": 50' in page.text
    data = "data:image/png;base64,"
    assert page.images == [data + base64.b64encode(PIXEL).decode()] * 3
    assert page.alternatives[0].startswith("Mean weight of each convolution")  # opens the report
    assert page.text.index("Learning curves") < page.text.index("A feature map")


def headline(directory, **results):
    write(directory, results=results)
    write_report(directory)
    source = (directory / "report.html").read_text()
    found = re.search(r'<p class="headline">(.*?)</p>', source, re.DOTALL)
    return html.unescape(found[1]) if found else ""


def test_the_headline_of_a_run(tmp_path):
    whole = results()
    assert "reaches a accuracy" not in headline(tmp_path, **whole)
    whole["test"] |= {"macro_f1": 0.7, "num_examples": 41}
    said = "medmerge from b+c: macro F1 0.700 on 41 test images of aptos."
    assert headline(tmp_path, **whole) == said
    unnamed = {**whole, "data": {**whole["data"], "name": "images"}}
    assert headline(tmp_path, **unnamed).endswith("0.700 on 41 test images.")
    interval = {"low": 0.6, "high": 0.8, "resamples": 1000, "undefined": 0}
    parts = {"per_class": [], "thresholds": [], "by_group": None, "resampled": "images"}
    calibration = {"temperature": None, "before": {"loss": 1.0}, "after": None}
    whole["statistics"] = {"intervals": {"macro_f1": interval}, "calibration": calibration, **parts}
    assert "macro F1 0.700 (95 % interval 0.600 to 0.800) on 41" in headline(tmp_path, **whole)


@pytest.mark.parametrize(
    ("low", "words"), [(0.01, "it is told apart from"), (-0.01, "it is not told apart from")]
)
def test_the_headline_of_a_comparison_says_whether_rows_can_be_told_apart(tmp_path, low, words):
    def row(recipe, mean):
        found = {"mean": mean, "std": 0.02, "values": [mean, mean]}
        return {"recipe": recipe, "start": "b", "macro_f1": found}

    of_row = {"difference": 0.1, "low": low, "high": 0.2, "p": 0.04}
    differences = {
        "reference": "lp_bn_ft from b",
        "metric": "macro_f1",
        "rows": [{"recipe": "medmerge", "start": "b", "macro_f1": of_row}],
    }
    table = [row("lp_bn_ft", 0.6), row("medmerge", 0.7)]
    said = headline(tmp_path, recipe="compare", table=table, seeds=[0, 1], differences=differences)
    assert said.startswith("Of 2 rows medmerge from b has the best macro F1 of the test images, ")
    assert f"0.700 ± 0.020 over 2 seeds; {words} the reference lp_bn_ft from b, +0.100" in said
    table.reverse()
    table[0]["macro_f1"]["mean"] = 0.5
    said = headline(tmp_path, recipe="compare", table=table, seeds=[0, 1], differences=differences)
    assert said.endswith("0.600 ± 0.020 over 2 seeds: it is the reference itself.")


def test_report_loads_nothing(tmp_path):
    write(tmp_path, results=results(), config={"config": {}})
    add_figure(tmp_path / "figures" / "coefficients.png")
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert not page.tags & {"link", "iframe", "object", "a", "form", "base"}
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in page.policy
    assert f"script-src 'sha256-{digest}'" in page.policy  # this one and no other may run
    source = re.sub(r'base64,[^"]*"', "", page.source).replace(script, "")
    assert not re.search(r"https?:|//|url\(|@import", source)
    assert not re.search(r"https?:|fetch|XMLHttp|import|eval|innerHTML", script)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_report_escapes_names(tmp_path):
    config = {"config": {"data": EVIL}}
    write(tmp_path, results=results(EVIL), config=config)
    add_figure(tmp_path / "figures" / "x<b>y.png")
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert len(page.scripts) == 1
    assert "b" not in page.tags
    assert page.open == []
    # Title, heading, headline, class: as it was written, neither run nor evaluated. The parent's
    # source is there too, as the last component of a path, which is what is shared of it.
    assert page.text.count(EVIL) == 4
    assert page.text.count(EVIL.rpartition("/")[2]) == 5
    assert json.dumps(EVIL) in page.text


def test_report_of_the_audit(tmp_path):
    def part(count, *example):
        return {"images": count, "exact": count // 2, "examples": [list(example)] * (count > 0)}

    audit = {
        "groups": {"by_splits": {"train and test": 17}, "examples": ["p1"]},
        "duplicates": [{"of": "test", "in": "train", **part(4, EVIL, "b.png")}],
        "parents": {"b": {"training_images": 9, "test": part(6, "c.png", "d.png")}, "c": None},
        "summary": ["warning: 17 groups are in two splits"],
    }
    write(tmp_path, results=results(), data_audit=audit)
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.open == []
    assert len(page.scripts) == 1
    for text in (
        "warning: 17 groups are in two splits",
        "groups in train and test 17",
        f"test images in train 4 2 {EVIL} = b.png",
        "test images that parent b was trained on 6 3 c.png = d.png",
    ):
        assert text in re.sub(r"\s+", " ", page.text)


def test_report_of_a_comparison(tmp_path):
    def value(mean):
        return {"mean": mean, "std": 0.0125, "values": [mean]}

    rows = [
        {"recipe": recipe, "start": "b", "seeds": [0, 1], "accuracy": value(mean), "kappa": None}
        for recipe, mean in (("ft", 0.625), ("medmerge", 0.875))
    ]
    data = results()["data"]
    write(tmp_path, results={"recipe": "compare", "seeds": [0, 1], "table": rows, "data": data})
    for seed in (0, 1):
        add_figure(tmp_path / "medmerge" / f"seed{seed}" / "figures" / "coefficients.png")
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.open == []
    assert "aptos: comparison" in page.text
    assert re.search(r">0\.875 ± 0\.01[23]</td>", page.source)
    assert re.search(r">0\.625 ± 0\.01[23]</td>", page.source)
    assert "Coefficients of medmerge: mean weight" in page.text
    assert len(page.images) == 1


def test_a_comparison_shows_the_first_seed_of_each_run_in_order(tmp_path):
    write(tmp_path, results={"recipe": "compare", "seeds": [2, 10], "table": []})
    for run in ("ft", "medmerge"):
        for seed in (2, 10):
            path = tmp_path / run / f"seed{seed}" / "figures" / "coefficients.png"
            add_figure(path, f"{run} {seed}".encode())
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    shown = [base64.b64decode(image.partition(",")[2]).decode() for image in page.images]
    assert shown == ["ft 2", "medmerge 2"]


@pytest.mark.parametrize("content", [None, "", '{"recipe": ', "[1]"])
def test_report_without_results(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert f"{tmp_path.name}: no results yet" in page.text
    assert page.open == []


@pytest.mark.parametrize("missing", sorted(results()))
def test_report_of_results_with_a_part_missing(tmp_path, missing):
    write(tmp_path, results={k: v for k, v in results().items() if k != missing})
    write_report(tmp_path)
    assert Page(tmp_path / "report.html").open == []
