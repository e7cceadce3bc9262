"""python -m medmerge_jax.merge --method weight_matching --out merged.safetensors A B ...

Merges weight files, model directories or run directories without training. Methods that look at
activations or gradients want a folder of images, without labels: --images FOLDER.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medmerge_jax import weights
from medmerge_jax.commands import entry
from medmerge_jax.commands.help import HelpFormatter
from medmerge_jax.data.files import find_images
from medmerge_jax.data.hashing import find_hashes
from medmerge_jax.errors import UserError
from medmerge_jax.images.decode import read_image
from medmerge_jax.images.formats import SUFFIXES
from medmerge_jax.merging.trees import flatten, without_head
from medmerge_jax.models import create_model, get_spec, list_models, mergers, statistics
from medmerge_jax.models.network import Network
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic

_FROM_ALL = (
    *("image_size", "resize", "mean", "std", "classes", "multilabel"),
    *("intensity", "window", "background"),
)
"""Fields of the parents' cards that the merged model's card takes over if all agree."""

_Models = Sequence[tuple[Any, dict[str, Any]]]

_EPILOG = """\
methods, and their options:
{}

example:
  python -m medmerge_jax.merge --method zipit --images images/train \\
      --recalibrate --out merged.safetensors a.safetensors b.safetensors"""


def main(arguments: Sequence[str]) -> None:
    """Merges, and writes the model with its card beside it."""
    options = _parse(arguments)
    out = _checked_out(options)
    entry.work_in(out.parent)
    entry.keep_programs()
    names = [*options.parents, *([options.ancestor] if options.ancestor else [])]
    lacking = options.estimate_statistics
    models = [weights.load_parent(names[0], options.architecture, lacking=lacking)]
    architecture = models[0][1]["architecture"]
    models += [weights.load_parent(name, architecture, lacking=lacking) for name in names[1:]]
    fingerprints = _fingerprints(names, models)
    models = _of_one_normalisation(architecture, models)
    _report(architecture, names, models)
    agreed = _agreed([card for _, card in models[: len(options.parents)]])
    images = None if options.images is None else _images(options, architecture, agreed)
    models = _with_statistics(architecture, models, images, options)
    parents = models[: len(options.parents)]
    given = {name: getattr(options, name) for name in _merger_flags()}
    given = {name: value for name, value in given.items() if value is not None}
    if "multilabel" in mergers.merger_options(options.method):
        given["multilabel"] = [bool(card.get("multilabel")) for _, card in parents]
    try:
        merged = mergers.merge(
            options.method,
            architecture,
            [variables for variables, _ in parents],
            images,
            heads=options.heads,
            recalibrate=options.recalibrate,
            repair=options.repair,
            batch_size=options.batch_size,
            **given,
            **({"ancestor": models[-1][0]} if options.ancestor else {}),
        )
    except ValueError as error:
        rows = [f"  parent {index} is {name}" for index, name in enumerate(options.parents)]
        raise UserError("\n".join([str(error), *rows])) from error
    if options.ancestor:
        given["ancestor"] = options.ancestor
    if options.heads == "drop" or "head" not in models[0][0]["params"]:
        agreed.pop("classes", None)
    card = {
        **agreed,
        "recipe": f"merge {options.method}",
        "options": {**given, "recalibrate": options.recalibrate, "repair": options.repair},
        "parents": _parents(fingerprints, models),
    }
    model = weights.model_from_card(architecture, merged, card)
    if out.suffix:
        weights.save_weights(out, architecture, merged)
        atomic.write_json(out.with_suffix(".json"), model.card())
    else:
        weights.save_model(out, _with_hashes(model, models))
    say(f"wrote {out}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax.merge",
        description="Merges weight files, model directories or run directories without training.",
        epilog=_methods(),
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "parents",
        nargs="+",
        metavar="MODEL",
        help="weight file, model or run directory, or hf://ORG/NAME",
    )
    add("--method", required=True, choices=mergers.list_mergers(), metavar="NAME", help="see below")
    add("--out", required=True, type=Path, help="a .safetensors file, or a folder for a model")
    add("--overwrite", action="store_true", help="replace OUT")
    add("--architecture", choices=list_models(), metavar="NAME", help="default: as the first says")
    add("--heads", choices=mergers.HEADS, default="merge", help="drop them if classes differ")
    add("--recalibrate", action="store_true", help="batch norms, on the images")
    add("--repair", action="store_true", help="layers of a transformer, on the images")
    add("--estimate-statistics", action="store_true", help="that parents lack, on the images")
    add("--images", type=Path, metavar="FOLDER", help="to calibrate with")
    add("--num-images", type=_count, default=512, help="of these, at most")
    add("--image-size", type=_count, help="pixels; default: as parents' cards say")
    add("--batch-size", type=_count, default=32)
    add("--ancestor", metavar="MODEL", help="that the parents were trained from")
    for name, methods in _merger_flags().items():
        add(f"--{name}", type=_numbers, help=f"of {', '.join(methods)}")
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
    names = mergers.list_mergers()
    width = max(map(len, names)) + 2
    lines = []
    for name in names:
        text, options = mergers.describe_merger(name)
        lines.append(f"  {name:{width}}{text}{f' ({options})' if options else ''}")
    return _EPILOG.format("\n".join(lines))


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is given; 1 or more is wanted")
    return int(text)


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
    if options.images is None and (what := _wants_images(options)):
        raise UserError(f"{what} wants --images FOLDER")
    options.image_seed = 0 if options.seed is None else options.seed
    if type(options.image_seed) is not int or options.image_seed < 0:
        raise UserError(f"--seed {options.seed}: a whole number from 0 is wanted")
    if "seed" not in mergers.merger_options(options.method):
        options.seed = None
    return out


def _fingerprints(names: Sequence[str], models: _Models) -> dict[str, str]:
    """With the model's name of each, if no two are the same."""
    seen: dict[str, str] = {}
    for name, (variables, _) in zip(names, models, strict=True):
        fingerprint = weights.model_fingerprint(variables)
        if fingerprint in seen:
            same = "it" if seen[fingerprint] == name else f"{name}, which is the same model,"
            raise UserError(f"{seen[fingerprint]}: {same} is given twice; give different models")
        seen[fingerprint] = name
    return seen


