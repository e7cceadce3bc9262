"""Models for other programs: each is loaded as its README says, and has our logits."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exported import assert_has_our_logits, code_for
from helpers.random_models import variables_of

import medmerge_jax as mm
from medmerge_jax.commands import export as command
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predict import predict_step
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.weights.export import KINDS, export_model

NETWORKS = ("resnet18", pytest.param("densenet121", marks=pytest.mark.slow))
SIZE = 64


def make_model(architecture, size=SIZE, **facts):
    variables = variables_of(0, num_classes=3, architecture=architecture)
    return mm.Model(architecture, variables, Preprocessing(size), ("ant", "<b>", "cat"), **facts)


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def monai():
    """Asked for first: without it nothing else is made."""
    return pytest.importorskip("monai")


@pytest.fixture(scope="module")
def images(model):
    """uint8, and the model's logits."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    module = mm.create_model(model.architecture, 3)
    network = Network(module, model.preprocessing)
    return pixels, np.asarray(predict_step(network, dict(model.variables), jnp.asarray(pixels)))


def takes_normalised(model):
    """What a program of the model takes here: one network is tried with each kind of images."""
    return model.architecture == "densenet121"


@pytest.mark.usefixtures("torchvision")
def test_torchvisions_names(model, images, tmp_path, monkeypatch):
    export_model(model, tmp_path / "x")
    code = code_for(tmp_path / "x", "torchvision")
    assert_has_our_logits(code, tmp_path / "x", images, model, monkeypatch)
    assert mm.load_model(tmp_path / "x").card() == model.card()


@pytest.mark.usefixtures("torchvision")  # which timm imports
def test_timm(model, images, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    assert "config.json" in export_model(model, tmp_path / "x", "timm")
    code = code_for(tmp_path / "x", "timm")
    assert_has_our_logits(code, tmp_path / "x", images, model, monkeypatch)
    made = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    config = timm.data.resolve_model_data_config(made)
    assert tuple(config["input_size"]) == (3, SIZE, SIZE)
    assert tuple(config["mean"]) == model.preprocessing.mean
    assert config["crop_mode"] == "squash"
    assert made.pretrained_cfg["label_names"] == ["ant", "<b>", "cat"]


def test_monai(monai, model, images, tmp_path, monkeypatch):
    export_model(model, tmp_path / "x", "monai")
    code = code_for(tmp_path / "x", "MONAI")
    assert_has_our_logits(code, tmp_path / "x", images, model, monkeypatch)
    # We read it back too.
    again = mm.load_weights(model.architecture, tmp_path / "x" / "model.safetensors")
    kernel = again["params"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, model.variables["params"]["head"]["kernel"])


@pytest.mark.slow
def test_a_program_for_any_number_of_images(model, images, tmp_path, monkeypatch):
    normalised = takes_normalised(model)
    files = export_model(model, tmp_path / "x", "stablehlo", normalised=normalised)
    assert files == ("README.md", "model.json", "model.stablehlo")
    pixels, wanted = images
    look = model.preprocessing
    if normalised:
        pixels = (pixels / np.float32(255) - np.float32(look.mean)) / np.float32(look.std)
    monkeypatch.chdir(tmp_path / "x")
    code = code_for(tmp_path / "x", "JAX")
    for count in (1, 3):
        names = {"images": jnp.asarray(pixels[:count])}
        exec(code, names)
        tolerance = 1e-5 * max(1, np.abs(wanted).max())
        np.testing.assert_allclose(names["logits"], wanted[:count], atol=tolerance)


@pytest.mark.slow
def test_onnx(model, images, tmp_path, monkeypatch, caplog):
    pytest.importorskip("jax2onnx")
    normalised = takes_normalised(model)
    assert "model.onnx" in export_model(model, tmp_path / "x", "onnx", normalised=normalised)
    assert not caplog.records  # the packages' warnings are not for the reader
    pixels, wanted = images
    look = model.preprocessing
    if normalised:
        pixels = (pixels / np.float32(255) - np.float32(look.mean)) / np.float32(look.std)
    monkeypatch.chdir(tmp_path / "x")
    for count in (1, 3):
        names = {"images": pixels[:count]}
        exec(code_for(tmp_path / "x", "ONNX runtime"), names)
        tolerance = 1e-4 * max(1, np.abs(wanted).max())
        np.testing.assert_allclose(names["logits"], wanted[:count], atol=tolerance)


def test_without_the_packages_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match=r"jax2onnx is missing; pip install 'medmerge-jax\[onnx\]'"):
        export_model(make_model("resnet20", 32), tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_an_export_replaces_one_and_nothing_else(model, tmp_path):
    export_model(model, tmp_path / "x", "stablehlo")
    export_model(model, tmp_path / "x", "timm")
    assert not (tmp_path / "x" / "model.stablehlo").exists()
    (tmp_path / "x" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match=r"holds mine\.txt, which would be lost"):
        export_model(model, tmp_path / "x")
    assert (tmp_path / "x" / "config.json").exists()


def test_a_network_that_a_library_has_not(tmp_path):
    small = make_model("resnet20", 32)
    for kind in ("timm", "monai"):
        with pytest.raises(
            UserError, match="has no resnet20; it can be exported as safetensors, s"
        ):
            export_model(small, tmp_path / "x", kind)
    with pytest.raises(UserError, match="export as 'onyx': one of safetensors, timm"):
        export_model(small, tmp_path / "x", "onyx")
    without = mm.Model("resnet20", variables_of(0, num_classes=0), Preprocessing(32))
    with pytest.raises(UserError, match="resnet20: the model has no head to export"):
        export_model(without, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_shared_is_inert(tmp_path):
    """Names of classes in the model card are text."""
    provenance = {"parents": {"b": {"source": "/home/ann/<script>.pth"}}}
    export_model(make_model("resnet18", provenance=provenance), tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    assert "<script>" not in text and "<b>" not in text and "/home" not in text
    json.loads((tmp_path / "x" / "model.json").read_text())


def test_the_command(tmp_path, capsys):
    mm.save_model(tmp_path / "model", make_model("resnet20", 32))
    command.main([str(tmp_path / "model"), "--to", str(tmp_path / "x")])
    assert "model.safetensors" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "model"), "--to", str(tmp_path / "x"), "--with-preprocessing"])
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert all(f"\n  {kind} " in capsys.readouterr().out for kind in list(KINDS)[:1])
