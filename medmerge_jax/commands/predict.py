"""python -m medmerge_jax predict MODEL IMAGES ... --out FILE: classes of new images."""

import argparse
from collections.abc import Sequence

from medmerge_jax.commands import entry
from medmerge_jax.commands.help import HelpFormatter
from medmerge_jax.runtime.progress import say, tell

_EPILOG = """\
Images are decoded and resized as those that the model was trained on. FILE has a line for each:
image, predicted, probability_CLASS of each class, and problem, why one cannot be used. The same
command goes on from what was interrupted.

examples:
  python -m medmerge_jax predict runs/aptos new_patients --out probabilities.csv
  python -m medmerge_jax predict runs/seed0 scans/*.dcm --with runs/seed1 \\
      --with runs/seed2 --out mean_of_three.csv
  python -m medmerge_jax predict runs/aptos patients.csv --root images \\
      --out probabilities.csv"""


def main(arguments: Sequence[str]) -> None:
    """Predicts, writes the file and says how many images are of which class."""
    options = _parse(arguments)
    entry.work_in(options.out.parent)
    entry.keep_programs()
    from medmerge_jax.data.listing import list_images
    from medmerge_jax.evaluation.prediction_file import write_predictions
    from medmerge_jax.weights import load_model

    names = dict.fromkeys([options.model, *options.others])
    images = list_images(options.images, options.root, options.image_column)
    models = {name: load_model(name) for name in names}
    for note in images.notes:
        say(note)
    written = write_predictions(models, images, options.out, options.batch_size)
    if written.resumed:
        say(f"{written.resumed} images were predicted before")
    counts = ", ".join(f"{name} {count}" for name, count in sorted(written.predicted.items()))
    tell(f"wrote {options.out}: {written.images} images; predicted {counts or 'nothing'}")
    if written.problems:
        say(f"warning: {written.problems} images cannot be used; the column problem says why")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax predict",
        usage="%(prog)s MODEL IMAGES ... --out FILE [options]",
        description="Predicts the classes of new images.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run, model directory, weight file or hf://ORG/NAME")
    add("images", nargs="+", metavar="IMAGES", help="files, folders, or one table (.csv, .tsv)")
    add("--out", required=True, type=entry.user_path, metavar="FILE", help="CSV")
    add("--with", action="append", default=[], dest="others", metavar="MODEL",
        help="a further model, of which there may be any number: the mean is taken")  # fmt: skip
    add(
        "--root",
        type=entry.user_path,
        help="folder of the images that a table names; default: its own",
    )
    add("--image-column", default="", metavar="NAME", help="of a table; default: a usual one")
    add(
        "--batch-size", type=entry.whole_number, default=32, metavar="N", help="default %(default)s"
    )
    return parser.parse_intermixed_args(arguments)
