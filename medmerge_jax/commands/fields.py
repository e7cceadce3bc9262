"""python -m medmerge_jax fields [PREFIX]: what a config may say, and its defaults."""

import argparse
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from medmerge_jax.config import MOST, Config, EvaluateOn, Field, fields
from medmerge_jax.errors import UserError, nearest
from medmerge_jax.models.mergers import MERGERS, merger_options
from medmerge_jax.studies.checks import choices_of, option_names

_WIDEST = 100


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints every field below a prefix."""
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax fields",
        description="Prints the fields of a config with type, default, choices and meaning. "
        "A config file sets them, or the command line: --config.lp.epochs=5.",
        epilog="Example: python -m medmerge_jax fields lp",
    )
    parser.add_argument("prefix", nargs="?", default="", help="a field or a group, as data or lp")
    prefix: str = parser.parse_args(arguments).prefix.removeprefix("config.").rstrip(".")
    chosen = [one for one in all_fields() if not prefix or f"{one.path}.".startswith(f"{prefix}.")]
    if not chosen:
        names = dict.fromkeys(one.path.partition(".")[0] for one in all_fields())
        raise UserError(f"there is no field {prefix!r}: {nearest(prefix, names)}")
    indent = " " * (2 + max(len(one.path) for one in chosen))
    width = min(_WIDEST, max(shutil.get_terminal_size((_WIDEST, 0)).columns, len(indent) + 30))
    for one in chosen:
        first = f"{one.path:{len(indent)}}{_kind_name(one.kind)} = {one.value!r}"
        for text, start in ((first, ""), (_meaning(one), indent)):
            print(textwrap.fill(text, width, initial_indent=start, subsequent_indent=indent))


def all_fields() -> Iterator[Field]:
    """The fields of a config, those of `merge_ft.options` for all mergers there are."""
    for one in fields(Config()):
        if one.path != "merge_ft.options":
            yield one
            if one.path == "evaluate_on":
                inside = fields(EvaluateOn(), "evaluate_on.NAME.")
                yield from (of_set for of_set in inside if ".data." not in of_set.path)
            continue
        for name in option_names():
            users = [method for method in MERGERS if name in merger_options(method)]
            kind = typing.get_type_hints(MERGERS[users[0]].function)[name]
            default = merger_options(users[0])[name]
            default = None if default is inspect.Parameter.empty else default
            yield Field(
                f"{one.path}.{name}", kind, default, f"of {', '.join(users)}", "", None, MOST
            )


def _meaning(field: Field) -> str:
    parts = [field.doc]
    if choices := choices_of(field):
        parts.append(f"{'of' if isinstance(field.value, tuple) else 'one of'} {', '.join(choices)}")
    if field.at_least is not None:
        to = "" if field.at_most == MOST else f" to {field.at_most}"
        parts.append(f"from {field.at_least}{to}")
    return "; ".join(parts)


def _kind_name(kind: Any) -> str:
    """As it stands in `config`, without the names of modules."""
    return re.sub(r"\w+\.(?=\w)", "", inspect.formatannotation(kind))
