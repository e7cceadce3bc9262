"""The one door of all commands: signals, caches, errors, exit codes.

A command is a file of this room with `main(arguments)`, and a row of `COMMANDS`.
"""

import argparse
import errno
import importlib
import os
import platform
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import medmerge_jax
from medmerge_jax.errors import UserError, nearest
from medmerge_jax.runtime import cpu, preemption, processes
from medmerge_jax.runtime.inert import on_terminal
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage import atomic

COMMANDS = {
    "run": "run, or resume, an experiment: run CONFIG [--workdir FOLDER]",
    "merge": "merge weight files, without training: --method NAME --out FILE A B ...",
    "predict": "classes of new images: predict MODEL IMAGES ... --out FILE",
    "export": "a model for other programs: export MODEL --to FOLDER",
    "evaluate": "models on any data set: evaluate MODEL ... --config FILE",
    "surface": "loss between models, measured and drawn: A B [C] --config FILE --out FOLDER",
    "analyse": "what models have learned, in figures: analyse KIND ... --out FOLDER",
    "work": "help with a study that was begun elsewhere: work WORKDIR",
    "status": "print what has become of each job of a study: status WORKDIR",
    "fields": "print what a config may say: fields [PREFIX]",
    "completion": "what a shell completes commands and options by: completion bash|zsh",
}
_TRAIN = (
    "absl", "array_record", "filelock", "flatbuffers", "grain", "huggingface_hub", "jinja2",
    "matplotlib", "ml_collections", "optax", "orbax", "PIL", "rich", "tensorboardX",
    "tensorflow_datasets",
)  # fmt: skip
"""Modules that the extra `train` brings."""
_INSTALL = "pip install 'medmerge-jax[train]', or in a clone pip install -e '.[train]',"
HELP = ("-h", "--help", "-help")
_VERSION = ("--version", "-version")
_GONE = (
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE,
    errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT,
)  # fmt: skip
_PIPE_CLOSED = 128 + signal.SIGPIPE
"""The status of other tools whose output nobody reads any more, as in `... | head -1`."""

_workplaces: list[Path] = []


def main() -> None:
    """`python -m medmerge_jax COMMAND ...`, and the console script."""
    name, *arguments = sys.argv[1:] or HELP[:1]
    if name in _VERSION:
        _enter(_print_versions)
    elif name in COMMANDS:
        start(name, arguments)
    else:
        _enter(lambda: _list_commands(name))


def start(name: str, arguments: Sequence[str]) -> None:
    """Calls a command's `main`.

    Exit status 2 and one message for what the user can mend; a traceback for a bug. Status 75 after
    SIGTERM, SIGUSR1 or SIGUSR2, and 130 after Ctrl-C: the same command goes on from there. A closed
    pipe ends it without a word, with status 141.
    """

    def call() -> None:
        if arguments and arguments[0] in _VERSION:
            _print_versions()
            return
        cpu.prepare()
        preemption.install()
        importlib.import_module(f"medmerge_jax.commands.{name}").main(arguments)

    _enter(call)


def _enter(call: Callable[[], None]) -> None:
    try:
        try:
            call()
        finally:
            sys.stdout.flush()  # here, where a pipe without a reader is no fault of the program
    except processes.StoppedElsewhereError:
        _leave(2)
    except UserError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN:
            raise
        _fail(f"the package {error.name} is missing; {_INSTALL} brings it")
    except BrokenPipeError:
        os._exit(_PIPE_CLOSED)  # without a last flush into it
    except OSError as error:
        if error.errno in atomic.DISK_FULL:
            _fail(_disk_full(error), quietly=True)
        if error.errno not in _GONE or not _is_ours(error.filename):
            raise
        _fail(_gone(error), quietly=True)
    except preemption.Preempted as stopped:
        if processes.is_first():
            print(preemption.message(stopped), file=sys.stderr)
        sys.exit(preemption.exit_status())  # all processes end here, and wait for each other
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        _leave(130)


def work_in(folder: Path) -> None:
    """Names a folder that the command writes to: it is said plainly if that vanishes."""
    _workplaces.append(folder)


def user_path(text: str) -> Path:
    """A path of the command line, for argparse."""
    return Path(text).expanduser()


def whole_number(text: str) -> int:
    """A number from 1 of the command line, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 is wanted")
    return int(text)


def keep_programs() -> None:
    """Has JAX keep compiled programs in the cache folder, for the next run of the command."""
    import jax

    update: Callable[[str, object], None] = jax.config.update
    update("jax_compilation_cache_dir", str(atomic.cache_folder("xla")))
    # Also what compiles in less than a second, of which there is much: a hundred small programs.
    update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _print_versions() -> None:
    """Of this program, and of what decides its numbers."""
    here = {**package_versions(), "medmerge-jax": medmerge_jax.__version__}
    for package, version in {**here, "Python": platform.python_version()}.items():
        print(f"{package} {version}")


def _list_commands(name: str) -> None:
    """Prints all commands; refuses a name that is none."""
    if name not in HELP:
        raise UserError(f"there is no command {name!r}; {nearest(name, COMMANDS)}")
    print("python -m medmerge_jax COMMAND ..., or medmerge COMMAND ...\n")
    width, indent = shutil.get_terminal_size().columns, " " * 14
    for command, summary in COMMANDS.items():
        print(textwrap.fill(f"  {command:12}{summary}", width, subsequent_indent=indent))
    print("\nEach says more with --help:  python -m medmerge_jax merge --help")
    print("Versions:  python -m medmerge_jax --version")


def _leave(status: int, quietly: bool = False) -> NoReturn:
    """Ends the process, of several without waiting for the others, which JAX ends then.

    Quietly also without the last words of Orbax, whose threads would still try to write.
    """
    if quietly or processes.count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _disk_full(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    reason = errno.errorcode.get(error.errno or 0, "")
    return (
        f"the disk is full{where} ({reason}: {error.strerror}); nothing half-written was kept. "
        "Free some space and give the same command again: it resumes."
    )


def _is_ours(path: object) -> bool:
    folders = [atomic.cache_folder("."), *_workplaces]
    return isinstance(path, str) and any(
        Path(path).absolute().is_relative_to(folder.expanduser().absolute()) for folder in folders
    )


def _gone(error: OSError) -> str:
    return (
        f"{error.filename} cannot be read or written any more ({error.strerror}): a folder that "
        "the run works in has vanished or has become read-only. Nothing half-written was kept. "
        "When the folder is back, the same command goes on from the last checkpoint."
    )


def _fail(message: str, quietly: bool = False) -> NoReturn:
    from medmerge_jax.runtime.progress import fitted

    which = f"process {processes.index()}: " if processes.count() > 1 else ""
    print(fitted(f"{which}error: {on_terminal(message)}", indent=2), file=sys.stderr)
    _leave(2, quietly)
