"""The configs that come with the program, by name: `aptos`, `fission_fusion/aptos`."""

from pathlib import Path

from medmerge_jax.errors import UserError, nearest

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where they are: inside of an installed package, beside that of a clone."""
    inside, beside = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    # Beside an installed package a folder of this name is somebody else's.
    clone = not inside.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file()
    return beside if clone else inside


def names() -> list[str]:
    """Of all of them, sorted."""
    files = [path.relative_to(folder()) for path in folder().rglob("*.py")]
    return sorted(file.with_suffix("").as_posix() for file in files if file.stem[0] not in "._")


def config_path(text: str) -> str:
    """A file's path with what follows its colon, for a path or a name: "aptos:resnet50".

    Raises:
      UserError: There is no such file, and no config of this name.
    """
    name, colon, variant = text.partition(":")
    if Path(name).is_file():
        return text
    meant = name.removeprefix("configs/").removesuffix(".py")
    if meant in names() and name in (meant, f"configs/{meant}.py"):  # its path in a clone
        return f"{folder() / meant}.py{colon}{variant}"
    raise UserError(
        f"--config {text}: there is no file {name}, and of the configs that come with the program "
        f"none has this name; {nearest(meant, names())}, or the path of a config file"
    )


def usual_workdir(text: str) -> str:
    """Where a config that is given by its name is run: "aptos:resnet50" in runs/aptos_resnet50.

    Empty for the path of a file.
    """
    name, _, variant = text.partition(":")
    if Path(name).is_file() or name.endswith(".py"):
        return ""
    return "runs/" + "_".join([*name.split("/"), *filter(None, variant.split(","))])
