"""Parameters of a test, of which the quick tests take a few and CI takes all."""

import pytest


def some_slow(values, *slow):
    """The values as parameters; those of `slow` are for the slow tests alone."""
    return [pytest.param(one, marks=pytest.mark.slow) if one in slow else one for one in values]


def some_quick(values, *quick):
    """The values as parameters; all but those of `quick` are for the slow tests alone."""
    return some_slow(values, *(one for one in values if one not in quick))
