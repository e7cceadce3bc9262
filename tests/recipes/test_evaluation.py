"""A run on further data sets, and the command evaluate on what a run has left."""

import dataclasses
import json
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from absl import flags
from helpers import tiny_config, tiny_network
from helpers.random_models import variables_of
from scipy.special import softmax

import medmerge_jax as mm
from medmerge_jax import weights
from medmerge_jax.analysis import results_text
from medmerge_jax.commands.evaluate import main
from medmerge_jax.config import completed, default_evaluate_on
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.recipes.evaluation import evaluate_models
from medmerge_jax.studies import run
from medmerge_jax.studies.checks import check_config

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections

TINY = Path(tiny_config.__file__)
MAPPED = {"0": "0", "1": ("1",), "2": ("2", "3")}
"""Grade 3 of the data has no partner, and two of the model are grade 2."""


def with_sets():
    """The tiny config, evaluated on its own images again: test, remapped, training, all."""
    config = tiny_config.get_config()
    tiny_network.register_architecture()
    config.architecture, config.recipe = tiny_network.ARCHITECTURE, "lp"
    config.lp.epochs = 1
    sets = {}
    for name in ("again", "mapped", "seen", "clean"):
        sets[name] = default_evaluate_on()
        sets[name].data = config.data.copy_and_resolve_references()
    sets["mapped"].classes, sets["mapped"].unmapped = ml_collections.ConfigDict(MAPPED), "drop"
    sets["seen"].split, sets["clean"].split = "train", "all"
    sets["clean"].data.exclude_overlap = True
    config.evaluate_on = ml_collections.ConfigDict(sets)
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMERGE_JAX_CACHE", str(home / "cache"))
        run(with_sets(), home / "run")
        yield home


@pytest.fixture
def command(monkeypatch):
    """Calls the command as a new process would; ml_collections looks at sys.argv for fields."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["medmerge_jax", *arguments])
        flags.FLAGS["config"].unparse()
        main(arguments)

    return call


@pytest.fixture
def results(home):
    return json.loads((home / "run" / "results.json").read_text())


def test_the_own_test_split_as_a_further_set_gives_the_same_to_the_digit(home, results):
    assert results["evaluate_on"]["again"] == results["test"]
    head = results_text(results).splitlines()[2].split()
    columns = head[1::2]
    assert columns == ["metric", "val", "test", "again", "clean", "mapped", "seen"]
    own, again = (
        Predictions.load(home / "run" / f"predictions{name}.npz") for name in ("", "-again")
    )
    for field in dataclasses.fields(Predictions):
        np.testing.assert_equal(getattr(again, field.name), getattr(own, field.name))


def test_mapped_classes_by_hand(home, results):
    own = Predictions.load(home / "run" / "predictions.npz")
    known = own.labels < 3
    probabilities = softmax(own.logits.astype(np.float64), axis=1)[known]
    three = np.stack([probabilities[:, 0], probabilities[:, 1], probabilities[:, 2:].sum(1)], 1)
    found = results["evaluate_on"]["mapped"]
    assert found["num_examples"] == known.sum() < len(own)
    assert found["accuracy"] == np.mean(three.argmax(axis=1) == own.labels[known])
    nll = -np.log(three[np.arange(len(three)), own.labels[known]])
    assert found["loss"] == pytest.approx(nll.mean())


def test_the_audit_says_what_is_known_of_a_further_set(home, results):
    audit = json.loads((home / "run" / "data_audit.json").read_text())
    seen = audit["evaluate_on"]["seen"]
    assert seen["known"]["this run"]["images"] == seen["images"] == 16
    assert "seen: this run was trained on 16 of 16 evaluated images" in " ".join(audit["summary"])
    assert "this run was trained on 16 of 16" in (home / "run" / "report.html").read_text()
    assert audit["evaluate_on"]["clean"]["excluded"] == 16
    assert results["evaluate_on"]["clean"]["num_examples"] == 8 + 12
    assert results["evaluate_on"]["seen"]["num_examples"] == 16
    described = results["data"]["evaluate_on"]
    assert described["mapped"]["classes"] == ["0", "1", "2"]
    assert described["again"]["fingerprint"] == described["mapped"]["fingerprint"]
    assert described["again"]["fingerprint"] != described["seen"]["fingerprint"]


def test_the_audit_says_what_a_parent_knows_of_a_further_set(home, tmp_path, capfd):
    config = with_sets()
    config.parents.b = str(home / "run")
    config.data.synthetic.appearance, config.data.name = 1, "another"
    run(config, tmp_path / "run", dry_run=True)
    said = capfd.readouterr().err
    assert "seen: parent b was trained on 16 of 16 evaluated images" in said
    assert "again: parent b" not in said and "clean: parent b" not in said


def test_a_run_on_its_own_test_split_gives_its_own_numbers(home, results, capsys, command):
    out = home / "out" / "own.json"
    command("--config", str(TINY), str(home / "run"), f"--out={out}")
    found = json.loads(out.read_text())["models"][0]
    assert found["metrics"] == results["test"]
    assert (found["model"], found["left_out"]) == ("run", 0)
    assert found["counts"] == results["data"]["counts"]["test"]
    assert found["audit"]["known"]["the model"]["images"] == 0
    interval = found["intervals"]["accuracy"]
    assert interval["low"] <= found["metrics"]["accuracy"] <= interval["high"]
    printed = capsys.readouterr().out
    shown = next(line for line in printed.splitlines() if line.startswith("| accuracy"))
    assert f" {found['metrics']['accuracy']:.4f} [{interval['low']:.4f}, " in shown
    assert printed.splitlines()[0].startswith(
        "clinic_2, test: value [95 % bootstrap interval over images]"
    )


def test_a_mapping_on_the_command_line(home, results, command):
    given = json.dumps({name: list(parts) for name, parts in MAPPED.items()})
    out = home / "mapped.json"
    options = ["--classes", given, "--unmapped=drop", "--out", str(out)]
    command(*options, "--config", str(TINY), str(home / "run"))
    found = json.loads(out.read_text())["models"][0]
    assert found["metrics"] == results["evaluate_on"]["mapped"]
    assert found["left_out"] == results["data"]["counts"]["test"]["3"]
    assert f"{found['left_out']} of 12 images are left out" in " ".join(found["notes"])


def test_models_keep_their_own_preprocessing(home):
    """A weight file of 32 pixels beside the run of 16, on the run's images."""
    card = {"image_size": 32, "resize": "crop", "num_classes": 4, "data_fingerprint": "x"}
    other = variables_of(0, architecture=tiny_network.ARCHITECTURE)
    weights.save_model(home / "b", weights.model_from_card(tiny_network.ARCHITECTURE, other, card))
    config = check_config(tiny_config.get_config())
    run_found, found = evaluate_models([str(home / "run"), str(home / "b")], config)["models"]
    assert run_found["notes"] == []
    notes = " ".join(found["notes"])
    assert "image_size 32, as the model's; not 16" in notes and "resize crop" in notes
    assert "taken by number: 0 is 0" in notes and "training images are not known" in notes
    paths = sorted((home / "run" / "data" / "clinic_2" / "test").rglob("*.png"))
    labels = np.array([int(path.parent.name) for path in paths])
    predicted = mm.predict(mm.load_model(home / "b"), paths).argmax(axis=1)
    assert found["metrics"]["accuracy"] == pytest.approx(np.mean(predicted == labels))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "--config FILE is missing"),
        (["run", f"--config={TINY}", "--config.data.nothing=1"], "nothing"),
        (["run", f"--config={TINY}", "--classes", "{0"], "this is no JSON"),
        (["run", f"--config={TINY}", "--classes", '{"0": 1}'], "names are wanted"),
        (["run", f"--config={TINY}", "--config.data.kind=folder", "--config.data.root=/nowhere"],
         "data.root = /nowhere: there is no such"),
        (["nowhere", f"--config={TINY}"], "nowhere: there is no such file"),
        (["run", f"--config={TINY}", "--classes", '{"0": "x"}'], "run: classes of the model: ther"),
    ],
)  # fmt: skip
def test_command_lines_that_cannot_be_used(home, monkeypatch, command, arguments, words):
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=words):
        command(*arguments)


