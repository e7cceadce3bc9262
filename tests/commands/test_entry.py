"""The door of the commands: help, names, and what every command has in common."""

import importlib
import importlib.metadata
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.parameters import some_quick

from medmerge_jax.commands import entry
from medmerge_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.fixture
def command(monkeypatch):
    """A command that raises what it is told, called through the door; returns the exit status."""

    def start(error):
        def main(arguments):
            raise error

        module = type(sys)("medmerge_jax.commands.told")
        module.main = main
        monkeypatch.setitem(sys.modules, "medmerge_jax.commands.told", module)
        monkeypatch.setattr(entry.cpu, "prepare", lambda: None)
        monkeypatch.setattr(entry.preemption, "install", lambda: None)
        with pytest.raises(SystemExit) as left:
            entry.start("told", [])
        return left.value.code

    return start


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_all_commands_are_listed(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medmerge", *arguments])
    entry.main()
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in entry.COMMANDS)


@pytest.mark.parametrize("call", [entry.main, lambda: entry.start("run", ["--version"])])
def test_versions(call, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medmerge", "--version"])
    call()
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["medmerge-jax"] == PROJECT["version"]
    assert printed["jax"] == importlib.metadata.version("jax")
    assert printed["Python"] == sys.version.split()[0]


def test_a_command_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medmerge", "merg"])
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == 2
    assert "no command 'merg'; did you mean 'merge'" in capsys.readouterr().err


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_has_a_file_and_explains_itself(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(f"medmerge_jax.commands.{name}")
    try:
        module.main(["--help"])
    except SystemExit as left:
        assert not left.code
    printed = capsys.readouterr().out
    assert "xample" in printed and max(map(len, printed.splitlines())) <= 80


def test_help_of_a_run_ends_with_status_0_and_without_jax():
    code = (
        "import sys; from medmerge_jax.commands import entry; entry.start('run', ['--help']); "
        "sys.exit('jax' in sys.modules)"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "--config configs/quickstart.py" in result.stdout


def test_programs_by_their_names():
    for arguments in (["medmerge_jax"], ["medmerge_jax.main", "--help"]):
        result = python("-m", *arguments)
        assert result.returncode == 0 and not result.stderr, result.stderr
    assert PROJECT["scripts"] == {"medmerge": "medmerge_jax.__main__:main"}


def test_the_statuses(command, capsys, tmp_path):
    assert command(UserError("this cannot be used")) == 2
    assert capsys.readouterr().err == "error: this cannot be used\n"
    assert command(ModuleNotFoundError("no", name="optax")) == 2
    assert "optax is missing; pip install 'medmerge-jax[train]'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # of a config file, say: no extra of ours brings it
        command(ModuleNotFoundError("no", name="pandas"))
    assert command(KeyboardInterrupt()) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        command(ZeroDivisionError())
    # Of a folder that is nobody's workplace the operating system's error is a bug.
    with pytest.raises(FileNotFoundError):
        command(FileNotFoundError(2, "there is no such file", str(tmp_path / "x")))


@pytest.mark.parametrize(
    "number, words",
    [(28, "the disk is full while writing {}"), (2, "{} cannot be read or written any more")],
)
def test_a_workplace_that_is_lost_is_said_plainly(tmp_path, number, words):
    """In a process of its own: it ends without the last words of other threads."""
    path = str(tmp_path / "run" / "x")
    code = f"""
import sys
from pathlib import Path
from medmerge_jax.commands import entry
module = type(sys)("medmerge_jax.commands.told")
def main(arguments):
    entry.work_in(Path({str(tmp_path)!r}))
    raise OSError({number}, "the reason", {path!r})
module.main = main
sys.modules["medmerge_jax.commands.told"] = module
entry.start("told", [])
"""
    result = python("-c", code)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {words.format(path)}")


@pytest.mark.parametrize("call", some_quick(("start('fields', [])", "main()"), "main()"))
def test_a_closed_pipe_is_no_error(call):
    code = (
        "import sys; sys.argv = ['medmerge']; "
        f"from medmerge_jax.commands import entry; entry.{call}"
    )
    result = subprocess.run(
        f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}',
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode in (0, 128 + signal.SIGPIPE), result.stderr
    assert not result.stderr
