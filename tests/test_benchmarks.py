"""The benchmarks can be started, and what README.md says of them stems from their results files."""

import importlib
import re
import socket
import sys
from pathlib import Path

import pytest

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
