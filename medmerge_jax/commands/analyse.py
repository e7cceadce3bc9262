"""python -m medmerge_jax analyse KIND ... --out FOLDER: what models have learned, in figures."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmerge_jax.commands import entry
from medmerge_jax.commands.config_flags import take_config
from medmerge_jax.commands.help import HelpFormatter
from medmerge_jax.errors import UserError
from medmerge_jax.runtime.progress import say, tell
from medmerge_jax.weights.card import short_names

if TYPE_CHECKING:
    from medmerge_jax.config import Config
    from medmerge_jax.evaluation.images import Image

_EPILOG = """\
FOLDER gets figures, and the numbers as JSON and CSV. A model or run is called by the end of its
path, or as NAME=PATH says. Images are files, folders or a table (--images), or a split of the data
of a config (--config, with --config.FIELD=VALUE as for run). No figure has an image's file name,
which may be a patient's.

examples:
  python -m medmerge_jax analyse depth runs/aptos runs/isic2019 runs/rsna \\
      --out figures/depth
  python -m medmerge_jax analyse trajectory runs/aptos/medmerge/seed0 \\
      --out figures/trajectory
  python -m medmerge_jax analyse rank runs/aptos runs/isic2019 runs/rsna \\
      --out figures/rank
  python -m medmerge_jax analyse features b=runs/eyepacs c=imagenet \\
      merged=runs/merge_lp tuned=runs/medmerge --images eye.png \\
      --out figures/features
  python -m medmerge_jax analyse cka runs/ft runs/medmerge \\
      --config configs/aptos.py --num-images 256 --out figures/cka
  python -m medmerge_jax analyse grad_cam runs/ft runs/medmerge --images *.png \\
      --out figures/cam
  python -m medmerge_jax analyse mistakes runs/medmerge --out figures/mistakes"""

_FEW = 4
"""Images of a data set that sheets show, unless some are chosen."""


def main(arguments: Sequence[str]) -> None:
    """Computes, draws, and prints what there is to say in words."""
    if set(entry.HELP) & set(arguments):
        _parse(arguments)
    config = None
    if any(re.match(r"--?config(\.|=|$)", argument) for argument in arguments):
        config, arguments = take_config(arguments)
    options = _parse(arguments)
    entry.work_in(options.out)
    entry.keep_programs()
    from medmerge_jax.studies.checks import check_config

    checked = None if config is None else check_config(config)
    tell(_KINDS[options.kind][1](options, checked))
    say(f"wrote {options.out}")


def _depth(options: argparse.Namespace, config: "Config | None") -> str:
    from medmerge_jax.studies.coefficient_analyses import depth_maps

    found = depth_maps(_folders(options), options.out)
    width = max(map(len, found.rows))
    lines = [
        f"{row:{width}}  {of}: {np.nanmean(mean):.4f} mean weight of {len(found.layers)} layers, "
        f"from {np.nanmin(mean):.4f} to {np.nanmax(mean):.4f}; deviation inside of layers "
        f"{np.nanmean(inside):.4f}; {seeds} seed{'s' if seeds > 1 else ''}"
        for row, of, mean, inside, seeds in zip(
            found.rows, found.parents, found.mean, found.inside, found.seeds, strict=True
        )
    ]
    return "\n".join(lines)


def _trajectory(options: argparse.Namespace, config: "Config | None") -> str:
    from medmerge_jax.studies.coefficient_analyses import trajectories

    found = trajectories(_folders(options), options.out)
    return "\n".join(
        f"{one.label}: mean weight of {one.parents[0]} {one.values[0, 0, :, 0].mean():.4f} after "
        f"epoch {one.epochs[0]}, {one.values[0, -1, :, 0].mean():.4f} after epoch {one.epochs[-1]}"
        for one in found
    )


def _rank(options: argparse.Namespace, config: "Config | None") -> str:
    from medmerge_jax.studies.coefficient_analyses import ranks

    found = ranks(_folders(options), options.out, options.metric, options.recipe)
    whole = found["all_layers"]
    said = "undefined" if whole["rho"] is None else f"{whole['rho']:+.3f}, p {whole['p']:.3f}"
    apart = [of["layer"] for of in found["layers"] if (of["p_of_any"] or 1) <= 0.05]
    lines = [
        f"rank correlation of the mean weight of {found['parents'][0]} with its advantage in "
        f"fine-tuning, over {len(found['targets'])} targets: {said}",
        f"layers told apart from chance, all looked at together: {', '.join(apart) or 'none'}",
    ]
    return "\n".join([*lines, *filter(None, [found["warning"]])])


def _features(options: argparse.Namespace, config: "Config | None") -> str:
    from medmerge_jax.recipes.model_analyses import feature_sheets, open_models

    images = _images(options, config, options.num_images or _FEW)
    models = open_models(_named(options.models))
    found = feature_sheets(models, images, options.out, options.layers, options.channels)
    return "\n".join(
        f"{layer}: channels {', '.join(map(str, channels))}"
        for layer, channels in found["channels"].items()
    )


def _cka(options: argparse.Namespace, config: "Config | None") -> str:
    from medmerge_jax.recipes.model_analyses import open_models, similarity

    images = _images(options, config, options.num_images)
    models = open_models(_named(options.models))
    found = similarity(models, images, options.out, options.layers, options.batch_size)
    counts = [f"{len(layers)} of {name}" for name, layers in found["layers"].items()]
    return f"CKA of layers on {found['images']} images: {', '.join(counts)}"


def _grad_cam(options: argparse.Namespace, config: "Config | None") -> str:
    from medmerge_jax.recipes.model_analyses import explanations, open_models

    images = _images(options, config, options.num_images or _FEW)
    models = open_models(_named(options.models))
    found = explanations(models, images, options.out, options.class_name, options.layer)
    return "\n".join(
        f"{model['model']}, image {one['image']}: {one['class']} {one['probability']:.3f}"
        for model in found["models"]
        for one in model["images"]
    )


def _mistakes(options: argparse.Namespace, config: "Config | None") -> str:
    from medmerge_jax.recipes.model_analyses import mistake_sheet

    found = mistake_sheet(Path(options.run).expanduser(), options.out, options.count, config)
    shown = len(found["shown"])
    return f"{found['mistakes']} mistakes on {found['images']} test images, {shown} of them shown"


_Kind = Callable[[argparse.Namespace, "Config | None"], str]

_KINDS: dict[str, tuple[str, _Kind]] = {
    "depth": ("coefficients by depth, of several runs or studies, with their spread", _depth),
    "trajectory": ("coefficients over the epochs of a merge", _trajectory),
    "rank": ("whether coefficients follow the parents' fine-tuning scores", _rank),
    "features": ("feature maps of images in several models", _features),
    "cka": ("how alike the layers of models are, by centred kernel alignment", _cka),
    "grad_cam": ("which places of an image speak for a class", _grad_cam),
    "mistakes": ("the test images that a run is most surely wrong about", _mistakes),
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    shape: dict[str, Any] = {
        "formatter_class": HelpFormatter,
        "allow_abbrev": False,
        "epilog": _EPILOG,
    }
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax analyse",
        description="Analyses of models and runs, each with a figure.",
        **shape,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (summary, _) in _KINDS.items():
        described = f"{summary[0].upper()}{summary[1:]}."
        kind = kinds.add_parser(name, help=summary, description=described, **shape)
        kind.add_argument("--out", required=True, type=entry.user_path, metavar="FOLDER",
                          help="made if it is not there")  # fmt: skip
        _add_options(name, kind)
    return parser.parse_args(arguments)


def _add_options(name: str, kind: argparse.ArgumentParser) -> None:
    add = kind.add_argument
    if name in ("depth", "trajectory", "rank"):
        what = "comparison" if name == "rank" else "run or study with learned coefficients"
        add("runs", nargs="+", metavar="RUN", help=what)
    elif name == "mistakes":
        add("run", metavar="RUN", help="finished run; --config says where its data is now")
        add("--count", type=entry.whole_number, default=24, metavar="N", help="default %(default)s")
    else:
        _add_images(name, kind)
    if name == "rank":
        add("--metric", choices=_metrics(), default="macro_f1", metavar="NAME",
            help="of the test images; default %(default)s")  # fmt: skip
        add("--recipe", default="medmerge", help="of the merge; default %(default)s")


def _add_images(name: str, kind: argparse.ArgumentParser) -> None:
    from medmerge_jax.data.splits import EVALUATED

    add = kind.add_argument
    add("models", nargs="+", metavar="MODEL", help="run, model directory, weight file or imagenet")
    add("--images", nargs="+", default=[], metavar="IMAGES", help="files, folders, or one table")
    add("--split", choices=EVALUATED, default="test", help="of --config; default %(default)s")
    default = "default all" if name == "cka" else f"default all, of --config {_FEW}"
    add("--num-images", type=entry.whole_number, default=0, metavar="N",
        help=f"so many of them; {default}")  # fmt: skip
    if name == "grad_cam":
        add("--class", dest="class_name", default="", metavar="CLASS",
            help="that is explained; default: of each image what the model predicts")  # fmt: skip
        add("--layer", default="", metavar="PATH", help="a module's; default: the last feature map")
        return
    default = "all hidden ones" if name == "cka" else "the first and the last"
    add("--layers", nargs="+", default=[], metavar="PATTERN", help=f"paths; default: {default}")
    if name == "cka":
        add("--batch-size", type=entry.whole_number, default=64, metavar="N",
            help="over which the estimate is made; default %(default)s")  # fmt: skip
    else:
        add("--channels", type=entry.whole_number, default=2, metavar="N",
            help="of each layer; default %(default)s")  # fmt: skip


def _metrics() -> list[str]:
    from medmerge_jax.evaluation.metrics import METRICS

    return [name for name, one in METRICS.items() if one.compared]


def _named(texts: Sequence[str]) -> dict[str, str]:
    """Paths by what they are called: NAME=PATH, or the end of a path."""
    pairs = []
    for text in texts:
        name, equals, path = text.partition("=")
        named = equals and name and "/" not in name and not Path(text).expanduser().exists()
        pairs.append((name, path) if named else ("", text))
    short = short_names([path for _, path in pairs])
    names = [name or of_path for (name, _), of_path in zip(pairs, short, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"two are called the same ({', '.join(names)}); NAME=PATH names them")
    return dict(zip(names, (path for _, path in pairs), strict=True))


def _folders(options: argparse.Namespace) -> dict[str, Path]:
    folders = {name: Path(path).expanduser() for name, path in _named(options.runs).items()}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; a run or study is wanted")
    return folders


def _images(options: argparse.Namespace, config: "Config | None", most: int) -> "list[Image]":
    """What --images or --config names, the first so many; of a data set for CKA any."""
    if bool(options.images) == (config is not None):
        raise UserError("images are wanted: either --images FILES, or --config FILE")
    if config is None:
        from medmerge_jax.data.listing import list_images

        listing = list_images(options.images)
        for note in listing.notes:
            say(note)
        if missing := [n for n, p in zip(listing.ids, listing.paths, strict=True) if p is None]:
            raise UserError(f"{missing[0]}: there is no image file of this name")
        images: list[Image] = [path for path in listing.paths if path is not None]
        most = options.num_images
    else:
        from medmerge_jax.recipes.model_analyses import data_images

        images = data_images(config, options.split)
    if not most or most >= len(images):
        return images
    if options.kind != "cka":
        return images[:most]
    chosen = np.random.default_rng(0).choice(len(images), most, replace=False)
    return [images[row] for row in sorted(chosen.tolist())]
