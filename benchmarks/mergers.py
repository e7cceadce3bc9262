"""Seconds and memory of every merger, each in a process of its own.

    taskset -c 0,1 python benchmarks/mergers.py --models resnet50,densenet121

Two networks with random weights; for mergers that look at images, 32 of noise at 224 px (`fisher`
differentiates every class for every image: 4 of them). Each merger runs twice: what the first time
takes more than the second is compilation and what else is done once, and the compiler's own seconds
are counted by JAX. Memory is what the process's peak grows by beyond what it held before, the two
networks: the merged network, and what it takes to compute it, in the first run. On a GPU, also the
peak of what is allocated there, of all runs.

Checked: what comes out is finite, and one parent given twice merges to itself. Not so where units
are matched by their activations: some never are active, and are alike.

Expected: an average reads two networks and writes one, 3 x 94 MiB for ResNet-50, so some 30 ms, in
numpy with a few copies. Images cost a forward pass for each parent, 32 x 2 x 8 GFLOP, some 3 s.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
from measuring import forget_peak, memory, spread
from results import by_row, output_option, write_table

MERGERS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "weighted": {"weights": (0.7, 0.3)},
    "slerp": {},
    "task_arithmetic": {},
    "fisher": {},
    "weight_matching": {},
    "activation_matching": {},
    "zipit": {},
    "matched_averaging": {},
}
COMPILED = "/jax/core/compile/backend_compile_duration"
CLASSES = 5
QUESTION = "What do the mergers cost, in seconds and in memory beyond the two networks?"


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet50,densenet121")
    parser.add_argument("--mergers", default=",".join(MERGERS))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=1, help="processes for each merger")
    output_option(parser, "mergers")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(_measure(*options.only, options.images, options.image_size)))
        return
    notes = [f"{options.images} images (fisher: 4), {options.image_size} px."]
    rows, raw = [], []
    for model in options.models.split(","):
        for merger in options.mergers.split(","):
            command = [
                sys.executable, __file__, "--only", model, merger,
                "--images", str(options.images), "--image-size", str(options.image_size),
            ]  # fmt: skip
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                for _ in range(options.repeats)
            ]

            def shown(name: str, unit: float = 1.0, digits: int = 2, runs: list = runs) -> str:
                return spread([one[name] for one in runs], unit, digits)

            rows.append(
                {
                    "model": model,
                    "merger": merger,
                    "first, s": shown("first"),
                    "of which compiling, s": shown("compiling"),
                    "programs": shown("programs", digits=0),
                    "again, s": shown("again"),
                    "again, CPU s": shown("again_cpu"),
                    "memory, MiB": shown("memory", 2**20, 0),
                    "of one network": f"{runs[0]['memory'] / runs[0]['model']:.1f}",
                    "on the GPU, MiB": shown("on_gpu", 2**20, 0),
                }
            )
            raw.append({"model": model, "merger": merger, "runs": runs})
            answer = f"Seconds of the second call: {by_row(rows, ['model', 'merger'], 'again, s')}."
            write_table(options.output, QUESTION, answer, rows, notes, raw=raw)


def _measure(model: str, merger: str, num_images: int, size: int) -> dict[str, float]:
    """One merger in this process."""
    import jax
    import jax.numpy as jnp

    from medmerge_jax.models import create_model, mergers
    from medmerge_jax.runtime import cpu

    cpu.convolve_on_all_cores()  # as in the program, but what is freed is given back
    compiled: list[float] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    shapes = jax.eval_shape(
        create_model(model, CLASSES).init, jax.random.key(0), jnp.zeros((1, size, size, 3))
    )
    parents = [_variables(shapes, seed) for seed in (0, 1)]
    rng, images = np.random.default_rng(0), None
    if mergers.MERGERS[merger].needs_images:
        count = 4 if merger == "fisher" else num_images
        images = rng.standard_normal((count, size, size, 3), np.float32)
    chosen = dict(MERGERS[merger])
    if merger == "task_arithmetic":
        chosen["ancestor"] = _variables(shapes, 2)

    def merged(models: list[Any]) -> Any:
        return jax.block_until_ready(mergers.merge(merger, model, models, images, **chosen))

    compiled.clear()
    forget_peak()
    before, started = memory("VmRSS"), time.perf_counter()
    merged(parents)
    first, programs, compiling = time.perf_counter() - started, len(compiled), sum(compiled)
    most = memory("VmHWM") - before
    started, used = time.perf_counter(), time.process_time()
    merged(parents)
    again, again_cpu = time.perf_counter() - started, time.process_time() - used
    _check(merger, merged([parents[0]] * 2), parents[0], chosen)
    gpu = jax.local_devices()[0].memory_stats() or {}  # none on a CPU
    return {
        "first": first,
        "compiling": compiling,
        "programs": programs,
        "again": again,
        "again_cpu": again_cpu,
        "memory": most,
        "on_gpu": gpu.get("peak_bytes_in_use", 0),
        "model": sum(leaf.nbytes for leaf in jax.tree.leaves(parents[0])),
    }


def _variables(shapes: Any, seed: int) -> Any:
    """Kernels of the usual size, and batch norms so small that no network is saturated."""
    import jax

    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim > 1:
            noise *= np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32)
        else:
            middle = {"scale": 0.3, "var": 1.0}.get(path[-1].key, 0.0)
            noise = np.float32(middle) + np.float32(0.1 * (middle or 1)) * np.abs(noise)
        return jax.device_put(noise)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _check(merger: str, merged: Any, parent: Any, chosen: dict[str, Any]) -> None:
    """Raises unless it is finite, and one network merged with itself is that network."""
    import jax

    exact = merger not in ("activation_matching", "zipit") and "ancestor" not in chosen
    for ours, theirs in zip(*map(jax.tree.leaves, (merged, parent)), strict=True):
        if exact:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=merger)
        if not np.isfinite(ours).all():
            raise SystemExit(f"{merger}: the merged network is not finite")


if __name__ == "__main__":
    main()
