"""CITATION.cff says what pyproject.toml says, and names the two papers."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_it_says_what_the_project_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["version"] == project["version"]
    assert CITATION["license"] == project["license"]
    assert CITATION["message"] and CITATION["authors"] and CITATION["title"]
    assert set(CITATION["keywords"]) <= set(project["keywords"])


def test_it_names_the_papers_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    for paper in CITATION["references"]:
        assert {"type", "title", "authors", "year", "doi"} <= paper.keys()
        assert f"]({paper['url']})" in readme
        assert all({"family-names", "given-names"} == one.keys() for one in paper["authors"])
    assert len(CITATION["references"]) == 2
