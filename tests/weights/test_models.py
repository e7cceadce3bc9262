import argparse
import collections
import json
import os
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from medmerge_jax.errors import UserError
from medmerge_jax.models import create_model
from medmerge_jax.weights import (
    load_model,
    load_parent,
    load_weights,
    model_fingerprint,
    model_from_card,
    save_model,
    save_weights,
    shareable,
    variables_to_torch,
)

CARD = {"num_classes": 5, "classes": list("abcde"), "recipe": "ft", "architecture": "ignored"}


def test_model_directory(tmp_path, variables, assert_same):
    save_model(tmp_path / "run" / "model", model_from_card("resnet20", variables, CARD))

    for source in (tmp_path / "run" / "model", str(tmp_path / "run")):
        found, card = load_parent(source, "resnet20")
        assert_same(found, variables)
        assert card["classes"] == CARD["classes"]
        assert card["architecture"] == "resnet20"
        assert card["versions"].keys() >= {"jax", "flax", "numpy"}
        assert card["file"] == str(tmp_path / "run" / "model" / "model.safetensors")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"model"}
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"


def test_a_model_directory_is_replaced(tmp_path, variables, make_variables, assert_same):
    save_model(
        tmp_path / "model",
        model_from_card("resnet20", variables, {"seed": 0, "versions": {"jax": "1"}}),
    )
    other = make_variables("resnet20", seed=1)
    save_model(
        tmp_path / "model",
        model_from_card("resnet20", other, {"seed": 1, "versions": {"jax": "2"}}),
    )
    found, card = load_parent(tmp_path / "model", "resnet20")
    assert_same(found, other)
    assert (card["seed"], card["versions"]) == (1, {"jax": "2"})
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_only_a_model_directory_is_replaced(tmp_path, variables):
    model = model_from_card("resnet20", variables, {})
    (tmp_path / "notes").write_text("mine")
    save_model(tmp_path / "model", model)
    (tmp_path / "model" / "photo.png").touch()
    with pytest.raises(UserError, match=r"notes: is a file; give the folder"):
        save_model(tmp_path / "notes", model)
    with pytest.raises(UserError, match=r"model: holds photo\.png, which would be lost"):
        save_model(tmp_path / "model", model)
    assert (tmp_path / "notes").read_text() == "mine"
    assert (tmp_path / "model" / "photo.png").exists()


@pytest.mark.parametrize("broken", ["card", "disk"])
def test_a_failed_save_leaves_nothing_or_the_old_model(
    tmp_path, variables, make_variables, assert_same, monkeypatch, broken
):
    save_model(tmp_path / "old", model_from_card("resnet20", variables, {}))
    card = {"value": float("nan")} if broken == "card" else {}
    if broken == "disk":

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
    for name in ("old", "new"):
        with pytest.raises((ValueError, OSError)):
            save_model(
                tmp_path / name,
                model_from_card("resnet20", make_variables("resnet20", seed=1), card),
            )
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert_same(load_parent(tmp_path / "old", "resnet20")[0], variables)


@pytest.mark.parametrize("card_name", ["eyes.json", "model.json"])
def test_bare_files_and_their_cards(tmp_path, variables, assert_same, card_name):
    file = tmp_path / "eyes.npz"
    np.savez(file, **variables_to_torch("resnet20", variables))
    found, card = load_parent(file, "resnet20")
    assert_same(found, variables)
    assert card == {"architecture": "resnet20", "file": str(file)}

    (tmp_path / card_name).write_text(json.dumps({"classes": ["x"], "architecture": "resnet20"}))
    assert load_parent(file, "resnet20")[1]["classes"] == ["x"]

    (tmp_path / card_name).write_text(json.dumps({"architecture": "resnet56"}))
    with pytest.raises(UserError, match=r"eyes\.npz: this is a resnet56.*resnet20 is wanted"):
        load_parent(file, "resnet20")


def test_a_model_json_belongs_to_its_model(tmp_path, variables):
    save_model(tmp_path, model_from_card("resnet20", variables, {"seed": 7}))
    save_weights(tmp_path / "other.safetensors", "resnet20", variables)
    assert load_parent(tmp_path, "resnet20")[1]["seed"] == 7
    assert "seed" not in load_parent(tmp_path / "other.safetensors", "resnet20")[1]


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_broken_cards(tmp_path, variables, text):
    save_weights(tmp_path / "model.safetensors", "resnet20", variables)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.json: (this is no JSON|holds a list)"):
        load_parent(tmp_path, "resnet20")


