"""The program as users call it: what it says and leaves when something is wrong, and when not."""

import fcntl
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medmerge_jax.models import create_model
from medmerge_jax.weights import load_parent, save_weights
from medmerge_jax.weights.files import read_tensors, write_safetensors

pytestmark = pytest.mark.slow  # every call starts a Python with JAX

TINY = Path(__file__).parents[1] / "helpers" / "tiny_config.py"


@pytest.fixture
def root(tmp_path):
    """An image folder: three splits of two classes of four images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, shade in (("a", 60), ("b", 180)):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = np.clip(rng.normal(shade, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{split}_{label}{index}.png")
    return tmp_path / "images"


@pytest.fixture
def program(tmp_path):
    """Calls the program on the tiny config; the caches are the test's own."""

    def call(*flags, workdir=None, variant="", config=TINY, prefix=(), **options):
        workdir = workdir or tmp_path / "run"
        given = f"{config}:{variant}" if variant else str(config)
        command = [sys.executable, "-m", "medmerge_jax.main", f"--config={given}"]
        environment = {
            **os.environ,
            "MEDMERGE_JAX_CACHE": str(tmp_path / "cache"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        return subprocess.run(
            [*prefix, *command, f"--workdir={workdir}", *flags],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            **options,
        )

    return call


@pytest.fixture
def folder_flags(root):
    return ("--config.data.kind=folder", f"--config.data.root={root}")


def refuse(result, workdir, *words):
    """One error that says all the words, status 2, and no results or other remains."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    message = result.stderr[result.stderr.index("error:") :]
    for word in words:
        assert word in message, message
    left = [path for path in workdir.rglob("*") if path.is_file()] if workdir.exists() else []
    assert not [path for path in left if path.name == "results.json" or "-tmp" in str(path)]
    return message


def test_a_truncated_jpeg(program, folder_flags, root, tmp_path):
    path = root / "train" / "a" / "broken.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:800])
    result = program(*folder_flags)
    refuse(result, tmp_path / "run", "broken.jpg", "1 of 25 images", "replace")
    assert not (tmp_path / "run").exists()


def test_a_text_file_named_png(program, folder_flags, root, tmp_path):
    (root / "val" / "b" / "notes.png").write_text("not an image")
    result = program(*folder_flags)
    refuse(result, tmp_path / "run", "notes.png", "not an image that can be read")
    assert not (tmp_path / "run").exists()


def test_a_class_missing_from_training(program, folder_flags, root, tmp_path):
    for path in (root / "train" / "b").iterdir():
        path.unlink()
    result = program(*folder_flags)
    refuse(result, tmp_path / "run", "no training image of ['b']")
    assert not (tmp_path / "run").exists()


def test_an_empty_split(program, folder_flags, root, tmp_path):
    for path in (root / "train").rglob("*.png"):
        path.unlink()
    result = program(*folder_flags)
    refuse(result, tmp_path / "run", "split 'train' is empty")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("nowhere.png,a", ("nowhere.png", "labels.csv")),
        ("train/a/train_a0.png,c", ("'c'", "labels.csv")),
    ],
)
def test_a_bad_row_of_a_table(program, root, tmp_path, row, words):
    lines = [f"train/{label}/train_{label}{i}.png,{label}" for label in "ab" for i in range(1, 4)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["filename,label", *lines, row]) + "\n")
    result = program(
        "--config.data.kind=table",
        f"--config.data.root={root}",
        f"--config.data.table={table}",
        "--config.data.classes=('a','b')",
    )
    refuse(result, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def weights(path, architecture="resnet20", change=None):
    model = create_model(architecture, num_classes=3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    save_weights(path, architecture, variables)
    if change is not None:
        tensors = {name: np.array(tensor) for name, tensor in read_tensors(path).items()}
        change(tensors)
        write_safetensors(path, tensors)
    return path


def misshape(tensors):
    tensors["layer1.0.conv1.weight"] = np.zeros((16, 8, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("resnet32", None, ("resnet32",)),
        ("resnet20", lambda t: t.pop("layer2.1.bn1.bias"), ("layer2.1.bn1.bias",)),
        ("resnet20", lambda t: t.update({"layer1.9.x": np.zeros(3, np.float32)}), ("layer1.9.x",)),
        ("resnet20", misshape, ("layer1.0.conv1.weight", "(16, 8, 3, 3)", "(16, 16, 3, 3)")),
    ],
)
def test_a_weight_file_that_does_not_fit(
    program, folder_flags, tmp_path, architecture, change, words
):
    path = weights(tmp_path / "b.safetensors", architecture, change)
    result = program(*folder_flags, f"--config.parents.b={path}")
    refuse(result, tmp_path / "run", "parents.b", "b.safetensors", *words)
    assert not (tmp_path / "run").exists()


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_with_code(program, folder_flags, tmp_path):
    path, canary = tmp_path / "b.pth", tmp_path / "canary"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"conv1.weight": Canary(canary)}, 2))
        archive.writestr("archive/version", "3\n")
    result = program(*folder_flags, f"--config.parents.b={path}")
    refuse(result, tmp_path / "run", "b.pth", "open")
    assert not canary.exists()


def test_a_loss_that_is_not_finite(program, folder_flags, tmp_path):
    result = program(
        *folder_flags, "--config.recipe=ft", "--config.ft.learning_rate=2e9",
        "--config.weight_decay=1e9", "--config.batch_size=4",
    )  # fmt: skip
    refuse(result, tmp_path / "run", "stage ft", "not finite", "learning_rate")


def test_a_full_disk(program, folder_flags, tmp_path):
    """No file may grow beyond 500 kB, which ends the first checkpoint."""

    result = program(*folder_flags, prefix=("bash", "-c", 'ulimit -f 500; exec "$@"', "limited"))
    refuse(result, tmp_path / "run", "disk is full", "resumes")
    result = program(*folder_flags)
    assert result.returncode == 0, result.stderr


MISCHIEF = """
import subprocess, sys, time
from pathlib import Path

run, deed, *command = sys.argv[1:]
process = subprocess.Popen(command)
while process.poll() is None:
    metrics = Path(run, "metrics.jsonl")
    if metrics.exists() and metrics.read_text().count("\\n") > 2:
        subprocess.run(["sh", "-c", deed], cwd=run)
        break
    time.sleep(0.01)
sys.exit(process.wait())
"""


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ('mv "$PWD" "$PWD-elsewhere"', ("vanished", "same command")),
        ("chmod -R a-w checkpoints", ("checkpoints", "read-only", "same command")),
        # A plain rm -r fails where a checkpoint is being written at that moment.
        ("mv checkpoints ../gone", ("checkpoints", "vanished", "same command")),
    ],
)
def test_a_workdir_lost_while_it_trains(program, folder_flags, tmp_path, deed, words):
    if "chmod" in deed and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    run = tmp_path / "run"
    flags = (*folder_flags, "--config.recipe=ft", "--config.ft.epochs=1000")
    prefix = (sys.executable, "-c", MISCHIEF, str(run), deed)
    result = program(*flags, prefix=prefix)
    assert result.returncode == 2, result.stderr
    # A thread of Orbax may tell of the file that it was about to write, too.
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in result.stderr[result.stderr.index(error) :] for word in words), error


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.batchsize=3", ("batchsize", "batch_size")),
        ("--config.ft.epochs=many", ("many",)),
        ("--config.recipe=medmrge", ("recipe", "did you mean 'medmerge'")),
        ("--config.data.root=/nowhere", ("data.root", "/nowhere")),
        ("--workdir=", ("--workdir is empty",)),
        ("--batch_size=32", ("--config.batch_size",)),
    ],
)
def test_a_field_that_cannot_be_used(program, folder_flags, tmp_path, flag, words):
    result = program(*folder_flags, flag)
    refuse(result, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_not_there(program, tmp_path):
    refuse(program(config=tmp_path / "absent.py"), tmp_path / "run", "absent.py")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.batchsize = 3", ("config.py, line 4", "batchsize", "batch_size")),
        ("config.batch_size = 'many'", ("config.py, line 4", "batch_size", "many")),
        ("1 / 0", ("config.py, line 4", "ZeroDivisionError")),
        ("for", ("config.py, line 4", "invalid syntax")),
        ("return {'seed': 3}", ("default_config()",)),
    ],
)
def test_a_config_file_that_cannot_be_used(program, tmp_path, line, words):
    lines = [
        "from medmerge_jax.config import default_config",
        "def get_config():",
        "  config = default_config()",
        f"  {line}",
        "  return config",
    ]
    (tmp_path / "config.py").write_text("\n".join(lines) + "\n")
    message = refuse(program(config=tmp_path / "config.py"), tmp_path / "run", *words)
    assert len(message) < 400


def test_a_workdir_that_cannot_be_written(program, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "run"
    refuse(program(workdir=workdir), workdir, str(workdir), "cannot be written", "--workdir")


def test_a_variant_that_is_not_there(program, tmp_path):
    refuse(program(variant="other"), tmp_path / "run", "no variant 'other'")


def test_everything_missing_is_named_at_once(program, tmp_path):
    aptos = TINY.parents[2] / "configs" / "aptos.py"
    message = refuse(program(config=aptos, cwd=tmp_path), tmp_path / "run", "parents.b")
    assert "data.root" in message
    assert "train_images" in message  # what to download, and where to put it
    assert "configs/eyepacs.py" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_reader_that_leaves(program, tmp_path, finished):
    """As `... --help | head -1` and `... | head -1` do."""
    if finished:
        assert program().returncode == 0
    closed = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
    closed += "os.execv(sys.argv[1], sys.argv[1:])"
    flags = () if finished else ("--help",)
    result = program(*flags, prefix=(sys.executable, "-c", closed))
    assert (result.returncode, result.stdout) == (141, "")
    assert "error" not in result.stderr
    assert "Broken" not in result.stderr


def test_a_workdir_in_use(program, folder_flags, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = program(*folder_flags)
    refuse(result, tmp_path / "run", "in use")


def test_a_whole_run_and_what_it_leaves(program, folder_flags, tmp_path):
    first = program(*folder_flags)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl", "coefficients.npz", "predictions.npz",
                 "results.json", "report.html", "model/model.safetensors", "model/model.json",
                 "figures/coefficients.png", "figures/learning_curves.png",
                 "figures/confusion_matrix.png", "checkpoints/merge_lp", "events"):  # fmt: skip
        assert (run / name).exists(), name
    for name in ("checkpoints/ft", "seconds.json"):  # model/ and results.json say the same
        assert not (run / name).exists(), name

    # Again: nothing is done, the results are printed, and a report that is missing is written.
    (run / "report.html").unlink()
    written = (run / "results.json").stat().st_mtime_ns
    again = program(*folder_flags)
    assert again.stdout == first.stdout
    assert "macro F1" in again.stdout
    assert (run / "results.json").stat().st_mtime_ns == written
    assert (run / "report.html").exists()

    # Another config in the same workdir: refused, with the fields that differ.
    result = program(*folder_flags, "--config.batch_size=4", "--config.ft.epochs=3")
    assert result.returncode == 2
    assert "batch_size: 8 there, 4 now" in result.stderr
    assert "ft.epochs: 2 there, 3 now" in result.stderr

    # The model that it leaves is the one whose predictions it leaves, and a parent of the next.
    variables, card = load_parent(run, "resnet20")
    assert card["classes"] == ["a", "b"]
    results = json.loads((run / "results.json").read_text())
    with np.load(run / "predictions.npz") as predictions:
        accuracy = np.mean(predictions["logits"].argmax(1) == predictions["labels"])
    assert results["test"]["accuracy"] == pytest.approx(accuracy)
    assert variables["params"]["head"]["kernel"].shape == (64, 2)


def test_a_second_run_of_the_same_command_compiles_nothing(program, folder_flags, tmp_path):
    kept = []
    for name in ("first", "second"):
        result = program(*folder_flags, workdir=tmp_path / name)
        assert result.returncode == 0, result.stderr
        files = (tmp_path / "cache" / "xla").iterdir()
        kept.append({path.name: path.stat().st_mtime_ns for path in files})
    assert len(kept[0]) > 10
    assert kept[1] == kept[0]  # what is compiled is kept
