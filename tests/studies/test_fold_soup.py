"""A soup over the folds of a cross-validation."""

import json

import numpy as np
import pytest

import medmerge_jax as mm
from medmerge_jax.merging.trees import flatten
from medmerge_jax.studies import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(make_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("folds") / "run"
    run(make_config("fold_soup", **{"fold_soup.folds": 3}), path)
    return path


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_every_image_is_val_of_one_member_and_train_of_all_others(folder):
    counts = [read(folder, f"folds/{k}-seed0/results.json")["data"]["counts"] for k in range(3)]
    whole = read(folder, "warmup/results.json")["data"]["counts"]
    together = {c: whole["train"][c] + whole["val"][c] for c in whole["train"]}
    for one in counts:
        assert {c: one["train"][c] + one["val"][c] for c in together} == together
        assert one["test"] == whole["test"]
    assert {c: sum(one["val"][c] for one in counts) for c in together} == together
    notes = read(folder, "folds/1-seed0/data_audit.json")["notes"]
    assert any("3 folds (stratified, seed 0), of which number 1 is val" in note for note in notes)


def test_the_soup_is_the_mean_of_the_folds_models(folder):
    members = [flatten(mm.load_model(folder / f"folds/{k}-seed0").variables) for k in range(3)]
    soup = flatten(mm.load_model(folder / "soups/uniform").variables)
    for path, leaf in soup.items():
        wanted = np.mean([one[path] for one in members], axis=0)
        np.testing.assert_allclose(leaf, wanted, atol=1e-6)
    table = {row["recipe"]: row for row in read(folder, "results.json")["table"]}
    assert table["uniform"]["start"] == "3 of 3"
