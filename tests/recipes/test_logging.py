"""A run tells its loggers what it says in metrics.jsonl, and nothing of the machine."""

import csv

import pytest
from helpers import tiny_config

import medmerge_jax as mm
from medmerge_jax.errors import UserError
from medmerge_jax.storage import loggers
from medmerge_jax.storage.loggers import LOGGERS, LoggerEntry
from medmerge_jax.storage.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def told(monkeypatch):
    """What the logger "told" is told, by the name of the run."""
    runs = {}

    class Logger:
        def __init__(self, about):
            self.lines = []
            runs[about.name] = (about, self.lines)

        def log(self, stage, epoch, values):
            self.lines.append((stage, epoch, dict(values)))

        def close(self, results):
            self.lines.append(results)

    entries = {**LOGGERS, "told": LoggerEntry(Logger, "json", "train")}
    monkeypatch.setattr(LOGGERS, "_entries", entries)
    return runs


def test_a_missing_package_is_found_before_anything_is_written(tmp_path, monkeypatch):
    config = tiny_config.get_config()
    config.log_to = ("wandb",)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"medmerge-jax\[wandb\]"):
        mm.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_study_s_runs(tmp_path, told):
    config = tiny_config.get_config("compare")
    config.compare.recipes, config.compare.seeds = ("lp_ft",), (0,)
    config.parents = {"b": str(tmp_path / "source"), "c": "source:c"}
    source = tiny_config.get_config()
    source.recipe, source.parents, source.start = "ft", {"c": "random"}, "c"
    mm.run(source, tmp_path / "source")
    config.sources = {"c": config.sources.c}
    config.log_to = ("told",)
    results = mm.run(config, tmp_path / "run")
    assert set(told) == {"sources/c", "lp_ft-b/seed0", "lp_ft-c/seed0"}
    for name, (about, lines) in told.items():
        folder = tmp_path / "run" / name
        records = RunDirectory(folder).records()
        assert [line[:2] for line in lines[:-1]] == [(r["stage"], r["epoch"]) for r in records]
        assert lines[0][2]["train_loss"] == records[0]["train_loss"]
        assert any(key.startswith("test/") for key in lines[-1])
        assert about.study == "run"
        assert str(tmp_path) not in repr(about.config)
        with (folder / "metrics.csv").open(newline="") as file:
            assert [(r["stage"], int(r["epoch"])) for r in csv.DictReader(file)] == [
                (r["stage"], r["epoch"]) for r in records
            ]
        assert not (folder / "events").exists()
    # Another logger is no other config.
    config.log_to = ("tensorboard",)
    assert mm.run(config, tmp_path / "run") == results
