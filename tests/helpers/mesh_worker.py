"""Trains on the devices that the process has and saves what came out: see test_mesh.py.

python -m helpers.mesh_worker EXPERIMENTS.json OUTPUT.npz [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.data import ResidentBatches, StreamedBatches
from medmerge_jax.evaluation.predict import predict
from medmerge_jax.images.augment import POLICIES, epoch_key
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.models.resnet import CifarResNet
from medmerge_jax.runtime.mesh import data_mesh, fetch, replicate
from medmerge_jax.training import parameterization
from medmerge_jax.training.accumulation import accumulated_step
from medmerge_jax.training.augmentation import augmented_batch
from medmerge_jax.training.step import Task, collapse, init_state, train_step

CLASSES = 3


def main():
    experiments, output, *cluster = sys.argv[1:]
    if cluster:
        jax.distributed.initialize(cluster[0], int(cluster[1]), int(cluster[2]))
    found = {}
    for number, options in enumerate(json.loads(Path(experiments).read_text())):
        for name, value in run(**options).items():
            found[f"{number}/{name}"] = value
    np.savez(output, **found)


def run(
    stage,
    batch_size,
    depth=3,
    steps=50,
    accumulate=1,
    stream=False,
    policy="",
    multilabel=False,
):
    """Losses, first gradients, last batch statistics, logits and batches of one experiment."""
    mesh = data_mesh()
    spec = get_spec("resnet20")
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    network = Network(CifarResNet(depth, CLASSES, dtype), spec.preprocessing, mesh)
    start = start_of(stage, depth)
    if dtype == jnp.float64:
        start = jax.tree.map(lambda x: np.asarray(x, dtype) if hasattr(x, "dtype") else x, start)
    task = Task(network, start.assemble, start.train_batch_norm, multilabel)
    rng = np.random.default_rng(0)
    images, labels = drawn(rng, 50, multilabel)
    kind = StreamedBatches if stream else ResidentBatches
    batches = kind(images, labels, batch_size, mesh=mesh, accumulate=accumulate)
    state, frozen = replicate((init_state(start), start.frozen), mesh)
    weights = replicate(jnp.array([0.5, 1.0, 2.0], jnp.float32), mesh)
    scalars = np.float32([1e-4 if stage == "merge_lp" else 1e-5, 1e-2])
    losses, gradients, rows = [], None, []
    for epoch in range(steps):
        key = epoch_key(3, epoch) if policy else None
        for batch in batches.epoch(3, epoch):
            if policy:
                batch = augmented_batch(POLICIES[policy], mesh, batch, key)
            take = accumulated_step if isinstance(batch, tuple) else train_step
            state, loss = take(task, state, frozen, batch, *scalars, weights, key)
            losses.append(float(loss))
            rows += [np.asarray(part["indices"]) for part in np.atleast_1d(batch)]
            if gradients is None:  # the first moment of Adam after one step is a tenth of them
                gradients = {p: 10 * fetch(g) for p, g in flatten(state.opt_state[0].mu).items()}
            if len(losses) == steps:
                break
        if len(losses) == steps:
            break
    params = collapse(start.assemble, state.trainable, frozen)
    logits = predict(network, {"params": params, "batch_stats": state.batch_stats}, batches)
    return {
        "losses": np.array(losses),
        "rows": np.concatenate(rows),
        "logits": logits,
        **{f"gradients/{path}": leaf for path, leaf in gradients.items()},
        **{f"stats/{path}": fetch(leaf) for path, leaf in flatten(state.batch_stats).items()},
        "compiled": np.array(train_step._cache_size()),
    }


def start_of(stage, depth):
    model = CifarResNet(depth, CLASSES)
    init = jax.jit(model.init)
    parents = [init(jax.random.key(seed), jnp.zeros((1, 16, 16, 3))) for seed in range(2)]
    if stage == "merge_lp":
        return parameterization.merge_linear_probe(parents, parents[0]["params"]["head"])
    return parameterization.fine_tune(parents[0])


def drawn(rng, count, multilabel):
    """Noise around a brightness that the label decides."""
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    images = rng.integers(0, 156, (count, 16, 16, 3)) + 50 * labels[:, None, None, None]
    if multilabel:
        labels = rng.integers(0, 2, (count, CLASSES)).astype(np.float32)
        labels[rng.random(labels.shape) < 0.3] = np.nan
    return images.astype(np.uint8), labels


if __name__ == "__main__":
    main()
