"""What README and documents tell a reader to type: its commands, flags, fields and files exist.

Most commands of the documents are run too, by test_docs.py; those of clusters and of the README
want machines, networks and data that are not here.
"""

import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from medmerge_jax.commands import entry, packaged
from medmerge_jax.commands.config_flags import named_config
from medmerge_jax.commands.fields import all_fields

ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
OWN = ("mine.py",)
"""Config files that a page has its reader write."""

FOREIGN = {"--cpus-per-task"}
"""Flags of other programs that stand alone."""

FIELDS = {one.path for one in all_fields()} | {"merge_ft.options.share"}
"""With that of the README's own merger."""


def shown(page):
    """The commands of a page, each as words: in blocks, indented, or inside of a sentence."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    indented = "\n".join(re.findall(r"^    (.*)$", rest, re.MULTILINE))
    inside = [one.replace("\n", " ") for one in re.findall(r"`([^`]+)`", rest)]
    programs = re.compile(r"(python|medmerge|launch/\S+|sbatch|apptainer) ")
    lines = "\n".join([*blocks, indented, *filter(programs.match, inside)])
    return [shlex.split(line, comments=True) for line in lines.replace("\\\n", " ").splitlines()]


def ours(words):
    """The command of this program that is called, and its arguments; None if none is."""
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        if word in ("medmerge_jax.main", "medmerge_jax.merge"):
            return word.partition(".")[2].replace("main", "run"), rest
        if re.fullmatch(r"launch/(one_machine|slurm)\.sh|\w+\.sif", word):
            return "run", rest
        if rest and (word == "medmerge_jax" or (word == "medmerge" and place == 0)):
            return rest[0], rest[1:]
    return None


@functools.cache
def flags_of(command, *kind):
    """As its help has them, at the beginning of a line; --config also elsewhere."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(f"medmerge_jax.commands.{command}").main([*kind, "--help"])
    found = re.findall(r"^  (?:-\w, )?(--[\w-]+)|(--config)\b", said.getvalue(), re.MULTILINE)
    return {"".join(names) for names in found} | {"--help"}


@pytest.mark.parametrize("page", [name for name in PAGES if any(map(ours, shown(name)))])
def test_commands_and_their_flags_exist(page):
    for command, arguments in filter(None, map(ours, shown(page))):
        assert command in entry.COMMANDS or command.startswith("-"), command
        kind = arguments[:1] if command == "analyse" and arguments[0] != "--help" else []
        flags = {one.partition("=")[0] for one in arguments if one.startswith("--")}
        flags = {flag for flag in flags if not flag.startswith("--config.")}
        assert not flags or flags <= flags_of(command, *kind), command


@pytest.mark.parametrize("page", PAGES)
def test_flags_inside_of_sentences_exist(page):
    known = set().union(*map(flags_of, entry.COMMANDS)) | FOREIGN
    for code in re.findall(r"`(--[^`]+)`", PAGES[page]):
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known


@pytest.mark.parametrize("page", PAGES)
def test_fields_exist(page):
    """Those of the command line; of what a further data set has, as of the config itself."""
    for path in re.findall(r"--config\.(?:evaluate_on\.\w+\.)?([a-z_]+(?:\.\w+)*)", PAGES[page]):
        group = "parents" if path.startswith("parents.") else path
        assert any(one == group or one.startswith(f"{group}.") for one in FIELDS), path


@pytest.mark.parametrize("page", [name for name in PAGES if any(map(ours, shown(name)))])
def test_config_files_exist(page):
    for _, arguments in filter(None, map(ours, shown(page))):
        _, value = named_config(arguments)
        if value.partition(":")[0] not in ("", "FILE", *OWN):
            assert Path(packaged.config_path(value).partition(":")[0]).is_file()
