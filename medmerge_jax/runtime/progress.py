"""Progress on the terminal: a bar where there is one, lines elsewhere."""

import re
import shutil
import sys
import textwrap
import time
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from medmerge_jax.runtime import processes
from medmerge_jax.runtime.inert import on_terminal, visible

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

_TIME = "%H:%M:%S "
_TIMED = re.compile(r"\d\d:\d\d:\d\d ")

_said: set[str] = set()


class _Whole:
    """Of which part of a study this process makes, see `work_on_part`."""

    part = ""
    ends: float | None = None


def work_on_part(part: str, seconds_left: float | None = None) -> None:
    """Has lines and bars say which part of the whole is at work, "7/18", until it is "".

    Args:
      part: Before each line.
      seconds_left: For the whole; None where nothing is known of it.
    """
    _Whole.part = part
    _Whole.ends = None if seconds_left is None else time.monotonic() + seconds_left


def say(text: str) -> None:
    """A line to the reader with the time of day, on stderr; of several processes, from the first.

    On a terminal it is broken between words. Control characters of names in it do nothing there.
    """
    if processes.is_first():
        part = f"{_Whole.part} " if _Whole.part else ""
        line = f"{time.strftime(_TIME)}{part}{on_terminal(text)}"
        console.print(fitted(line, indent=len("00:00:00 ")))


def tell(text: str) -> None:
    """What was asked for, on stdout; on a terminal lines are broken between words."""
    width = columns()
    print(on_terminal(text) if width is None else fitted(on_terminal(text), width))


def columns() -> int | None:
    """Of the terminal that stdout is; None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say_once(text: str) -> None:
    """As `say`, but nothing that this process has said so before; nor an empty text."""
    if text and text not in _said:
        _said.add(text)
        say(text)


def untimed(line: str) -> str:
    """A line that another process has said, without its time."""
    return _TIMED.sub("", line, count=1) if _TIMED.match(line) else line


def fitted(text: str, width: int | None = None, indent: int = 0) -> str:
    """Lines broken between words, never inside of one, where they go on indented.

    Args:
      text: Of any number of lines.
      width: In columns; by default that of the terminal on stderr, and endless if it is none.
      indent: Of what goes on; at least as much as its line begins with.
    """
    if width is None:
        width = console.width if sys.stderr.isatty() else len(text) + 1
    lines = []
    for line in text.split("\n"):
        spaces = max(indent, len(line) - len(line.lstrip(" ")))
        lines += textwrap.wrap(
            line,
            max(width, spaces + 1),
            subsequent_indent=" " * spaces,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In words of a few letters.

    >>> duration(7.4), duration(312), duration(9000)
    ('7 s', '5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _BarOrWait(BarColumn):
    """The bar; in its place, while there is nothing to count, what is waited for and how long."""

    def render(self, task: Task) -> RenderableType:  # type: ignore[override]  # of two kinds
        waiting, since = task.fields["waiting"]
        if not waiting:
            return super().render(task)
        return Text(f"{waiting} … {duration(time.monotonic() - since)}", no_wrap=True)


class _Counts(ProgressColumn):
    """How much is done, how fast, and how long it and the whole study will take."""

    def render(self, task: Task) -> Text:
        note, left = task.fields["note"], task.fields["left"]
        parts = [f"{task.percentage:.0f} %{f' at {note}' if note else ''}"]
        if left is not None:
            parts.append(f"{duration(left)} left")
        if _Whole.ends is not None and (whole := _Whole.ends - time.monotonic()) > 0:
            parts.append(f"all {duration(whole)}")
        return Text(", ".join(parts), no_wrap=True)


class Bar:
    """A progress bar over `total` units with their rate; silent when stderr is no terminal.

    Use as a context manager; `advance` costs a microsecond or two. `waiting` says what is waited
    for before the first unit is done, as "compiling".
    """

    def __init__(self, title: str, total: int, unit: str, waiting: str = ""):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            _BarOrWait(bar_width=None, table_column=Column(ratio=1, no_wrap=True)),
            _Counts(table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            expand=True,
            disable=not (sys.stderr.isatty() and processes.is_first()),
        )
        self._unit = unit
        self._started = time.monotonic()
        self._task = self._progress.add_task(
            _titled(title), total=total, note="", left=None, waiting=(waiting, self._started)
        )
        self._waits = bool(waiting)
        self._done = 0
        self._before: int | None = None

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

    def wait(self, what: str) -> None:
        """Says what is waited for until the next units are done."""
        self._progress.update(self._task, waiting=(what, time.monotonic()))

    def advance(self, units: int, title: str | None = None) -> None:
        """Moves on by `units`; a `title` replaces the one shown."""
        shown: dict[str, Any] = {"description": None if title is None else _titled(title)}
        if self._waits:  # the first units come with what was waited for: they tell no rate
            self._waits, self._started = False, time.monotonic()
        else:
            self._done += units
            rate = self._done / max(time.monotonic() - self._started, 1e-9)
            task = self._progress.tasks[self._task]
            left = ((task.total or 0) - task.completed - units) / max(rate, 1e-9)
            shown |= {"note": f"{rate:.0f} {self._unit}/s", "left": left}
        self._progress.update(self._task, advance=units, waiting=("", 0.0), **shown)


def _titled(title: str) -> str:
    return visible(f"{_Whole.part} {title}" if _Whole.part else title)
