"""For programs that tests start: new Pythons that find `helpers`, and forks of a warm one."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]


def with_helpers():
    """The environment in which a started Python finds `helpers` too."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *([path] if path else [])])}


class WarmPrograms:
    """Starts programs of the package, each a fork of one process that has done the imports.

    Of the environment, what JAX reads when it is imported is as it was at the first start.
    """

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.warm"],
            env=with_helpers(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments, log, *, stdout=None, module="medmerge_jax.main", folder=".", **more):
        """A program that writes to the end of the file `log`; `more` is of its environment."""
        request = {
            "module": module,
            "arguments": [str(one) for one in arguments],
            "environment": {**os.environ, **more},
            "folder": str(Path(folder).absolute()),
            "stdout": str(stdout or log),
            "stderr": str(log),
        }
        return WarmProgram(self, self.ask(request), Path(log))

    def run(self, arguments, folder_of_logs, **more):
        """As subprocess.run: the status, and what it wrote to stdout and stderr."""
        out, err = (Path(tempfile.mkstemp(dir=folder_of_logs)[1]) for _ in range(2))
        program = self.start(arguments, err, stdout=out, **more)
        status = program.wait(600)
        written = [path.read_text() for path in (out, err)]
        return subprocess.CompletedProcess(arguments, status, *written)

    def ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class WarmProgram:
    """What tests want of subprocess.Popen."""

    def __init__(self, programs, pid, log):
        self._programs, self.pid, self.log, self.returncode = programs, pid, log, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self._programs.ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout=None):
        started = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() > started + timeout:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
