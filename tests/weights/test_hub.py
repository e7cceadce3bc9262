"""Models of the Hugging Face hub: a real huggingface_hub, and a hub in this process."""

import json
import re
import time

import huggingface_hub
import numpy as np
import pytest
from helpers import tiny_config
from helpers.fake_hub import COMMIT, TOKEN, serving
from helpers.random_models import variables_of
from huggingface_hub import constants
from safetensors.numpy import save

import medmerge_jax as mm
from medmerge_jax.commands import export as command
from medmerge_jax.commands import merge
from medmerge_jax.errors import UserError
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.recipes import inputs
from medmerge_jax.studies.checks import check_config
from medmerge_jax.weights import hub as module
from medmerge_jax.weights import load_parent, variables_to_torch
from medmerge_jax.weights.references import HubReference, hub_reference

CLASSES = ("healthy", "ill", "very ill")
EXACT = f"hf://clinic/eyes@{COMMIT}/model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    module.fetch.cache_clear()
    with serving(tmp_path / "copies", monkeypatch) as hub:
        yield hub
    module.fetch.cache_clear()


@pytest.fixture
def variables():
    return variables_of(0, 3)


@pytest.fixture
def folder(tmp_path, variables):
    """A model directory."""
    hashes = np.arange(40, dtype=np.uint64).reshape(10, 4)
    facts = {"provenance": {"data_fingerprint": "f00d"}, "image_hashes": hashes}
    mm.save_model(
        tmp_path / "model", mm.Model("resnet20", variables, Preprocessing(32), CLASSES, **facts)
    )
    return tmp_path / "model"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(variables, architecture="resnet20"):
    named = variables_to_torch(architecture, variables)
    return save({name: np.ascontiguousarray(tensor) for name, tensor in named.items()})


def test_spelling():
    assert hub_reference("hf://a-b/c.d_e") == HubReference("a-b/c.d_e")
    assert hub_reference("hf://a/b@refs%2Fpr%2F1/x/y.pth") == HubReference(
        "a/b", "refs/pr/1", "x/y.pth"
    )
    for text in ("hf://a/b", "hf://a/b@v1", "hf://a/b/x", "hf://a/b@refs%2Fpr%2F1/x/y.pth"):
        assert str(hub_reference(text)) == text
    for text in ("hf://a", "hf://", "hf://a/b@", "hf://a/b/../c", "hf:///a/b", "hf://a/b//c"):
        with pytest.raises(UserError, match="ORG/NAME is wanted, with @REVISION"):
            hub_reference(text)


def test_a_model_of_ours(hub, folder, variables, assert_same, capsys):
    hub.files["clinic/eyes"] = {**contents(folder), "train.py": b"raise SystemExit", "x.bin": b""}
    model = mm.load_model("hf://clinic/eyes")
    assert_same(model.variables, variables)
    assert (model.classes, model.provenance["origin"]) == (CLASSES, EXACT)
    assert len(model.image_hashes) == 10
    assert "hf://clinic/eyes: model.safetensors is fetched" in capsys.readouterr().err
    fetched = {one.rpartition("/")[2] for one in hub.asked if "/resolve/" in one}
    assert fetched == {"model.safetensors", "model.json", "README.md", "image_hashes.npz"}

    asked = len(hub.asked)
    found, card = load_parent("hf://clinic/eyes", "resnet20")
    assert len(hub.asked) == asked  # a process asks once
    assert_same(found, variables)
    assert len(card["sha256"]) == 64
    assert_same(mm.load_weights("resnet20", "hf://clinic/eyes@v1"), variables)
    assert mm.load_model(EXACT).provenance["origin"] == EXACT


def test_a_parent_of_a_config(hub, folder, capsys, tmp_path):
    hub.files["clinic/eyes"] = contents(folder)
    config = tiny_config.get_config()
    config.architecture, config.parents.b = "resnet20", "hf://clinic/eyes"
    config.parents.c = "hf://clinic/ears"
    checked = check_config(config)
    (line,) = inputs.missing_parents(checked, ["b", "c"], [])
    assert "parents.c: hf://clinic/ears: the Hugging Face hub has no such model, or it" in line
    loaded = inputs.load_parents(checked, ["b"], tmp_path)
    assert f"parent b: {EXACT}, sha256 " in capsys.readouterr().err
    shared = mm.weights.shareable({"b": loaded["b"][1]}, "parents")["b"]
    assert (shared["source"], shared["origin"]) == ("hf://clinic/eyes", EXACT)


