"""python -m medmerge_jax.merge --method weight_matching --out merged.safetensors A B ...

Merges weight files, model directories or run directories without training. Methods that look at
activations or gradients want a folder of images, without labels: --images FOLDER.
"""

import argparse
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medmerge_jax import weights
from medmerge_jax.commands import entry
from medmerge_jax.data.folder import find_images
from medmerge_jax.errors import UserError
from medmerge_jax.images.decode import read_image
from medmerge_jax.images.formats import SUFFIXES
from medmerge_jax.merging.trees import flatten, without_head
from medmerge_jax.models import Preprocessing, create_model, get_spec, list_models, mergers
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Rendering
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic

_FROM_ALL = (
    *("image_size", "resize", "mean", "std", "classes", "multilabel"),
    *("intensity", "window", "background"),
)
"""Fields of the parents' cards that the merged model's card takes over if all agree."""


def main(arguments: Sequence[str]) -> None:
    """Merges, and writes the model with its card beside it."""
    options = _parse(arguments)
    out = _checked_out(options)
    entry.work_in(out.parent)
    entry.keep_programs()
    architecture = options.architecture or weights.find_architecture(options.parents[0])
    names = [*options.parents, *([options.ancestor] if options.ancestor else [])]
    models = [weights.load_parent(name, architecture) for name in names]
    _check_distinct(names, [variables for variables, _ in models])
    _report(architecture, names, models)
    parents = [variables for variables, _ in models[: len(options.parents)]]
    cards = [card for _, card in models[: len(options.parents)]]
    given = {name: getattr(options, name) for name in _merger_flags()}
    given = {name: value for name, value in given.items() if value is not None}
    if options.ancestor:
        given["ancestor"] = models[-1][0]
    if "multilabel" in mergers.merger_options(options.method):
        given["multilabel"] = [bool(card.get("multilabel")) for card in cards]
    images = None if options.images is None else _images(options, architecture, cards)
    if images is None and (options.recalibrate or mergers.MERGERS[options.method].needs_images):
        what = "--recalibrate" if options.recalibrate else f"the merger {options.method!r}"
        raise UserError(f"{what} wants --images FOLDER")
    merged = _merge(options, architecture, parents, images, given)
    if options.ancestor:
        given["ancestor"] = options.ancestor
    _write(out, architecture, merged, _card(options, architecture, names, models, given))
    say(f"wrote {out}")


def _merge(
    options: argparse.Namespace,
    architecture: str,
    parents: Sequence[Any],
    images: np.ndarray | None,
    given: dict[str, Any],
) -> dict[Any, Any]:
    try:
        return mergers.merge(
            options.method,
            architecture,
            parents,
            images,
            heads=options.heads,
            recalibrate=options.recalibrate,
            batch_size=options.batch_size,
            **given,
        )
    except ValueError as error:
        rows = [f"  parent {index} is {name}" for index, name in enumerate(options.parents)]
        raise UserError("\n".join([str(error), *rows])) from error


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax.merge",
        description="Merges weight files, model directories or run directories without training.",
        epilog=_methods(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parents",
        nargs="+",
        metavar="MODEL",
        help="weight file with torchvision's names, model directory or run directory",
    )
    parser.add_argument(
        "--method", required=True, choices=mergers.list_mergers(), metavar="NAME", help="see below"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="a .safetensors file, or a folder for a model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument(
        "--architecture", choices=list_models(), metavar="NAME", help="default: as the first says"
    )
    parser.add_argument(
        "--heads", choices=mergers.HEADS, default="merge", help="drop them if classes differ"
    )
    parser.add_argument("--recalibrate", action="store_true", help="batch norms, on the images")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="to calibrate with")
    parser.add_argument("--num-images", type=int, default=512, help="of these, at most")
    parser.add_argument("--image-size", type=int, help="pixels; default: as the parents' cards say")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--ancestor", metavar="MODEL", help="that the parents were trained from")
    for name, methods in _merger_flags().items():
        parser.add_argument(f"--{name}", type=_numbers, help=f"of {', '.join(methods)}")
    return parser.parse_args(arguments)


def _merger_flags() -> dict[str, list[str]]:
    """The options of all mergers, each with those that have it."""
    flags: dict[str, list[str]] = {}
    for method in mergers.list_mergers():
        for name in mergers.merger_options(method):
            if name not in mergers.FROM_PARENTS:
                flags.setdefault(name, []).append(method)
    return flags


def _methods() -> str:
    rows = [(name, *mergers.describe_merger(name)) for name in mergers.list_mergers()]
    width = max(len(name) for name, _, _ in rows) + 2
    lines = [
        textwrap.fill(
            f"{text} ({options})" if options else text,
            100,
            initial_indent=f"  {name:{width}}",
            subsequent_indent=" " * (width + 2),
        )
        for name, text, options in rows
    ]
    return "\n".join(
        [
            "methods, and their options:",
            *lines,
            "",
            "example:",
            "  python -m medmerge_jax.merge --method zipit --images images/train --recalibrate \\",
            "      --out merged.safetensors a.safetensors b.safetensors",
        ]
    )


