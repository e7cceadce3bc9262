"""What is installed with which extra."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from medmerge_jax.commands import entry

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]

CORE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"no {{name}}", name=name)

sys.meta_path.insert(0, Missing())
import numpy as np
import medmerge_jax as mm
from medmerge_jax.merging.trees import unflatten
from medmerge_jax.models import get_spec

def parent(seed):
    rng, shapes = np.random.default_rng(seed), get_spec("resnet20").shapes(3)
    return {{
        name: unflatten({{p: rng.random(leaf.shape, np.float32) for p, leaf in flat.items()}})
        for name, flat in shapes.items()
    }}

a, b = parent(0), parent(1)
mm.merge_variables([a, b], mm.init_coefficients(a["params"]))
merged = mm.merge("weight_matching", "resnet20", [a, b])
mm.save_weights({path!r}, "resnet20", merged)
mm.load_weights("resnet20", {path!r})
"""

IMPORTS = {
    "absl-py": "absl",
    "array-record": "array_record",
    "huggingface-hub": "huggingface_hub",
    "ml-collections": "ml_collections",
    "pillow": "PIL",
    "tensorflow-datasets": "tensorflow_datasets",
}
"""Names of modules where they are not the packages' own."""

OF_FLAX = {"absl-py", "optax", "orbax-checkpoint", "rich"}
"""What Flax brings by itself."""


def test_merging_and_weights_want_nothing_of_the_extra_train(tmp_path):
    packages = {re.split(r"[><=]", text)[0] for text in PROJECT["optional-dependencies"]["train"]}
    assert packages >= OF_FLAX
    missing = {IMPORTS.get(name, name) for name in packages - OF_FLAX}
    code = CORE.format(missing=missing, path=str(tmp_path / "merged.safetensors"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_missing_module_of_the_extra_train_is_known_as_such():
    packages = [re.split(r"[><=]", x)[0] for x in PROJECT["optional-dependencies"]["train"]]
    modules = {IMPORTS.get(name, name).replace("orbax-checkpoint", "orbax") for name in packages}
    assert modules == set(entry._TRAIN)


def test_every_other_extra_brings_the_extra_train():
    extras = PROJECT["optional-dependencies"]
    names = ("test", "gpu", "gpu12", "dicom", "cluster", "wandb", "mlflow")
    assert all("medmerge-jax[train]" in extras[name] for name in names)


def test_the_wheel_holds_the_package_and_the_configs(tmp_path):
    """Built from a copy, because building leaves folders beside the sources."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("medmerge_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name in ("medmerge_jax", "configs"):
        inside = "" if name == "medmerge_jax" else "medmerge_jax/"
        files = [
            one
            for one in (source / name).rglob("*")
            if one.suffix in (".py", ".j2", ".toml", ".css", ".js")
        ]
        assert files
        assert {f"{inside}{one.relative_to(source).as_posix()}" for one in files} <= held
    assert "medmerge_jax/py.typed" in held
    assert not [one for one in held if one.startswith("configs")]

    # Installed, they are found without the repository.
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from medmerge_jax.commands import packaged; print(packaged.config_path('aptos'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "installed" / "medmerge_jax/configs/aptos.py"), (
        done.stderr
    )


def test_files_that_are_no_code_are_installed_too():
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]["*"]
    files = [x for x in (ROOT / "medmerge_jax").rglob("*") if x.is_file() and x.suffix != ".py"]
    kept = [file for file in files if file.parent.name != "__pycache__"]
    assert len(kept) > 3
    assert [x for x in kept if not any(map(x.match, patterns))] == []