def test_the_command_merge(hub, folder, variables, tmp_path):
    hub.files["clinic/eyes"] = contents(folder)
    variables = variables_of(1, 3)
    mm.save_model(tmp_path / "b", mm.Model("resnet20", variables, Preprocessing(32), CLASSES))
    names = ["hf://clinic/eyes", str(tmp_path / "b")]
    merge.main(["--method", "uniform", "--out", str(tmp_path / "merged"), *names])
    parents = json.loads((tmp_path / "merged" / "model.json").read_text())["parents"]
    assert list(parents) == ["hf://clinic/eyes", "b"]
    assert parents["hf://clinic/eyes"]["origin"] == EXACT
    # Of one of the two it is not known what it was trained on.
    assert not (tmp_path / "merged" / "image_hashes.npz").exists()
    assert f"- hf://clinic/eyes: {EXACT} (" in (tmp_path / "merged" / "README.md").read_text()


def test_timms_layout(hub, variables, assert_same, capsys):
    card = b"---\nlicense: apache-2.0\ntags:\n- timm\n---\nlicense: mit\n"
    config = {
        "architecture": "resnet20",
        "num_classes": 3,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "crop_pct": 0.875,
            "crop_mode": "center",
            "label_names": list(CLASSES),
        },
    }
    files = {"README.md": card, "config.json": json.dumps(config).encode()}
    files |= {"model.safetensors": tensors(variables), "pytorch_model.bin": b"another"}
    hub.files["timm/small"] = files
    model = mm.load_model("hf://timm/small")
    assert_same(model.variables, variables)
    assert (model.preprocessing, model.classes) == (
        Preprocessing(64, "crop", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        CLASSES,
    )
    assert model.provenance["licence"] == "apache-2.0"
    assert "timm prepares its images with crop_pct 0.875; here" in capsys.readouterr().err

    config["pretrained_cfg"]["std"] = [0, 1, 1]
    module.fetch.cache_clear()
    hub.files["timm/other"] = {**files, "config.json": json.dumps(config).encode()}
    with pytest.raises(UserError, match=r"config\.json: std is \[0, 1, 1\]"):
        mm.load_model("hf://timm/other")


def test_which_file(hub, variables, assert_same):
    one = tensors(variables)
    hub.files["a/one"] = {"deep/weights.bin": one, "README.md": b"", "x.py": b""}
    assert_same(mm.load_weights("resnet20", "hf://a/one"), variables)
    other = tensors(variables_of(1, 3))
    hub.files["a/two"] = {"a.safetensors": other, "b/b.pth": one, "c.pt": other}
    with pytest.raises(UserError, match=r"has 2 weight files; .*as\n  hf://a/two@main/a\.safe"):
        mm.load_weights("resnet20", "hf://a/two@main")
    for name in ("hf://a/two/b", "hf://a/two@main/b/b.pth"):
        assert_same(mm.load_weights("resnet20", name), variables)
    hub.files["a/run"] = {
        "model/model.safetensors": one,
        "kept/ft-3/model/model.safetensors": other,
    }
    assert_same(mm.load_weights("resnet20", "hf://a/run"), variables)
    hub.files["a/none"] = {"README.md": b"", "train.py": b""}
    with pytest.raises(UserError, match=r"a/none: has no weight file .* README\.md, train\.py"):
        mm.load_weights("resnet20", "hf://a/none")
    with pytest.raises(UserError, match=r"a weight file \(\.safetensors, .* is wanted"):
        mm.load_weights("resnet20", "hf://a/none/train.py")
    with pytest.raises(UserError, match="has no branch, tag or commit 'v9'"):
        mm.load_weights("resnet20", "hf://a/one@v9")


def test_a_file_that_is_no_model_runs_nothing(hub, tmp_path):
    proof = tmp_path / "ran"
    code = f"cposix\nsystem\n(S'touch {proof}'\ntR.".encode()
    hub.files["a/evil"] = {"pytorch_model.bin": code, "model.py": b"import os"}
    with pytest.raises(UserError):
        mm.load_weights("resnet20", "hf://a/evil")
    assert not proof.exists()


def test_without_the_hub(hub, folder, variables, assert_same, capsys):
    hub.files["clinic/eyes"] = contents(folder)
    mm.load_model("hf://clinic/eyes")
    hub.close()
    module.fetch.cache_clear()
    began = time.monotonic()
    model = mm.load_model("hf://clinic/eyes")
    assert_same(model.variables, variables)
    assert (model.classes, model.provenance["origin"]) == (CLASSES, EXACT)
    assert "the hub does not answer" in capsys.readouterr().err
    for name in ("hf://clinic/ears", "hf://clinic/eyes@v1", "hf://clinic/eyes/other.pth"):
        with pytest.raises(
            UserError, match="is not on this machine and cannot be fetched"
        ) as error:
            mm.load_model(name)
        assert "Give the same command once where the hub can be reached" in str(error.value)
    assert time.monotonic() - began < 3 * module.SECONDS


def test_a_hub_that_says_nothing_is_waited_for_once(tmp_path, monkeypatch):
    """Connections are taken and never answered."""
    import socket

    module.fetch.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(tmp_path, monkeypatch):
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(module, "SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(UserError, match="cannot be fetched"):
            mm.load_model("hf://clinic/eyes")
        assert time.monotonic() - began < 1.5


def push(folder, to, *flags, repository="clinic/eyes"):
    command.main([str(folder), "--to", str(to), "--hub", repository, "--license", "mit", *flags])


def test_what_is_pushed_is_the_folder(hub, folder, tmp_path, capsys):
    push(folder, tmp_path / "x")
    assert hub.files["clinic/eyes"] == contents(tmp_path / "x")
    assert set(contents(tmp_path / "x")) == {
        *("model.safetensors", "model.json", "README.md", "image_hashes.npz")
    }
    captured = capsys.readouterr()
    assert f"pushed to hf://clinic/eyes@{COMMIT}" in captured.out
    assert "with hashes of its training images; --without-hashes" in captured.err
    assert TOKEN not in captured.out + captured.err
    sent = b"".join(hub.files["clinic/eyes"].values())
    assert str(tmp_path).encode() not in sent and TOKEN.encode() not in sent
    text = hub.files["clinic/eyes"]["README.md"].decode()
    assert text.startswith('---\nlicense: "mit"\n')
    assert 'mm.load_model("hf://clinic/eyes")' in text
    assert mm.load_model("hf://clinic/eyes").classes == CLASSES


def test_a_second_push_replaces_the_first_and_nothing_else(hub, folder, tmp_path):
    old = {"model.stablehlo": b"old", "model.json": b"old", "image_hashes.npz": b"old"}
    hub.files["clinic/eyes"] = {**old, "LICENSE": b"mine", "notes/model.onnx": b"mine"}
    push(folder, tmp_path / "x", "--without-hashes")
    assert set(hub.files["clinic/eyes"]) == {
        *("model.safetensors", "model.json", "README.md", "LICENSE", "notes/model.onnx")
    }
    assert hub.files["clinic/eyes"]["model.json"] != b"old"


def test_private(hub, folder, tmp_path):
    push(folder, tmp_path / "x", "--private")
    assert hub.private == {"clinic/eyes"}
    hub.private.clear()
    hub.files["clinic/eyes"].clear()
    with pytest.raises(UserError, match="is there and is public; make it private"):
        push(folder, tmp_path / "x", "--private")
    assert not hub.files["clinic/eyes"]


def test_what_is_wanted_for_a_push(hub, folder, tmp_path, monkeypatch, capsys):
    hub.forbidden = True
    with pytest.raises(UserError, match=r"x is written, but .* may not write there") as error:
        push(folder, tmp_path / "x")
    assert TOKEN not in str(error.value)
    assert (tmp_path / "x" / "model.json").exists()
    hub.close()
    with pytest.raises(UserError, match="again where the hub can be reached"):
        push(folder, tmp_path / "x")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="has no token of the Hugging Face hub"):
        push(folder, tmp_path / "y")
    with pytest.raises(UserError, match="--hub eyes: ORG/NAME is wanted"):
        push(folder, tmp_path / "y", repository="eyes")
    assert not (tmp_path / "y").exists()
    for flags in (["--hub", "clinic/eyes"], ["--private"], ["--license", "MIT licence"]):
        with pytest.raises(SystemExit):
            command.main([str(folder), "--to", str(tmp_path / "y"), *flags])
    assert "--hub wants --license ID" in capsys.readouterr().err


def test_every_line_of_code_of_a_card_loads_from_the_hub(hub, folder, tmp_path, variables):
    """Those of JAX are run; of the others, no path of a folder is left."""
    for kind in ("safetensors", "stablehlo"):
        push(folder, tmp_path / kind, "--format", kind, repository=f"clinic/{kind}")
        text = (tmp_path / kind / "README.md").read_text()
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            assert "the folder of this file" not in code
            assert re.search(rf"clinic/{kind}", code)
    names = {"images": np.zeros((1, 32, 32, 3), np.float32)}
    exec(code, names)
    assert names["logits"].shape == (1, 3)
