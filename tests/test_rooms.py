"""The structure: every import points to a room further down, and no files import in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "medmerge_jax"

ROOMS = (
    "interrupts", "errors", "registry", "config", "merging", "runtime", "storage", "models",
    "weights", "images", "data", "evaluation", "training", "analysis", "recipes", "studies",
    "commands",
)  # fmt: skip
"""From the bottom to the top; a room may import those before it, and itself."""

DOORS = ("__init__", "__main__", "main", "merge")
"""Files beside the rooms through which a user comes in; they may import any room."""


def modules():
    """Every file of the package by its dotted name below the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts), path


def imported(path, names):
    """The files of the package that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for candidate in candidates:
            name = candidate.removeprefix("medmerge_jax.")
            if name != candidate and name in names:
                found.add(name)
            if name != candidate and f"{name}.__init__" in names:
                found.add(f"{name}.__init__")
    return found


@pytest.fixture(scope="module")
def imports():
    names = {name for name, _ in modules()}
    return {name: imported(path, names) for name, path in modules()}


def room(name):
    return name.partition(".")[0]


def test_every_file_is_in_a_room(imports):
    assert {room(name) for name in imports} <= {*ROOMS, *DOORS}


def test_no_import_runs_up(imports):
    upward = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if room(name) in ROOMS
        and (room(other) not in ROOMS or ROOMS.index(room(other)) > ROOMS.index(room(name)))
    ]
    assert not upward


def test_no_files_import_in_a_circle(imports):
    # A package's __init__ collects what its files offer; inside of the package nobody asks it for
    # anything but a file.
    graph = {
        name: {other for other in others if not name.startswith(other.removesuffix("__init__"))}
        for name, others in imports.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_a_circle_and_an_upward_import_would_be_found(tmp_path):
    """The reader of imports sees those inside of functions and of several names."""
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from medmerge_jax.recipes import run\nimport medmerge_jax.data\n"
    )
    assert imported(file, {"recipes.run", "data.__init__"}) == {"recipes.run", "data.__init__"}
