"""python -m medmerge_jax.main --config configs/aptos.py --workdir runs/aptos.

Fields of the config are changed on the command line: --config.batch_size=32. The same command
resumes what was interrupted and prints the results of what is finished.
"""

import errno
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from medmerge_jax import files
from medmerge_jax.errors import UserError

_USAGE = "python -m medmerge_jax.main --config configs/quickstart.py --workdir runs/quickstart"
_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; made if it is not there.")


def main(argv: list[str]) -> None:
    """Runs the experiment and prints its results."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is no flag; --config FILE and --workdir FOLDER are wanted")
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or workdir is None:
        missing = "--config FILE" if config is None else "--workdir FOLDER"
        raise UserError(f"{missing} is missing, as in: {_USAGE}")
    _check_loaded(config)
    import jax

    if not flags.FLAGS["verbosity"].present:
        # The libraries' notes are not for our readers; their errors come to us as exceptions too.
        logging.set_verbosity(logging.FATAL)

    jax.config.update("jax_compilation_cache_dir", str(files.cache_folder("xla")))
    from medmerge_jax.analysis import results_text
    from medmerge_jax.recipes.run import run

    results = run(config, Path(workdir).expanduser())
    print(results_text(results))


def entry_point() -> None:
    """Exit status 2 and one message for what the user can mend; a traceback for a bug."""
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        if error.errno not in files.DISK_FULL:
            raise
        sys.exit(_fail(_disk_full(error)))


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        raise UserError(f"the command line cannot be used: {_without_traceback(error)}") from error


def _check_loaded(config: Any) -> None:
    """ml_collections tells only on the first access that a config file could not be read."""
    try:
        config.recipe  # noqa: B018
    except OSError as error:
        raise UserError(f"the config cannot be read: {_without_traceback(error)}") from error
    except AttributeError as error:
        raise UserError(
            "get_config() of the config file must return a config with the fields of "
            "medmerge_jax.config.default_config()"
        ) from error


def _without_traceback(error: Exception) -> str:
    """The last line of a message that quotes a traceback, as ml_collections' do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if any("Traceback" in line for line in lines) else str(error)


def _disk_full(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    reason = errno.errorcode.get(error.errno or 0, "")
    return (
        f"the disk is full{where} ({reason}: {error.strerror}); nothing half-written was kept. "
        "Free some space and give the same command again: it resumes."
    )


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    entry_point()
