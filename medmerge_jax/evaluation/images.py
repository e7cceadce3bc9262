"""What a model says of any images."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy.special import expit, softmax

from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predict import explain_memory, predict_step
from medmerge_jax.images.decode import read_image, resize_pixels
from medmerge_jax.models import create_model
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.runtime.mesh import fetch
from medmerge_jax.weights import Model

_BATCH = 32


def predict(
    model: Model, images: Sequence[str | os.PathLike[str] | np.ndarray] | np.ndarray
) -> np.ndarray:
    """Probabilities of images, each decoded and resized as those that the model was trained on.

    Args:
      model: With a head.
      images: Paths, or uint8 arrays (h, w) or (h, w, 3) of any size.

    Returns:
      (n, classes) float32 in [0, 1], in the order of `model.classes`: the softmax of the logits,
      or with several labels per image the sigmoid of each.

    Raises:
      UserError: The model has no head, or an image cannot be used; names it.

    >>> from medmerge_jax.weights import Model
    >>> module = create_model("resnet20", num_classes=2)
    >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> model = Model("resnet20", variables, Preprocessing(32), ("healthy", "ill"))
    >>> predict(model, [np.zeros((80, 60), np.uint8)]).shape
    (1, 2)
    """
    if not model.num_classes:
        raise UserError(
            f"{model.file or model.architecture}: the model has no head to predict with"
        )
    one = repr(os.fspath(images)) if isinstance(images, str | os.PathLike) else ""
    if isinstance(images, np.ndarray) and (images.ndim == 2 or images.shape[2:] == (3,)):
        one = f"an array of shape {images.shape}"
    if one:
        raise UserError(f"{one}: a list of images is wanted, not one")
    preprocessing, count = model.preprocessing, len(images)
    # Of one shape, so that one program serves all batches; few images are few at once.
    size = min(_BATCH, 1 << max(count - 1, 0).bit_length())
    module = create_model(model.architecture, model.num_classes)
    network = Network(module, preprocessing)
    logits = [np.zeros((0, model.num_classes), np.float32)]
    with ThreadPoolExecutor() as pool, explain_memory("predict", size):
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            pixels = list(pool.map(lambda row: _pixels(images[row], row, preprocessing), rows))
            pixels += [np.zeros_like(pixels[0])] * (size - len(pixels))
            outputs = predict_step(network, dict(model.variables), jnp.asarray(np.stack(pixels)))
            logits.append(fetch(outputs)[: len(rows)])
    exact = np.concatenate(logits).astype(np.float64)
    probabilities = expit(exact) if model.multilabel else softmax(exact, axis=1)
    return np.asarray(probabilities, np.float32)


def _pixels(
    image: str | os.PathLike[str] | np.ndarray, row: int, preprocessing: Preprocessing
) -> np.ndarray:
    """uint8 (size, size, 3)."""
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
