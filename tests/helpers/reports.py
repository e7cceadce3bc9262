"""Finished runs and studies that nothing was trained for, and what is read of their reports."""

import html.parser
import json

import numpy as np

from helpers.drawn_predictions import drawn
from medmerge_jax.analysis import (
    comparison_figure,
    confusion_matrix_figure,
    learning_curves,
    write_report,
)
from medmerge_jax.config import default_config, parse, to_json
from medmerge_jax.evaluation.metrics import METRICS, confusion_matrix
from medmerge_jax.evaluation.statistics import statistics

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b[31mred\x1b[0m\x07",
    "=cmd|'/c calc'!A1", "+1+cmd()", "@SUM(A1)", "\t=1+1", r"\input{/etc/passwd}", "% comment",
    "a & b # c _ d $x^2$ ~", "a\\\\\n[2cm]b", "*bold* _it_ `code` [link](x) ![](http://x/y.png)",
    "| cell |", "&lt;b&gt;", "{{ 7 * 6 }}", "\u202egnp.exe", "\r\nInjected: yes", "^^5cinput",
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Text, images, tables, and everything else that a browser would fetch or run."""

    def __init__(self, path):
        super().__init__()
        self.text, self.images, self.open, self.tags = "", [], [], set()
        self.buttons, self.alternatives, self.scripts, self.policy = [], [], [], ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        assert not [name for name in found if name.startswith("on")]
        if tag == "img":
            self.images.append(found["src"])
            self.alternatives.append(found["alt"])
        if tag == "button" and "data-file" in found:
            self.buttons.append((found["data-file"], found["data-text"]))
        if tag == "script":
            assert not found
        if tag == "meta" and "http-equiv" in found:
            self.policy = found["content"]
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " * (tag in ("td", "th", "dt", "dd"))

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        else:
            self.text += data


def finished_run(folder, classes=("healthy", "ill", "unclear"), figures=False, seed=0):
    """Leaves what a run does, of drawn predictions, but for its model; returns its results."""
    validation, test = (
        drawn(len(classes), n=90, seed=seed + number, classes=tuple(classes)) for number in (1, 2)
    )
    metrics = {
        name: {**{key: metric(one) for key, metric in METRICS.items()}, "num_examples": 90}
        for name, one in (("val", validation), ("test", test))
    }
    counts = {name: dict.fromkeys(classes, 30) for name in ("train", "val", "test")}
    results = {
        "recipe": "medmerge",
        "start": "b+c",
        "seed": seed,
        "architecture": "resnet20",
        **metrics,
        "statistics": statistics(validation, test),
        "stages": [
            {"name": name, "epochs": 4, "images": 360, "seconds": 2.5, "images_per_second": 144.0}
            for name in ("merge_lp", "ft")
        ],
        "data": {"name": "aptos", "fingerprint": "f0" * 32, "classes": list(classes),
                 "counts": counts},
        "parents": {
            name: {"source": f"{name}.pth", "fingerprint": name * 64} for name in ("b", "c")
        },
        "versions": {"jax": "0.10.2", "numpy": "2.3.1"},
        "wall_seconds": 61.5,
        "training": {"epochs": 8, "steps": 90, "images": 720, "seconds": 5.0},
    }  # fmt: skip
    test.save(folder / "predictions.npz")
    lines = [
        {"stage": name, "epoch": epoch, "learning_rate": 1e-4, "train_loss": 1 / epoch,
         "val_loss": 1.5 / epoch, "val_macro_f1": 0.1 * epoch}
        for name in ("merge_lp", "ft") for epoch in range(1, 5)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if figures:
        matrix = confusion_matrix(test)
        confusion_matrix_figure(matrix, classes, folder / "figures" / "confusion_matrix.png")
        learning_curves(lines, folder / "figures" / "learning_curves.png")
    _leave(folder, results)
    return results


def finished_study(folder, members=48, seeds=(0, 1, 2)):
    """A study with as many members, whose table has a row for every eighth of them."""
    random = np.random.default_rng(0)

    def row(number, name):
        values = random.uniform(0.4, 0.8, len(seeds)).tolist()
        found = {"mean": np.mean(values), "std": np.std(values, ddof=1), "values": values}
        return {"recipe": name, "start": f"b{number}", **dict.fromkeys(METRICS, found)}

    table = [row(number, "lp_ft") for number in range(max(members // 8, 2))]
    told = {"difference": 0.02, "low": -0.01, "high": 0.05, "p": 0.12}
    results = {
        "recipe": "grid_search",
        "architecture": "resnet20",
        "seeds": list(seeds),
        "table": table,
        "metric": "macro_f1",
        "differences": {
            "reference": "lp_ft from b0", "metric": "macro_f1",
            "rows": [{**one, "macro_f1": told} for one in table[1:]],
        },
        "members": {
            f"grid/lr{10.0 ** -(number % 6)}-heavy-seed{number}": {
                "epochs": 50, "seconds": 100.0 * number,
                **{split: {"macro_f1": random.uniform()} for split in ("val", "test")},
            }
            for number in range(members)
        },
        "data": {"name": "aptos", "classes": ["a"], "counts": {"train": {"a": 9}}},
        "parents": {},
        "versions": {"jax": "0.10.2"},
        "wall_seconds": 4800.0,
        "training": {"epochs": 2400, "steps": 10**5, "images": 10**7, "seconds": 4500.0},
        "jobs": [f"grid/{number}" for number in range(members)],
    }  # fmt: skip
    path = folder / "figures" / "comparison.png"
    comparison_figure(table, "macro_f1", path, "lp_ft from b0")
    _leave(folder, results)
    return results


def _leave(folder, results):
    config = default_config()
    config.recipe, config.lp.epochs = results["recipe"], 4
    audit = {
        "images": {"train": 90, "val": 90, "test": 90}, "groups": None, "duplicates": [],
        "parents": {}, "notes": ["the delimiter is a semicolon"], "summary": ["nothing"],
    }  # fmt: skip
    for name, value in {
        "results": results, "config": {"config": to_json(parse(config))}, "data_audit": audit,
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(value))
    write_report(folder)
