"""python -m medmerge_jax evaluate runs/aptos --config data.py: models on any data set.

Their own preprocessing is used, and their classes are matched with the data set's by name, or as
--classes says.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from medmerge_jax.analysis import evaluation_text
from medmerge_jax.analysis.terminal import terminal_evaluation
from medmerge_jax.commands import entry
from medmerge_jax.commands.config_flags import take_config
from medmerge_jax.commands.help import HelpFormatter
from medmerge_jax.data.splits import EVALUATED
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.evaluate import UNMAPPED
from medmerge_jax.recipes.evaluation import evaluate_models
from medmerge_jax.runtime.progress import columns, tell
from medmerge_jax.storage import atomic
from medmerge_jax.studies.checks import check_config

_EPILOG = """\
The classes of models and data are matched by name; of a model that says no names, by number.
--classes says otherwise: {class of the data: class, or classes, of the model}. The
probabilities of several of the model's classes are summed; several of the data's may be one
of the model's.

example:
  python -m medmerge_jax evaluate runs/aptos runs/eyepacs --out idrid.json \\
      --config configs/folder.py --config.data.root=idrid --split all \\
      --classes '{"healthy": "0", "ill": ["1", "2", "3", "4"]}'"""


def main(arguments: Sequence[str]) -> None:
    """Evaluates, prints a table, and writes it as JSON if asked to."""
    if set(entry.HELP) & set(arguments):
        _parse(arguments)
    config, arguments = take_config(arguments)
    options = _parse(arguments)
    classes = _classes(options.classes)
    if options.out is not None:
        entry.work_in(options.out.parent)
        options.out.parent.mkdir(parents=True, exist_ok=True)
    entry.keep_programs()
    results = evaluate_models(
        options.models, check_config(config), options.split, classes, options.unmapped
    )
    if options.out is not None:
        atomic.write_json(options.out, results)
    names, width = list(dict.fromkeys(options.models)), columns()
    tell(
        evaluation_text(results, names)
        if width is None
        else terminal_evaluation(results, names, width)
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax evaluate",
        usage="%(prog)s MODEL ... --config FILE\n    [--config.FIELD=VALUE ...] [options]",
        description="Evaluates models on the data set of a config file (its group `data`).",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="run, model directory, weight file or hf://ORG/NAME",
    )
    add("--out", type=entry.user_path, metavar="FILE", help="JSON, written beside the table")
    add("--split", choices=EVALUATED, default="test", help="of the data; default: test")
    add("--classes", default="{}", metavar="JSON", help="see below")
    add("--unmapped", choices=UNMAPPED, default="error", help="classes without a partner")
    return parser.parse_intermixed_args(arguments)


def _classes(text: str) -> dict[str, Any]:
    try:
        classes = json.loads(text)
    except ValueError as error:
        raise UserError(f"--classes {text}: this is no JSON ({error})") from error
    parts = list(classes.values()) if isinstance(classes, dict) else [None]
    names = [name for part in parts for name in (part if isinstance(part, list) else [part])]
    if not all(isinstance(name, str) for name in names):
        raise UserError(
            f"--classes {text}: names are wanted, "
            '{"class of the data": "class of the model"} or {"class": ["one", "another"]}'
        )
    return dict(classes)