def test_missing_sources_name_what_is_there(tmp_path):
    wanted = tmp_path / "runs" / "eyepacs" / "model"
    with pytest.raises(UserError, match=f"{wanted}: there is no such .* {tmp_path} is there"):
        load_parent(wanted, "resnet20")
    with pytest.raises(UserError, match=r"holds no model. Wanted model\.safetensors in it"):
        load_parent(tmp_path, "resnet20")


def test_unknown_architecture_and_suffix(tmp_path, variables):
    for call in (load_weights, lambda name, path: load_parent(path, name)):
        with pytest.raises(UserError, match="did you mean 'resnet20'"):
            call("resnet_20", tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"written as \.safetensors, not '\.pth'"):
        save_weights(tmp_path / "x.pth", "resnet20", variables)


def test_fingerprint_is_of_names_shapes_types_and_values(variables, make_variables):
    wanted = model_fingerprint(variables)
    backwards = {key: variables[key] for key in reversed(variables)}
    assert model_fingerprint(backwards) == wanted
    assert model_fingerprint(make_variables("resnet20", seed=1)) != wanted
    assert model_fingerprint({"a": np.zeros(2)}) != model_fingerprint({"b": np.zeros(2)})
    assert model_fingerprint({"a": np.zeros(2)}) != model_fingerprint({"a": np.zeros((2, 1))})
    assert model_fingerprint({"a": np.zeros(2)}) != model_fingerprint({"a": np.zeros(2, int)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"mean": [0.5, 0.5]}', "mean is .*a number for each colour"),
        ('{"std": [0.5, 0, 0.5]}', "std is .*above 0"),
        ('{"image_size": 1e9}', "image_size is .*pixels"),
        ('{"image_size": 1000000000}', "image_size is .*pixels"),
        ('{"classes": "abc"}', "classes is 'abc'; names"),
        ('{"classes": [1]}', r"classes is \[1\]; names"),
        ('{"architecture": ["resnet20"]}', "architecture is .*a name"),
        ('{"multilabel": "no"}', "multilabel is 'no'; true or false"),
        ('{"origin": []}', "origin is"),
        ('{"loss": NaN}', "no JSON .*NaN"),
        ('{"loss": 1e999}', "no JSON"),
        ("[" * 100_000, "no JSON .*nested too deeply"),
    ],
)
def test_cards_of_any_content(tmp_path, variables, text, words):
    save_model(tmp_path, model_from_card("resnet20", variables, {}))
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=rf"model\.json: .*{words}"):
        load_parent(tmp_path, "resnet20")


def test_what_a_file_does_not_say_is_inferred_and_said(tmp_path, variables, capsys):
    save_weights(tmp_path / "eyes.safetensors", "resnet20", variables)
    model = load_model(tmp_path / "eyes.safetensors")
    assert (model.architecture, model.num_classes, model.classes) == ("resnet20", 5, ())
    assert model.preprocessing.size == 32
    said = capsys.readouterr().err
    assert "eyes.safetensors: nothing says its preprocessing; resnet20's is taken" in said
    assert "image_size 32, resize squash" in said


def test_names_of_other_classes_than_the_logits_are_refused(tmp_path, variables):
    for classes in ("abcd", "abcdef"):
        model = model_from_card("resnet20", variables, {"classes": list(classes)})
        with pytest.raises(UserError, match=rf"5 logits and the names of {len(classes)} classes"):
            save_model(tmp_path / "eyes", model)
    save_model(tmp_path / "eyes", model_from_card("resnet20", variables, CARD))
    card = json.loads((tmp_path / "eyes" / "model.json").read_text())
    (tmp_path / "eyes" / "model.json").write_text(json.dumps({**card, "classes": ["x"]}))
    with pytest.raises(UserError, match=r"model\.safetensors: .*names of 1 classes"):
        load_model(tmp_path / "eyes")


