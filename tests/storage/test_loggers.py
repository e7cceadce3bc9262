"""Loggers: what they are told, that they never end a run, and that they say nothing of the machine.

Weights & Biases and MLflow are tested as they are where they are installed, without network.
"""

import contextlib
import csv
import getpass
import json
import platform
import sqlite3
import subprocess
import sys

import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.storage import loggers
from medmerge_jax.storage.loggers import LOGGERS, LoggerEntry, check_loggers
from medmerge_jax.storage.run_directory import RunDirectory

CONFIG = {"lp": {"epochs": 2}, "parents": {"b": "model.safetensors"}, "data": {"root": "images"}}


class Recorder:
    """A logger that keeps what it is told, and fails when it is told to."""

    def __init__(self, about):
        self.about, self.told, self.fails, self.closed = about, [], False, "no"

    def log(self, stage, epoch, values):
        if self.fails:
            raise ConnectionError("the server is gone")
        self.told.append((stage, epoch, dict(values)))

    def close(self, results):
        self.closed = results


@pytest.fixture
def recorders(monkeypatch):
    """Loggers "one" and "two", by name once they are open."""
    found = {}

    def opener(name):
        def open_one(about):
            found[name] = Recorder(about)
            return found[name]

        return open_one

    entries = {name: LoggerEntry(opener(name), "json", "train") for name in ("one", "two")}
    monkeypatch.setattr(LOGGERS, "_entries", {**LOGGERS, **entries})
    return found


def test_they_are_told_the_numbers_of_each_epoch_and_the_results(tmp_path, recorders):
    directory = RunDirectory(tmp_path / "study" / "ft-b" / "seed0", study=tmp_path / "study")
    directory.path.mkdir(parents=True)
    directory.begin_logging(("one", "one"), CONFIG)
    directory.log({"stage": "ft", "epoch": 1, "loss": 0.5, "auc": None, "note": "text", "ok": True})
    results = {"test": {"f1": 0.5, "auc": None}, "evaluate_on": {"idrid": {"f1": 0.25}}}
    directory.close(results)
    one = recorders["one"]
    assert (one.about.name, one.about.study) == ("ft-b/seed0", "study")
    assert one.about.config == CONFIG
    assert one.told == [("ft", 1, {"loss": 0.5})]
    assert one.closed == {"test/f1": 0.5, "idrid/f1": 0.25}


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path, recorders, capsys):
    directory = RunDirectory(tmp_path)
    directory.begin_logging(("one", "two"), CONFIG)
    recorders["one"].fails = True
    for epoch in (1, 2):
        directory.log({"stage": "ft", "epoch": epoch, "loss": 0.5})
    directory.close()
    assert capsys.readouterr().err.count("one is left out from here on (ConnectionError") == 1
    assert [epoch for _, epoch, _ in recorders["two"].told] == [1, 2]
    assert recorders["two"].closed is None
    assert len(directory.records()) == 2


def test_one_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch):
    def refuse(about):
        raise RuntimeError("no\nkey")

    entry = LoggerEntry(refuse, "json", "train", "give a key, ")
    monkeypatch.setattr(LOGGERS, "_entries", {"locked": entry})
    with pytest.raises(UserError, match=r"log_to has 'locked', .*no key.*give a key, or leave"):
        RunDirectory(tmp_path).begin_logging(("locked",), CONFIG)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_an_error_that_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"log_to has '{name}'.*medmerge-jax\[{name}\]"):
        check_loggers(("tensorboard", name)[1:])


def test_the_table_has_the_rows_of_the_lines_whatever_columns_are_added(tmp_path):
    directory = RunDirectory(tmp_path)
    records = [
        {"stage": "lp", "epoch": 1, "loss": 0.1, "auc": None},
        {"stage": "ft", "epoch": 1, "loss": 1e-07, "coefficient_mean": -0.5},
        {"stage": "=cmd()", "epoch": 2, "loss": 2},
    ]
    for record in records:
        directory.log(record)
    directory.close()  # as where a run ends by an error
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["stage", "epoch", "loss", "auc", "coefficient_mean"]
    for row, record in zip(rows, records, strict=True):
        for name, text in row.items():
            value = record.get(name)
            if value is None or isinstance(value, str):
                assert text in (value or "", f"'{value}")
            else:
                assert float(text) == value
    assert rows[2]["stage"] == "'=cmd()"
    directory.rewind("ft", 0)  # a run that goes on
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3


PROGRAM = """
import json, sys
from pathlib import Path
from medmerge_jax.storage.run_directory import RunDirectory

name, epochs, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
directory = RunDirectory(folder)
directory.begin_logging((name,), {config!r})
for epoch in epochs:
    directory.log({{"stage": "ft", "epoch": epoch, "loss": 1 / epoch}})
directory.close({{"test": {{"f1": 0.625}}}} if epochs[-1] == 3 else None)
"""


def log_in_two_parts(name, tmp_path, **environment):
    """Three epochs by two processes, the second of which goes on; the ids after each."""
    folder, ids = tmp_path / "runs" / "fundus", []
    for epochs in ([1, 2], [2, 3]):
        program = PROGRAM.format(config=CONFIG)
        done = subprocess.run(
            [sys.executable, "-c", program, name, json.dumps(epochs), str(folder)],
            env={**loggers.os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "left out" not in done.stderr, done.stderr
        ids.append(json.loads((folder / loggers.IDS_FILE).read_text())[name])
    assert ids[0] == ids[1]
    return folder, ids[0]


def names_of_the_machine(tmp_path):
    """What would say where a run was made; a user named "root" is named so everywhere."""
    names = {str(tmp_path), platform.node(), getpass.getuser(), sys.executable}
    return [name for name in names if len(name) > 4]


@pytest.mark.slow
def test_weights_and_biases_without_network(tmp_path):
    pytest.importorskip("wandb")
    folder, known_as = log_in_two_parts(
        "wandb", tmp_path, WANDB_MODE="offline", WANDB_API_KEY="0123456789" * 4
    )
    written = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2 and all(known_as in path.name for path in written)
    told = b"".join(path.read_bytes() for path in written)
    assert b"ft/loss" in told and b"test/f1" in told and b"0.625" in told
    assert b"model.safetensors" in told  # the config
    for name in (*names_of_the_machine(tmp_path), "0123456789" * 4):
        assert name.encode() not in told, name


@pytest.mark.slow
def test_mlflow_without_a_server(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    store = tmp_path / "store.db"
    _, known_as = log_in_two_parts("mlflow", tmp_path, MLFLOW_TRACKING_URI=f"sqlite:///{store}")
    with contextlib.closing(sqlite3.connect(store)) as database:

        def found(what):
            return database.execute(what).fetchall()

        assert found("select run_uuid, name, status from runs") == [
            (known_as, "fundus", "FINISHED")
        ]
        steps = found("select step from metrics where key = 'ft/loss' order by timestamp, step")
        assert [step for (step,) in steps] == [1, 2, 2, 3]
        assert found("select value from metrics where key = 'test/f1'") == [(0.625,)]
        assert found("select value from params where key = 'lp.epochs'") == [("2",)]
        told = [
            *found("select name, user_id, source_name, entry_point_name from runs"),
            *found("select key, value from params"),
            *found("select key, value from tags"),
        ]
    for name in names_of_the_machine(tmp_path):
        assert name not in repr(told), name
