"""What models say of any images, which are decoded while the device computes."""

import collections
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, softmax

from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predict import explain_memory, predict_step
from medmerge_jax.evaluation.predictions import class_names
from medmerge_jax.images.decode import read_image, resize_pixels
from medmerge_jax.models import create_model
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.runtime import preemption
from medmerge_jax.runtime.cpu import usable_cores
from medmerge_jax.runtime.mesh import fetch
from medmerge_jax.weights import Model

Image = str | os.PathLike[str] | np.ndarray

BATCH = 32
"""Images that the device gets at once."""


class Chunk(NamedTuple):
    """What models say of some consecutive images.

    Attributes:
      rows: Numbers of the images.
      probabilities: (n, classes) float32; NaN for an image that cannot be used.
      problems: Why not, by row.
    """

    rows: range
    probabilities: np.ndarray
    problems: dict[int, str]


def predict(model: Model | Sequence[Model], images: Sequence[Image] | np.ndarray) -> np.ndarray:
    """Probabilities of images, each decoded and resized as those that the model was trained on.

    Args:
      model: With a head. Of several, which have the same classes in any order, the mean of their
        probabilities is taken.
      images: Paths, or uint8 arrays (h, w) or (h, w, 3) of any size.

    Returns:
      (n, classes) float32 in [0, 1], in the order of the (first) model's classes: the softmax of
      the logits, or with several labels per image the sigmoid of each.

    Raises:
      UserError: A model has no head or other classes, or an image cannot be used; names it.

    >>> from medmerge_jax.weights import Model
    >>> module = create_model("resnet20", num_classes=2)
    >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> model = Model("resnet20", variables, Preprocessing(32), ("healthy", "ill"))
    >>> predict(model, [np.zeros((80, 60), np.uint8)]).shape
    (1, 2)
    """
    one = repr(os.fspath(images)) if isinstance(images, str | os.PathLike) else ""
    if isinstance(images, np.ndarray) and (images.ndim == 2 or images.shape[2:] == (3,)):
        one = f"an array of shape {images.shape}"
    if one:
        raise UserError(f"{one}: a list of images is wanted, not one")
    models = [model] if isinstance(model, Model) else list(model)
    check_ensemble(models)
    found = [np.zeros((0, models[0].num_classes), np.float32)]
    for chunk in stream(models, images):
        for problem in chunk.problems.values():
            raise UserError(problem)
        found.append(chunk.probabilities)
    return np.concatenate(found)


def check_ensemble(models: Sequence[Model], names: Sequence[str] = ()) -> None:
    """Refuses models that cannot be averaged.

    Args:
      models: At least one.
      names: What they are called in messages; by default the files that they come from.

    Raises:
      UserError: There is no model, one has no head, or two have not the same classes.
    """
    if not models:
        raise UserError("0 models; one or more are wanted")
    names = names or [str(model.file or model.architecture) for model in models]
    for name, model in zip(names, models, strict=True):
        if not model.num_classes:
            raise UserError(f"{name}: the model has no head to predict with")
        if model.multilabel != models[0].multilabel or set(classes_of(model)) != set(
            classes_of(models[0])
        ):
            raise UserError(
                f"{names[0]} tells {_described(models[0])} and {name} {_described(model)}; models "
                "that are averaged have the same classes"
            )


def classes_of(model: Model) -> tuple[str, ...]:
    """The model's, see `predictions.class_names`."""
    return class_names(model.classes, model.num_classes)


def _described(model: Model) -> str:
    kind = "any of" if model.multilabel else "one of"
    return f"{kind} {', '.join(classes_of(model))}"


