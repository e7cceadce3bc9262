"""python -m medmerge_jax COMMAND ..., and the console script: see `commands.entry`."""

from medmerge_jax import interrupts


def main() -> None:
    """Calls the command that is named."""
    interrupts.end_at_once()
    from medmerge_jax.commands import entry

    entry.main()


if __name__ == "__main__":
    main()
