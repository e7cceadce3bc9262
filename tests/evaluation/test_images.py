"""A finished run is loaded, predicts what it predicted, and says nothing of where it was made."""

import base64
import csv
import functools
import json
import re

import numpy as np
import pytest
from helpers import random_models, tiny_config, tiny_network
from helpers.tiny_network import ARCHITECTURE
from PIL import Image
from scipy.special import expit, softmax

import medmerge_jax as mm
from medmerge_jax.errors import UserError
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.weights import model_from_card

variables_of = functools.partial(random_models.variables_of, architecture=ARCHITECTURE)

TELLTALE, PATIENT = "ann-telltale", "patient-4711"
SHARED = (
    *("report.html", "results.json", "data_audit.json"),
    *("model/model.json", "model/README.md", "model/model.safetensors"),
)


@pytest.fixture(scope="module", autouse=True)
def architecture():
    tiny_network.register_architecture()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images of two patients and a parent that came from another's machine."""
    home = tmp_path_factory.mktemp(TELLTALE)
    rng = np.random.default_rng(0)
    (home / "images").mkdir()
    with (home / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "split", "patient"])
        for index in range(24):
            name = f"{PATIENT}-{index}.png"
            pixels = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
            pixels[:, :, 0] //= 1 + index % 3
            Image.fromarray(pixels).save(home / "images" / name)
            split = ("train", "val", "test")[index // 12 + index // 18]
            table.writerow([name, ("zebra", "ant", "cat")[index % 3], split, PATIENT])
    grandparent = {"source": f"/home/{TELLTALE}/x", "file": f"/home/{TELLTALE}/x/model.safetensors"}
    parent = {"file": f"/mnt/{TELLTALE}/b.pth", "parents": {"c": grandparent}, "sha256": "beef"}
    card = {"parents": {"b": parent}, "note": f"made in /home/{TELLTALE}/runs, it says"}
    mm.save_model(home / "parent", model_from_card(ARCHITECTURE, variables_of(0), {}))
    written = json.loads((home / "parent" / "model.json").read_text())
    (home / "parent" / "model.json").write_text(json.dumps({**written, **card}))
    return home


@pytest.fixture(scope="module")
def finished(home):
    """The directory of a run."""
    config = tiny_config.get_config()
    config.architecture, config.recipe, config.start = ARCHITECTURE, "lp", "b"
    config.parents.b, config.parents.c = str(home / "parent"), "random"
    config.data.kind, config.data.name, config.data.resize = "table", "animals", "crop"
    config.data.root, config.data.table = str(home / "images"), str(home / "labels.csv")
    config.data.group_column, config.lp.epochs = "patient", 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMERGE_JAX_CACHE", str(home / "cache"))
        mm.run(config, home / "run")
    return home / "run"


def test_what_is_shared_tells_neither_paths_nor_patients(finished):
    for name in SHARED:
        content = (finished / name).read_bytes()
        parts = [content, *map(base64.b64decode, re.findall(rb'base64,([^"]*)"', content))]
        parts += [figure.read_bytes() for figure in finished.glob("figures/*.png")]
        for part in parts:
            assert TELLTALE.encode() not in part, name
            assert PATIENT.encode() not in part, name
    card = json.loads((finished / "model" / "model.json").read_text())["parents"]["b"]
    assert (card["source"], card["file"]) == ("parent", "model.safetensors")
    assert len(card["fingerprint"]) == 64
    assert card["parents"]["b"]["file"] == "b.pth"
    assert card["parents"]["b"]["parents"]["c"] == {"source": "x", "file": "model.safetensors"}
    assert TELLTALE in (finished / "config.json").read_text()
    assert (
        json.loads((finished / "data_audit.json").read_text())["groups"]["in_several_splits"] == 1
    )


def test_a_loaded_model_predicts_what_its_run_did(finished, capsys):
    model = mm.load_model(finished)
    assert (model.classes, model.multilabel) == (("ant", "cat", "zebra"), False)
    assert (model.preprocessing.size, model.preprocessing.resize) == (16, "crop")
    assert capsys.readouterr().err == ""  # all is known
    written = read_npz(finished / "predictions.npz")
    assert tuple(written["classes"]) == model.classes
    paths = [finished.parent / "images" / name for name in written["ids"]]
    found = mm.predict(model, paths)
    assert (found.dtype, found.shape) == (np.float32, (6, 3))
    wanted = softmax(written["logits"].astype(np.float64), axis=1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    np.testing.assert_array_equal(mm.predict(model, arrays), found)
    # In a copy too, and one by one.
    mm.save_model(finished.parent / "copy", model)
    again = mm.load_model(finished.parent / "copy")
    assert again.card() == model.card()
    np.testing.assert_allclose(mm.predict(again, paths[2:3]), found[2:3], rtol=0, atol=1e-6)


def test_several_labels_have_a_sigmoid_each():
    model = mm.Model(ARCHITECTURE, variables_of(0), Preprocessing(16), multilabel=True)
    one = mm.Model(ARCHITECTURE, variables_of(0), Preprocessing(16))
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    several, single = mm.predict(model, images), mm.predict(one, images)
    odds = np.log(several) - np.log1p(-several)
    np.testing.assert_allclose(softmax(odds, axis=1), single, atol=1e-4)
    np.testing.assert_allclose(expit(odds), several, atol=1e-6)
    assert mm.predict(model, []).shape == (0, model.num_classes)


def test_what_cannot_be_predicted_is_named(tmp_path):
    model = mm.Model(ARCHITECTURE, variables_of(0), Preprocessing(16))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png"):
        mm.predict(model, [tmp_path / "broken.png"])
    with pytest.raises(UserError, match=r"image 1 is float64 of shape \(8, 8, 3\); .*uint8"):
        mm.predict(model, [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3))])
    with pytest.raises(UserError, match="a list of images is wanted"):
        mm.predict(model, "image.png")


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3)])
def test_one_array_is_not_taken_for_as_many_images_as_it_has_rows(shape):
    model = mm.Model(ARCHITECTURE, variables_of(0), Preprocessing(16))
    with pytest.raises(UserError, match=r"of shape \(9, 8.*: a list of images is wanted, not one"):
        mm.predict(model, np.zeros(shape, np.uint8))
    assert mm.predict(model, np.zeros((2, 9, 8), np.uint8)).shape[0] == 2
