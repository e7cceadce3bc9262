"""The number of devices and of processes changes nothing but the speed.

What is compared was computed in other processes, because the number of devices of a CPU is fixed
when JAX starts.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import tiny_config
from helpers.programs import with_helpers
from helpers.tiny_config import ARCHITECTURE

from medmerge_jax.runtime import mesh
from medmerge_jax.runtime.mesh import data_mesh, own_rows, padded_size

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = Path(tiny_config.__file__)
# All layouts, ResNet-20 and 50 steps take half an hour on two cores: MEDMERGE_JAX_MESH=full, and -s
# shows the largest differences. CI has a share, with a network of 8 layers.
FULL = os.environ.get("MEDMERGE_JAX_MESH") == "full"
# 13 is no multiple of the devices.
LONG = [
    {"stage": stage, "batch_size": batch_size}
    for stage in ("merge_lp", "ft")
    for batch_size in (13, 16)
]
SHORT = [
    {"stage": "ft", "batch_size": 16, "steps": 5},
    {"stage": "ft", "batch_size": 13, "steps": 3, "stream": True, "accumulate": 2},
    {"stage": "ft", "batch_size": 3, "steps": 3},  # there are more devices than images
    {"stage": "merge_lp", "batch_size": 13, "steps": 3, "stream": True, "multilabel": True},
    {"stage": "merge_lp", "batch_size": 16, "steps": 3, "policy": "medium"},
]
if not FULL:
    # Fine-tuning on such layouts is in test_a_run_goes_on_with_other_devices_and_processes.
    LONG = [{**LONG[0], "steps": 6, "depth": 1}]
    SHORT = [{**SHORT[4], "depth": 1}]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture
def start(warm_programs, compiled_programs):
    """Starts the processes of one run, which write to `log`; the test leaves none."""
    started = []

    def processes_of(module, arguments, processes, devices, flags, log):
        """The arguments, and the flags of a cluster, are functions of a process's index."""
        where = f"localhost:{free_port()}"
        environment = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "MEDMERGE_JAX_CACHE": str(compiled_programs),
        }
        for index in range(processes):
            cluster = flags(where, processes, index) if processes > 1 else []
            given = [*arguments(index), *cluster]
            started.append(warm_programs.start(given, log, module=module, **environment))
        return started[-processes:]

    yield processes_of
    for process in started:
        process.kill()
        process.wait(60)


def trained(start, folder, layout, experiments):
    """What the first and the last process of a layout have computed."""
    processes, devices = layout
    (folder / "experiments.json").write_text(json.dumps(experiments))
    started = start(
        "helpers.mesh_worker",
        lambda index: [folder / "experiments.json", folder / f"{index}.npz"],
        processes,
        devices,
        lambda *cluster: cluster,
        folder / "log",
    )
    for process in started:
        assert process.wait(1800) == 0, (folder / "log").read_text()[-3000:]
    return [dict(np.load(folder / f"{index}.npz")) for index in {0, processes - 1}]


