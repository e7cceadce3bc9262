"""python -m medmerge_jax.main --config FILE --workdir FOLDER: see `commands.run`."""

import sys

from medmerge_jax.commands import entry

if __name__ == "__main__":
    entry.start("run", sys.argv[1:])
