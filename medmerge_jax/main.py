"""python -m medmerge_jax.main --config FILE --workdir FOLDER: see `commands.run`."""

import sys

from medmerge_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()
    from medmerge_jax.commands import entry

    entry.start("run", sys.argv[1:])
