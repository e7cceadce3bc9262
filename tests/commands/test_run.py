"""The program as users call it: what it says and leaves when something is wrong, and when not."""

import fcntl
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config
from helpers.random_models import variables_of
from helpers.tiny_config import ARCHITECTURE
from PIL import Image

from medmerge_jax.weights import load_parent, save_weights
from medmerge_jax.weights.files import read_tensors, write_safetensors

pytestmark = pytest.mark.slow  # some calls start a Python with JAX, some train

TINY = Path(tiny_config.__file__)


@pytest.fixture(scope="module", autouse=True)
def architecture():
    tiny_config.register_architecture()


def draw_images(folder):
    """An image folder: three splits of two classes of four images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, shade in (("a", 60), ("b", 180)):
            (folder / split / label).mkdir(parents=True)
            for index in range(4):
                pixels = np.clip(rng.normal(shade, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{split}_{label}{index}.png")
    return folder


@pytest.fixture
def root(tmp_path):
    return draw_images(tmp_path / "images")


def flags_of(root):
    return ("--config.data.kind=folder", f"--config.data.root={root}")


@pytest.fixture
def folder_flags(root):
    return flags_of(root)


@pytest.fixture
def program(warm_programs, compiled_programs, tmp_path):
    """Calls the program on the tiny config; with a prefix as a Python of its own."""
    cache = {"MEDMERGE_JAX_CACHE": str(compiled_programs)}

    def call(*flags, workdir=None, variant="", config=TINY, prefix=(), folder="."):
        given = f"{config}:{variant}" if variant else str(config)
        flags = [f"--config={given}", f"--workdir={workdir or tmp_path / 'run'}", *flags]
        if not prefix:
            return warm_programs.run(flags, tmp_path, folder=folder, **cache)
        return subprocess.run(
            [*prefix, sys.executable, "-m", "medmerge_jax.main", *flags],
            env={**os.environ, **cache},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return call


@pytest.fixture(scope="module")
def finished(warm_programs, compiled_programs, tmp_path_factory):
    """What a whole run printed, its workdir, and its flags without these."""
    folder = tmp_path_factory.mktemp("finished")
    workdir, flags = folder / "run", flags_of(draw_images(folder / "images"))
    result = warm_programs.run(
        [f"--config={TINY}", f"--workdir={workdir}", *flags],
        folder,
        MEDMERGE_JAX_CACHE=str(compiled_programs),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, workdir, flags


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


def weights(path, name, change=None):
    save_weights(path, name, variables_of(0, num_classes=3, architecture=name))
    if change is not None:
        tensors = {name: np.array(tensor) for name, tensor in read_tensors(path).items()}
        change(tensors)
        write_safetensors(path, tensors)
    return path


def misshape(tensors):
    tensors["layer1.0.conv1.weight"] = np.zeros((16, 8, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("resnet20", None, ("resnet20",)),
        (ARCHITECTURE, lambda t: t.pop("layer2.0.bn1.bias"), ("layer2.0.bn1.bias",)),
        (
            ARCHITECTURE,
            lambda t: t.update({"layer1.9.x": np.zeros(3, np.float32)}),
            ("layer1.9.x",),
        ),
        (ARCHITECTURE, misshape, ("layer1.0.conv1.weight", "(16, 8, 3, 3)", "(16, 16, 3, 3)")),
    ],
)
def test_a_weight_file_that_does_not_fit(program, folder_flags, tmp_path, name, change, words):
    path = weights(tmp_path / "b.safetensors", name, change)
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
        *folder_flags,
        "--config.recipe=ft",
        "--config.ft.epochs=3",
        "--config.ft.learning_rate=2e9",
        "--config.weight_decay=1e9",
    )
    refuse(result, tmp_path / "run", "stage ft", "not finite", "learning_rate")


def test_a_full_disk(program, folder_flags, tmp_path):
    """No file may grow beyond 100 kB, which ends the first checkpoint."""
    flags = (*folder_flags, "--config.recipe=ft")
    result = program(*flags, prefix=("bash", "-c", 'ulimit -f 100; exec "$@"', "limited"))
    refuse(result, tmp_path / "run", "disk is full", "resumes")
    result = program(*flags)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ('mv "$PWD" "$PWD-elsewhere"', ("vanished", "same command")),
        ("chmod -R a-w checkpoints", ("checkpoints", "read-only", "same command")),
        # A plain rm -r fails where a checkpoint is being written at that moment.
        ("mv checkpoints ../gone", ("checkpoints", "vanished", "same command")),
    ],
)
def test_a_workdir_lost_while_it_trains(
    warm_programs, compiled_programs, folder_flags, tmp_path, deed, words
):
    if "chmod" in deed and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    run, log = tmp_path / "run", tmp_path / "log"
    flags = (*folder_flags, "--config.recipe=ft", "--config.ft.epochs=1000")
    running = warm_programs.start(
        [f"--config={TINY}", f"--workdir={run}", *flags], log,
        MEDMERGE_JAX_CACHE=str(compiled_programs),
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert running.poll() is None, log.read_text()
        time.sleep(0.01)
    subprocess.run(["sh", "-c", deed], cwd=run, check=True)
    assert running.wait(300) == 2, log.read_text()
    said = log.read_text()
    # A thread of Orbax may tell of the file that it was about to write, too.
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert all(word in said[said.index(error) :] for word in words), error


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
    message = refuse(program(config=aptos, folder=tmp_path), tmp_path / "run", "parents.b")
    assert "data.root" in message
    assert "train_images" in message  # what to download, and where to put it
    assert "configs/eyepacs.py" in message
    assert not (tmp_path / "run").exists()


def without_a_reader(program, *flags, **options):
    """As `... | head -1` leaves it."""
    closed = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
    closed += "os.execv(sys.argv[1], sys.argv[1:])"
    result = program(*flags, prefix=(sys.executable, "-c", closed), **options)
    assert (result.returncode, result.stdout) == (141, "")
    assert "error" not in result.stderr
    assert "Broken" not in result.stderr


def test_a_reader_that_leaves(program):
    without_a_reader(program, "--help")


def test_a_workdir_in_use(program, folder_flags, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = program(*folder_flags)
    refuse(result, tmp_path / "run", "in use")


def test_a_whole_run_and_what_it_leaves(program, finished):
    _, run, _ = finished
    for name in ("config.json", "metrics.jsonl", "coefficients.npz", "predictions.npz",
                 "results.json", "report.html", "model/model.safetensors", "model/model.json",
                 "figures/coefficients.png", "figures/learning_curves.png",
                 "figures/confusion_matrix.png", "checkpoints/merge_lp", "events"):  # fmt: skip
        assert (run / name).exists(), name
    for name in ("checkpoints/ft", "seconds.json"):  # model/ and results.json say the same
        assert not (run / name).exists(), name

    # The model that it leaves is the one whose predictions it leaves, and a parent of the next.
    variables, card = load_parent(run, ARCHITECTURE)
    assert card["classes"] == ["a", "b"]
    results = json.loads((run / "results.json").read_text())
    with np.load(run / "predictions.npz") as predictions:
        accuracy = np.mean(predictions["logits"].argmax(1) == predictions["labels"])
    assert results["test"]["accuracy"] == pytest.approx(accuracy)
    assert variables["params"]["head"]["kernel"].shape == (64, 2)


def test_a_finished_run_is_not_done_again(program, finished):
    """The results are printed, and a report that is missing is written."""
    printed, run, flags = finished
    (run / "report.html").unlink()
    written = (run / "results.json").stat().st_mtime_ns
    again = program(*flags, workdir=run)
    assert again.stdout == printed
    assert "macro F1" in again.stdout
    assert (run / "results.json").stat().st_mtime_ns == written
    assert (run / "report.html").exists()
    without_a_reader(program, *flags, workdir=run)


def test_another_config_in_the_same_workdir_is_refused(program, finished):
    _, run, flags = finished
    result = program(*flags, "--config.batch_size=4", "--config.ft.epochs=3", workdir=run)
    assert result.returncode == 2
    assert "batch_size: 8 there, 4 now" in result.stderr
    assert "ft.epochs: 2 there, 3 now" in result.stderr


def test_a_second_run_of_the_same_command_compiles_nothing(
    program, finished, compiled_programs, tmp_path
):
    def kept():
        return {
            path.name: path.stat().st_mtime_ns for path in (compiled_programs / "xla").iterdir()
        }

    before = kept()
    result = program(*finished[2], workdir=tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert len(before) > 10
    assert kept() == before  # what is compiled is kept