def gathered(found, prefix):
    return np.concatenate([found[p].ravel() for p in sorted(found) if p.startswith(prefix)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiments, layouts",
    [
        pytest.param(LONG, [(1, 8), (2, 4), (8, 1)] if FULL else [(2, 4)], id="many steps"),
        pytest.param(SHORT, [(1, 8), (2, 4)] if FULL else [(1, 8)], id="variants"),
    ],
)
def test_every_layout_computes_what_one_device_does(start, tmp_path, experiments, layouts):
    """Layouts are processes, and devices of each."""
    results = {}
    for layout in ((1, 1), *layouts):
        folder = tmp_path / "x".join(map(str, layout))
        folder.mkdir()
        results[layout] = trained(start, folder, layout, experiments)
    (wanted,) = results.pop((1, 1))
    for layout, found in results.items():
        for one in found:
            for number, options in enumerate(experiments):
                differences = assert_same(one, wanted, number)
                print(layout, options, differences)


def assert_same(found, wanted, number):
    """Returns the largest relative differences of losses and of the first gradients' norm."""
    losses = [result[f"{number}/losses"] for result in (found, wanted)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    gradients = [gathered(result, f"{number}/gradients/") for result in (found, wanted)]
    difference = np.linalg.norm(gradients[0] - gradients[1]) / np.linalg.norm(gradients[1])
    assert difference <= 1e-5
    np.testing.assert_array_equal(found[f"{number}/rows"], wanted[f"{number}/rows"])
    statistics = [gathered(result, f"{number}/stats/") for result in (found, wanted)]
    np.testing.assert_allclose(*statistics, rtol=1e-3, atol=1e-3)
    logits = [result[f"{number}/logits"] for result in (found, wanted)]
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-3)
    # One program for all steps: what a step leaves lies where the next one wants it.
    np.testing.assert_array_equal(found[f"{number}/compiled"], wanted[f"{number}/compiled"])
    worst = np.abs(losses[0] / losses[1] - 1).max()
    return f"losses {worst:.1e}, gradients {difference:.1e}"


def test_rows_are_padded_and_shared():
    devices = jax.devices()
    assert data_mesh(devices[:1]) is None
    assert padded_size(13, None) == 13
    assert own_rows(13, None) == slice(0, 13)


@pytest.mark.parametrize(("process", "rows"), [(0, slice(0, 4)), (1, slice(4, 8))])
def test_the_rows_of_a_process_are_those_of_its_devices(monkeypatch, process, rows):
    """Of four devices, of which two are in each process."""
    ours = {one: (slice(2 * one, 2 * one + 2),) for one in (2 * process, 2 * process + 1)}
    sharding = SimpleNamespace(addressable_devices_indices_map=lambda shape: ours)
    monkeypatch.setattr(mesh, "batch_sharded", lambda _: sharding)
    assert own_rows(8, SimpleNamespace(size=4)) == rows


def test_devices_of_one_process_are_neighbours(monkeypatch):
    """Or a process would have other rows of a batch than its devices."""
    monkeypatch.setattr(mesh, "Mesh", lambda devices, *_, **__: devices)
    ids = [(1, 3), (0, 2), (1, 0), (0, 1)]
    devices = [SimpleNamespace(process_index=process, id=id) for process, id in ids]
    ordered = [(device.process_index, device.id) for device in data_mesh(devices)]
    assert ordered == [(0, 1), (0, 2), (1, 0), (1, 3)]


PARTS = """
import jax, numpy as np, sys
from medmerge_jax.data import ResidentBatches, StreamedBatches
from medmerge_jax.runtime.mesh import data_mesh, own_rows, padded_size
mesh = data_mesh()
assert mesh.size == 8 and padded_size(13, mesh) == 16 and own_rows(16, mesh) == slice(0, 16)
assert [data_mesh(jax.devices()[:n]).size for n in (2, 5)] == [2, 5]
assert [device.id for device in data_mesh(jax.devices()[::-1]).devices] == list(range(8))
images = np.arange(23 * 12, dtype=np.uint8).reshape(23, 2, 2, 3)
for kind in (ResidentBatches, StreamedBatches):
    one, all = (kind(images, np.arange(23), 9, mesh=m, accumulate=2) for m in (None, mesh))
    for wanted, found in zip(one.epoch(0, 1), all.epoch(0, 1), strict=True):
        assert [len(part["labels"]) for part in found] == [5, 4]
        for a, b in zip(wanted, found, strict=True):
            assert b["inputs"].shape[0] == 8 and len(b["inputs"].addressable_shards) == 8
            assert {s.data.shape[0] for s in b["inputs"].addressable_shards} == {1}
            assert b["labels"].is_fully_replicated
            for name in a:
                np.testing.assert_array_equal(a[name], np.asarray(b[name])[: len(a[name])])
    for (a, valid), (b, same) in zip(one.ordered(), all.ordered(), strict=True):
        assert valid == same
        np.testing.assert_array_equal(a["inputs"][:valid], np.asarray(b["inputs"])[:valid])
"""

STEPS = """
import flax.linen as nn, jax.numpy as jnp
from medmerge_jax.evaluation.predict import predict
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import Preprocessing
from medmerge_jax.models.layers import Conv, dense_head, global_average
from medmerge_jax.models.network import Network
from medmerge_jax.models.norm import BatchNorm
from medmerge_jax.runtime.mesh import replicate
from medmerge_jax.training import parameterization
from medmerge_jax.training.step import Task, collapse, init_state, train_step

class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, use_running_average=True):
        x = nn.relu(BatchNorm(name="bn")(Conv(4, 3, 2, name="conv")(x), use_running_average))
        return dense_head(4, 3)(global_average(x))

rng = np.random.default_rng(0)
images, labels = rng.integers(0, 256, (29, 8, 8, 3), np.uint8), np.arange(29, dtype=np.int32) % 3
start = parameterization.fine_tune(jax.jit(Small().init)(jax.random.key(0), images[:1] / 1.0))
ends = []
for m in (None, mesh):
    network = Network(Small(), Preprocessing(8, mean=(0.5,) * 3, std=(0.25,) * 3), m)
    task = Task(network, start.assemble, True, False)
    batches = ResidentBatches(images, labels, 13, mesh=m)
    state, frozen = replicate((init_state(start), start.frozen), m)
    settings = replicate([np.float32(1e-3), np.float32(0.1), np.float32([1, 2, 3])], m)
    for batch in batches.epoch(0, 0):
        state, loss = train_step(task, state, frozen, batch, *settings)
    params = collapse(task.assemble, state.trainable, frozen)
    logits = predict(network, {"params": params, "batch_stats": state.batch_stats}, batches)
    leaves = {**flatten(state.trainable), **flatten(state.batch_stats)}
    ends.append({"loss": loss, "logits": logits, **leaves})
for name, leaf in ends[0].items():
    np.testing.assert_allclose(ends[1][name], leaf, rtol=2e-4, atol=2e-5, err_msg=name)
"""


@pytest.mark.parametrize(
    "program", [PARTS, pytest.param(PARTS + STEPS, marks=pytest.mark.slow)], ids=["parts", "steps"]
)
def test_batches_are_split_over_eight_devices_and_steps_are_the_same(program):
    """13 rows are filled up to 16, which do not count in loss, gradients and statistics."""
    flags = "--xla_force_host_platform_device_count=8"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr


@pytest.fixture
def start_program(start, tmp_path):
    """Starts the program on the tiny config; it writes to `tmp_path / "log"`."""

    def processes_of(processes, devices, workdir, *more):
        flags = [f"--config={TINY}", f"--workdir={workdir}", *more]
        return start(
            "medmerge_jax.main",
            lambda index: flags,
            processes,
            devices,
            cluster_flags,
            tmp_path / "log",
        )

    return processes_of


def cluster_flags(where, processes, index):
    return [f"--coordinator={where}", f"--num_processes={processes}", f"--process_id={index}"]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["epoch"], line["train_loss"], line["val_loss"]) for line in lines]


