"""The configs that come with the program, by name."""

import subprocess
from pathlib import Path

import pytest

from medmerge_jax.commands import completion, entry, packaged, run
from medmerge_jax.commands.config_flags import named_config
from medmerge_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without configs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_config_of_the_repository_has_a_name():
    names = packaged.names()
    assert {"aptos", "quickstart", "folder", "fission_fusion/aptos"} <= set(names)
    for name in names:
        for text in (name, f"configs/{name}.py"):  # as docstrings say it, without a clone
            assert Path(packaged.config_path(text)).samefile(CONFIGS / f"{name}.py")
    assert packaged.config_path("aptos:resnet50,compare").endswith("aptos.py:resnet50,compare")


def test_a_file_wins_over_a_name(elsewhere):
    (elsewhere / "aptos").mkdir()  # no file, as the folder of the images may be called
    assert packaged.config_path("aptos").endswith("aptos.py")
    (elsewhere / "quickstart").write_text("")
    assert packaged.config_path("quickstart:x") == "quickstart:x"
    assert packaged.usual_workdir("quickstart:x") == ""


@pytest.mark.parametrize("text", ["aptso", "configs/aptso.py", "aptso:resnet50"])
def test_an_unknown_name_is_told_the_nearest(text):
    with pytest.raises(UserError, match=r"there is no file .*aptso.*did you mean 'aptos'"):
        packaged.config_path(text)


def test_what_a_config_alone_stands_for(elsewhere):
    explicit = run._explicit
    assert explicit(["quickstart"]) == ["--config=quickstart", "--workdir=runs/quickstart"]
    given = ["aptos:resnet50", "--config.lp.epochs=5", "--workdir", "x"]
    assert explicit(given) == ["--config=aptos:resnet50", *given[1:]]
    words = explicit(["--config", "fission_fusion/aptos:grid"])
    assert words[-1] == "--workdir=runs/fission_fusion_aptos_grid"
    (elsewhere / "mine.py").write_text("")
    assert explicit(["mine.py"]) == ["--config=mine.py"]  # a file's workdir is asked for
    with pytest.raises(UserError, match="one config is wanted"):
        explicit(["quickstart", "--config=aptos"])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], (-1, "")),
        (["--config"], (-1, "")),
        (["--config.seed=1"], (-1, "")),
        (["x", "--config=a=b.py"], (1, "a=b.py")),
        (["-config", "a=b.py"], (1, "a=b.py")),
    ],
)
def test_where_a_config_is_given(words, found):
    assert named_config(words) == found


def completed(script, *words):
    """What bash would offer after these words."""
    quoted = " ".join(f"'{word}'" for word in words)
    program = f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _medmerge\n"
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_fields_and_names(monkeypatch, capsys):
    # Two of the commands, one of each kind of parser: the others would import all there is.
    monkeypatch.setattr(entry, "COMMANDS", {"run": "", "status": ""})
    completion.main(["bash"])
    script = capsys.readouterr().out
    assert completed(script, "medmerge", "") == ["run", "status", "--help", "--version"]
    assert completed(script, "medmerge", "ru") == ["run"]
    assert completed(script, "medmerge", "run", "apt") == ["aptos"]
    assert completed(script, "medmerge", "run", "aptos", "--work") == ["--workdir"]
    assert completed(script, "medmerge", "run", "x", "--config.lp.ep") == ["--config.lp.epochs="]
    assert completed(script, "medmerge", "run", "x", "a") == []  # files, which bash adds itself
    assert completed(script, "medmerge", "status", "-") == ["--help"]
    completion.main(["zsh"])
    assert capsys.readouterr().out.startswith("autoload")
