"""What the documents name exists, what they quote was measured, and what they show runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from helpers.random_models import variables_of

import medmerge_jax as mm
from medmerge_jax.models.mergers import MERGERS

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


# The pages of the site


PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
READ = ("tutorial", "mergers", "api", "formats", "faq")
"""Pages whose commands and snippets are run, in an order in which each finds what it needs."""

ELSEWHERE = {"apptainer", "docker", "kubectl", "pip", "sbatch", "launch/one_machine.sh", "export"}
"""Programs of commands that want a cluster, a network or another shell."""

TINY = (
    *("architecture=resnet20", "image_size=16", "batch_size=16", "parents.c=random"),
    *("lp.epochs=1", "ft.epochs=1", "compare.seeds=0", "compare.recipes=lp_bn_ft,medmerge"),
)  # fmt: skip


def blocks(page):
    """The snippets of a page in order: their language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page):
    """The words of each command of a page, without the variables before it."""
    for language, text in blocks(page):
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                yield words[next(i for i, word in enumerate(words) if not is_variable(word)) :]


def is_variable(word):
    return re.match(r"[A-Z_]+=", word) is not None


def tables(text):
    """Each Markdown table of a text: rows of cells by the title of their column."""
    for found in re.findall(r"^((?:\|.*\n)+)", text, re.MULTILINE):
        titles, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()
        ]
        yield [dict(zip(titles, row, strict=True)) for row in rows]


def test_all_that_pages_show_is_of_a_known_kind():
    for page in PAGES:
        assert {language for language, _ in blocks(page)} <= {"python", "sh", "text"}
        programs = {words[0] for words in commands(page)}
        assert programs <= ELSEWHERE | {"python"}
        assert page in READ or "python" not in programs
        assert page in READ or "python" not in dict(blocks(page))


def test_commands_name_files_that_are_there():
    own = ("mine.py", *(f"{name}.sif" for name in ("medmerge",)))
    for page in PAGES:
        for words in commands(page):
            for word in words:
                path = word.partition(":")[0]
                if re.fullmatch(r"(configs|launch)/.*|.*\.(py|sh|yaml|sif)", path):
                    assert path in own or (ROOT / path).is_file(), word


def test_pages_name_files_of_the_project_that_are_there():
    for text in PAGES.values():
        for path in re.findall(r"`((?:benchmarks|configs|docs|launch)/[\w./]+)`", text):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["when_to_merge", "mergers"])
def test_quoted_tables_are_those_that_were_measured(page):
    parts = re.split(r"<!-- from (\S+) -->", PAGES[page])
    assert len(parts) > 2
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        measured = [
            row
            for one in tables((ROOT / "benchmarks" / "results" / name).read_text())
            for row in one
        ]
        (quoted, *_) = tables(text)
        for row in quoted:
            assert [one for one in measured if row.items() <= one.items()], (name, row)


def test_the_page_of_mergers_has_all():
    first, *_ = tables(PAGES["mergers"])
    assert [row["method"].strip("`") for row in first] == list(MERGERS)
    for row, one in zip(first, MERGERS.values(), strict=True):
        assert ("images" in row["what it needs besides them"]) == one.needs_images
        assert ("with heads" in row["parents"]) == one.needs_heads


def test_the_page_of_the_interface_has_all_public_names():
    assert set(re.findall(r"^::: medmerge_jax\.(\w+)$", PAGES["api"], re.MULTILINE)) == set(
        mm.__all__
    )


class Reader:
    """Does what the pages say, in a folder of its own, with the smallest networks and trainings."""

    def __init__(self, folder, warm_programs, cache):
        self.folder, self.programs, self.cache = folder, warm_programs, cache

    def read(self, page):
        """Runs all blocks of a page; returns the variables of its Python."""
        names = {"__name__": page}
        for language, text in blocks(page):
            if language == "sh":
                for line in text.replace("\\\n", " ").splitlines():
                    self.call(shlex.split(line))
            elif file := re.match(r"# (\w+\.py)\n", text):
                (self.folder / file[1]).write_text(text)
            elif language == "python":
                exec(compile(text, f"docs/{page}.md", "exec"), names)
        return names

    def call(self, words):
        """Runs a command of this program, and no other."""
        python, _, module, *arguments = words
        assert python == "python" and module.partition(".")[0] == "medmerge_jax"
        if "--config" in arguments:
            arguments += [f"--config.{one}" for one in TINY]
            arguments += ["--config.parents.b=random"] if "mine.py:parent" in arguments else []
        result = self.programs.run(
            arguments,
            self.folder.parent,
            module=module,
            folder=self.folder,
            MEDMERGE_JAX_CACHE=str(self.cache),
        )
        assert result.returncode == 0, (words, result.stderr)


@pytest.mark.slow
def test_what_the_pages_show_runs(tmp_path, warm_programs, compiled_programs, monkeypatch):
    """One small run for all: what a page reads, an earlier one has made."""
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(compiled_programs))
    for seed, name in enumerate("ab"):
        mm.save_weights(f"{name}.safetensors", "resnet20", variables_of(seed, 4, "resnet20"))
    reader = Reader(folder, warm_programs, compiled_programs)
    names = {page: reader.read(page) for page in READ}
    lines = (folder / "probabilities.csv").read_text().splitlines()
    assert len(lines) == 97 and lines[0].startswith("image,predicted,probability_both,")
    assert {"model.safetensors", "README.md"} <= {
        p.name for p in (folder / "for_pytorch").iterdir()
    }
    assert names["api"]["probabilities"].shape == (len(names["api"]["images"]), 4)
    assert 0 <= names["formats"]["accuracy"] <= 1


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nobody_else(tmp_path):
    config = pytest.importorskip("mkdocs.config")
    build = importlib.import_module("mkdocs.commands.build")
    build.build(
        config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    )
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = (
            r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//|<link[^>]* href=\"(?:https?:)?//"
        )
        assert not re.findall(loaded, page.read_text()), page
