"""Measures permutation alignment on every registered architecture at full size.

    python benchmarks/align_models.py planted --seeds-to runs/planted.jsonl
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
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import forget_peak, memory
from results import RESULTS, by_row, output_option, write_table

import medmerge_jax as mm
from medmerge_jax.merging import alignment, permutations
from medmerge_jax.merging.spaces import find_spaces
from medmerge_jax.merging.trees import flatten, unflatten

QUESTIONS = {
    "planted": "How often does weight matching recover an order of units that was planted?",
    "independent": "What does weight matching of two independent networks cost?",
}
# Each network is run but twice: compiling it well would take longer than that.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["planted", "independent"])
    parser.add_argument("architectures", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--start", choices=alignment.STARTS, default="forward")
    parser.add_argument("--seeds-to", type=Path, help="file that each seed's result is appended to")
    output_option(parser, None)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(independent(options.architectures[0], options.start)))
        return
    output = options.output or RESULTS / f"align_{options.what}.md"
    rows: list[dict[str, Any]] = []
    for name in options.architectures or mm.list_models():
        if options.what == "planted":
            rows.append(planted(name, options))
            answer = f"Recovered: {by_row(rows, ['architecture'], 'recovered')}."
        else:
            command = [sys.executable, __file__, "independent", name, "--here"]
            command += ["--start", options.start]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            rows.append(json.loads(done.stdout))
            answer = f"CPU seconds: {by_row(rows, ['architecture'], 'CPU s')}."
        write_table(output, QUESTIONS[options.what], answer, rows, [f"Start: {options.start}."])


def planted(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Counts how often a planted permutation is recovered."""
    model = mm.create_model(name, 10)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    forward, results = None, []
    for seed in range(options.seeds):
        variables = random_network(name, seed)
        order = permutations.random_permutations(find_spaces(variables), seed + 1000)
        permuted = permutations.permute_variables(variables, order)
        if forward is None:
            lowered = jax.jit(lambda v: model.apply(v, images)).lower(variables)
            forward = lowered.compile(compiler_options=QUICK)
        logits, same = np.asarray(forward(variables)), np.asarray(forward(permuted))
        begin = time.perf_counter()
        recovered = alignment.weight_matching(
            variables, permuted, seed=seed + 2000, start=options.start
        )
        result = {
            "architecture": name,
            "seed": seed,
            "seconds": time.perf_counter() - begin,
            "recovered": all(
                np.array_equal(recovered[space], inverse)
                for space, inverse in permutations.invert_permutations(order).items()
            ),
            "difference": float(np.abs(same - logits).max() / np.abs(logits).max()),
        }
        results.append(result)
        if options.seeds_to:
            options.seeds_to.parent.mkdir(parents=True, exist_ok=True)
            with options.seeds_to.open("a") as file:
                file.write(json.dumps(result) + "\n")
    return {
        "architecture": name,
        "recovered": f"{sum(r['recovered'] for r in results)} of {len(results)}",
        "logits differ by": f"{max(r['difference'] for r in results):.1e}",
        "s": f"{np.median([r['seconds'] for r in results]):.2f}",
    }


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


def independent(name: str, start: str) -> dict[str, str]:
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
    forget_peak()
    before = memory("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    order = alignment.weight_matching(*parents, start=start)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak = memory("VmHWM") - before
    matched = permutations.permute_variables(parents[1], order)
    return {
        "architecture": name,
        "s": f"{seconds:.1f}",
        "CPU s": f"{cpu:.1f}",
        "assignment problems": str(len(assignments)),
        "their share": f"{100 * sum(assignments) / cpu:.0f} %",
        "memory, MiB": f"{peak / 2**20:.0f}",
        "cosine of kernels before": f"{cosine(*parents):.4f}",
        "after": f"{cosine(parents[0], matched):.4f}",
    }


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
