"""Everything that is measured on a GPU, one program after another.

    python benchmarks/gpu.py                  # results in benchmarks/results, or in $OUT
    python benchmarks/gpu.py --tiny           # the same at small sizes, into runs/gpu/tiny

In the order of what is asked of a GPU: steps and whole recipes beside PyTorch's, an epoch beside
its steps, prediction; then mergers and growth. Each program checks first that what it compares
computes the same, prints its tables as they grow, and ends within ten minutes; one that fails or
takes longer does not stop the others. Whole recipes may take longer: the same command again goes
on with those that are missing, in `runs/gpu`. Only some programs:
`python benchmarks/gpu.py --programs training_step --models resnet50`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from results import RESULTS

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "gpu"
LIMIT_SECONDS = 600
MODELS = ("densenet121", "resnet50")
# Not smaller: batch norms over the few numbers of a last map magnify rounding, so that the sides
# differ.
TINY = {
    "training_step": "--batch-sizes 8 --image-size 64 --blocks 2 --steps 1",
    "whole_recipe": "--scale 0.01 --epochs 1 --image-size 32 --stored-size 48 --batch-size 8",
    "data_path": "--images 32 --image-size 32 --batch-size 8 --blocks 2",
    "inference": "--batch-size 4 --image-size 64 --blocks 2 --steps 1",
    "mergers": "--mergers uniform,fisher,weight_matching,zipit --images 8 --image-size 64",
    "growth": "--quantities batch --image-size 64 --batch-size 4 --blocks 2 --steps 1",
}


def main() -> None:
    """Prints what the programs print; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", nargs="+", choices=list(TINY), default=list(TINY))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    default = RUNS / "tiny" if options.tiny else RESULTS
    output = Path(os.environ.get("OUT", default))
    failed = [
        f"{program} of {model}"
        for program in options.programs
        for model in options.models
        if not succeeds(program, model, output, options.tiny)
    ]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def succeeds(program: str, model: str, output: Path, tiny: bool) -> bool:
    """Runs one program."""
    command = [sys.executable, HERE / f"{program}.py"]
    command += ["--output", output / f"{program}-{model}.md"]
    if program == "whole_recipe":
        size = "tiny" if tiny else "full"
        command += ["--workdir", RUNS / f"{program}-{model}-{size}"]
    one_model = program in ("whole_recipe", "data_path", "growth")
    command += ["--architecture" if one_model else "--models", model]
    command += TINY[program].split() if tiny else []
    started = time.monotonic()
    print(f"# {program}, {model}", flush=True)
    try:
        status = subprocess.run(command, timeout=LIMIT_SECONDS).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {LIMIT_SECONDS} s"
    print(f"status {status}, {time.monotonic() - started:.0f} s\n", flush=True)
    return status == 0


if __name__ == "__main__":
    main()
