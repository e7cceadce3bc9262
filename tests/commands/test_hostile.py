"""Hostile names of classes, files and fields are text, whatever reads what we write."""

import csv
import json
import re
import sys
import unicodedata
from pathlib import Path

import markdown_it
import numpy as np
import pytest
import yaml
from absl import flags
from helpers import tiny_config
from helpers.random_models import variables_of
from PIL import Image

import medmerge_jax as mm
from medmerge_jax.commands import entry, evaluate, export, merge, predict, status
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.runtime.progress import Bar, say
from medmerge_jax.studies.state import FAILED, JobStates

pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module"),  # of ml_collections
    pytest.mark.filterwarnings(
        "ignore:Glyph"
    ),  # of matplotlib, whose fonts lack control characters
]

CLASSES = (
    "<script>alert(1)<script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b]0;owned\x07\x1b[31mred\x9b2J",
    "=cmd('calc')!A0",
    "\\input{secrets}\\write18{x}",
    "`a` **b** [c](javascript:x) ![d](e) ~~~ | $x$ &lt;i&gt; https:",
    "+1\u202e\u2066gnp",
    "@SUM(1)",
)
FILES = tuple(f"{name}.png" for name in CLASSES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run on folders and files of these names."""
    home = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, name in enumerate(CLASSES):
            folder = home / "images" / split / name
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8) // 2 + 16 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}{FILES[label]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMERGE_JAX_CACHE", str(home / "cache"))
        yield home


def config_of(home, recipe="ft"):
    config = tiny_config.get_config().unlock()
    config.data.kind, config.data.root = "folder", str(home / "images")
    config.data.name = "[/bold] :skull: \x1b[5m<b>"
    config.recipe, config.ft.epochs = recipe, 1
    return config


@pytest.fixture(scope="module")
def run(home):
    """The run directory, and what was said while it was made."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    said = StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        mm.run(config_of(home), home / "run")
    return home / "run", said.getvalue()


def assert_calm(text):
    """No character that a terminal obeys, but for line ends and tabs."""
    assert not {one for one in text if unicodedata.category(one)[0] == "C"} - set("\n\t")


def assert_plain_markdown(text, *names):
    """Nothing of these names has become anything but text; all of them is shown."""
    _, head, body = text.split("---\n", 2)
    assert set(yaml.safe_load(head)) <= {"license", "library_name", "pipeline_tag", "tags"}
    parsed = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    tokens = [one for token in parsed for one in (token, *(token.children or ()))]
    kinds = {one.type.removesuffix("_open").removesuffix("_close") for one in tokens}
    assert kinds <= {
        *("heading", "inline", "text", "table", "thead", "tbody", "tr", "th", "td"),
        *("paragraph", "fence", "bullet_list", "list_item", "softbreak", "code_inline"),
    }
    code = "".join(one.content for one in tokens if one.type in ("fence", "code_inline"))
    shown = " ".join(one.content for one in tokens if one.type == "text")
    for name in names:
        assert name in shown and name not in code
    assert_calm(text)


@pytest.mark.slow
def test_what_a_run_says_and_leaves(run):
    folder, said = run
    assert_calm(said)
    assert "[/bold] :skull: \\x1b[5m<b>" in said
    text = (folder / "model" / "README.md").read_text()
    assert_plain_markdown(text, "<script>alert(1)<script>", "[c](javascript:x) ![d](e) ~~~ | $x$")
    for file in folder.rglob("*.json"):
        assert_calm(file.read_text())
        json.loads(file.read_text())
    assert set(json.loads((folder / "model" / "model.json").read_text())["classes"]) == set(CLASSES)


@pytest.fixture
def new_images(tmp_path):
    (tmp_path / "new").mkdir()
    for number, name in enumerate(FILES):
        Image.new("RGB", (16, 16), (30 * number, 9, 9)).save(tmp_path / "new" / name)
    (tmp_path / "new" / "=broken\x1b[31m.png").write_bytes(b"\x89PNG\x1b[31m")
    return tmp_path / "new"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory with these classes."""
    tiny_config.register_architecture()
    variables = variables_of(0, len(CLASSES), tiny_config.ARCHITECTURE)
    folder = tmp_path_factory.mktemp("model") / "\x1b[31m=`<i>"
    mm.save_model(folder, mm.Model(tiny_config.ARCHITECTURE, variables, Preprocessing(16), CLASSES))
    return folder


def test_predict(model, new_images, tmp_path, capsys):
    out = tmp_path / "\x1b[31m=out.csv"
    predict.main([str(model), str(new_images), "--out", str(out)])
    captured = capsys.readouterr()
    assert_calm(captured.out + captured.err)
    text = out.read_text()
    assert_calm(text)
    rows = list(csv.reader(text.splitlines()))
    assert len(rows) == 2 + len(FILES)
    for cell in (cell for row in rows for cell in row):
        assert not re.match(r"[=+\-@\t\r]", cell) or re.fullmatch(r"-?[\d.]+(e-?\d+)?", cell)
    assert "'=cmd('calc')!A0.png" in {row[0] for row in rows}


def test_export(model, tmp_path, capsys):
    export.main([str(model), "--to", str(tmp_path / "\x1b[31m<b>")])
    captured = capsys.readouterr()
    assert_calm(captured.out + captured.err)
    text = (tmp_path / "\x1b[31m<b>" / "README.md").read_text()
    assert_plain_markdown(text, "<script>alert(1)<script>")


@pytest.mark.slow
def test_evaluate(run, home, tmp_path, monkeypatch, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(tiny_config.__file__).parents[1])!r})\n"
        "from helpers import tiny_config\n\n\n"
        "def get_config():\n"
        "    config = tiny_config.get_config().unlock()\n"
        f"    config.data.kind, config.data.root = 'folder', {str(home / 'images')!r}\n"
        "    config.data.name = '[/bold] \\x1b[5m<b>'\n"
        "    return config\n"
    )
    arguments = [str(run[0]), "--config", str(file), "--out", str(tmp_path / "told.json")]
    monkeypatch.setattr(sys, "argv", ["medmerge_jax", *arguments])
    flags.FLAGS["config"].unparse()
    evaluate.main(arguments)
    captured = capsys.readouterr()
    assert_calm(captured.out + captured.err + (tmp_path / "told.json").read_text())


def test_merge_of_strangers_models(tmp_path, capsys):
    """Whose cards say what they like, and whose folders are called so."""
    names = ["`</code><script>\x1b[31m", "[x](javascript:y)\u202e"]
    for seed, name in enumerate(names):
        facts = {
            "recipe": "<script>\x1b[2J",
            "licence": "mit\nevil: true",
            "parents": {"`<b>": {"source": "/home/ann/<img src=x>", "fingerprint": "**x**"}},
        }
        variables = variables_of(seed, 2, "resnet20")
        model = mm.Model("resnet20", variables, Preprocessing(32), CLASSES[:2], provenance=facts)
        mm.save_model(tmp_path / name, model)
        text = (tmp_path / name / "README.md").read_text()
        assert_plain_markdown(text, "<script>\\x1b[2J", "`<b>", "<img src=x>", "mit evil: true")
        assert "license" not in yaml.safe_load(text.split("---\n", 2)[1])
        assert "ann" not in text
    out = tmp_path / "merged"
    merge.main(["--method", "uniform", "--out", str(out), *(str(tmp_path / one) for one in names)])
    captured = capsys.readouterr()
    assert_calm(captured.out + captured.err)
    assert_plain_markdown((out / "README.md").read_text(), CLASSES[1])


def test_status(tmp_path, capsys):
    with JobStates(tmp_path).changing() as entries:
        entries["ft/<b>"] = entry_type = _failed("\x1b[31mValueError: [/red] \x07")
    assert entry_type.status == FAILED
    status.main([str(tmp_path)])
    captured = capsys.readouterr()
    assert_calm(captured.out + captured.err)
    assert "\\x1b[31mValueError: [/red]" in captured.out


def _failed(error):
    from medmerge_jax.studies.state import Entry

    return Entry(status=FAILED, error=error)


def test_errors_lines_and_bars(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medmerge", "export", "no\x1b[31m", "--to", "x"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry.preemption, "install", lambda: None)  # it would stay
    with pytest.raises(SystemExit):
        entry.main()
    captured = capsys.readouterr()
    assert "\\x1b[31m" in captured.err
    assert_calm(captured.err)
    say("[/bold] :skull: \x1b[31m")
    assert capsys.readouterr().err.endswith("[/bold] :skull: \\x1b[31m\n")
    with Bar("[/bold] \x1b[31m", 1, "images") as bar:
        bar.advance(1)
