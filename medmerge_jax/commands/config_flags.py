"""The flag --config of all commands that take one, and --config.FIELD=VALUE, which changes it."""

import ast
import re
import traceback
import typing
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from medmerge_jax.commands.packaged import config_path
from medmerge_jax.config import AnyConfig, Config, fields
from medmerge_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config(), or a name of those above.",
    lock_config=False,  # for options of mergers, which may be any; config files lock the rest
    accept_new_attributes=True,
)


def take_config(arguments: Sequence[str]) -> tuple[AnyConfig, list[str]]:
    """The config that --config names, with what --config.FIELD changes, and the other arguments.

    For commands whose own options are argparse's.

    Raises:
      UserError: There is no --config, or it or a field cannot be used.
    """
    ours, others = list[str](), list[str]()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not re.match(r"--?config(\.|=|$)", argument):
            others.append(argument)
            continue
        ours.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            ours.append(rest.pop(0))
    parse_flags(["medmerge_jax", *ours])
    if CONFIG.value is None:
        raise UserError("--config FILE is missing; a config whose `data` says what to read")
    return CONFIG.value, others


def config_file() -> str:
    """The path of the config file, without what follows its colon."""
    name: str = config_flags.get_config_filename(flags.FLAGS["config"])
    return name.partition(":")[0]


def parse_flags(argv: list[str]) -> list[str]:
    """Takes the flags from a command line, whose first entry is the program; returns the rest.

    Raises:
      UserError: A flag or the config file cannot be used.
    """
    try:
        rest: list[str] = flags.FLAGS(with_tuples(_with_paths(argv)))
        # ml_collections tells only on an access that a file could not be read.
        if CONFIG.value is not None and not hasattr(CONFIG.value, "recipe"):
            raise UserError(
                "get_config() of the config file must return a config with the fields of "
                "medmerge_jax.config.default_config()"
            )
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:  # a config file is a program: it may raise anything
        raise UserError(explain(error)) from error
    return rest


def named_config(argv: Sequence[str]) -> tuple[int, str]:
    """The argument that ends with the value of --config, and the value; (-1, "") if none does."""
    for place, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config") and (equals or place + 1 < len(argv)):
            return (place, value) if equals else (place + 1, argv[place + 1])
    return -1, ""


def _with_paths(argv: list[str]) -> list[str]:
    """The arguments, with the path of the file where --config has a name."""
    place, value = named_config(argv)
    if place < 0:
        return argv
    given = argv[place].removesuffix(value) + config_path(value)
    return [*argv[:place], given, *argv[place + 1 :]]


def with_tuples(argv: list[str]) -> list[str]:
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
        path = re.sub(r"^--?config\.((sources|evaluate_on)\.[^.]+\.)*", "", name)
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


def explain(error: Exception) -> str:
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
