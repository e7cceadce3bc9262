"""What each optimisation for the CPU is worth: the gradient with all of them, and without one.

    taskset -c 0,1 python benchmarks/optimisations.py --models densenet121 resnet50 resnet18

Each is undone by putting its simplest form in its place, compiled once, and all are run in turn,
in blocks. Before, the gradients of all are compared with the first's at 64 px in float64, where
rounding does not decide the signs before ReLUs. Memory is a matter of the process: pairs of
processes that differ in nothing else, one after another.

Expected, before the first run: per batch norm, one pass over its input less; of max-pooling, no
arrays of indices; of 1 x 1 kernels' gradients, no transposed copies, 2 x 4 bytes per activation.
Of small maps, no transposed kernels, 2 x 4 bytes per number, and no transposed activations. Of
DenseNets' joined maps, two passes less forwards and half of one less backwards for each layer.
Of convolutions on all cores, up to half of the time of those with 64 output channels or fewer. Of
few filters' gradients, half of the time where 32 fill half of what a CPU's vectors hold. Of
activations that are not computed anew, a pass over the map and its gradient for each kernel, and
the more the longer the chain and the further apart two images lie.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import beside_pytorch
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import Cost, Side, interleave, median, ratio, spread
from results import by_row, output_option, write_table

import medmerge_jax as mm
from medmerge_jax.merging import kernels
from medmerge_jax.models import densenet, layers, norm, resnet
from medmerge_jax.training.parameterization import (
    Parameterization,
    fine_tune,
    merge_linear_probe,
)

ALL = "with all"
QUESTION = "How much longer does a gradient take without each optimisation for the CPU?"
MEMORY = "memory given back to the system"
TOLERANCE = 1e-9
"""Of the norm of all gradients, float64."""


class ProductOfFourAxes(layers.Conv):
    """Without the reshaping to matrices."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """As `Conv`."""
        if self.size > 1:
            return super().__call__(x)
        kernel = self.param("kernel", self.kernel_init, (1, 1, x.shape[-1], self.features))
        return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]


def pool_by_window(x: jax.Array) -> jax.Array:
    """Without the slices."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def blend_of_four_axes(leaves: Any, weights: jax.Array) -> jax.Array:
    """Of two parents, with coefficients of the shape (1, 1, 1, c_out)."""
    weights = weights[None, None, None]
    return weights * leaves[0] + (1 - weights) * leaves[1]


class StatisticsAnew(norm.BatchNorm):
    """Without what the caller has."""

    def __call__(
        self, x: jax.Array, use_running_average: bool, of_batch: norm.Statistics | None = None
    ) -> jax.Array:
        """As `BatchNorm`."""
        del of_batch
        return super().__call__(x, use_running_average)


def kernel_gradient_by_outputs(x: jax.Array, size: int, dy: jax.Array) -> jax.Array:
    """As JAX derives it."""
    convolve = functools.partial(layers._convolution, x, stride=1)
    kernel = jnp.zeros((size, size, x.shape[-1], dy.shape[-1]), x.dtype)
    return jax.linear_transpose(convolve, kernel)(dy)[0]


Patches = Sequence[tuple[Any, str, Any]]
"""Modules, names in them, and what to put there."""


