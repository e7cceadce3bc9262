"""The examples in the docstrings of all modules are run."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_slow

import medmerge_jax

PROGRAMS = ("medmerge_jax.__main__", "medmerge_jax.main", "medmerge_jax.merge")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(medmerge_jax.__path__, "medmerge_jax.")
    if module.name not in PROGRAMS
]
COMPILING = ("medmerge_jax.evaluation.images",)
"""Whose examples run a network."""
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", some_slow(MODULES, *COMPILING))
def test_examples(name):
    runner, globs = doctest.DocTestRunner(optionflags=OPTIONS), {"np": np, "jax": jax, "jnp": jnp}
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module, extraglobs=globs):
        runner.run(test)
    assert not runner.failures


@pytest.mark.parametrize(
    "name",
    [
        *("create_model", "list_models", "init_coefficients", "merge_kernels", "merge_variables"),
        *("load_model", "save_model", "predict", "effective_coefficients", "zeros_parent"),
    ],
)
def test_public_names_have_examples(name):
    assert ">>> " in getattr(medmerge_jax, name).__doc__
