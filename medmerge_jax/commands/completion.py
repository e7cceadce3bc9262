"""python -m medmerge_jax completion SHELL: a script by which a shell completes the commands."""

import argparse
import contextlib
import importlib
import io
import os
import re
from collections.abc import Sequence

from medmerge_jax.commands import entry, packaged

_SHELLS = ("bash", "zsh")

_OPTION = re.compile(r"^ +(?:-\w, )?(--[a-z][\w-]*)|(--config) FILE", re.MULTILINE)
"""A line of a help that explains an option begins with it; --config may stand elsewhere."""

_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
"""Has zsh understand what bash does."""

_SCRIPT = """\
_medmerge() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" choices=""
  case "$COMP_CWORD:${{COMP_WORDS[1]}}:$word" in
    1:*) choices="{commands}" ;;
    2:run:[!-]*|2:run:) choices="{configs}" ;;
{options}
  esac
  COMPREPLY=($(compgen -W "$choices" -- "$word"))
  case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _medmerge medmerge"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the script."""
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax completion",
        description="Prints a script by which a shell completes the commands of medmerge, their "
        "options, the fields of a config and the names of the configs that come with the program; "
        "where none of these is meant, files. It is read when a shell starts.",
        epilog="Example: medmerge completion bash > ~/.medmerge_completion; "
        "echo '. ~/.medmerge_completion' >> ~/.bashrc",
    )
    parser.add_argument("shell", choices=_SHELLS)
    shell: str = parser.parse_args(arguments).shell
    print((_ZSH if shell == "zsh" else "") + _script())


def _script() -> str:
    lines = [
        f'    *:{name}:-*) choices="{" ".join(options_of(name))}" ;;' for name in entry.COMMANDS
    ]
    return _SCRIPT.format(
        commands=" ".join((*entry.COMMANDS, "--help", "--version")),
        configs=" ".join(packaged.names()),
        options="\n".join(lines),
    )


def options_of(name: str) -> list[str]:
    """All long options of a command, as its help has them; fields of the config end with "="."""
    from medmerge_jax.commands.fields import all_fields

    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # or a long option may be broken at the end of a line
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(f"medmerge_jax.commands.{name}").main(["--help"])
    finally:
        os.environ.pop("COLUMNS")
        os.environ.update({} if columns is None else {"COLUMNS": columns})
    found = {"".join(names) for names in _OPTION.findall(said.getvalue())} | {"--help"}
    paths = [f"--config.{one.path}=" for one in all_fields()] if "--config" in found else []
    return [*sorted(found), *paths]
