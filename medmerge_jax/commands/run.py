"""python -m medmerge_jax.main --config configs/aptos.py --workdir runs/aptos.

Fields of the config are changed on the command line: --config.batch_size=32. The same command
resumes what was interrupted and prints the results of what is finished.
"""

import ast
import re
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from medmerge_jax.commands import entry
from medmerge_jax.config import Config, fields
from medmerge_jax.errors import UserError
from medmerge_jax.runtime import processes

_PROGRAM = "python -m medmerge_jax.main"
_USAGE = f"{_PROGRAM} --config configs/quickstart.py --workdir runs/quickstart"
_HELP = f"""{_PROGRAM} --config FILE --workdir FOLDER [--config.FIELD=VALUE ...]

Runs the experiment of a config file. The same command resumes what was interrupted, and prints
the results of what is finished.

Examples:
  {_USAGE}
  {_PROGRAM} --config configs/folder.py --workdir runs/mine \\
      --config.data.root=images --config.parents.b=medical.pth --config.lp.epochs=20

Options:
OPTIONS
  --config.FIELD    any field of the config; python -m medmerge_jax fields lists them
"""

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config().",
    lock_config=False,  # for options of mergers, which may be any; config files lock the rest
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; made if it is not there.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check all that can be checked without training, and end."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, of several processes; SLURM needs none of these."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and runs what it says."""
    if set(entry.HELP) & set(arguments):
        ours = (_CONFIG, _WORKDIR, _DRY_RUN, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
        lines = [f"  --{holder.name:16}{flags.FLAGS[holder.name].help}" for holder in ours]
        print(_HELP.replace("OPTIONS", "\n".join(lines)).rstrip())
    else:
        app.run(_run, ["medmerge_jax", *arguments], flags_parser=_parse_flags)


def _run(argv: list[str]) -> None:
    """Runs the experiment and prints its results."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is no flag; --config FILE and --workdir FOLDER are wanted")
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or workdir is None:
        missing = "--config FILE" if config is None else "--workdir FOLDER"
        raise UserError(f"{missing} is missing, as in: {_USAGE}")
    if not workdir.strip():
        raise UserError(f"--workdir is empty; a folder is wanted, as in: {_USAGE}")
    if not flags.FLAGS["verbosity"].present:
        # The libraries' notes are not for our readers; their errors come to us as exceptions too.
        logging.set_verbosity(logging.FATAL)

    entry.work_in(Path(workdir))
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    entry.keep_programs()
    from medmerge_jax.analysis import results_text
    from medmerge_jax.studies import run

    file = config_flags.get_config_filename(flags.FLAGS["config"])
    results = run(config, workdir, dry_run=_DRY_RUN.value, config_file=file)
    if not results:
        return
    if processes.is_first():
        print(results_text(results))
    processes.wait_for_all()  # for as long as the first writes its report


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest: list[str] = flags.FLAGS(_with_tuples(argv))
        # ml_collections tells only on an access that a file could not be read.
        if _CONFIG.value is not None and not hasattr(_CONFIG.value, "recipe"):
            raise UserError(
                "get_config() of the config file must return a config with the fields of "
                "medmerge_jax.config.default_config()"
            )
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:  # a config file is a program: it may raise anything
        raise UserError(_explain(error)) from error
    return rest


def _with_tuples(argv: list[str]) -> list[str]:
    """The arguments, with the values of fields of several parts as Python writes tuples.

    So that they may stand with parentheses and quotes or without: label_columns=Finding Labels.
    """
    kinds = {one.path: one.kind for one in fields(Config())}
    result, field = [], ""
    for argument in argv:
        name, equals, value = argument.partition("=")
        if field:  # its value is an argument by itself
            result.append(_tuple(field, kinds[field], argument))
            field = ""
            continue
        path = re.sub(r"^--?config\.(sources\.[^.]+\.)*", "", name)
        if path == name or typing.get_origin(kinds.get(path)) is not tuple:
            result.append(argument)
        elif equals:
            result.append(f"{name}={_tuple(path, kinds[path], value)}")
        else:
            result.append(argument)
            field = path
    return result


def _tuple(path: str, kind: Any, text: str) -> str:
    (part, *_), words = typing.get_args(kind), text.strip()
    try:
        value = ast.literal_eval(words)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        inner = words[1:-1] if words[:1] + words[-1:] in ("()", "[]") else words
        parts = [one.strip().strip("'\"") for one in inner.split(",") if one.strip()]
        try:
            return repr(tuple(part(one) for one in parts))
        except ValueError as error:
            raise UserError(
                f"--config.{path}={text}: wanted is {part.__name__}, or several with commas "
                "between them"
            ) from error
    if not isinstance(value, tuple | list):
        value = (words,) if part is str and not isinstance(value, str) else (value,)
    return repr(tuple(value)) if part is not str else repr(tuple(_texts(value, words)))


def _texts(value: tuple[Any, ...] | list[Any], words: str) -> list[Any]:
    """The parts, numbers among them as they were written: classes=0,1,02."""
    if all(isinstance(one, str) for one in value):
        return list(value)
    return [one.strip().strip("'\"") for one in words.strip("()[]").split(",") if one.strip()]


def _hint(error: Exception) -> str:
    """The field of the config that an unknown flag may mean."""
    name = getattr(error, "flagname", "")
    paths = [one.path for one in fields(Config())]
    meant = [path for path in paths if path == name or path.endswith(f".{name}")]
    return (
        f"; fields of the config are set by --config.{' or --config.'.join(meant)}" if meant else ""
    )


def _explain(error: Exception) -> str:
    """What is wrong with the command line or the config file, and where.

    ml_collections wraps what a config file raises, some of it with a traceback as text.
    """
    for raised in _chain(error):
        if isinstance(raised, SyntaxError):
            return f"config file {raised.filename}, line {raised.lineno}: {raised.msg}"
        for frame in reversed(traceback.extract_tb(raised.__traceback__)):
            if frame.name in ("get_config", "<module>"):
                where = f"config file {frame.filename}, line {frame.lineno}"
                return f"{where}: {type(raised).__name__}: {_short(raised)}"
    if isinstance(error, OSError):
        return f"the config file cannot be read: {str(_chain(error)[0]).splitlines()[-1].strip()}"
    if isinstance(error, KeyError | AttributeError):
        text = re.sub(r"^Key (\S+) does not exist and [^.]*locked", r"\1", _short(error))
        return f"the command line cannot be used: the config has no field {text}"
    return f"the command line cannot be used: {error}{_hint(error)}"


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error that came first, and those that it led to."""
    return [] if error is None else [*_chain(error.__cause__ or error.__context__), error]


def _short(error: BaseException) -> str:
    """On one line, without the list of all fields that a locked config adds."""
    text: Any = error
    while isinstance(text, BaseException) and len(text.args) == 1:
        text = text.args[0]  # a KeyError's str() is quoted, and ml_collections nests them
    text = re.sub(r' Other fields present: ".*}"', "", str(text), flags=re.DOTALL)
    return ". ".join(line.strip().rstrip(".") for line in text.splitlines())
