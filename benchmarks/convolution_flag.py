"""What the flag of `runtime.cpu` that has Eigen convolve is worth with the JAX that is installed.

    taskset -c 0,1 python benchmarks/convolution_flag.py

Pairs of processes that differ in the flag alone, one after another: XLA reads it once, when it
starts. The gradients of both must agree.

Expected: up to half of the time of convolutions with 64 output channels or fewer, as long as XLA
shares a convolution among cores by 64 of them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import Cost, Side, interleave, ratio, spread
from results import by_row, output_option, write_table

import medmerge_jax as mm
from medmerge_jax.runtime import cpu

QUESTION = "What is the flag for convolutions on all cores worth with the newest JAX?"
TOLERANCE = 2e-2
"""Of the norm of the gradients, as in `training_step`: rounding decides some signs before ReLUs."""


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=("resnet18:8", "densenet121:4"))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=3)
    output_option(parser, "convolution_flag")
    parser.add_argument("--alone", choices=("with", "without"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        _run_alone(options)
        return
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        costs, gradients = _pairs(case, options)
        scale = np.linalg.norm(gradients["with"])
        difference = np.linalg.norm(gradients["with"] - gradients["without"]) / scale
        if not difference <= TOLERANCE:
            raise SystemExit(f"{case}: the gradients differ by {difference:.1e}")
        rows.append(
            {
                "model, batch": case.replace(":", ", "),
                **{f"{how} ms": spread([c.wall for c in costs[how]], 1e-3, 0) for how in costs},
                "without / with": spread(ratio(costs["without"], costs["with"]), digits=2),
                "gradients differ by": f"{difference:.0e}",
            }
        )
    notes = [
        f"float32, {options.image_size} px; medians of {options.blocks} blocks, of {options.pairs} "
        "pairs of processes the median (lowest–highest)."
    ]
    answer = by_row(rows, ["model, batch"], "without / with")
    write_table(options.output, QUESTION, f"Time without / with: {answer}.", rows, notes)


def _pairs(case: str, options: argparse.Namespace) -> tuple[Any, Any]:
    costs: dict[str, list[Cost]] = {"with": [], "without": []}
    gradients = {}
    for _ in range(options.pairs):
        for how, seen in costs.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "costs.npz")
                command = [sys.executable, __file__, "--cases", case, f"--alone={how}"]
                command += [f"--output={path}", "--blocks", str(options.blocks)]
                command += ["--image-size", str(options.image_size)]
                subprocess.run(command, check=True, env=os.environ)
                with np.load(path) as arrays:
                    seen.append(Cost(*np.median(arrays["costs"], axis=0).tolist()))
                    gradients[how] = arrays["gradient"]
    return costs, gradients


def _run_alone(options: argparse.Namespace) -> None:
    """In a process of its own: writes the gradient and what the blocks took to --output."""
    cpu.keep_freed_memory()
    if options.alone == "with":
        cpu.convolve_on_all_cores()
        if "ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
            raise SystemExit("the installed XLA does not know the flag")
    (case,) = options.cases
    name, batch = case.split(":")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((int(batch), options.image_size, options.image_size, 3))
    images = jnp.asarray(images, jnp.float32)
    labels = jnp.arange(int(batch)) % 5
    model = mm.create_model(name, num_classes=5)
    # It runs once, so that optimizing it takes longer than it saves.
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    variables = init(jax.random.key(0), images)

    def loss(params: Any, images: jax.Array) -> Any:
        given = {**variables, "params": params}
        logits, updated = model.apply(given, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def step() -> Any:
        return jax.block_until_ready(gradient(variables["params"], images))

    leaves = jax.tree.leaves(step()[0])
    costs = interleave([Side(case, step)], options.blocks, 1)[case]
    np.savez(
        options.output,
        costs=[(cost.wall, cost.cpu, cost.faults) for cost in costs],
        gradient=np.concatenate([np.ravel(leaf) for leaf in leaves]),
    )


if __name__ == "__main__":
    main()