@contextlib.contextmanager
def in_place(patches: Patches) -> Iterator[None]:
    """While something is compiled."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


COMPILER_OPTIONS: dict[str, str] = {}
"""Of the gradients."""

_LIBRARY_CALLS = ("INDIVIDUAL_DOT", "REDUCE", "INDIVIDUAL_CONVOLUTION")
BY_CHANNELS = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{name}" for name in _LIBRARY_CALLS
    )
}
"""What XLA gives to YNNPACK if it is not told otherwise."""

JOINED = "statistics of joined maps for each layer anew"
FEWER = "gradients of kernels with as many filters as outputs"
OF_DENSENETS = (JOINED, FEWER)

WITHOUT: dict[str, Patches] = {
    "batch norm's derivative by JAX": [
        (norm, "affine", norm.affine.fun),
        (norm, "statistics", norm.statistics.fun),
        (densenet, "statistics", norm.statistics.fun),
    ],
    JOINED: [(densenet, "BatchNorm", StatisticsAnew)],
    FEWER: [(layers, "_kernel_gradient", kernel_gradient_by_outputs)],
    "activations anew for kernels' gradients": [(layers, "_materialize", lambda x: x)],
    "convolutions shared by output channels": [
        (sys.modules[__name__], "COMPILER_OPTIONS", BY_CHANNELS),
    ],
    "max-pooling by `reduce_window`": [
        (resnet, "max_pool", pool_by_window),
        (densenet, "max_pool", pool_by_window),
    ],
    "1 × 1 kernels as products of four axes": [
        (resnet, "Conv", ProductOfFourAxes),
        (densenet, "Conv", ProductOfFourAxes),
    ],
    "small maps convolved": [(layers, "_product_of_patches", layers._convolution)],
}
WITHOUT_BLEND: dict[str, Patches] = {
    "coefficients broadcast from (1, 1, 1, c_out)": [(kernels, "_blend", blend_of_four_axes)],
}


def main() -> None:
    """Prints the tables, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["densenet121", "resnet50", "resnet18"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=7)
    output_option(parser, "optimisations")
    parser.add_argument("--alone", choices=("keep", "give_back"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone != "give_back":
        beside_pytorch.prepare_process()
    if options.alone:
        _run_alone(options)
        return
    rows: list[dict[str, Any]] = []
    raw = {}
    for name in options.models:
        variables = _parents(name, options)
        head = variables[0]["params"]["head"]
        for stage, start, without in (
            ("fine-tune", fine_tune(variables[0]), WITHOUT),
            ("merge linear probe", merge_linear_probe(variables, head), WITHOUT_BLEND),
        ):
            by_label = _compare(name, start, without, options)
            if stage == "fine-tune":
                by_label[MEMORY] = _pairs(name, options)
            for label, costs in by_label.items():
                # Memory is compared with processes of its own.
                against = costs.pop("with") if label == MEMORY else by_label[ALL]["costs"]
                walls = ratio(costs["costs"], against)
                cpus = ratio(costs["costs"], against, "cpu")
                rows.append(
                    {
                        "network": name,
                        "gradient of": stage,
                        "without": label if label != ALL else "–",
                        "ms": f"{1e3 * median(costs['costs']):.0f}",
                        "time beside all": spread(walls, digits=2),
                        "CPU time beside all": spread(cpus, digits=2),
                        "page faults": f"{median(costs['costs'], 'faults'):.0f}",
                    }
                )
            raw[f"{name}, {stage}"] = {
                k: [vars(c) for c in v["costs"]] for k, v in by_label.items()
            }
    notes = [
        f"Batch {options.batch_size}, {options.image_size} px, {options.blocks} blocks in turn; of "
        "memory three pairs of processes. 1.05 is 5 %."
    ]
    without = [row for row in rows if row["without"] != "–"]
    answer = by_row(without, ["network", "without"], "time beside all")
    write_table(options.output, QUESTION, f"Time beside all: {answer}.", rows, notes, raw=raw)


def _parents(name: str, options: argparse.Namespace) -> list[Any]:
    model = mm.create_model(name, num_classes=5)
    image = jnp.zeros((1, options.image_size, options.image_size, 3))
    return [jax.jit(model.init)(jax.random.key(seed), image) for seed in range(2)]


def _gradient(
    name: str, start: Parameterization, batch_size: int, image_size: int, dtype: Any = jnp.float32
) -> Callable[[], Any]:
    """Loss and gradient of what is trained, compiled."""
    model = mm.create_model(name, num_classes=5, dtype=dtype)
    shape = (batch_size, image_size, image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    labels = jnp.arange(batch_size) % 5

    def loss(trainable: Any, frozen: Any, batch_stats: Any, images: jax.Array) -> Any:
        variables = {"params": start.assemble(trainable, frozen), "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), updated

    arguments = (start.trainable, start.frozen, start.batch_stats, images)
    # Eigen has no convolutions of float64.
    compiler_options = BY_CHANNELS if dtype == jnp.float64 else COMPILER_OPTIONS
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=compiler_options)
    step = gradient.lower(*arguments).compile()
    return lambda: jax.block_until_ready(step(*arguments))


def _compare(
    name: str, start: Parameterization, without: dict[str, Patches], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    if "densenet" not in name:
        without = {label: without[label] for label in without if label not in OF_DENSENETS}
    sizes = (options.batch_size, options.image_size)
    _check(name, start, without)
    steps = {ALL: _gradient(name, start, *sizes)}
    for label, patches in without.items():
        with in_place(patches):
            steps[label] = _gradient(name, start, *sizes)
    sides = [Side(label, step) for label, step in steps.items()]
    costs = interleave(sides, options.blocks, 1)
    return {label: {"costs": costs[label]} for label in steps}


def _check(name: str, start: Parameterization, without: dict[str, Patches]) -> None:
    with jax.enable_x64(True):
        doubles = {
            field: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), getattr(start, field))
            for field in ("trainable", "frozen", "batch_stats")
        }
        double = dataclasses.replace(start, **doubles)
        _, expected = _gradient(name, double, 2, 64, jnp.float64)()
        for label, patches in without.items():
            with in_place(patches):
                _, gradient = _gradient(name, double, 2, 64, jnp.float64)()
            error = optax.global_norm(jax.tree.map(jnp.subtract, gradient, expected))
            error = float(error / optax.global_norm(expected))
            print(f"{name}, {label}: relative difference of the gradients {error:.1e}", flush=True)
            if not error <= TOLERANCE:
                raise SystemExit(f"{name}, {label}: the gradients differ by {error:.1e}")


def _run_alone(options: argparse.Namespace) -> None:
    """In a process of its own: writes what the steps took to --output."""
    (name,) = options.models
    start = fine_tune(_parents(name, options)[0])
    step = _gradient(name, start, options.batch_size, options.image_size)
    costs = interleave([Side(name, step)], options.blocks, 1)[name]
    np.save(options.output, [(cost.wall, cost.cpu, cost.faults) for cost in costs])


def _pairs(name: str, options: argparse.Namespace, pairs: int = 3) -> dict[str, Any]:
    costs: dict[str, list[Cost]] = {"keep": [], "give_back": []}
    for _ in range(pairs):
        for how, pair in costs.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "costs.npy")
                command = [sys.executable, __file__, f"--alone={how}", f"--output={path}"]
                command += ["--models", name, "--blocks", str(options.blocks)]
                command += ["--batch-size", str(options.batch_size)]
                command += ["--image-size", str(options.image_size)]
                subprocess.run(command, check=True, env=os.environ)
                middle = np.median(np.load(path), axis=0)
            pair.append(Cost(*middle.tolist()))
    return {"costs": costs["give_back"], "with": costs["keep"]}


if __name__ == "__main__":
    main()
