"""python -m medmerge_jax COMMAND ...: see `commands.entry`."""

from medmerge_jax.commands import entry

if __name__ == "__main__":
    entry.main()
