"""python -m medmerge_jax.merge: the command of `medmerge_jax.commands.merge` by its old name."""

if __name__ != "__main__":  # a submodule would take the place of the function `mm.merge`
    raise ImportError(
        "medmerge_jax.merge is a command, python -m medmerge_jax.merge; the function is mm.merge "
        "after `import medmerge_jax as mm`, and its module medmerge_jax.models.mergers"
    )

from medmerge_jax.commands.merge import entry_point

entry_point()
