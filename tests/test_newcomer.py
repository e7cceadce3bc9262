"""A newcomer's path: own images, a parent, a merge, its report, new images, other libraries."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.exported import assert_has_our_logits, code_for
from scipy.special import softmax

import medmerge_jax as mm
from medmerge_jax.data import write_synthetic
from medmerge_jax.images.decode import read_image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SIZE = 32
SMALL = (
    "--config=configs/folder.py", "--config.architecture=resnet18", f"--config.image_size={SIZE}",
    "--config.batch_size=8", "--config.lp.epochs=1", "--config.ft.epochs=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory, warm_programs, compiled_programs):
    """What the programs leave, called as the README says."""
    home = tmp_path_factory.mktemp("newcomer")
    for seed, name in enumerate(("clinic", "hospital", "new")):
        drawn = {"seed": seed, "appearance": seed % 2}
        counts = {"train": 12, "val": 8, "test": 8}
        write_synthetic(home / name, "lesion", counts, size=48, **drawn)
    cache = {"MEDMERGE_JAX_CACHE": str(compiled_programs)}

    def call(*arguments, module="medmerge_jax"):
        result = warm_programs.run(arguments, home, module=module, folder=ROOT, **cache)
        assert result.returncode == 0, result.stderr
        return result.stdout

    parent, workdir = home / "runs" / "parent", home / "runs" / "mine"
    main = "medmerge_jax.main"
    said = {
        "parent": call(
            *SMALL, f"--workdir={parent}", f"--config.data.root={home / 'hospital'}",
            "--config.recipe=ft", "--config.parents.b=random", module=main,
        ),
        "run": call(
            *SMALL, f"--workdir={workdir}", f"--config.data.root={home / 'clinic'}",
            f"--config.parents.b={parent}", "--config.parents.c=random", module=main,
        ),
        "predict": call(
            "predict", workdir, home / "new" / "test", "--out", home / "probabilities.csv"
        ),
    }  # fmt: skip
    for kind in ("safetensors", "timm", "monai", "stablehlo"):
        call("export", workdir, "--to", home / kind, "--format", kind)
    return home, said


@pytest.fixture(scope="module")
def predicted(home):
    """The new images as models see them, and the logits by this program's model."""
    rows = list(csv.DictReader((home[0] / "probabilities.csv").read_text().splitlines()))
    paths = [home[0] / "new" / "test" / row["image"] for row in rows]
    model = mm.load_model(home[0] / "runs" / "mine")
    look = model.preprocessing
    pixels = np.stack([read_image(path, look.size, look.resize) for path in paths])
    normalised = (pixels / np.float32(255) - np.float32(look.mean)) / np.float32(look.std)
    network = mm.create_model(model.architecture, len(model.classes))
    logits = np.asarray(network.apply(model.variables, normalised, train=False))
    said = [[float(row[f"probability_{name}"]) for name in model.classes] for row in rows]
    np.testing.assert_allclose(softmax(logits, axis=1), said, atol=1e-4)
    return model, pixels, normalised, logits


def test_what_is_said_and_left(home):
    folder, said = home
    workdir = folder / "runs" / "mine"
    assert "accuracy" in said["run"] and "accuracy" in said["parent"]
    assert (workdir / "report.html").read_text().startswith("<!DOCTYPE html>")
    parents = json.loads((workdir / "results.json").read_text())["parents"]
    assert parents["b"]["source"] == "parent" and "hospital" not in json.dumps(parents)
    audit = json.loads((workdir / "data_audit.json").read_text())
    assert audit["parents"]["b"]["training_images"] == 12
    assert "wrote" in said["predict"]


@pytest.mark.parametrize(
    ("kind", "title"), [("safetensors", "torchvision"), ("timm", "timm"), ("monai", "MONAI")]
)
@pytest.mark.usefixtures("torchvision")
def test_in_pytorchs_libraries(home, predicted, kind, title, monkeypatch):
    pytest.importorskip(title.lower())
    model, pixels, _, logits = predicted
    code = code_for(home[0] / kind, title)
    assert_has_our_logits(code, home[0] / kind, (pixels, logits), model, monkeypatch)


def test_as_a_program(home, predicted, monkeypatch):
    _, _, normalised, logits = predicted
    monkeypatch.chdir(home[0] / "stablehlo")
    names = {"images": normalised}
    exec(code_for(home[0] / "stablehlo", "JAX"), names)
    np.testing.assert_allclose(names["logits"], logits, atol=1e-4 * max(1, np.abs(logits).max()))


def test_in_onnxruntime(home, predicted, tmp_path, monkeypatch):
    pytest.importorskip("jax2onnx")
    from medmerge_jax.commands import export

    export.main([str(home[0] / "runs" / "mine"), "--to", str(tmp_path / "x"), "--format", "onnx"])
    _, _, normalised, logits = predicted
    monkeypatch.chdir(tmp_path / "x")
    names = {"images": normalised}
    exec(code_for(tmp_path / "x", "ONNX runtime"), names)
    np.testing.assert_allclose(names["logits"], logits, atol=1e-4 * max(1, np.abs(logits).max()))
