"""The gradient of a network's loss beside PyTorch's, without an optimizer, a process for each row.

    taskset -c 0,1 python benchmarks/gradient.py

Each network and batch size is measured in processes of its own, since compiled programs beside it
change where memory lies, and so the time. Both sides have the same weights and images, float32,
batch norms of training; PyTorch channels last and without `torch.compile`. Before, their gradients
must agree.

Expected: both are bound by the arithmetic of convolutions, three times the forward pass's.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytorch_recipe
import torch
from measuring import Side, interleave, spread
from results import by_row, output_option, write_table
from torch.nn import functional
from training_step import CLASSES, GRADIENT_TOLERANCE, SIDES, Case, parents, relative_difference

import medmerge_jax as mm
from medmerge_jax.weights import variables_to_torch

QUESTION = "How long does a gradient take beside PyTorch's, without an optimizer?"
CASES = ("densenet121:4", "resnet50:4", "resnet18:8", "resnet18:4", "deit_small_patch16_224:8")


def main() -> None:
    """Prints the table, and writes it."""
    beside_pytorch.prepare_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:BATCH")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=13, help="of one gradient of each side")
    parser.add_argument("--processes", type=int, default=5)
    output_option(parser, "gradient")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(case_of(options.cases[0], options), options.blocks)))
        return
    notes = [
        f"float32, {options.image_size} px; medians of "
        f"{options.blocks} blocks, of {options.processes} processes the median (lowest–highest)."
    ]
    rows, raw = [], []
    for case in options.cases:
        command = [sys.executable, __file__, "--alone", "--cases", case]
        command += ["--blocks", str(options.blocks), "--image-size", str(options.image_size)]
        processes = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(options.processes)
        ]
        medians = {name: [float(np.median(one[name])) for one in processes] for name in SIDES}
        ratios = [float(np.median(np.divide(*(one[name] for name in SIDES)))) for one in processes]
        rows.append(
            {
                "model, batch": case.replace(":", ", "),
                **{f"{name} ms": spread(medians[name], 1e-3, 0) for name in SIDES},
                "JAX / PyTorch": spread(ratios, digits=2),
                "gradients differ by": f"{max(one['difference'] for one in processes):.0e}",
            }
        )
        raw.append({"case": case, "processes": processes})
        answer = by_row(rows, ["model, batch"], "JAX / PyTorch")
        write_table(options.output, QUESTION, f"JAX / PyTorch: {answer}.", rows, notes, raw=raw)


def case_of(text: str, options: argparse.Namespace) -> Case:
    """Of "model:batch"."""
    model, batch_size = text.split(":")
    return Case(model, int(batch_size), options.image_size, "float32", "off")


def measure(case: Case, blocks: int) -> dict[str, Any]:
    """Seconds of each block by side, and the relative difference of the gradients.

    Raises:
      SystemExit: The gradients differ too much.
    """
    images = np.random.default_rng(0).standard_normal(case.shape, np.float32)
    with parents(case) as (path, _):
        ours, theirs = (make(case, path, images) for make in (jax_gradient, torch_gradient))
    # Ours also has the running statistics.
    gradients, expected = ours(), theirs()
    difference = relative_difference({name: gradients[name] for name in expected}, expected)
    if not difference <= GRADIENT_TOLERANCE:
        raise SystemExit(f"{case}: the gradients differ by {difference:.1e}")
    sides = [Side(n, f.step, f.wait) for n, f in zip(SIDES, (ours, theirs), strict=True)]
    costs = interleave(sides, blocks, 1)
    return {name: [cost.wall for cost in costs[name]] for name in SIDES} | {
        "difference": difference
    }


class Gradient:
    """A side; calling it returns the gradients by PyTorch's names."""

    def __init__(
        self, step: Callable[[], Any], wait: Callable[[], Any], named: Callable[[], dict[str, Any]]
    ):
        self.step, self.wait, self._named = step, wait, named

    def __call__(self) -> dict[str, Any]:
        """After one step."""
        self.step()
        self.wait()
        return self._named()


def jax_gradient(case: Case, path: Path, images: np.ndarray) -> Gradient:
    """Of the package's network."""
    model = mm.create_model(case.architecture, CLASSES)
    variables = mm.load_weights(case.architecture, path)

    def loss(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
        given = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(given, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    statistics = variables.get("batch_stats", {})
    arguments = jax.device_put((variables["params"], statistics, images, case.labels()))
    last: list[Any] = [None]

    def step() -> None:
        last[0] = None  # as PyTorch's side lets go of its gradients before it makes new ones
        last[0] = gradient(*arguments)

    def named() -> dict[str, Any]:
        tree = {"params": last[0][1], "batch_stats": statistics}
        tensors = variables_to_torch(case.architecture, jax.tree.map(jnp.asarray, tree))
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}

    return Gradient(step, lambda: jax.block_until_ready(last[0]), named)


def torch_gradient(case: Case, path: Path, images: np.ndarray) -> Gradient:
    """Of the network of torchvision or timm, channels last."""
    network = pytorch_recipe.load_network(case.architecture, path)
    network = network.to(memory_format=torch.channels_last).train()
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)  # NHWC in memory: channels last
    labels = torch.from_numpy(case.labels()).long()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        functional.cross_entropy(network(inputs), labels).backward()

    def named() -> dict[str, Any]:
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    return Gradient(step, lambda: None, named)


if __name__ == "__main__":
    main()
