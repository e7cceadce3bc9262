import time

import pytest

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
