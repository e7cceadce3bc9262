"""A model's outputs over a whole split, and the metrics over them."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from medmerge_jax.data.batches import Batches
from medmerge_jax.errors import OutOfMemoryError
from medmerge_jax.evaluation.metrics import classification_metrics
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.models.network import Network
from medmerge_jax.runtime import preemption
from medmerge_jax.runtime.mesh import fetch, replicate, replicated

Tree = dict[str, Any]

STEPS_IN_FLIGHT = 4
"""Steps dispatched ahead of the one that the host waits for."""


def predict(network: Network, variables: Tree, batches: Batches) -> np.ndarray:
    """Outputs (num_examples, ...) float32 in evaluation mode, fetched once at the end."""
    outputs: list[tuple[jax.Array, int]] = []
    variables = replicate(variables, network.mesh)
    with explain_memory("evaluation", batches.batch_size):
        for batch, valid in batches.ordered():
            preemption.check()
            outputs.append((predict_step(network, variables, batch["inputs"]), valid))
            if len(outputs) > STEPS_IN_FLIGHT:  # or a fast disk would fill the device with images
                outputs[-1 - STEPS_IN_FLIGHT][0].block_until_ready()
        return np.concatenate([fetch(output)[:valid] for output, valid in outputs])


def evaluate(
    network: Network, variables: Tree, batches: Batches, multilabel: bool, ordinal: bool = False
) -> dict[str, Any]:
    """Metrics over a whole split, see `metrics.classification_metrics`."""
    logits = predict(network, variables, batches)
    return classification_metrics(
        Predictions(logits, np.asarray(batches.labels), multilabel, ordinal=ordinal)
    )


@functools.partial(jax.jit, static_argnames="network")
def predict_step(network: Network, variables: Tree, inputs: jax.Array) -> jax.Array:
    """Outputs in evaluation mode: logits, or features of a network without a head."""
    outputs: Any = network.model.apply(variables, network.normalise(inputs), train=False)
    if network.mesh is not None:
        constrain: Any = jax.lax.with_sharding_constraint
        outputs = constrain(outputs, replicated(network.mesh))
    logits: jax.Array = outputs
    return logits


@contextlib.contextmanager
def explain_memory(where: str, batch_size: int) -> Iterator[None]:
    """Says which batch size to try when the memory does not suffice."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # A CPU calls it INTERNAL, a GPU RESOURCE_EXHAUSTED or CUDA_ERROR_OUT_OF_MEMORY.
        text = str(error).lower().replace("_", " ")
        full = "out of memory" in text or "resource exhausted" in text
        if not full and not isinstance(error, MemoryError):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        smaller = f"batch_size = {batch_size // 2}" if batch_size > 1 else "a smaller image_size"
        raise OutOfMemoryError(
            f"{where}: out of memory with batch_size = {batch_size} ({reason}). Try {smaller}, or "
            "twice the accumulate, which takes the same batch in parts (batch norms then see the "
            "parts), in a new --workdir. Checkpoints of finished epochs are kept in this one."
        ) from error
