"""What a run leaves, also where it was killed while it wrote."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
from helpers import tiny_config

from medmerge_jax.config import parse, to_json
from medmerge_jax.errors import UserError
from medmerge_jax.storage import atomic, run_directory
from medmerge_jax.storage.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path)
    yield directory
    directory.close()


def test_a_line_cut_short_is_forgotten(directory):
    for epoch in (1, 2):
        directory.log({"stage": "lp", "epoch": epoch, "loss": 0.5})
    path = directory.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "lp", "ep')
    assert [record["epoch"] for record in directory.records()] == [1, 2]
    directory.rewind("lp", 2)
    directory.log({"stage": "lp", "epoch": 3, "loss": 0.25})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_rewinding_leaves_other_stages_alone(directory):
    for stage, epochs in (("lp", 2), ("ft", 3)):
        for epoch in range(1, epochs + 1):
            directory.log({"stage": stage, "epoch": epoch, "loss": 0.5})
    directory.rewind("ft", 1)
    found = [(record["stage"], record["epoch"]) for record in directory.records()]
    assert found == [("lp", 1), ("lp", 2), ("ft", 1)]


def test_what_is_said_of_layers_goes_into_a_file_of_its_own(directory):
    for epoch in (1, 2, 3):
        directory.log({"stage": "merge_lp", "epoch": epoch}, {"conv1/kernel": [[0.5, epoch]]})
    directory.log({"stage": "ft", "epoch": 1}, {})
    path = directory.path / "coefficients.jsonl"
    path.write_text(path.read_text() + '{"stage": "merge_lp", "ep')
    directory.rewind("merge_lp", 2)
    assert [record["stage"] for record in directory.records()] == ["merge_lp", "merge_lp", "ft"]
    assert directory.records("coefficients.jsonl") == [
        {"stage": "merge_lp", "epoch": epoch, "layers": {"conv1/kernel": [[0.5, epoch]]}}
        for epoch in (1, 2)
    ]
    assert not any("layers" in record for record in directory.records())


def test_the_fields_that_differ_are_named(directory):
    config = {"ft": {"epochs": 2}, "seed": 0}
    directory.record_config(config, "data", {"b": "one"}, {})
    directory.record_config(config, "data", {"b": "one", "c": "made since"}, {})
    with pytest.raises(UserError, match=r"ft\.epochs: 2 there, 3 now"):
        directory.check_config({"ft": {"epochs": 3}, "seed": 0})
    with pytest.raises(UserError, match="other data"):
        directory.record_config(config, "other", {}, {})
    with pytest.raises(UserError, match="another parent b"):
        directory.record_config(config, "data", {"b": "two"}, {})


def test_free_fields_are_named_whole(tmp_path):
    """A group with its fields, and none whose name only begins so."""
    directory = RunDirectory(tmp_path / "run", free=("grid",))
    config = {"grid": {"seeds": [0]}, "grids": 1}
    directory.record_config(config, "data", {}, {})
    directory.check_config({**config, "grid": {"seeds": [0, 1]}})
    with pytest.raises(UserError, match="grids: 1 there, 2 now"):
        directory.check_config({**config, "grids": 2})


def test_a_killed_process_leaves_its_temporaries_to_the_next(directory, monkeypatch):
    class Killed(BaseException):
        """Like SIGKILL, it leaves no time to clean up."""

    def write(file):
        file.write(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        atomic.write_atomically(directory.path / "lp-b" / "results.json", write)
    (directory.path / ".model.ab12_xyz").mkdir()
    (directory.path / ".model.ab12_xyz" / "model.safetensors").write_bytes(b"half")
    (directory.path / "data" / "clinic").mkdir(parents=True)
    (directory.path / "data" / "clinic" / ".synthetic.json").write_text("{}")
    assert len(list((directory.path / "lp-b").iterdir())) == 1
    directory.write_json("config.json", {})
    with directory.locked():
        left = {path.name for path in directory.path.rglob("*")}
    assert left == {".lock", "config.json", "lp-b", "data", "clinic", ".synthetic.json"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only goes on where it is told to."""
    now = [1000.0]
    monkeypatch.setattr(run_directory.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_the_seconds_of_all_processes_are_counted(tmp_path, clock):
    """Of a comparison too, while its parts are at work; a killed process loses an epoch's."""
    whole, part = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run" / "lp")
    with contextlib.suppress(InterruptedError), whole.locked():
        for directory in (whole, part):
            directory.start_clock()
            directory.write_json("config.json", {})
            clock(10)
        raise InterruptedError
    clock(500)  # nobody is at work
    with whole.locked():
        for directory in (whole, part):
            directory.start_clock()
        clock(5)
        part.log({"stage": "lp", "epoch": 1})
        saved = [(directory.path / "seconds.json").read_bytes() for directory in (whole, part)]
        clock(7)
    for directory, content in zip((whole, part), saved, strict=True):
        (directory.path / "seconds.json").write_bytes(content)  # as if killed without a word
    with whole.locked():
        for directory in (whole, part):
            directory.start_clock()
        clock(1)
        assert (whole.wall_seconds(), part.wall_seconds()) == (26, 16)
        part.clean_up({})
        clock(3)
        assert whole.wall_seconds() == 29
        whole.clean_up({})
    assert not list(tmp_path.rglob("seconds.json"))


def test_the_seconds_of_a_run_that_kept_none_are_those_of_its_epochs(directory, clock):
    for epoch in (1, 2):
        directory.log({"stage": "lp", "epoch": epoch, "seconds": 2.5})
    directory.start_clock()
    clock(1)
    assert directory.wall_seconds() == 6


def test_a_run_of_which_nothing_is_left_is_not_made_anew_for_its_seconds(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        directory.start_clock()
        directory.write_json("config.json", {})
        (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_keeps_no_checkpoint_that_its_model_repeats(directory):
    """What is the only copy of something stays, and what is damaged, to be looked at."""
    folder = directory.path / "checkpoints"
    stays = ["lp/8/d/x", "lp/8.json", "ft/12.damaged/d/x"]
    goes = ["lp/3.model.npz", "ft/5.model.npz", "ft/8/d/x", "ft/8.json", "ft/12/d/x", "ft/12.json"]
    for name in stays + goes + ["../merged.npz"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    directory.clean_up({"stages": [{"name": "lp"}, {"name": "ft"}]})
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == set(stays)
    assert sorted(p.name for p in directory.path.iterdir()) == ["checkpoints"]


def test_where_the_last_stage_was_the_only_one_no_folder_is_left(directory):
    (directory.path / "checkpoints" / "ft" / "8").mkdir(parents=True)
    directory.clean_up({"stages": [{"name": "ft"}]})
    assert not list(directory.path.iterdir())


def test_a_directory_in_which_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(UserError), RunDirectory(tmp_path / "run").locked():
        raise UserError("no")
    assert not (tmp_path / "run").exists()
    with RunDirectory(tmp_path / "run").locked():
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    ours = [".results.json.abcd1234", "figures/.comparison.svg.abcd1234", ".model.abcd1234/x"]
    users = [".vscode.settings", "notes.txt", ".results.json.backup"]
    for name in ours + users:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with RunDirectory(tmp_path).locked():
        assert all((tmp_path / name).exists() for name in ours + users)  # no run is in here
    (tmp_path / "config.json").write_text("{}")
    with RunDirectory(tmp_path).locked():
        assert all((tmp_path / name).exists() for name in users)
        assert not any((tmp_path / name).exists() for name in ours)


def test_what_a_worker_is_writing_is_left_by_those_who_hold_its_study(tmp_path):
    """A second worker begins by holding the study, while the first one is at work on a job."""
    study, job = RunDirectory(tmp_path), RunDirectory(tmp_path / "grid" / "lr0.001")
    study.write_json("config.json", {})
    with job.locked():
        job.write_json("config.json", {})
        writing = job.figures / ".confusion_matrix.png.abcd1234"
        writing.parent.mkdir()
        writing.write_text("half")
        with study.locked():
            assert writing.exists()
    with job.locked():
        assert not writing.exists(), "the next one at work on the job removes it"


@pytest.mark.parametrize(
    "text", ["[]", "1", "{}", '{"config": 1}', "[" * 10**5, '{"config": {}}', "NaN", "\0"]
)
def test_a_damaged_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        RunDirectory(tmp_path).check_config({"a": 1})


@pytest.mark.parametrize("line", ["[]", "{}", "{", '{"epoch": "1"}', "[" * 10**5, "\udcff"])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
    good = '{"stage": "ft", "epoch": 1}\n'
    text = f"{good}{line}\n{good}"
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        RunDirectory(tmp_path).rewind("ft", 0)


def test_a_run_of_an_earlier_version_lacks_what_has_become_a_field_since(tmp_path):
    """What it did is what the field's default says."""
    config = to_json(parse(tiny_config.get_config("compare")))
    earlier = copy.deepcopy(config)
    for stage in (earlier["lp"], earlier["sources"]["b"]["ft"]):
        for field in ("patience", "patience_delta", "keep"):
            del stage[field]
    del earlier["data"]["ordinal"]
    record = {"config": earlier, "data_fingerprint": "", "parent_fingerprints": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    RunDirectory(tmp_path).check_config(config)
    config["lp"]["patience"] = config["sources"]["b"]["ft"]["patience"] = 3
    config["data"]["ordinal"] = True
    with pytest.raises(UserError) as error:
        RunDirectory(tmp_path).check_config(config)
    assert str(error.value).splitlines()[1:4] == [
        "  data.ordinal: absent there, true now",
        "  lp.patience: 0 there, 3 now",
        "  sources.b.ft.patience: 0 there, 3 now",
    ]
