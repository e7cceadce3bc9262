"""python -m helpers.warm: the package's programs, started without importing everything each time.

Most of a short run's time are its imports. This process does them once, and each request forks
what then goes on and ends as `python -m MODULE ARGUMENTS ...` would. Neither devices nor threads of
JAX are there before. Requests and answers are lines of JSON, see `helpers.programs.WarmPrograms`.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys

IMPORTED = (
    "medmerge_jax.commands.run", "medmerge_jax.commands.merge", "medmerge_jax.studies",
    "medmerge_jax.images.augment", "jinja2", "matplotlib.pyplot", "PIL.Image", "sklearn.metrics",
    "tensorboardX",
)  # fmt: skip
"""What runs import, the package's modules and those that it imports where they are used."""


def next_program():
    """Answers requests; returns one in the process that was forked for it, or None at their end."""
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            found, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    return None


def become(request):
    """Makes the process what it would be if it had been started so."""
    for number, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        file = os.open(name, flags)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[1:] = request["arguments"]


if __name__ == "__main__":
    # Tests in the background of a shell ignore it, and so would what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # or each fork looks through all that was imported when it ends
    if request := next_program():
        become(request)
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