def test_the_readme_is_a_model_card_of_the_hub(tmp_path, variables):
    yaml = pytest.importorskip("yaml")
    card = {
        **CARD,
        "classes": ["a|b", "<b>", "c\nd", "`", "e"],
        "parents": {"b": {"source": "/x/y"}},
    }
    save_model(tmp_path / "eyes", model_from_card("resnet20", variables, card))
    _, front, text = (tmp_path / "eyes" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["medmerge", "image-classification", "resnet20"]
    assert "# resnet20\n" in text
    assert "- b: y\n" in text
    assert "<b>" not in text.replace("\\<", "")
    assert sum(line.startswith("| classes") for line in text.splitlines()) == 1


def test_files_of_a_model_are_readable_for_all_whom_the_umask_lets(tmp_path, variables):
    before = os.umask(0o022)
    try:
        save_model(tmp_path / "eyes", model_from_card("resnet20", variables, {}))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "eyes").iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "model.json", "README.md"), 0o644)
    assert (tmp_path / "eyes").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("value", "shared"),
    [
        ({"file": "/home/ann/b.pth", "source": "runs/b"}, {"file": "b.pth", "source": "b"}),
        ({"source": "imagenet", "seed": 0}, {"source": "imagenet", "seed": 0}),
        ({"source": "random, seed 0"}, {"source": "random, seed 0"}),
        ({"parents": {"b": "../ann/runs/b/"}}, {"parents": {"b": "b"}}),
        ({"parents": {"/a/x": {}, "/b/x": {}}}, {"parents": {"x": {}, "x'": {}}}),
        ({"classes": ["/home/ann/x", "and/or"]}, {"classes": ["/home/ann/x", "and/or"]}),
        ({"help": "see /home/ann/x y.txt or C:\\Users\\ann\\z"}, {"help": "see x y.txt or z"}),
        ({"url": "https://example.org/a/b"}, {"url": "https://example.org/a/b"}),
        ({"share": "1/2"}, {"share": "1/2"}),
    ],
)  # fmt: skip
def test_what_is_shared_names_files_without_folders(value, shared):
    assert shareable(value) == shared


def test_a_model_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path, variables, make_variables, assert_same, monkeypatch
):
    save_model(tmp_path / "eyes", model_from_card("resnet20", variables, {}))
    rename = Path.rename

    def fails(path, target):
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    other = model_from_card("resnet20", make_variables("resnet20", seed=1), {})
    with pytest.raises(OSError, match="Input/output"):
        save_model(tmp_path / "eyes", other)
    assert_same(load_parent(tmp_path / "eyes", "resnet20")[0], variables)
    assert [path.name for path in tmp_path.iterdir()] == ["eyes"]


def test_one_of_several_models_in_a_file(
    torch, tmp_path, variables, make_variables, assert_same, capsys
):
    """A checkpoint with companions of any class, and a whole module."""
    trees = {"state_dict": variables, "state_dict_ema": make_variables("resnet20", seed=1)}
    content = {
        where: {
            f"module.{name}": torch.from_numpy(np.array(tensor))
            for name, tensor in variables_to_torch("resnet20", tree).items()
        }
        for where, tree in trees.items()
    }
    content |= {
        "args": argparse.Namespace(lr=0.1, out=Path("x"), device=torch.device("cpu")),
        "epoch": np.float64(3),
        "history": collections.defaultdict(list, loss=[np.arange(3), datetime.now()]),
        "counts": collections.Counter("abca"),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "names": {"a", "b"},
        "kind": re.RegexFlag.I,
    }
    torch.save(content, tmp_path / "best.pth.tar")
    for choice, where in (("", "state_dict"), ("::state_dict_ema", "state_dict_ema")):
        found, card = load_parent(f"{tmp_path / 'best.pth.tar'}{choice}", "resnet20")
        assert_same(found, trees[where])
        assert load_model(f"{tmp_path / 'best.pth.tar'}{choice}").num_classes == 5
        assert any("'module.', which is taken off" in note for note in card["notes"])
    said = capsys.readouterr().err
    assert "holds 2 models, state_dict.module, state_dict_ema.module" in said


@pytest.mark.slow
def test_a_whole_module_is_read_and_never_made(torch, torchvision, tmp_path, assert_same):
    network = torchvision.models.resnet18(num_classes=4).eval()
    torch.save(network, tmp_path / "whole.pt")
    torch.save(network.state_dict(), tmp_path / "state.pt")
    model = load_model(tmp_path / "whole.pt")
    assert (model.architecture, model.num_classes) == ("resnet18", 4)
    assert_same(model.variables, load_weights("resnet18", tmp_path / "state.pt"))


@pytest.mark.slow
def test_a_whole_module_gives_pytorch_s_logits(torch, torchvision, tmp_path):
    network = torchvision.models.resnet18(num_classes=4).eval()
    torch.save(network, tmp_path / "whole.pt")
    model = load_model(tmp_path / "whole.pt")
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    logits = create_model("resnet18", 4).apply(model.variables, images, train=False)
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=1e-5)
