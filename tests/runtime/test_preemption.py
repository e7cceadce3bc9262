"""Signals outside of the stages of training; those within are in training/test_faults.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medmerge_jax.runtime.preemption import EXIT_STATUS

TINY = Path(__file__).parents[1] / "helpers" / "tiny_config.py"

ALONE = """
import hashlib, os, signal, threading, time
from medmerge_jax.runtime import preemption
from medmerge_jax.runtime import processes

preemption.install()
processes.start(None, None, None)
threading.Timer(0.3, os.kill, (os.getpid(), signal.{signal})).start()
try:
    {}
finally:
    print("an exception, or too late")
"""


@pytest.mark.parametrize(
    "busy", ["time.sleep(60)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 300_000_000)"]
)
@pytest.mark.parametrize(
    "number, name, status", [("SIGUSR2", "SIGUSR2", EXIT_STATUS), ("SIGINT", "Ctrl-C", 130)]
)
def test_a_signal_ends_the_process_at_once(busy, number, name, status):
    """Also when the main thread is in C, where it runs no handlers of signals."""
    program = ALONE.format(busy, signal=number)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == status
    assert result.stderr == f"stopped by {name}; the same command goes on from here\n"
    assert result.stdout == ""


STAGE = """
import os, signal, sys, time
from medmerge_jax.runtime import preemption, processes

preemption.install()
processes.start(None, None, None)
with preemption.deferred():
    print("training", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saving", flush=True)
    try:
        preemption.check()
    except preemption.Preempted as stopped:
        print(stopped, flush=True)
        time.sleep(float(sys.argv[2]))
        sys.exit(preemption.exit_status())
"""


@pytest.mark.parametrize("step, saving", [(60, 0), (1, 60)])
def test_a_second_ctrl_c_ends_it_at_once(step, saving):
    """Inside a step, and while what the first one asked for is being saved."""
    command = [sys.executable, "-c", STAGE, str(step), str(saving)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout.readline() == "training\n"
        for _ in range(2):  # sent on by a launcher, it is the same
            program.send_signal(signal.SIGINT)
            time.sleep(0.05)
        if saving:
            assert program.stdout.readline() == "saving\n"
            assert program.stdout.readline() == "Ctrl-C\n"
        else:
            time.sleep(0.5)
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        assert program.wait(5) == 130
        assert program.stderr.read() == "stopped by Ctrl-C; the same command goes on from here\n"


def test_ctrl_c_is_ignored_where_it_was_ignored_before():
    """As in jobs that a shell has put into the background."""
    program = "import signal; from medmerge_jax.runtime import preemption; preemption.install(); "
    program += "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        subprocess.run([sys.executable, "-c", program], check=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_ends_the_process_also_when_nobody_hears_what_it_says():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", ALONE.format("time.sleep(60)", signal="SIGUSR1")]
    assert subprocess.run(command, stderr=writing, timeout=50).returncode == EXIT_STATUS
    os.close(writing)


@pytest.fixture
def start(warm_programs, compiled_programs, tmp_path):
    """Starts one of two processes of a run; the test leaves none."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []

    def process(index):
        flags = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}"]
        flags += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
        cache = {"MEDMERGE_JAX_CACHE": str(compiled_programs)}
        started.append(warm_programs.start(flags, tmp_path / f"log{index}", **cache))
        return started[-1]

    process.port = port
    yield process
    for one in started:
        one.kill()
        one.wait(60)


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1.0):
        return True
    return False


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.01)


def ended(*processes, status=EXIT_STATUS):
    ends = [process.wait(60) for process in processes]
    said = [process.log.read_text() for process in processes]
    assert ends == [status] * 2, said
    return said


@pytest.mark.slow
def test_a_signal_while_one_waits_for_the_others_to_start(start):
    first = start(0)
    wait_for(lambda: answers(start.port), first)
    first.send_signal(signal.SIGTERM)
    said, _ = ended(first, start(1))
    assert said.count("stopped by SIGTERM; the same command goes on from here\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked, number, name, status",
    [
        (0, signal.SIGUSR1, "SIGUSR1", EXIT_STATUS),
        (1, signal.SIGUSR1, "SIGUSR1", EXIT_STATUS),
        (1, signal.SIGINT, "Ctrl-C", 130),
    ],
)
def test_a_signal_to_one_of_two_outside_of_a_stage_ends_both(
    start, tmp_path, asked, number, name, status
):
    both = start(0), start(1)
    wait_for((tmp_path / "run" / ".lock").exists, both[0])  # while the second waits for the first
    both[asked].send_signal(number)
    said, _ = ended(*both, status=status)
    assert f"stopped by {name}; the same command goes on from here\n" in said
    assert not (tmp_path / "run" / "results.json").exists()
