"""Progress on the terminal: a bar where there is one, lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from medmerge_jax.runtime import processes
from medmerge_jax.runtime.inert import on_terminal, visible

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str) -> None:
    """A line to the reader, on stderr; of several processes, from the first."""
    if processes.is_first():
        console.print(on_terminal(text))


def tell(text: str) -> None:
    """What was asked for, on stdout."""
    print(on_terminal(text))


class Bar:
    """A progress bar over `total` units with their rate; silent when stderr is no terminal.

    Use as a context manager; `advance` costs a microsecond or two.
    """

    def __init__(self, title: str, total: int, unit: str):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (sys.stderr.isatty() and processes.is_first()),
        )
        self._unit = unit
        self._task = self._progress.add_task(visible(title), total=total, note="")
        self._done = 0
        self._before: int | None = None
        self._started = time.monotonic()

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def skip(self, units: int) -> None:
        """Counts `units` as done without taking time."""
        self._progress.update(self._task, advance=units)

    def to(self, done: int, total: int) -> None:
        """For callbacks that tell how far they are, first of all what was done before."""
        if self._before is None:
            self._before = done
            self.skip(done)
        else:
            self.advance(done - self._before - self._done)

    def advance(self, units: int, title: str | None = None) -> None:
        """Moves on by `units`; a `title` replaces the one shown."""
        self._done += units
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        note = f"{rate:.0f} {self._unit}/s"
        self._progress.update(self._task, advance=units, note=note, description=title)
