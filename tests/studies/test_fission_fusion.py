"""FissionFusion from drawn images to its table, and each of its soups by brute force."""

import json

import numpy as np
import pytest

import medmerge_jax as mm
from medmerge_jax.analysis import results_text
from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.merging.trees import flatten
from medmerge_jax.studies import run

# Where members are kept and which jobs there are is tested of the schedule and of plans, too.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(make_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "run"
    run(make_config("fission_fusion"), path)
    return path


def results(folder, job=""):
    return json.loads((folder / job / "results.json").read_text())


def leaves(path):
    return {name: np.asarray(x) for name, x in flatten(mm.load_model(path).variables).items()}


def mean(models):
    return {name: np.mean([one[name] for one in models], axis=0) for name in models[0]}


GROUPS = ("lr0.1", "lr0.01")
MEMBERS = ("base", "fgg-1", "fgg-5")


def member(folder, group, name):
    job = folder / "fgg" / group
    return leaves(job if name == "base" else job / "kept" / name)


def test_members_are_kept_at_the_minima_and_nowhere_else(folder):
    for group in GROUPS:
        kept = {path.name for path in (folder / "fgg" / group / "kept").iterdir()}
        assert kept == {"fgg-1", "fgg-5"}


def test_every_member_begins_with_the_warm_ups_head(folder):
    heads = {
        json.loads((path / "model.json").read_text())["head"]
        for path in (folder / "fgg").glob("**/model")
    }
    assert len(heads) == 1
    first = results(folder, "fgg/lr0.1")
    assert first["parents"]["warmup"]["recipe"] == "lp_drift"


def test_the_warm_up_leaves_all_but_head_and_running_statistics(folder):
    config = json.loads((folder / "warmup" / "config.json").read_text())["config"]
    assert (config["recipe"], config["head"]) == ("lp_drift", "new")
    warm, card = leaves(folder / "warmup"), results(folder, "warmup")
    # The parent is random: its scales are ones and its running means zeros.
    assert np.array_equal(warm["params/norm/scale"], np.ones(8))
    assert not np.allclose(warm["batch_stats/norm/mean"], 0)
    assert [stage["name"] for stage in card["stages"]] == ["lp_drift"]


def test_uniform_soups_are_means_of_everything(folder):
    for group in GROUPS:
        members = [member(folder, group, name) for name in MEMBERS]
        soup = leaves(folder / "soups" / f"uniform-{group}")
        for path, wanted in mean(members).items():
            np.testing.assert_allclose(soup[path], wanted, atol=1e-6, err_msg=path)


def scored(folder, job):
    return results(folder, job)["soup"]


@pytest.mark.parametrize("level", ["GoU", "GoG"])
def test_hierarchical_soups_are_greedy_soups_of_the_groups_soups(folder, level):
    kind = {"GoU": "uniform", "GoG": "greedy"}[level]
    facts = scored(folder, f"soups/{level}")
    assert set(facts["members"]) == set(GROUPS)
    for group, value in facts["members"].items():
        assert value == pytest.approx(results(folder, f"soups/{kind}-{group}")["val"]["loss"])
    chosen = [leaves(folder / "soups" / f"{kind}-{group}") for group in facts["chosen"]]
    soup = leaves(folder / "soups" / level)
    for path, wanted in mean(chosen).items():
        np.testing.assert_allclose(soup[path], wanted, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["greedy", "greedy-lr0.1", "greedy-lr0.01", "GoU", "GoG"])
def test_a_greedy_soup_is_never_worse_than_its_best_member_on_validation(folder, name):
    facts = scored(folder, f"soups/{name}")
    assert facts["variants"]["averaged"]["val"]["loss"] <= min(facts["members"].values())
    assert "explanation" not in facts


def test_the_table_has_all_soups_and_the_best_member_by_validation_and_by_test(folder):
    table = {row["recipe"]: row for row in results(folder)["table"]}
    assert set(table) == {
        "best single, by validation",
        "best single, by test",
        *(f"{one}{end}" for one in ("uniform", "greedy", "GoU", "GoG")
          for end in ("", ", recalibrated")),
    }  # fmt: skip
    tests = {group: results(folder, f"fgg/{group}") for group in GROUPS}
    best = min(GROUPS, key=lambda group: tests[group]["val"]["loss"])
    assert table["best single, by validation"]["start"] == best
    values = [one["test"]["loss"] for one in tests.values()]
    assert table["best single, by test"]["loss"]["mean"] == min(values)
    assert set(METRICS) <= set(table["GoG"])
    assert results(folder)["epochs"] == 2 + 2 * (2 + 5)


def test_further_data_sets_have_tables_of_their_own(folder):
    rows = {row["recipe"]: row for row in results(folder)["evaluate_on"]["elsewhere"]}
    assert set(rows) == {
        "best single, by validation", "best single, by test", "uniform", "greedy", "GoU", "GoG",
    }  # fmt: skip
    for name in ("uniform", "GoG"):
        own = results(folder, f"soups/{name}")["evaluate_on"]["elsewhere"]
        assert rows[name]["loss"]["mean"] == own["loss"]
        assert own["num_examples"] == 8
    assert "\n\nOn elsewhere\n\n" in results_text(results(folder))


def test_a_study_that_is_finished_is_not_run_again(folder, make_config, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = run(make_config("fission_fusion"), folder)
    assert again == results(folder)
    assert "nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_one_more_learning_rate_trains_one_more_member(folder, make_config, tmp_path):
    config = make_config("fission_fusion")
    config.grid.learning_rates = (1e-1, 1e-2, 1e-3)
    before = {path: path.stat().st_mtime_ns for path in (folder / "fgg").rglob("*.safetensors")}
    more = run(config, folder)
    assert set(more["members"]) == {"fgg/lr0.1", "fgg/lr0.01", "fgg/lr0.001"}
    for path, when in before.items():
        assert path.stat().st_mtime_ns == when
    assert set(scored(folder, "soups/GoG")["members"]) == {*GROUPS, "lr0.001"}
    assert len(scored(folder, "soups/uniform")["members"]) == 9
