"""What is said of the published data sets is complete, and installed with the package."""

import fnmatch
import tomllib
from pathlib import Path

import pytest

from medmerge_jax.data.official import LAYOUTS
from medmerge_jax.data.official.records import ABOUT

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_says_what_it_is_what_to_cite_and_what_to_download(name):
    layout = LAYOUTS[name]
    assert ABOUT[name]["description"] == layout.description and layout.description
    assert layout.citation.startswith("@") and layout.citation.endswith("}\n")
    assert layout.homepage.startswith("https://") and layout.licence
    assert "holds:" in layout.instructions or "folder" in layout.instructions
    assert layout.instructions.endswith("\n") and not layout.instructions.startswith("\n")


def test_the_texts_are_installed():
    patterns = tomllib.loads(PYPROJECT.read_text())["tool"]["setuptools"]["package-data"]
    assert any(fnmatch.fnmatch("about.toml", pattern) for pattern in patterns["*"])
