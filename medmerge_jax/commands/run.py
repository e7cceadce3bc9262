"""python -m medmerge_jax run CONFIG, or python -m medmerge_jax.main --config FILE --workdir FOLDER.

Fields of the config are changed on the command line: --config.batch_size=32. The same command
resumes what was interrupted and prints the results of what is finished.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from medmerge_jax.commands import entry, packaged
from medmerge_jax.commands.config_flags import CONFIG, config_file, named_config, parse_flags
from medmerge_jax.commands.help import filled
from medmerge_jax.errors import UserError
from medmerge_jax.runtime import processes

_PROGRAM = "python -m medmerge_jax.main"
_USAGE = f"{_PROGRAM} --config configs/quickstart.py --workdir runs/quickstart"
_HELP = f"""usage: {_PROGRAM} --config FILE --workdir FOLDER [options]
       python -m medmerge_jax run CONFIG [--workdir FOLDER] [options]

Runs the experiment of a config: a file, or one that comes with the program and
by default is run in runs/NAME. The same command resumes what was interrupted,
and prints the results of what is finished.

Configs that come with the program: CONFIGS.

Examples:
  {_PROGRAM} --config configs/quickstart.py \\
      --workdir runs/quickstart
  python -m medmerge_jax run quickstart
  python -m medmerge_jax run aptos:resnet50 --config.lp.epochs=5
  {_PROGRAM} --config configs/folder.py --workdir runs/mine \\
      --config.data.root=images --config.parents.b=medical.pth

Options:
OPTIONS
  --config.FIELD    any field of the config, see python -m medmerge_jax fields
"""

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; made if it is not there.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check all that can be checked without training, and end."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, of several; SLURM needs none."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and runs what it says."""
    if set(entry.HELP) & set(arguments):
        ours = (CONFIG, _WORKDIR, _DRY_RUN, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
        lines = [f"  --{holder.name:16}{flags.FLAGS[holder.name].help}" for holder in ours]
        text = _HELP.replace("OPTIONS", "\n".join(lines))
        text = text.replace("CONFIGS", ", ".join(packaged.names()))
        print(filled(text, shutil.get_terminal_size().columns))
    else:
        app.run(_run, ["medmerge_jax", *_explicit(arguments)], flags_parser=parse_flags)


def _explicit(arguments: Sequence[str]) -> list[str]:
    """With --config where a config stands alone at first, and --workdir if a name implies it."""
    result = list(arguments)
    if result and not result[0].startswith("-"):
        if named_config(result)[0] >= 0:
            raise UserError(f"{result[0]!r} and --config: one config is wanted")
        result[:1] = [f"--config={result[0]}"]
    place, value = named_config(result)
    given = any(re.match(r"--?workdir(=|$)", one) for one in result)
    if place >= 0 and not given and (workdir := packaged.usual_workdir(value)):
        result.append(f"--workdir={workdir}")
    return result


def _run(argv: list[str]) -> None:
    """Runs the experiment and prints its results."""
    if len(argv) > 1:
        raise UserError(
            f"{argv[1]!r} is no flag; a config at first, or --config FILE, and --workdir FOLDER "
            "are wanted"
        )
    config, workdir = CONFIG.value, _WORKDIR.value
    if config is None or workdir is None:
        missing = "--config FILE" if config is None else "--workdir FOLDER"
        raise UserError(f"{missing} is missing, as in: {_USAGE}")
    if not workdir.strip():
        raise UserError(f"--workdir is empty; a folder is wanted, as in: {_USAGE}")
    if not flags.FLAGS["verbosity"].present:
        # The libraries' notes are not for our readers; their errors come to us as exceptions too.
        logging.set_verbosity(logging.FATAL)

    entry.work_in(Path(workdir))
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    entry.keep_programs()
    from medmerge_jax.runtime.progress import columns, tell
    from medmerge_jax.studies import run

    file = config_file()
    results = run(config, workdir, dry_run=_DRY_RUN.value, config_file=file)
    if not results:
        return
    if processes.is_first():
        tell(results.text(columns()))
        tell(f"\nreport: {results.workdir / 'report.html'}")
    processes.wait_for_all()  # for as long as the first writes its report
