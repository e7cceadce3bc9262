"""python -m medmerge_jax export MODEL --to FOLDER: a model for other programs."""

import argparse
import dataclasses
from collections.abc import Sequence

from medmerge_jax.commands import entry
from medmerge_jax.commands.help import HelpFormatter
from medmerge_jax.runtime.progress import say, tell
from medmerge_jax.weights import Model, load_model
from medmerge_jax.weights.card import LICENCE
from medmerge_jax.weights.export import FILES, KINDS, export_model
from medmerge_jax.weights.push import check_pushable, push

_EPILOG = """\
formats:
  safetensors  weights with torchvision's names, also timm's
  timm         the same and timm's config.json: timm.create_model("local-dir:FOLDER")
  monai        weights with MONAI's names
  stablehlo    a program with the weights inside, which jax.export runs on CPU, GPU and TPU
  onnx         the same for ONNX runtimes (pip install 'medmerge-jax[onnx]')

FOLDER gets a README.md too, a model card of the Hugging Face hub that says how the model is used,
and image_hashes.npz, by which a run that starts from the model finds that it tests on images that
the model was trained on: perceptual hashes without names, from which no picture can be read. But
whoever has a picture can tell whether it is among them; --without-hashes leaves them out.
An earlier export there is replaced.

--hub ORG/NAME pushes what the folder then has, and nothing else, to the Hugging Face hub, with the
token of `hf auth login`; files of an earlier export there are replaced. It wants a licence, as the
hub spells it, because a model without one may be used by nobody.

examples:
  python -m medmerge_jax export runs/aptos --to for_timm --format timm
  python -m medmerge_jax export runs/aptos --to program --format stablehlo \\
      --with-preprocessing
  python -m medmerge_jax export runs/aptos --to aptos --hub clinic/aptos \\
      --license cc-by-nc-4.0"""


def main(arguments: Sequence[str]) -> None:
    """Exports, and says which files there are."""
    options = _parse(arguments)
    entry.work_in(options.to.parent)
    if options.hub:
        check_pushable(options.hub)
    model = _as_told(load_model(options.model), options)
    normalised = not options.with_preprocessing
    files = export_model(
        model, options.to, options.format, normalised=normalised, repository=options.hub
    )
    tell(f"wrote {options.to}: {', '.join(files)}")
    if model.image_hashes is None and not options.without_hashes:
        say("it has no hashes of its training images: what it was trained on cannot be audited")
    if options.hub:
        if model.image_hashes is not None:
            say("with hashes of its training images; --without-hashes leaves them out")
        there = push(options.to, options.hub, private=options.private, replaced=FILES)
        tell(f"pushed to {there}")


def _as_told(model: Model, options: argparse.Namespace) -> Model:
    """The model with the licence, and without hashes if they are not to be told."""
    licence = {"licence": options.license} if options.license else {}
    return dataclasses.replace(
        model,
        provenance={**model.provenance, **licence},
        image_hashes=None if options.without_hashes else model.image_hashes,
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax export",
        usage="%(prog)s MODEL --to FOLDER [--format NAME] [options]",
        description="Writes a model for other programs.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run, model directory, weight file or hf://ORG/NAME")
    add(
        "--to",
        required=True,
        type=entry.user_path,
        metavar="FOLDER",
        help="made if it is not there",
    )
    add("--format", choices=list(KINDS), default="safetensors", help="default: %(default)s")
    add("--with-preprocessing", action="store_true",
        help="a program takes uint8 images, resized only, and normalises them")  # fmt: skip
    add("--without-hashes", action="store_true", help="of the training images")
    add("--license", type=_licence, metavar="ID", help="such as mit or cc-by-nc-4.0")
    add("--hub", default="", metavar="ORG/NAME", help="pushes it to the Hugging Face hub")
    add("--private", action="store_true", help="there, for its owners alone")
    options = parser.parse_intermixed_args(arguments)
    if options.private and not options.hub:
        parser.error("--private is for --hub ORG/NAME")
    if options.hub and not options.license:
        parser.error("--hub wants --license ID, such as mit, cc-by-nc-4.0, other or unknown")
    if options.with_preprocessing and options.format not in ("stablehlo", "onnx"):
        parser.error("--with-preprocessing is for --format stablehlo or onnx")
    return options


def _licence(text: str) -> str:
    if not LICENCE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: is not spelled as on the hub, as mit, apache-2.0 or cc-by-nc-4.0"
        )
    return text
