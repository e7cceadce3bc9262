"""Measures permutation alignment on every registered architecture at full size.

    python benchmarks/align_models.py planted --out runs/planted.jsonl
    python benchmarks/align_models.py independent resnet50 densenet121

`planted`: a network of random weights and batch norms, its hidden units put in a random order,
and weight matching of the two, with 20 seeds of each; counted is how often the very order is
found. The logits of both networks for two random images are compared too, by the largest
difference relative to the largest logit.

`independent`: weight matching of two networks as `create_model(...).init` makes them with the
seeds 0 and 1: seconds, the memory that it takes at its peak, and what part of its time the
assignment problems took. Each runs in a process of its own. Linux only. For figures that do not
depend on what else the machine does, keep BLAS to one thread (OPENBLAS_NUM_THREADS=1) and read
the CPU time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import medmerge_jax as mm
from medmerge_jax.merging import alignment
from medmerge_jax.merging.spaces import find_spaces
from medmerge_jax.merging.trees import flatten, unflatten

# Each network is run but twice: compiling it well would take longer than that.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def main() -> None:
    """Prints a line for every architecture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["planted", "independent"])
    parser.add_argument("architectures", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--start", choices=alignment.STARTS, default="forward")
    parser.add_argument("--out", type=Path, help="file that each seed's result is appended to")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.architectures or mm.list_models()
    for name in names:
        if options.what == "planted":
            planted(name, options)
        elif options.here:
            independent(name, options.start)
        else:
            command = [sys.executable, __file__, "independent", name, "--here"]
            subprocess.run([*command, "--start", options.start], check=True)


def planted(name: str, options: argparse.Namespace) -> None:
    """Counts how often a planted permutation is recovered."""
    model = mm.create_model(name, 10)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    forward, results = None, []
    for seed in range(options.seeds):
        variables = random_network(name, seed)
        order = alignment.random_permutations(find_spaces(variables), seed + 1000)
        permuted = alignment.permute_variables(variables, order)
        if forward is None:
            lowered = jax.jit(lambda v: model.apply(v, images)).lower(variables)
            forward = lowered.compile(compiler_options=QUICK)
        logits, same = np.asarray(forward(variables)), np.asarray(forward(permuted))
        begin = time.perf_counter()
        found = alignment.weight_matching(
            variables, permuted, seed=seed + 2000, start=options.start
        )
        result = {
            "architecture": name,
            "seed": seed,
            "seconds": time.perf_counter() - begin,
            "recovered": all(
                np.array_equal(found[space], inverse)
                for space, inverse in alignment.invert_permutations(order).items()
            ),
            "difference": float(np.abs(same - logits).max() / np.abs(logits).max()),
        }
        results.append(result)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    print(
        f"{name}: recovered {sum(r['recovered'] for r in results)} of {len(results)}, logits "
        f"differ by at most {max(r['difference'] for r in results):.1e}, "
        f"{np.median([r['seconds'] for r in results]):.2f} s each",
        flush=True,
    )


def random_network(name: str, seed: int) -> dict[str, Any]:
    """Variables of which no two numbers are alike, batch norms included."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in flatten(shapes(name)).items():
        kind = path.rpartition("/")[2]
        if kind == "kernel":
            values = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        elif kind in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(0, 0.1, leaf.shape)
        leaves[path] = values.astype(np.float32)
    return unflatten(leaves)


def shapes(name: str) -> dict[str, Any]:
    """The architecture's variables as shapes."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(mm.create_model(name, 10).init, jax.random.key(0), images)


def independent(name: str, start: str) -> None:
    """Times weight matching of two initialisations, and the assignment problems within."""
    model, images = mm.create_model(name, 10), jnp.zeros((1, 64, 64, 3))
    parents = [
        jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(seed), images))
        for seed in range(2)
    ]
    jax.clear_caches()
    assignments: list[float] = []
    solve = alignment._assignment

    def timed(gains: np.ndarray) -> np.ndarray:
        begin = time.process_time()
        order = solve(gains)
        assignments.append(time.process_time() - begin)
        return order

    alignment._assignment = timed
    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak.
    before = mebibytes("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    found = alignment.weight_matching(*parents, start=start)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak = mebibytes("VmHWM") - before
    matched = alignment.permute_variables(parents[1], found)
    print(
        f"{name} ({start}): {seconds:.1f} s, of CPU time {cpu:.1f} s; of that "
        f"{sum(assignments):.2f} s ({100 * sum(assignments) / cpu:.0f} %) for "
        f"{len(assignments)} assignment problems; "
        f"{peak:.0f} MiB beside the {before:.0f} MiB of JAX and both models; "
        f"cosine of the kernels {cosine(*parents):.4f} before, {cosine(parents[0], matched):.4f} "
        f"after; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )


def mebibytes(field: str) -> float:
    """Memory of this process: "VmRSS", now, or "VmHWM", at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def cosine(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Of all kernels as one vector."""
    a, b = flatten(a["params"]), flatten(b["params"])
    pairs = [
        [flat[path].astype(np.float64) for flat in (a, b)] for path in a if path.endswith("kernel")
    ]
    return float(
        sum(np.vdot(x, y) for x, y in pairs)
        / np.sqrt(sum(np.vdot(x, x) for x, _ in pairs) * sum(np.vdot(y, y) for _, y in pairs))
    )


if __name__ == "__main__":
    main()