def test_a_model_without_a_head(home):
    bare = weights.model_from_card("resnet20", variables_of(0, num_classes=0), {})
    weights.save_model(home / "bare", bare)
    with pytest.raises(UserError, match="bare: the model has no head"):
        evaluate_models([str(home / "bare")], check_config(tiny_config.get_config()))


def test_what_is_wrong_with_a_further_set_is_said_before_anything_is_trained(tmp_path):
    config = with_sets()
    config.evaluate_on.seen.data.kind = config.evaluate_on.again.data.kind = "folder"
    config.evaluate_on.again.data.root = str(tmp_path / "nowhere")
    with pytest.raises(UserError) as raised:
        run(config, tmp_path / "run")
    assert "evaluate_on.again.data.root" in str(raised.value)
    assert "give a path, --config.evaluate_on.seen.data.root=PATH" in str(raised.value)
    config = with_sets()
    config.evaluate_on.again.data.fractions = (0.5, 0.5)
    config.evaluate_on.again.data.window = (3.0, 1.0)
    config.evaluate_on.again.unlock().split = "tests"
    config.evaluate_on.unlock().test = config.evaluate_on.seen
    with pytest.raises(UserError) as raised:
        check_config(config)
    for words in ("again.data.window", "again.split = 'tests': did you mean", "test: letters, dig"):
        assert f"evaluate_on.{words}" in str(raised.value)


def test_a_further_set_of_other_classes_is_refused_by_name(home, tmp_path):
    config = with_sets()
    config.evaluate_on.mapped.unmapped = "error"
    with pytest.raises(UserError, match=r"evaluate_on\.mapped: classes without .*\['3'\] of"):
        run(config, tmp_path / "run", dry_run=True)


def test_a_further_set_without_an_image_of_the_run_s_classes_is_refused_before_training(
    home, tmp_path, write_images
):
    write_images(
        *(tmp_path / "images" / name / "x.png" for name in ("train/0", "train/1", "test/8"))
    )
    config = with_sets()
    config.evaluate_on.mapped.data.kind = "folder"
    config.evaluate_on.mapped.data.root = str(tmp_path / "images")
    config.evaluate_on.mapped.classes = ml_collections.ConfigDict({"0": "0", "1": "1"})
    with pytest.raises(UserError, match=r"evaluate_on\.mapped: no image is of any of the classes"):
        run(config, tmp_path / "run", dry_run=True)


def test_a_config_of_before_has_no_further_sets():
    found = completed({"sources": {"b": {"evaluate_on": {"idrid": {"data": {"root": "x"}}}}}})
    assert found["evaluate_on"] == {}
    idrid = found["sources"]["b"]["evaluate_on"]["idrid"]
    assert (idrid["split"], idrid["data"]["root"], idrid["data"]["resize"]) == (
        "test", "x", "squash",
    )  # fmt: skip