def _numbers(text: str) -> Any:
    """A number, or several with commas between them."""
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) > 1:
        return numbers
    return int(numbers[0]) if text.strip().lstrip("+-").isdecimal() else numbers[0]


def _checked_out(options: argparse.Namespace) -> Path:
    out: Path = options.out.expanduser()
    if out.suffix not in (".safetensors", ""):
        raise UserError(f"--out {out}: a .safetensors file or a folder is wanted")
    if out.exists() and not options.overwrite:
        raise UserError(f"--out {out} exists; --overwrite replaces it")
    if len(options.parents) < 2 and "ancestor" not in mergers.merger_options(options.method):
        raise UserError(f"{len(options.parents)} model is given; two or more are wanted")
    if options.seed is not None and "seed" not in mergers.merger_options(options.method):
        options.image_seed, options.seed = options.seed, None
    else:
        options.image_seed = options.seed or 0
    return out


def _check_distinct(names: Sequence[str], models: Sequence[Any]) -> None:
    seen: dict[str, str] = {}
    for name, variables in zip(names, models, strict=True):
        fingerprint = weights.model_fingerprint(variables)
        if fingerprint in seen:
            same = "it" if seen[fingerprint] == name else f"{name}, which is the same model,"
            raise UserError(f"{seen[fingerprint]}: {same} is given twice; give different models")
        seen[fingerprint] = name


def _report(
    architecture: str, names: Sequence[str], models: Sequence[tuple[Any, dict[str, Any]]]
) -> None:
    """What will be merged: `load_parent` has seen that all shapes are the architecture's."""
    backbone = flatten(without_head(models[0][0]))
    numbers = sum(int(np.size(leaf)) for leaf in backbone.values())
    say(f"{architecture}: {len(backbone)} arrays, {numbers / 1e6:.1f} million numbers, of each:")
    for name, (variables, _) in zip(names, models, strict=True):
        head = variables["params"].get("head")
        shape = "no head" if head is None else "head {} -> {}".format(*np.shape(head["kernel"]))
        say(f"  {name}: {shape}")


def _images(
    options: argparse.Namespace, architecture: str, cards: Sequence[dict[str, Any]]
) -> np.ndarray:
    """float32 (n, size, size, 3), normalised, from a folder and all below it."""
    spec, folder = get_spec(architecture), options.images.expanduser()
    if not folder.is_dir():
        raise UserError(f"--images {folder}: there is no such folder")
    paths = sorted(find_images(folder))
    if not paths:
        raise UserError(f"--images {folder}: holds no image ({', '.join(SUFFIXES)})")
    agreed = _agreed(cards)
    size = options.image_size or agreed.get("image_size", spec.preprocessing.size)
    mean, std = (agreed.get(x, getattr(spec.preprocessing, x)) for x in ("mean", "std"))
    order = np.random.default_rng(options.image_seed).permutation(len(paths))
    chosen = [paths[row] for row in sorted(order[: options.num_images].tolist())]
    say(f"{len(chosen)} of {len(paths)} images of {folder}, {size} px")
    resize = agreed.get("resize", spec.preprocessing.resize)
    rendering = Rendering.of_card(agreed)
    preprocessing = Preprocessing(size, resize, tuple(mean), tuple(std), rendering)
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda path: read_image(path, size, resize, rendering), chosen))
    network = Network(create_model(architecture, num_classes=0), preprocessing)
    return np.asarray(network.normalise(jnp.asarray(np.stack(pixels))))


def _agreed(cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields in which all cards that have them are the same."""
    agreed = {}
    for field in _FROM_ALL:
        values = [card[field] for card in cards if field in card]
        if values and all(value == values[0] for value in values):
            agreed[field] = values[0]
    return agreed


def _card(
    options: argparse.Namespace,
    architecture: str,
    names: Sequence[str],
    models: Sequence[tuple[Any, dict[str, Any]]],
    given: dict[str, Any],
) -> dict[str, Any]:
    head = models[0][0]["params"].get("head") if options.heads == "merge" else None
    agreed = _agreed([card for _, card in models[: len(options.parents)]])
    if head is None:
        agreed.pop("classes", None)
    return {
        "architecture": architecture,
        "num_classes": 0 if head is None else int(np.size(head["bias"])),
        **agreed,
        "recipe": f"merge {options.method}",
        "options": {**given, "recalibrate": options.recalibrate},
        "parents": {
            name: {
                "source": name,
                "fingerprint": weights.model_fingerprint(variables),
                "data_fingerprint": card.get("data_fingerprint"),
            }
            for name, (variables, card) in zip(names, models, strict=True)
        },
    }


def _write(out: Path, architecture: str, variables: Any, card: dict[str, Any]) -> None:
    model = weights.model_from_card(architecture, variables, card)
    if out.suffix:
        weights.save_weights(out, architecture, variables)
        atomic.write_json(out.with_suffix(".json"), model.card())
    else:
        weights.save_model(out, model)
