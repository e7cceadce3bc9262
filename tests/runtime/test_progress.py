"""What is said while something is under way."""

import re
import time

import pytest
from rich.console import Console

from medmerge_jax.runtime import progress
from medmerge_jax.runtime.progress import Bar


@pytest.fixture
def clock(monkeypatch):
    """A list whose last number is the time."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    return times


@pytest.mark.parametrize("before", [0, 600])
def test_the_rate_leaves_out_what_was_done_before(clock, before):
    bar = Bar("decoding", 1000, "images")
    bar.to(before, 1000)
    assert bar._progress.tasks[0].completed == before
    for seconds in (1, 2, 4):
        clock.append(100.0 + seconds)
        bar.to(before + 50 * seconds, 1000)
        assert bar._progress.tasks[0].completed == before + 50 * seconds
        assert bar._progress.tasks[0].fields["note"] == "50 images/s"


def rendered(bar, console):
    """What a terminal of 80 columns shows of the bar."""
    with console.capture() as captured:
        console.print(bar._progress.get_renderable())
    return captured.get()


@pytest.fixture
def terminal(monkeypatch):
    """A console of 80 columns in place of stderr, which is taken for a terminal."""
    console = Console(width=80, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    yield console
    progress.work_on_part("")


def test_until_the_first_step_a_bar_says_what_is_waited_for(clock, terminal):
    bar = Bar("merge_lp", 192, "images", "compiling")
    clock.append(112.0)
    assert "compiling … 12 s" in rendered(bar, terminal)
    bar.advance(16, "merge_lp epoch 1/4")
    clock.append(113.0)
    bar.advance(16)
    shown = rendered(bar, terminal)
    # The 12 s, in which one step came too, tell nothing about those to come.
    assert "compiling" not in shown and "17 % at 16 images/s, 10 s left" in shown
    bar.wait("validating")
    clock.append(116.0)
    assert "validating … 3 s" in rendered(bar, terminal)
    bar.advance(16)
    assert "validating" not in rendered(bar, terminal)


def test_a_bar_fits_into_80_columns_and_tells_of_the_whole(clock, terminal):
    progress.work_on_part("17/118", 3000)
    bar = Bar("x", 500_000, "images")
    clock.append(101.0)
    bar.advance(12_345, "merge_lp epoch 10/50")
    (line,) = rendered(bar, terminal).rstrip("\n").split("\n")
    assert len(line) <= 80
    assert line.startswith("17/118 merge_lp epoch 10/50 ")
    assert "2 % at 12345 images/s, 40 s left, all 50 min" in line


def test_lines_have_the_time_of_day_and_the_part_of_the_whole(capsys):
    progress.say("ft 1/3: loss 0.5")
    progress.work_on_part("7/20")
    progress.say("ft 2/3: \x1b[31mloss")
    progress.work_on_part("")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d ft 1/3: loss 0\.5", first)
    assert second[9:] == r"7/20 ft 2/3: \x1b[31mloss"
    assert progress.untimed(first) == "ft 1/3: loss 0.5" == progress.untimed("ft 1/3: loss 0.5")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_was_asked_for_is_broken_between_words_on_a_terminal(is_terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: is_terminal)
    progress.tell("wrote x: README.md, model.safetensors\nmodel.json")
    lines = ["wrote x: README.md,", "model.safetensors"]
    expected = lines if is_terminal else [" ".join(lines)]
    assert capsys.readouterr().out.splitlines() == [*expected, "model.json"]


def test_what_was_said_once_is_not_said_again(capsys):
    for text in ("warning: a", "warning: b", "warning: a", ""):
        progress.say_once(text)
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == [
        "warning: a",
        "warning: b",
    ]


@pytest.mark.parametrize("width", [20, 33, 80])
def test_lines_are_broken_between_words(width):
    text = "the workdir holds a run\n  batch_size: 8 there, 4 now\nUse --config.data.root=PATH."
    lines = progress.fitted(text, width, indent=4).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)
    assert progress.fitted(text, 200) == text
