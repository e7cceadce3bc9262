"""What models say of many images, as a CSV file that is made bit by bit and goes on after a stop.

Until all images are done, `.NAME.part` beside it has a line of JSON for each, below one that says
of which models and images it is.
"""

import collections
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from medmerge_jax.data.listing import Listing
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.images import BATCH, check_ensemble, classes_of, stream
from medmerge_jax.runtime.inert import on_terminal
from medmerge_jax.runtime.progress import Bar
from medmerge_jax.storage.atomic import write_atomically
from medmerge_jax.storage.csv_cells import csv_line
from medmerge_jax.storage.locks import InUseError, held
from medmerge_jax.weights import Model, model_fingerprint

_THRESHOLD = 0.5
"""Above it a label is predicted, of images with any number of them; as the metrics have it."""


class Written(NamedTuple):
    """What is in a file of predictions.

    Attributes:
      images: How many.
      predicted: Of each class that occurs.
      problems: Of images that cannot be used.
      resumed: Of images that were computed before a stop.
    """

    images: int
    predicted: dict[str, int]
    problems: int
    resumed: int


def write_predictions(
    models: Mapping[str, Model], images: Listing, out: Path, batch_size: int = BATCH
) -> Written:
    """Writes a CSV file with a line for each image.

    Its columns are `image`; `predicted`, the class of the highest probability, or of several labels
    per image those above 0.5, with bars between them; `probability_CLASS` of each class; and
    `problem`, why an image cannot be used, its other cells being empty. A cell that a spreadsheet
    would take for a formula has a quotation mark before it, and control characters are spelt out.

    Args:
      models: By what they are called; see `images.check_ensemble`.
      images: What they are asked.
      out: The file, whole or absent; what was finished before a stop is not computed again.
      batch_size: Images that the device gets at once.

    Raises:
      UserError: Models that cannot be averaged, or another process writes this file.
    """
    check_ensemble(list(models.values()), list(models))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with held(out.with_name(f".{out.name}.lock")), part.open("a+b") as file:
            resumed = _resume(file, list(models.values()), images)
            with Bar("predict", len(images.ids), "images", "compiling") as bar:
                bar.skip(resumed)
                for chunk in stream(list(models.values()), images.paths, resumed, batch_size):
                    for row, probabilities in zip(chunk.rows, chunk.probabilities, strict=True):
                        problem = chunk.problems.get(row, "")
                        _append(
                            file, problem.removeprefix(f"{images.paths[row]}: ") or probabilities
                        )
                    file.flush()
                    bar.advance(len(chunk.rows))
            counts = collections.Counter[str]()
            lines = _lines(file, images.ids, next(iter(models.values())), counts)
            write_atomically(out, lambda written: written.writelines(lines))
            part.unlink()
    except InUseError as error:
        raise UserError(f"{out}: {error} writes it now; wait, or name another file") from None
    problems = counts.pop("", 0)
    return Written(len(images.ids), dict(counts), problems, resumed)


def _resume(file: IO[bytes], models: Sequence[Model], images: Listing) -> int:
    """The number of images whose lines are there and whole; what follows them is cut off."""
    digest = hashlib.sha256()
    for name, path in zip(images.ids, images.paths, strict=True):
        digest.update(json.dumps([name, str(path)]).encode())
    fingerprints = [model_fingerprint(model.variables) for model in models]
    began = json.dumps({"models": fingerprints, "images": digest.hexdigest()}).encode() + b"\n"
    file.seek(0)
    whole, count = 0, 0
    if file.readline() == began:
        whole = len(began)
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole, count = whole + len(line), count + 1
    file.truncate(whole)
    if not whole:
        file.write(began)
    return count


def _append(file: IO[bytes], answer: np.ndarray | str) -> None:
    value = answer if isinstance(answer, str) else [float(f"{x:.8g}") for x in answer]
    file.write(json.dumps(value).encode() + b"\n")


def _lines(
    file: IO[bytes], ids: Sequence[str], model: Model, counts: collections.Counter[str]
) -> Iterator[bytes]:
    """Of the CSV file; counts what is predicted, and as "" what cannot be."""
    classes = classes_of(model)
    yield _line(["image", "predicted", *(f"probability_{name}" for name in classes), "problem"])
    file.seek(0)
    file.readline()
    for name, line in zip(ids, file, strict=True):
        answer = json.loads(line)
        if isinstance(answer, str):
            counts[""] += 1
            yield _line([name, "", *[""] * len(classes), answer])
            continue
        if model.multilabel:
            found = [c for c, p in zip(classes, answer, strict=True) if p > _THRESHOLD]
        else:
            found = [classes[int(np.argmax(answer))]]
        counts.update(found)
        yield _line([name, "|".join(found), *map(str, answer), ""])


def _line(cells: Sequence[str]) -> bytes:
    return csv_line(map(on_terminal, cells)).encode("utf-8", "replace")
