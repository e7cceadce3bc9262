"""That what the readers of data and weights infer is printed, and stands where others see it."""

import html
import json

import numpy as np
from helpers import tiny_config
from helpers.random_models import variables_of

from medmerge_jax import weights
from medmerge_jax.analysis import write_report
from medmerge_jax.config import parse
from medmerge_jax.data.audit import audit_data_set, shareable_audit
from medmerge_jax.recipes import prepare
from medmerge_jax.recipes import run as run_module
from medmerge_jax.recipes.experiment import Experiment
from medmerge_jax.recipes.inputs import load_data
from medmerge_jax.recipes.run import leave_audit, shared_parents
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.studies.checks import check_config


def test_notes_are_printed_and_stand_in_audit_and_report(tmp_path, write_images, capsys):
    root = tmp_path / "images"
    write_images(
        *(root / name / f"{i}.png" for name in ("Training/a", "Training/b") for i in "012")
    )
    write_images(*(root / "Testing" / name / "secret.png" for name in "ab"))
    (root / "Training/a/patient_7.txt").touch()
    config = tiny_config.get_config()
    config.data.kind, config.data.root = "folder", str(root)
    dataset = load_data(parse(config), tmp_path)
    shown = capsys.readouterr().err
    left_out = "1 file is left out: no name ends in .jpg"
    read_as = "the folder Training is read as the split train; another name overrules it"
    assert f"data {config.data.name}: {read_as}\n" in shown
    assert left_out in shown
    assert "for instance Training/a/patient_7.txt" in shown

    audit = audit_data_set(dataset)
    assert audit["notes"] == list(dataset.notes)
    shared = shareable_audit(audit, dataset)
    (tmp_path / "data_audit.json").write_text(json.dumps(shared))
    assert "patient_7" not in json.dumps(shared)
    write_report(tmp_path)
    report = (tmp_path / "report.html").read_text()
    assert read_as in report
    assert left_out in report
    assert "patient_7" not in report


def test_what_is_inferred_of_a_parent_stands_in_report_and_card(torch, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    tensors = weights.variables_to_torch("resnet20", variables_of(0))
    tensors["conv1.weight"] = tensors["conv1.weight"][:, :1]
    named = {
        f"module.{name}": torch.from_numpy(np.array(tensor))
        for name, tensor in tensors.items()
        if "running" not in name
    }
    torch.save({"state_dict": named, "state_dict_ema": dict(named)}, tmp_path / "b.pth")
    card = {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 64}
    (tmp_path / "b.json").write_text(json.dumps(card))
    config = tiny_config.get_config()
    config.architecture = "resnet20"
    config.recipe, config.parents.b = "ft", str(tmp_path / "b.pth")
    config.estimate_statistics = True
    checked, directory = check_config(config), RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    inputs = prepare.load_inputs(prepare.prepare(checked, ["b"], directory.path, {}))
    leave_audit(directory, inputs)
    shared = shared_parents(inputs)
    words = (
        "its names begin with 'module.', which is taken off",
        "holds 2 models, state_dict.module, state_dict_ema.module",
        "its first convolution takes one channel; it is spread over three",
        "its first convolution and batch norm were adapted",
        "its images had image_size 64, here it is 16",
        "its batch norms had no running statistics; they were estimated on 16 images of clinic_2",
    )
    notes = shared["b"]["notes"]
    for word in words:
        assert sum(word in note for note in notes) == 1, word
    directory.write_json("results.json", {"recipe": "ft", "parents": shared})
    write_report(directory.path)
    report = html.unescape((directory.path / "report.html").read_text())
    model = run_module._model(Experiment(checked, directory, inputs), inputs.parents["b"][0], "")
    weights.save_model(tmp_path / "model", model)
    saved = json.loads((tmp_path / "model" / "model.json").read_text())
    assert saved["parents"]["b"]["notes"] == notes
    for note in notes:
        assert note in report, note
