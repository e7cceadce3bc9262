"""Images per second of prediction, beside PyTorch's.

    taskset -c 0,1 python benchmarks/inference.py --models resnet18,resnet50,densenet121
    python benchmarks/inference.py                          # on a GPU: bfloat16, batch 256

The package's `predict_step` and `pytorch_recipe.Predict` (no gradients, channels last, on a GPU
compiled), both from uint8 images on the device to logits there. Weights are the same, and so are
the logits of both in float32, or the script stops.

Expected: on a CPU both are bound by the arithmetic; XLA's convolutions are a little slower than
oneDNN's, and it does not fold batch norms into them.
"""

import dataclasses
from typing import Any

import beside_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import pytorch_recipe
import torch
from beside_pytorch import Peak, forward_work
from measuring import Side, interleave, median, ratio, spread
from results import by_row, write_table
from training_step import CLASSES, Case, JaxFeatures, TorchFeatures, parents

import medmerge_jax as mm
from medmerge_jax.models import get_spec
from medmerge_jax.models.network import Network

QUESTION = "How many images per second are predicted, beside PyTorch?"
TOLERANCE = 1e-3
"""Of the logits, float32, relative to the largest."""


def main() -> None:
    """Prints the table, and writes it."""
    beside_pytorch.prepare_process()
    parser = beside_pytorch.parser(__doc__, "inference")
    parser.set_defaults(models="resnet18,resnet50,densenet121")
    parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 8)
    options = parser.parse_args()
    dtype = options.dtype
    peak = Peak.of_machine(getattr(torch, dtype))
    notes = [f"Batch {options.batch_size}, {beside_pytorch.described(options, peak)}"]
    rows, raw = [], []
    for model in options.models:
        case = Case(model, options.batch_size, options.image_size, dtype, options.compile)
        notes.append(f"{model}: {_check(case)}")
        costs = interleave(_sides(case), options.blocks, options.steps)
        network = pytorch_recipe.new_network(model, CLASSES, seed=0)
        work = forward_work(network, case.shape, jnp.dtype(dtype).itemsize)
        ours, theirs = costs["JAX"], costs["PyTorch"]
        row = {
            "model": model,
            "floor, GFLOP and MB an image": f"{work.operations / case.batch_size / 1e9:.3g}, "
            f"{work.bytes / case.batch_size / 1e6:.3g}",
            "floor, images/s": f"{case.batch_size / work.seconds(peak):.0f}",
        }
        for name, blocks in costs.items():
            rates = [case.batch_size / cost.wall for cost in blocks]
            row[f"{name}, images/s"] = spread(rates, digits=1)
            row[f"{name}, per CPU second"] = f"{case.batch_size / median(blocks, 'cpu'):.1f}"
        row["JAX / PyTorch, time"] = spread(ratio(ours, theirs), digits=2)
        row["in CPU time"] = spread(ratio(ours, theirs, "cpu"), digits=2)
        rows.append(row)
        seconds = {name: [dataclasses.asdict(cost) for cost in costs[name]] for name in costs}
        raw.append({**dataclasses.asdict(case), "blocks": seconds})
        answer = f"JAX / PyTorch: {by_row(rows, ['model'], 'JAX / PyTorch, time')}."
        write_table(options.output, QUESTION, answer, rows, notes, raw=raw)


def _sides(case: Case) -> list[Side]:
    spec = get_spec(case.architecture)
    model = mm.create_model(case.architecture, CLASSES, jnp.dtype(case.dtype))
    with parents(case) as (path, _):
        variables = mm.load_weights(case.architecture, path)
        network = pytorch_recipe.load_network(case.architecture, path)
    settings = pytorch_recipe.Settings.of_machine(case.compile, getattr(torch, case.dtype))
    steps: dict[str, Any] = {
        "JAX": JaxFeatures(
            Network(model, spec.preprocessing),
            variables,
            case.images(),
        ),
        "PyTorch": TorchFeatures(network, settings, case.images()),
    }
    return [Side(name, step, step.wait) for name, step in steps.items()]


def _check(case: Case) -> str:
    """How far logits differ in float32; a SystemExit if it is too far."""
    checked = dataclasses.replace(case, dtype="float32", batch_size=2, compile="off")
    pytorch_recipe.allow_tf32(False)
    outputs = []
    with jax.default_matmul_precision("highest"):
        for side in _sides(checked):
            side.step()
            side.wait()
            logits = side.step.outputs  # type: ignore[attr-defined]
            outputs.append(np.asarray(logits.cpu() if isinstance(logits, torch.Tensor) else logits))
    pytorch_recipe.allow_tf32(True)
    difference = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[1]).max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"{case}: the logits differ by {difference:.1e} of the largest")
    return f"logits agree to {difference:.0e} of the largest"


if __name__ == "__main__":
    main()
