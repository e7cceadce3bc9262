"""python -m medmerge_jax.main --config configs/aptos.py --workdir runs/aptos.

Fields of the config are changed on the command line: --config.batch_size=32. The same command
resumes what was interrupted and prints the results of what is finished.
"""

import errno
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from medmerge_jax.errors import UserError
from medmerge_jax.runtime import cpu, preemption, processes
from medmerge_jax.storage import atomic

_USAGE = "python -m medmerge_jax.main --config configs/quickstart.py --workdir runs/quickstart"
_GONE = (
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE,
    errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT,
)  # fmt: skip
_PIPE_CLOSED = 128 + signal.SIGPIPE
"""The status of other tools whose output nobody reads any more, as in `... | head -1`."""

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config().",
    lock_config=False,  # for options of mergers, which may be any; config files lock the rest
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; made if it is not there.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, of several processes; SLURM needs none of these."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: list[str]) -> None:
    """Runs the experiment and prints its results."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is no flag; --config FILE and --workdir FOLDER are wanted")
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or workdir is None:
        missing = "--config FILE" if config is None else "--workdir FOLDER"
        raise UserError(f"{missing} is missing, as in: {_USAGE}")
    import jax

    if not flags.FLAGS["verbosity"].present:
        # The libraries' notes are not for our readers; their errors come to us as exceptions too.
        logging.set_verbosity(logging.FATAL)

    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    jax.config.update("jax_compilation_cache_dir", str(atomic.cache_folder("xla")))
    # Also what compiles in less than a second, of which there is much: a hundred small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from medmerge_jax.analysis import results_text
    from medmerge_jax.studies import run

    results = run(config, workdir)
    if processes.is_first():
        print(results_text(results))
    processes.wait_for_all()  # for as long as the first writes its report


def entry_point() -> None:
    """Exit status 2 and one message for what the user can mend; a traceback for a bug.

    Status 75 after SIGTERM or SIGUSR1, and 130 after Ctrl-C: the same command goes on from there.
    A closed pipe ends it without a word, with status 141.
    """
    cpu.prepare()
    preemption.install()
    try:
        try:
            app.run(main, flags_parser=_parse_flags)
        finally:
            sys.stdout.flush()  # here, where a pipe without a reader is no fault of the program
    except processes.StoppedElsewhereError:
        _leave(2)
    except UserError as error:
        _leave(_fail(str(error)))
    except BrokenPipeError:
        os._exit(_PIPE_CLOSED)  # without a last flush into it
    except OSError as error:
        if error.errno in atomic.DISK_FULL:
            _leave(_fail(_disk_full(error)), quietly=True)
        if error.errno not in _GONE or not _is_ours(error.filename):
            raise
        _leave(_fail(_gone(error)), quietly=True)
    except preemption.Preempted as stopped:
        if processes.is_first():
            print(preemption.message(stopped), file=sys.stderr)
        sys.exit(preemption.exit_status())  # all processes end here, and wait for each other
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        _leave(130)


def _leave(status: int, quietly: bool = False) -> NoReturn:
    """Ends the process, of several without waiting for the others, which JAX ends then.

    Quietly also without the last words of Orbax, whose threads would still try to write.
    """
    if quietly or processes.count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest: list[str] = flags.FLAGS(argv)
        # ml_collections tells only on an access that a file could not be read.
        if _CONFIG.value is not None and not hasattr(_CONFIG.value, "recipe"):
            raise UserError(
                "get_config() of the config file must return a config with the fields of "
                "medmerge_jax.config.default_config()"
            )
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:  # a config file is a program: it may raise anything
        raise UserError(_explain(error)) from error
    return rest


def _explain(error: Exception) -> str:
    """What is wrong with the command line or the config file, and where.

    ml_collections wraps what a config file raises, some of it with a traceback as text.
    """
    for raised in _chain(error):
        if isinstance(raised, SyntaxError):
            return f"config file {raised.filename}, line {raised.lineno}: {raised.msg}"
        for frame in reversed(traceback.extract_tb(raised.__traceback__)):
            if frame.name in ("get_config", "<module>"):
                where = f"config file {frame.filename}, line {frame.lineno}"
                return f"{where}: {type(raised).__name__}: {_short(raised)}"
    if isinstance(error, OSError):
        return f"the config file cannot be read: {str(_chain(error)[0]).splitlines()[-1].strip()}"
    if isinstance(error, KeyError | AttributeError):
        text = re.sub(r"^Key (\S+) does not exist and [^.]*locked", r"\1", _short(error))
        return f"the command line cannot be used: the config has no field {text}"
    return f"the command line cannot be used: {error}"


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error that came first, and those that it led to."""
    return [] if error is None else [*_chain(error.__cause__ or error.__context__), error]


def _short(error: BaseException) -> str:
    """On one line, without the list of all fields that a locked config adds."""
    text: Any = error
    while isinstance(text, BaseException) and len(text.args) == 1:
        text = text.args[0]  # a KeyError's str() is quoted, and ml_collections nests them
    text = re.sub(r' Other fields present: ".*}"', "", str(text), flags=re.DOTALL)
    return ". ".join(line.strip().rstrip(".") for line in text.splitlines())


def _disk_full(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    reason = errno.errorcode.get(error.errno or 0, "")
    return (
        f"the disk is full{where} ({reason}: {error.strerror}); nothing half-written was kept. "
        "Free some space and give the same command again: it resumes."
    )


def _is_ours(path: object) -> bool:
    folders = [atomic.cache_folder("."), *([Path(_WORKDIR.value)] if _WORKDIR.value else [])]
    return isinstance(path, str) and any(
        Path(path).absolute().is_relative_to(folder.expanduser().absolute()) for folder in folders
    )


def _gone(error: OSError) -> str:
    return (
        f"{error.filename} cannot be read or written any more ({error.strerror}): a folder that "
        "the run works in has vanished or has become read-only. Nothing half-written was kept. "
        "When the folder is back, the same command goes on from the last checkpoint."
    )


def _fail(message: str) -> int:
    which = f"process {processes.index()}: " if processes.count() > 1 else ""
    print(f"{which}error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    entry_point()
