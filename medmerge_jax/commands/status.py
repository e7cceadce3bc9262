"""python -m medmerge_jax status WORKDIR: what has become of each job of a study."""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medmerge_jax.errors import UserError
from medmerge_jax.runtime.progress import tell
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.studies.state import JOBS_FILE, RUNNING, Entry, JobStates


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each job."""
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax status",
        description="Prints what has become of each job of a study, also while it is at work.",
        epilog="Example: python -m medmerge_jax status runs/grid",
    )
    parser.add_argument("workdir", type=Path, help="directory of the study")
    workdir: Path = parser.parse_args(arguments).workdir.expanduser()
    entries = JobStates(workdir).read()
    if not entries:
        raise UserError(f"{workdir}: there is no {JOBS_FILE} in it, so no study was begun there")
    width = max(map(len, entries))
    for name, entry in entries.items():
        tell(f"{name:{width}}  {entry.status:8}{_details(workdir / name, entry)}".rstrip())
    counts = Counter(entry.status for entry in entries.values())
    tell(f"\n{len(entries)} jobs: " + ", ".join(f"{n} {status}" for status, n in counts.items()))


def _details(folder: Path, entry: Entry) -> str:
    if entry.error:
        return entry.error.splitlines()[0]
    if entry.status != RUNNING:
        return f"{entry.seconds:.0f} s" if entry.seconds else ""
    records = RunDirectory(folder).records()
    where = f"{records[-1]['stage']} epoch {records[-1]['epoch']} done" if records else "begun"
    return f"{where}, for {(time.time() - entry.since) / 60:.0f} min"
