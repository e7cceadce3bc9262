"""`python -m medmerge_jax.main`, which also writes down where its time went.

    python benchmarks/watched_main.py watched.json --config configs/folder.py --workdir runs/mine

Seconds, in a JSON object: "imports" until the program itself begins, "data" for reading, decoding
and auditing images, "features" of a frozen backbone, every stage by its name (without these
features); wherever they occur "trace", "compile" (with programs from the cache: reading them) and
"checkpoints" (as far as the program waits for them); and how many programs came from the cache.
"""

import collections
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
EVENTS = {
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
}
CACHE_HIT = "/jax/compilation_cache/cache_hits"


def main() -> None:
    """Runs the program with all arguments but the first."""
    path = Path(sys.argv.pop(1))
    seconds: collections.Counter[str] = collections.Counter()
    # Before JAX is there, which the program asks for by itself.
    from medmerge_jax.runtime import cpu

    cpu.prepare()
    import jax.monitoring

    from medmerge_jax.commands import entry
    from medmerge_jax.recipes import experiment, inputs
    from medmerge_jax.storage.checkpoints import StageCheckpoints

    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: _add(seconds, EVENTS.get(event), duration)
    )
    jax.monitoring.register_event_listener(
        lambda event, **_: _add(seconds, "programs from the cache", float(event == CACHE_HIT))
    )
    for owner, what, names in (
        (inputs, "data", ("load_data", "decode", "audit_data")),
        (StageCheckpoints, "checkpoints", ("restore", "save", "wait", "close")),
    ):
        for name in names:
            setattr(owner, name, _timed(getattr(owner, name), seconds, what))
    train, features = experiment.train_stage, experiment.Experiment._feature_batches
    experiment.Experiment._feature_batches = _timed(features, seconds, "features")
    experiment.train_stage = lambda stage, *arguments, **options: _stage(
        functools.partial(train, stage, *arguments, **options), seconds, stage.name
    )
    seconds["imports"] = time.perf_counter() - STARTED
    try:
        entry.start("run", sys.argv[1:])
    finally:
        path.write_text(json.dumps(seconds, indent=2) + "\n")


def _stage(train: Callable[[], Any], seconds: collections.Counter[str], name: str) -> Any:
    before = seconds["features"]
    try:
        return _timed(train, seconds, name)()
    finally:
        seconds[name] -= seconds["features"] - before


def _add(seconds: collections.Counter[str], what: str | None, duration: float) -> None:
    if what is not None:
        seconds[what] += duration


def _timed(
    function: Callable[..., Any], seconds: collections.Counter[str], what: str
) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        with contextlib.ExitStack() as stack:
            started = time.perf_counter()
            stack.callback(lambda: _add(seconds, what, time.perf_counter() - started))
            return function(*arguments, **options)

    return timed


if __name__ == "__main__":
    main()
