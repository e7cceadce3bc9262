"""python -m medmerge_jax.merge --method NAME --out FILE A B ...: see `commands.merge`."""

import sys

from medmerge_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()
    from medmerge_jax.commands import entry

    entry.start("merge", sys.argv[1:])
else:  # a submodule would take the place of the function `mm.merge`
    raise ImportError(
        "medmerge_jax.merge is a command, python -m medmerge_jax.merge; the function is mm.merge "
        "after `import medmerge_jax as mm`, and its module medmerge_jax.models.mergers"
    )
