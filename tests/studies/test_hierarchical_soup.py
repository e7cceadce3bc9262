"""Soups of runs that are on the disk already, and groups of them by a field."""

import json

import ml_collections
import numpy as np
import pytest
from helpers import tiny_network
from helpers.random_models import variables_of
from helpers.tiny_network import ARCHITECTURE

import medmerge_jax as mm
from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten
from medmerge_jax.recipes import inputs
from medmerge_jax.studies import run
from medmerge_jax.weights import model_from_card

RATE = "ft.learning_rate"


@pytest.fixture(scope="module")
def grid(make_config, tmp_path_factory):
    """A study that leaves four members, of two learning rates."""
    path = tmp_path_factory.mktemp("grid") / "run"
    run(make_config("grid_search", **{"grid.seeds": (0, 1), "soup.group_by": RATE}), path)
    return path


@pytest.fixture
def members(grid):
    return {"all": f"{grid}/grid/*"}


@pytest.fixture
def make_soup(make_config):
    """A config of the study, of these models."""

    def make(members, group_by=""):
        config = make_config("hierarchical_soup", **{"soup.group_by": group_by})
        with config.unlocked():
            config.parents = ml_collections.ConfigDict(members)
        return config

    return make


def bare(value):
    return {name: one for name, one in value.items() if name not in ("low", "high")}


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_it_is_the_soups_of_the_study_that_made_the_members(grid, members, make_soup, tmp_path):
    config = make_soup(members, RATE)
    theirs = read(grid / "results.json")
    results = run(config, tmp_path / "again")
    rows = {row["recipe"]: row for row in results["table"]}
    assert set(rows) == {row["recipe"] for row in theirs["table"]} - {"best single, by test"}
    for row in theirs["table"]:
        if ours := rows.get(row["recipe"]):
            assert ours.pop("start").endswith(row.pop("start"))
            if row["recipe"].startswith("best"):  # of a member, whose interval is not known here
                row = {k: bare(v) if isinstance(v, dict) else v for k, v in row.items()}
            assert ours == row
    for soup in ("uniform", "greedy", "uniform-lr0.1", "GoU", "GoG"):
        ours, wanted = (
            flatten(mm.load_model(folder / "soups" / soup).variables)
            for folder in (tmp_path / "again", grid)
        )
        for path, leaf in wanted.items():
            np.testing.assert_array_equal(ours[path], leaf)


@pytest.mark.slow
def test_members_are_read_for_their_averages_only(members, make_soup, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a member was loaded")

    monkeypatch.setattr(inputs, "load_parent", refuse)
    results = run(make_soup(members), tmp_path / "run")
    assert {row["recipe"] for row in results["table"]} >= {"uniform", "greedy"}
    assert set(results["jobs"]) == {"soups/uniform", "soups/greedy"}


def test_models_without_a_config_have_no_group(make_soup, tmp_path):
    tiny_network.register_architecture()
    one = model_from_card(ARCHITECTURE, variables_of(0, architecture=ARCHITECTURE), {})
    mm.save_model(tmp_path / "one" / "model", one)
    mm.save_model(tmp_path / "another" / "model", one)
    members = {name: str(tmp_path / name / "model") for name in ("one", "another")}
    config = make_soup(members, RATE)
    with pytest.raises(UserError, match=r"parents\.\w+ = .*: no config\.json says how"):
        run(config, tmp_path / "run")
    config.soup.group_by = "ft.rate"
    with pytest.raises(UserError, match=r"soup\.group_by = 'ft\.rate': did you mean"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