def stream(
    models: Sequence[Model],
    images: Sequence[Image | None] | np.ndarray,
    start: int = 0,
    batch_size: int = BATCH,
) -> Iterator[Chunk]:
    """What models say of images, in their order, with a bounded number of images in memory.

    Args:
      models: See `check_ensemble`.
      images: See `predict`; None for one that is not there.
      start: The first image.
      batch_size: Images that the device gets at once.

    Raises:
      OutOfMemoryError: The batch is too large.
    """
    # Of one shape, so that one program serves all batches; few images are few at once.
    size = min(batch_size, 1 << max(len(images) - start - 1, 0).bit_length())
    looks = list(dict.fromkeys(model.preprocessing for model in models))
    experts = [_Expert(model, classes_of(models[0])) for model in models]

    def decode(rows: range) -> _Decoded:
        pixels = [np.zeros((size, look.size, look.size, 3), np.uint8) for look in looks]
        problems = {}
        for place, row in enumerate(rows):
            try:
                for of_look, look in zip(pixels, looks, strict=True):
                    of_look[place] = prepared_pixels(images[row], row, look)
            except UserError as error:
                problems[row] = str(error)
        return _Decoded(rows, pixels, problems)

    def begin(decoded: _Decoded) -> tuple[_Decoded, list[jax.Array]]:
        on_device = dict(zip(looks, map(jnp.asarray, decoded.pixels), strict=True))
        return decoded, [expert.outputs(on_device[expert.look]) for expert in experts]

    def finish(decoded: _Decoded, outputs: list[jax.Array]) -> Chunk:
        answers = [e.probabilities(o) for e, o in zip(experts, outputs, strict=True)]
        mean = np.mean(answers, axis=0)[: len(decoded.rows)]
        mean[[row - decoded.rows.start for row in decoded.problems]] = np.nan
        return Chunk(decoded.rows, mean.astype(np.float32), decoded.problems)

    workers, count = usable_cores(), len(images)
    chunks = (range(first, min(first + size, count)) for first in range(start, count, size))
    pending = collections.deque[Future[_Decoded]]()
    in_flight = collections.deque[tuple[_Decoded, list[jax.Array]]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        with explain_memory("predict", size):
            while True:
                room = workers + 1 - len(pending)
                pending.extend(pool.submit(decode, r) for r in itertools.islice(chunks, room))
                if not pending:
                    break
                preemption.check()
                in_flight.append(begin(pending.popleft().result()))
                if len(in_flight) > 1:
                    yield finish(*in_flight.popleft())
            while in_flight:
                yield finish(*in_flight.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


class _Decoded(NamedTuple):
    """A chunk of images as the models want them, filled up to the size of a batch."""

    rows: range
    pixels: list[np.ndarray]  # of each way of preparing them
    problems: dict[int, str]


class _Expert:
    """A model, ready to compute; its answers have the classes in a wanted order."""

    def __init__(self, model: Model, classes: Sequence[str]):
        module = create_model(model.architecture, model.num_classes)
        self.look = model.preprocessing
        self._network = Network(module, model.preprocessing)
        self._variables = jax.device_put(dict(model.variables))
        self._multilabel = model.multilabel
        self._order = [classes_of(model).index(name) for name in classes]

    def outputs(self, pixels: jax.Array) -> jax.Array:
        logits: jax.Array = predict_step(self._network, self._variables, pixels)
        return logits

    def probabilities(self, outputs: jax.Array) -> np.ndarray:
        """(n, classes) float64."""
        logits = fetch(outputs).astype(np.float64)
        found = expit(logits) if self._multilabel else softmax(logits, axis=1)
        return np.asarray(found[:, self._order])


def prepared_pixels(image: Image | None, row: int, preprocessing: Preprocessing) -> np.ndarray:
    """An image as a model wants it, uint8 (size, size, 3); `row` is its number for messages."""
    if image is None:
        raise UserError("there is no image file of this name")
    if isinstance(image, str | os.PathLike):
        path = Path(image).expanduser()
        return read_image(path, preprocessing.size, preprocessing.resize, preprocessing.rendering)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise UserError(
            f"image {row} is {array.dtype} of shape {array.shape}; a path, or uint8 of shape "
            "(h, w) or (h, w, 3) is wanted"
        )
    try:
        return resize_pixels(array, preprocessing.size, preprocessing.resize)
    except (UserError, ValueError) as error:
        raise UserError(f"image {row}: {error}") from error
