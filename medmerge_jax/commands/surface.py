"""python -m medmerge_jax surface MODEL_A MODEL_B [MODEL_C] --config data.py --out FOLDER.

Loss and a metric along the segment between two models, or on the plane through three.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmerge_jax.commands import entry
from medmerge_jax.commands.config_flags import take_config
from medmerge_jax.commands.help import HelpFormatter
from medmerge_jax.runtime.progress import say, tell

_EPILOG = """\
--config.FIELD=VALUE changes a field of the config, as for run; of it count the data and batch_size,
precision, seed, select.metric (beside the loss) and merge_ft.num_images (to match activations on).

The same command goes on from what was interrupted. FOLDER gets surface.json, surface.png and
points.json, in which every measured point is kept.

example:
  python -m medmerge_jax surface runs/b runs/c --out surfaces/b_c \\
      --config configs/quickstart.py --recalibrate --align weight_matching"""


def main(arguments: Sequence[str]) -> None:
    """Measures, draws and prints the barriers."""
    if set(entry.HELP) & set(arguments):
        _parse(arguments)
    config, arguments = take_config(arguments)
    options = _parse(arguments)
    entry.work_in(options.out)
    entry.keep_programs()
    from medmerge_jax.recipes.surfaces import Settings, surface
    from medmerge_jax.studies.checks import check_config

    names = ("points", "margin", "recalibrate", "align", "num_images")
    settings = Settings(**{name: getattr(options, name) for name in names})
    results = surface(options.models, check_config(config), options.out, settings)
    tell(_text(results))
    say(f"wrote {options.out / 'surface.json'} and surface.png")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from medmerge_jax.recipes.surfaces import ALIGNMENTS, Settings

    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax surface",
        usage="%(prog)s A B [C] --config FILE --out FOLDER\n    [options]",
        description=__doc__ and __doc__.splitlines()[2],
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="two or three: run, model directory or file")
    add("--out", required=True, type=Path, metavar="FOLDER", help="made if it is not there")
    add("--points", type=int, default=usual.points, help="in each direction; default %(default)s")
    add("--margin", type=float, default=usual.margin, help="of a plane, around the models")
    add("--recalibrate", action="store_true", help="batch norms too, at every point")
    add("--align", choices=ALIGNMENTS, default="", help="the other models to the second first")
    add("--num-images", type=int, default=usual.num_images, help="of each split; default all")
    options = parser.parse_intermixed_args(arguments)
    options.out = options.out.expanduser()
    return options


def _text(results: dict[str, Any]) -> str:
    """Numbers at the models, and of a segment its barriers."""
    models = [one["model"] for one in results["models"]]
    ends = results.get("at_models") or {n: [v[0], v[-1]] for n, v in results["values"].items()}
    width = max(map(len, ends))
    rows = [[number, *map(_shown, values)] for number, values in ends.items()]
    lines = [f"{' ' * width}  {'  '.join(models)}"]
    for number, *values in rows:
        cells = [f"{value:>{len(model)}}" for value, model in zip(values, models, strict=True)]
        lines.append(f"{number:{width}}  {'  '.join(cells)}")
    for number, barrier in results.get("barriers", {}).items():
        height = "undefined" if barrier is None else f"{barrier['height']:.4f}"
        where = "" if not barrier else f", at {barrier['share']:.2f} of the way"
        lines.append(f"barrier of {number}: {height}{where}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
