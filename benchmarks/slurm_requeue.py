"""Stops jobs of launch/slurm.sh again and again; SLURM runs them to the same end, bit for bit.

    python benchmarks/slurm_requeue.py --workdir runs/slurm --tasks 2 -- \
        --config configs/quickstart.py

Submits the run twice. The second time it is stopped at random moments, in turn with the signal
that `#SBATCH --signal` asks for, with `scontrol requeue` as an administrator would, and, if
`--preempting` names a partition whose jobs go first, by such a job. The script's own `scontrol
requeue` or SLURM puts it back into the queue. In the end all that the two runs computed is
compared; only times may differ.
"""

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from chaos import content, report
from results import output_option, write_table

QUESTION = "Does a run that SLURM preempts and requeues end in the bits of an uninterrupted one?"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


def main() -> None:
    """Prints when and how it stopped the job, and what was compared; status 1 on a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--stops", type=int, default=3)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds until a stop")
    parser.add_argument("--preempting", help="a partition whose jobs preempt")
    parser.add_argument("--sbatch", action="append", default=[], help="as --sbatch=--gpus=2")
    parser.add_argument("--seed", type=int, default=0)
    output_option(parser, "slurm_requeue")
    parser.add_argument("arguments", nargs="+", help="of medmerge_jax.main, without --workdir")
    options = parser.parse_args()
    kinds = ["signal", "requeue", *(["preempt"] if options.preempting else [])]
    rng = random.Random(options.seed)
    whole, stopped = (options.workdir / name for name in ("whole", "stopped"))
    if not (whole / "results.json").exists():
        _end(_submit(whole, options))
    job, rows = _submit(stopped, options), []
    for restart in range(options.stops):
        _wait(job, "RUNNING", restart)
        time.sleep(rng.uniform(0.0, options.longest))
        kind = kinds[restart % len(kinds)]
        before = _state(job)
        if before != ("RUNNING", restart):
            sys.exit(f"the job is {before}, not to be stopped any more: more epochs are wanted")
        begun = time.monotonic()
        _stop(job, kind, options.preempting)
        _wait(job, None, restart + 1)
        rows.append({"stop": kind, "in the queue again, s": f"{time.monotonic() - begun:.1f}"})
        print(rows[-1], flush=True)
    restarts = _end(job)
    status = report(content(whole), content(stopped))
    answer = f"{restarts} restarts of {options.tasks} task(s): "
    answer += "the results differ." if status else "the results are the same."
    write_table(options.output, QUESTION, answer, rows)
    sys.exit(status)


def _submit(workdir: Path, options: argparse.Namespace) -> str:
    log = workdir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    request = [f"--ntasks={options.tasks}", f"--output={log}", *options.sbatch]
    launch = ["launch/slurm.sh", *options.arguments, f"--workdir={workdir}"]
    return _command("sbatch", "--parsable", *request, *launch).strip()


def _stop(job: str, kind: str, partition: str) -> None:
    if kind == "signal":
        _command("scancel", "--signal=USR1", job)
    elif kind == "requeue":
        _command("scontrol", "requeue", job)
    else:
        request = ["--exclusive", "--output=/dev/null", f"--partition={partition}"]
        _command("sbatch", *request, "--wrap=sleep 1")


def _state(job: str) -> tuple[str, int]:
    text = _command("scontrol", "show", "job", job)
    match = re.search(r"JobState=(\w+).*?Restarts=(\d+)", text, re.DOTALL)
    assert match, text
    return match[1], int(match[2])


def _wait(job: str, state: str | None, restarts: int) -> None:
    while True:
        now, count = _state(job)
        if count >= restarts and state in (None, now):
            return
        if now in ENDED:
            sys.exit(f"job {job} is {now} after {count} restarts")
        time.sleep(0.2)


def _end(job: str) -> int:
    while (state := _state(job))[0] not in ENDED:
        time.sleep(0.5)
    if state[0] != "COMPLETED":
        sys.exit(f"job {job} is {state[0]}")
    return state[1]


def _command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
