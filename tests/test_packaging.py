"""What is installed with which extra."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from medmerge_jax.commands import entry

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

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
    names = ("test", "gpu", "gpu12", "dicom", "cluster")
    assert all("medmerge-jax[train]" in extras[name] for name in names)
