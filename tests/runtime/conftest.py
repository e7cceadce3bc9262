import signal

import pytest


@pytest.fixture(autouse=True)
def heeded_interrupts():
    """Tests in the background of a shell ignore SIGINT, and so would the programs they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
