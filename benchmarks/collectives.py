"""What several devices exchange in a training step, counted in the program that was compiled.

python benchmarks/collectives.py resnet50 densenet121

Eight devices are simulated on the CPU. What is exchanged does not depend on the size of images.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import argparse
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from results import output_option, write_table

from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.runtime.mesh import batch_sharded, data_mesh, replicated
from medmerge_jax.training import parameterization
from medmerge_jax.training.step import Task, init_state, train_step

CLASSES, SIZE = 8, 64
QUESTION = "What do several devices exchange in a step?"
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OPERATION = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(.*")
ARRAY = re.compile(r"(f|s|u|bf|pred)(\d*)\[([\d,]*)\]")


def program(architecture: str, stage: str, batch_size: int = 64) -> str:
    """The compiled step of a stage, as text."""
    mesh, spec = data_mesh(), get_spec(architecture)
    model = create_model(architecture, CLASSES)
    images = jnp.zeros((1, SIZE, SIZE, 3))
    parent = jax.jit(model.init)(jax.random.key(0), images)
    if stage == "ft":
        start = parameterization.fine_tune(parent)
    else:
        start = parameterization.merge_linear_probe([parent, parent], parent["params"]["head"])
    task = Task(
        Network(model, spec.preprocessing, mesh),
        start.assemble,
        True,
        False,
    )
    whole, rows = replicated(mesh), batch_sharded(mesh)
    padded = -(-batch_size // mesh.size) * mesh.size

    def placed(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    state, frozen = jax.tree.map(placed, (init_state(start), start.frozen))
    batch = {
        "inputs": jax.ShapeDtypeStruct((padded, SIZE, SIZE, 3), np.uint8, sharding=rows),
        "labels": jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=whole),
    }
    scalar, weights = (
        jax.ShapeDtypeStruct(s, np.float32, sharding=whole) for s in ((), (CLASSES,))
    )
    lowered = train_step.lower(task, state, frozen, batch, scalar, scalar, weights)
    return lowered.compile().as_text()


class Collective(NamedTuple):
    """An operation in which all devices take part."""

    kind: str
    arrays: int
    bytes: int
    of_kernels: bool  # it exchanges matrices or kernels, not only one number a channel


def collectives(text: str) -> list[Collective]:
    """All that a program has."""
    operations = []
    for types, kind in OPERATION.findall(text):
        shapes = [[int(n) for n in dims.split(",") if n] for _, _, dims in ARRAY.findall(types)]
        widths = [int(width or 8) // 8 for _, width, _ in ARRAY.findall(types)]
        size = sum(math.prod(shape) * width for shape, width in zip(shapes, widths, strict=True))
        operations.append(Collective(kind, len(shapes), size, max(map(len, shapes)) > 1))
    return operations


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="+")
    parser.add_argument("--batch_size", type=int, default=64)
    output_option(parser, "collectives")
    options = parser.parse_args()
    rows = []
    for architecture in options.architectures:
        for stage in ("merge_lp", "ft"):
            operations = collectives(program(architecture, stage, options.batch_size))
            reduced = [one for one in operations if one.kind == "all-reduce"]
            norms = [one for one in reduced if not one.of_kernels]
            kernels = [one for one in reduced if one.of_kernels]
            rows.append(
                {
                    "model": architecture,
                    "stage": stage,
                    "all-reduces of batch norms": len(norms),
                    "of norms, MB": f"{sum(one.bytes for one in norms) / 1e6:.3f}",
                    "of gradients": len(kernels),
                    "arrays in these": sum(one.arrays for one in kernels),
                    "of gradients, MB": f"{sum(one.bytes for one in kernels) / 1e6:.3f}",
                    "other": ", ".join(
                        sorted(one.kind for one in operations if one.kind != "all-reduce")
                    )
                    or "none",
                }
            )
    answer = "All-reduces of batch norms and of gradients: " + "; ".join(
        f"{row['model']}, {row['stage']}: {row['all-reduces of batch norms']} and "
        f"{row['of gradients']}"
        for row in rows
    )
    notes = [f"Counted in the compiled step for {jax.device_count()} devices, nothing is run."]
    write_table(options.output, QUESTION, f"{answer}.", rows, notes)


if __name__ == "__main__":
    main()