def _report(architecture: str, names: Sequence[str], models: _Models) -> None:
    """What will be merged: `load_parent` has seen that all shapes are the architecture's."""
    backbone = flatten(without_head(models[0][0]))
    numbers = sum(int(np.size(leaf)) for leaf in backbone.values())
    say(f"{architecture}: {len(backbone)} arrays, {numbers / 1e6:.1f} million numbers, of each:")
    for name, (variables, _) in zip(names, models, strict=True):
        head = variables["params"].get("head")
        shape = "no head" if head is None else "head {} -> {}".format(*np.shape(head["kernel"]))
        say(f"  {name}: {shape}")


def _parents(fingerprints: dict[str, str], models: _Models) -> dict[str, Any]:
    """What the merged model's card says of each."""
    return {
        name: {
            "source": name,
            "fingerprint": fingerprint,
            "data_fingerprint": card.get("data_fingerprint"),
            **{field: card[field] for field in ("origin", "licence") if field in card},
            **({"notes": card["notes"]} if card.get("notes") else {}),
        }
        for (fingerprint, name), (_, card) in zip(fingerprints.items(), models, strict=True)
    }


def _with_hashes(merged: weights.Model, models: _Models) -> weights.Model:
    """With hashes of the images that any of the models was trained on, if all are known."""
    fingerprints = [card.get("data_fingerprint") for _, card in models]
    found = [
        find_hashes(Path(card["file"]), fingerprint)
        for fingerprint, (_, card) in zip(fingerprints, models, strict=True)
    ]
    known = [one.training().perceptual for one in found if one is not None]
    if len(known) < len(models):
        return merged
    of_all = hashlib.sha256(json.dumps(sorted(map(str, fingerprints))).encode()).hexdigest()
    return dataclasses.replace(
        merged,
        provenance={**merged.provenance, "data_fingerprint": of_all},
        image_hashes=np.concatenate(known),
    )


def _images(options: argparse.Namespace, architecture: str, agreed: dict[str, Any]) -> np.ndarray:
    """float32 (n, size, size, 3), normalised, from a folder and all below it."""
    folder = options.images.expanduser()
    if not folder.is_dir():
        raise UserError(f"--images {folder}: there is no such folder")
    paths, notes = find_images(folder)
    paths.sort()
    for note in notes:
        say(f"--images: {note}")
    if not paths:
        raise UserError(f"--images {folder}: holds no image ({', '.join(SUFFIXES)})")
    preprocessing = weights.model_from_card(architecture, {}, agreed).preprocessing
    size, resize = options.image_size or preprocessing.size, preprocessing.resize
    if refusal := get_spec(architecture).refusal(size):
        raise UserError(f"--image-size {size}: {refusal}")
    order = np.random.default_rng(options.image_seed).permutation(len(paths))
    chosen = [paths[row] for row in sorted(order[: options.num_images].tolist())]
    say(f"{len(chosen)} of {len(paths)} images of {folder}, {size} px")
    rendering = preprocessing.rendering
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda path: read_image(path, size, resize, rendering), chosen))
    network = Network(create_model(architecture, num_classes=0), preprocessing)
    return np.asarray(network.normalise(jnp.asarray(np.stack(pixels))))


def _wants_images(options: argparse.Namespace) -> str:
    """Which option or merger does; "" if none."""
    if options.recalibrate:
        return "--recalibrate"
    if options.repair:
        return "--repair"
    if options.estimate_statistics:
        return "--estimate-statistics"
    return f"the merger {options.method!r}" if mergers.MERGERS[options.method].needs_images else ""


def _with_statistics(
    architecture: str, models: _Models, images: np.ndarray | None, options: argparse.Namespace
) -> list[tuple[Any, dict[str, Any]]]:
    """The models; those whose batch norms lack running statistics have those of the images."""
    complete = []
    for variables, card in models:
        if images is not None and statistics.lacks_statistics(architecture, variables):
            note = statistics.estimated_note(len(images), options.images.name)
            say(f"{card['file']}: {note}")
            variables = statistics.with_statistics(
                architecture, variables, images, batch_size=options.batch_size
            )
            card = {**card, "notes": [*card.get("notes", []), note]}
        complete.append((variables, card))
    return complete


def _of_one_normalisation(
    architecture: str, models: list[tuple[Any, dict[str, Any]]]
) -> list[tuple[Any, dict[str, Any]]]:
    """The models as they are if all want images normalised alike, else adapted to what is usual."""
    published = get_spec(architecture).preprocessing
    usual = {"mean": list(published.mean), "std": list(published.std)}
    kinds = {json.dumps([card.get(key, usual[key]) for key in usual]) for _, card in models}
    if len(kinds) == 1:
        return models
    adapted = []
    for variables, card, note in (weights.as_published(architecture, *one) for one in models):
        if note:
            say(f"{card['file']}: {note}")
        adapted.append((variables, card))
    return adapted


def _agreed(cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields in which all cards that have them are the same."""
    values = {field: [card[field] for card in cards if field in card] for field in _FROM_ALL}
    return {field: of[0] for field, of in values.items() if of and of.count(of[0]) == len(of)}
