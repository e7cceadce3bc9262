"""For programs of this folder that tests start: `python -m helpers.NAME`."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]


def with_helpers():
    """The environment in which a started Python finds `helpers` too."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *([path] if path else [])])}
