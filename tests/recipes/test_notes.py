"""That what the data's readers infer is printed, and stands in the audit and in the report."""

import json

from helpers import tiny_config

from medmerge_jax.analysis import write_report
from medmerge_jax.config import parse
from medmerge_jax.data.audit import audit_data_set, shareable_audit
from medmerge_jax.recipes.inputs import load_data


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
