"""What the documents name exists."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
ENTRIES = re.split(r"^- ", GLOSSARY.read_text().split("\n## ", 1)[1], flags=re.MULTILINE)[1:]
ROOMS = [path.parent.name for path in (ROOT / "medmerge_jax").glob("*/__init__.py")]


def resolve(name: str) -> object:
    """The module, class or function of a dotted name below medmerge_jax."""
    words = ["medmerge_jax", *name.split(".")]
    for count in range(len(words), 0, -1):
        try:
            value = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in words[count:]:
            value = getattr(value, attribute)
        return value
    raise LookupError(name)


def test_the_glossary_names_places_that_exist():
    for entry in ENTRIES:
        names = re.findall(r"`((?:" + "|".join(ROOMS) + r")(?:\.\w+)*)`", entry)
        assert names or "*" in entry, entry
        for name in names:
            assert resolve(name), name


def test_every_term_of_the_glossary_has_an_entry():
    defined = " ".join(re.findall(r"\*\*(.+?)\*\*", GLOSSARY.read_text())).lower()
    for term in ("parent", "kernel", "coefficient", "granularity", "stage", "parameterization",
                 "assemble", "collapse", "recipe", "study", "run directory", "model directory",
                 "merger", "space", "tap", "stream", "permutation", "alignment", "recalibration",
                 "repair", "soup", "member", "merge linear probe", "head", "backbone", "features",
                 "preprocessing", "predictions", "metric", "ordinal", "audit", "overlap", "group",
                 "split", "official data set", "layout", "variant", "resident", "streamed", "mesh",
                 "replicated", "batch-sharded", "broadcast", "preemption", "fingerprint",
                 "card"):  # fmt: skip
        assert term in defined, term


def test_the_readme_links_to_the_glossary_and_to_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert "docs/glossary.md" in targets
    for target in targets:
        assert (ROOT / target).exists(), target
