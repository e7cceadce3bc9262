"""Runs a command of the package and presses Ctrl-C where it is told to.

    python -m helpers.pressed PLACES MODULE ARGUMENTS ...

PLACES has commas between: `import:NAME` is where that module is first asked for, `exit` where the
interpreter ends, `package.module:name` where that function is first called. The same place twice is
in the midst of it. Between two presses passes as much time as tells them from one.
"""

import atexit
import importlib
import importlib.abc
import os
import runpy
import signal
import sys
import threading
import time

BETWEEN = 0.4


class AtImport(importlib.abc.MetaPathFinder):
    """Presses when a module is first asked for."""

    def __init__(self, name, press):
        self.name, self.press = name, press

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            self.press()


def press_each(places):
    """Arranges for the places to come in their order."""
    if not places:
        return
    place, *others = places

    def press():
        press_each(others)
        os.kill(os.getpid(), signal.SIGINT)
        if others[:1] == [place]:  # while it is still there
            threading.Timer(BETWEEN, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif others:
            time.sleep(BETWEEN)

    module, _, name = place.partition(":")
    if place == "exit":
        atexit.register(press)
    elif module == "import":
        sys.meta_path.insert(0, AtImport(name, press))
    else:
        wrap(module, name, press)


def wrap(module, name, press):
    *holders, name = name.split(".")
    owner = importlib.import_module(module)
    for holder in holders:
        owner = getattr(owner, holder)
    function, presses = getattr(owner, name), [press]

    def pressed(*args, **kwargs):
        while presses:
            presses.pop()()
        return function(*args, **kwargs)

    setattr(owner, name, pressed)


if __name__ == "__main__":
    _, where, program, *arguments = sys.argv
    sys.argv = [program, *arguments]
    # As on a terminal; of jobs in the background it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    press_each(where.split(","))
    runpy.run_module(program, run_name="__main__", alter_sys=True)
