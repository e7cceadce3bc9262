"""The benchmarks can be started, and what README.md says of them stems from their results files."""

import importlib
import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from medmerge_jax.evaluation.predictions import Predictions

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
# These need PyTorch, which not every machine has, directly or because they import one that does.
OF_PYTORCH = re.compile(r"^(import|from) (torch|beside_pytorch|pytorch_recipe)\b", re.MULTILINE)


@pytest.fixture
def load(monkeypatch):
    """Imports a script as its own process would, and forgets it afterwards."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as `whole_recipe` does for itself
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_imports_exists(load, name):
    if OF_PYTORCH.search((BENCHMARKS / f"{name}.py").read_text()):
        pytest.importorskip("torch")
    module = load(name)
    assert hasattr(module, "main") or name in ("beside_pytorch", "measuring", "results")


def test_the_readme_says_what_the_results_say(load):
    results, text = load("results"), (BENCHMARKS / "README.md").read_text()
    assert results.with_summaries(text) == text, "python benchmarks/results.py was not run"
    assert len(text.splitlines()) <= 200
    named = re.findall(r"<!-- results/([\w-]+)\.md -->", text)
    assert sorted(named) == sorted(path.stem for path in results.RESULTS.glob("*.md"))


@pytest.fixture
def fission_fusion(load, tmp_path, monkeypatch):
    """The script with its options as on the command line, for images that are not there."""
    lines = ["id,label,class,split,group,origin"]
    for split, origin in (("train", "rosendahl"), ("train", "vidir_modern"), ("test", "isic2018")):
        for number, name in enumerate(("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc") * 20):
            lines.append(f"{origin}{number},0,{name},{split},{origin}{number},{origin}")
    uda1 = [lines[0], "a,0,benign,test,a,isic_uda1", "b,1,malignant,test,b,isic_uda1"]
    for folder, text in (("skin_ham10000", lines), ("skin_isic_uda1", uda1)):
        (tmp_path / folder / "jpeg128").mkdir(parents=True)
        (tmp_path / folder / "split.csv").write_text("\n".join(text))
    arguments = ["dermoscopy", f"--data={tmp_path}", f"--workdir={tmp_path}", "--weights=c.npz"]
    monkeypatch.setattr(sys, "argv", ["fission_fusion.py", *arguments])
    script = load("fission_fusion")
    return script, script._options()


def test_fission_fusion_and_the_grid_are_of_the_published_numbers(fission_fusion):
    script, options = fission_fusion
    studies = script._studies(options)
    plans = {
        name: script.plan(script.check_config(config))
        for (seed, name), config in studies.items()
        if seed == 1
    }
    assert {seed for seed, _ in studies} == {0, 1, 2}
    for study, job in script.ROWS.values():
        assert job in (script.VAL, script.TEST) or job in plans[study]
    greedy = {name: plans[name]["soups/greedy"].config.parents for name in ("grid", "fgg")}
    assert [len(members) for members in greedy.values()] == [48, 48]
    epochs = {
        name: sum(script._most_epochs(j.config) for j in plans[name].values()) for name in plans
    }
    assert epochs["grid"] == 10 + 48 * 50 and epochs["fgg"] == 10 + 8 * (50 + 17)
    assert epochs["anchored10"] == epochs["medmerge"] == 10 + 2 * 50
    assert plans["anchored100"]["warmup"].config.merge.learning_rate == pytest.approx(0.1)
    seeds = [set(studies[seed, "grid"].grid.seeds) for seed in (0, 1, 2)]
    assert len(set.union(*seeds)) == 6, "seeds of the comparison share members of the grid"


def test_no_image_of_another_clinic_is_in_the_target(fission_fusion):
    script, options = fission_fusion
    config = script._studies(options)[0, "fgg"]
    tables = [config.data.table, *(one.data.table for one in config.evaluate_on.values())]
    files = [{line.split(",")[0] for line in Path(t).read_text().splitlines()[1:]} for t in tables]
    assert [len(names) for names in files] == [100, 100, 2]
    assert len(set.union(*files)) == 202


def test_epochs_behind_a_row_are_those_of_all_its_jobs(fission_fusion, tmp_path):
    script, options = fission_fusion
    options.rates, options.seeds = (1e-3, 1e-4), 1
    config, folder = script._studies(options)[0, "fgg"], tmp_path / "study"
    for name in script.plan(script.check_config(config)):
        stages = {"warmup": [("lp", 5)], "fgg": [("ft", 20), ("fgg", 17)]}
        metrics = {"macro_f1": 0.7 if name == "fgg/lr0.0001" else 0.5}
        results = {"val": metrics, "test": {"macro_f1": 0.6}, "wall_seconds": 1.0}
        results["stages"] = [
            {"name": stage, "epochs": epochs}
            for stage, epochs in stages.get(name.partition("/")[0], [])
        ]
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(results))
        logits = np.eye(5)[[0, 1, 2, 3, 4 if name == "fgg/lr0.0001" else 0]]
        for further in ("", "-isic2018", "-uda1"):
            Predictions(logits, np.arange(5)).save(folder / name / f"predictions{further}.npz")
    best, top = (script._entry(config, folder, job) for job in (script.VAL, "soups/GoG"))
    assert (best.score(""), best.predicted["uda1"]) == (1.0, [0, 1, 2, 3, 4])
    assert top.score("") == pytest.approx((2 / 3 + 1 + 1 + 1 + 0) / 5)
    assert (best.epochs, best.warmup, best.seconds) == (2 * 37, 5, 3.0)
    assert (top.epochs, top.warmup, top.seconds) == (
        2 * 37,
        5,
        3.0 + 3.0,
    )  # two groups' soups and its own


def test_a_finished_seed_is_kept_for_another_machine(fission_fusion, tmp_path, monkeypatch):
    script, options = fission_fusion
    studies, options.seeds = script._studies(options), 1
    said = {further: [0, 1, 2, 3, 4] for further in ("", "isic2018", "uda1")}
    wrong = {further: [0, 1, 2, 3, 3] for further in said}
    entries = {
        title: script.Entry(said, said if title == script.CLAIMED else wrong, 9, 5, 100)
        for title in script.ROWS
    }
    described = {"notes": ["as published"], "failed": []}
    options.seeds_folder, options.output = tmp_path / "kept", tmp_path / "kept" / "table.md"
    with monkeypatch.context() as patch:
        patch.setattr(script, "_of_seed", lambda *arguments: entries[arguments[-1]])
        patch.setattr(script, "_described", lambda *_: described)
        script._keep(options, studies, 0)
    monkeypatch.setattr(script, "run", lambda *_: pytest.fail("it was run again"))
    assert script._entries(options, studies, script.CLAIMED) == {0: entries[script.CLAIMED]}
    script._write(options, {key: one for key, one in studies.items() if key[0] == 0})
    table = options.output.read_text()
    assert "as published" in table and "Not finished" not in table
    assert "| FGG + GoG | 1.000 |" in table


def test_a_changed_result_changes_the_readme(load, tmp_path, monkeypatch):
    results = load("results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    results.write_table(tmp_path / "results" / "speed.md", "How fast?", "2.5 times.", [{"a": 1}])
    text = "# Title\n\n<!-- results/speed.md -->\nold\n<!-- end -->\n\nNot measured: x.\n"
    new = results.with_summaries(text)
    assert "**2.5 times.**" in new and "How fast?" in new and "old" not in new
    assert new.startswith("# Title\n\n<!-- results/speed.md -->\n")
    assert new.endswith("<!-- end -->\n\nNot measured: x.\n")


def test_a_table_names_no_host_and_no_folder_of_the_machine(load, tmp_path, monkeypatch, capsys):
    results, output = load("results"), tmp_path / "speed.md"
    arguments = ["/home/ada/photos", "--data=/home/ada/b.csv", "--size", "24", "--output", "x"]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "speed.py"), *arguments])
    rows = [{"network": "a", "ms": 1}, {"network": "b", "ms": 2}]
    answer = results.by_row(rows, ["network"], "ms")
    results.write_table(output, "How fast?", answer, rows, ["A note."], raw={"ms": [1, 2]})
    text = output.read_text()
    assert "Command: `python benchmarks/speed.py photos --data=b.csv --size 24`" in text
    assert text.startswith("# How fast?\n\na: 1; b: 2\n\nMeasured: ")
    assert text.endswith("A note.\n\n| network | ms |\n|---|---:|\n| a | 1 |\n| b | 2 |\n")
    assert "/home" not in text and not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    assert text in capsys.readouterr().out
    assert (tmp_path / "speed.json").exists()


def test_the_headings_that_the_projects_readme_links_to_exist():
    headings = re.findall(r"^#+ (.*)$", (BENCHMARKS / "README.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    linked = re.findall(r"benchmarks/README\.md#([\w-]+)", (ROOT / "README.md").read_text())
    assert linked and set(linked) <= anchors