def assert_same_run(found, wanted):
    assert [line[:2] for line in losses(found)] == [line[:2] for line in losses(wanted)]
    np.testing.assert_allclose(
        [line[2:] for line in losses(found)], [line[2:] for line in losses(wanted)], rtol=1e-4
    )
    logits = [np.load(workdir / "predictions.npz")["logits"] for workdir in (found, wanted)]
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-3)
    for name in ("results.json", "report.html", "model/model.safetensors"):
        assert (found / name).exists()


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_processes(start_program, tmp_path):
    """Stopped on 8 devices, then in 2 processes of 1, it ends in 1 process with 2 devices.

    The 2 processes find the newest checkpoint damaged, and both take the one before.
    """
    log = tmp_path / "log"
    # The paper's rate: at that of the tiny config, rounding grows to a thousandth in few epochs.
    more = ["--config.recipe=ft", "--config.ft.epochs=8", "--config.ft.learning_rate=1e-5"]
    # Two processes may take some 20 steps until both stop: 12 an epoch leave 48 to the second stop.
    more += ["--config.data.synthetic.counts=(96,8,12)"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    (process,) = start_program(1, 1, whole, *more)
    assert process.wait(300) == 0, log.read_text()
    for (processes, devices), epoch, number, status in [
        ((1, 8), 2, signal.SIGUSR1, 75),
        ((2, 1), 4, signal.SIGINT, 130),
    ]:
        started = start_program(processes, devices, moved, *more)
        wait_for(moved, epoch, started, log)
        started[-1].send_signal(number)
        statuses = [process.wait(300) for process in started]
        assert statuses == [status] * processes, log.read_text()[-3000:]
        assert not (moved / "results.json").exists()
        if processes == 1:
            damaged = damage_newest(moved / "checkpoints" / "ft")
    (process,) = start_program(1, 2, moved, *more)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    assert len(re.findall("resumed after", log.read_text())) == 2
    assert len(re.findall(r"\d is damaged", log.read_text())) == 1
    assert damaged.is_dir()
    assert_same_run(moved, whole)


def damage_newest(folder):
    """Flips a bit in the arrays; returns the name that such a checkpoint gets."""
    newest = max((path for path in folder.iterdir() if path.is_dir()), key=lambda p: int(p.name))
    files = (path for path in newest.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)
    return newest.with_name(f"{newest.name}.damaged")


def wait_for(workdir, epoch, started, log):
    """Until the epoch of fine-tuning is in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    while not path.exists() or f'"stage": "ft", "epoch": {epoch},' not in path.read_text():
        assert all(process.poll() is None for process in started), log.read_text()[-3000:]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_within_a_minute(start_program, tmp_path, victim):
    more = ["--config.recipe=ft", "--config.ft.epochs=500"]
    started = start_program(2, 1, tmp_path / "run", *more)
    wait_for(tmp_path / "run", 1, started, tmp_path / "log")
    started[victim].kill()
    assert started[victim].wait(60) == -signal.SIGKILL
    assert started[1 - victim].wait(60) not in (0, 75)


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_the_others(start_program, tmp_path):
    """Only the first looks into the run directory."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    started = start_program(2, 1, tmp_path / "run")
    statuses = [process.wait(60) for process in started]
    assert statuses[0] == 2 and statuses[1] != 0
    assert (tmp_path / "log").read_text().count("process 0: error: ") == 1


@pytest.mark.slow
def test_one_exchange_of_gradients_and_three_for_each_batch_norm(tmp_path):
    """Counted in the program that the compiler made."""
    program = "import runpy, sys; from helpers import tiny_config; "
    program += "tiny_config.register_architecture(); sys.path.insert(0, sys.argv.pop(1)); "
    program += "runpy.run_module('collectives', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", program, str(BENCHMARKS), ARCHITECTURE]
    done = subprocess.run(
        [*command, f"--output={tmp_path}/table.md"],
        env={**with_helpers(), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith(f"| {ARCHITECTURE}")]
    assert [row[1].strip() for row in rows] == ["merge_lp", "ft"]
    for row in rows:
        assert int(row[2]) == 3 * 7
        assert int(row[4]) == 1
        assert row[7].strip() == "none"
