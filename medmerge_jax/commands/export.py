"""python -m medmerge_jax export MODEL --to FOLDER: a model for other programs."""

import argparse
from collections.abc import Sequence

from medmerge_jax.commands import entry

_EPILOG = """\
formats:
  safetensors  weights with torchvision's names, also timm's
  timm         the same and timm's config.json: timm.create_model("local-dir:FOLDER")
  monai        weights with MONAI's names
  stablehlo    a program with the weights inside, which jax.export runs on CPU, GPU and TPU
  onnx         the same for ONNX runtimes (pip install 'medmerge-jax[onnx]')

FOLDER gets a README.md too, a model card of the Hugging Face hub that says how the model is used.
An earlier export there is replaced.

examples:
  python -m medmerge_jax export runs/aptos --to for_timm --format timm
  python -m medmerge_jax export runs/aptos --to program --format stablehlo --with-preprocessing"""


def main(arguments: Sequence[str]) -> None:
    """Exports, and says which files there are."""
    options = _parse(arguments)
    entry.work_in(options.to.parent)
    from medmerge_jax.weights import load_model
    from medmerge_jax.weights.export import export_model

    model = load_model(options.model)
    normalised = not options.with_preprocessing
    files = export_model(model, options.to, options.format, normalised=normalised)
    print(f"wrote {options.to}: {', '.join(files)}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from medmerge_jax.weights.export import KINDS

    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax export",
        usage="%(prog)s MODEL --to FOLDER [--format NAME] [options]",
        description="Writes a model for other programs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run, model directory or weight file")
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
    options = parser.parse_intermixed_args(arguments)
    if options.with_preprocessing and options.format not in ("stablehlo", "onnx"):
        parser.error("--with-preprocessing is for --format stablehlo or onnx")
    return options
