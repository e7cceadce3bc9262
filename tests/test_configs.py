"""The configs of the paper's experiments."""

import importlib.util
from pathlib import Path

import pytest

from medmerge_jax.data.official import LAYOUTS
from medmerge_jax.recipes.inputs import missing_data
from medmerge_jax.studies.checks import check_config

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRS = {"aptos": "eyepacs", "isic2019": "ham10000", "rsna_pneumonia": "chexpert"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("architecture", ["densenet121", "resnet50"])
@pytest.mark.parametrize("target", PAIRS)
def test_targets(target, architecture):
    module = load(target)
    backbone = "resnet50" if architecture == "resnet50" else ""
    for recipe in ("medmerge", "compare"):
        words = [backbone, "compare" if recipe == "compare" else ""]
        config = module.get_config(",".join(filter(None, words)))
        check_config(config)
        assert (config.recipe, config.architecture) == (recipe, architecture)
        assert (config.lp.learning_rate, config.ft.learning_rate) == (1e-4, 1e-5)
        assert (config.lp.epochs, config.ft.epochs, config.image_size) == (50, 50, 224)
        # Each backbone's parent is where its config is told to put it.
        workdir = f"runs/{PAIRS[target]}" + (f"_{backbone}" if backbone else "")
        assert config.parents.to_dict() == {"b": workdir, "c": "imagenet"}
        assert f"--workdir {workdir}" in load(PAIRS[target]).__doc__
        command = (
            f"configs/{PAIRS[target]}.py{':' if backbone else ''}{backbone} --workdir {workdir};"
        )
        assert command in config.help


@pytest.mark.parametrize("architecture", ["densenet121", "resnet50"])
@pytest.mark.parametrize("parent", PAIRS.values())
def test_parents(parent, architecture):
    config = load(parent).get_config("resnet50" if architecture == "resnet50" else "")
    check_config(config)
    assert (config.recipe, config.architecture) == ("ft", architecture)
    assert config.parents.to_dict() == {"c": "imagenet"}


def test_aptos_with_a_transformer():
    for variant, recipe in (("deit_base", "medmerge"), ("deit_base,compare", "compare")):
        config = load("aptos").get_config(variant)
        check_config(config)
        assert (config.recipe, config.architecture) == (recipe, "deit_base_patch16_224")
        assert (config.drop_path, config.parents.b) == (0.1, "runs/eyepacs_deit_base")
    command = "configs/eyepacs.py:deit_base --workdir runs/eyepacs_deit_base"
    assert f"{command};" in config.help and command in load("eyepacs").__doc__
    source = load("eyepacs").get_config("deit_base")
    check_config(source)
    assert (source.architecture, source.drop_path) == (config.architecture, config.drop_path)


@pytest.mark.parametrize("name", [*PAIRS, *PAIRS.values()])
def test_what_to_download_is_said(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = load(name).get_config().data
    assert data.kind == "official"
    (line,) = missing_data(data)
    assert line.startswith(f"data.root = {data.root}: there is no such file or folder")
    for wanted in LAYOUTS[data.name].instructions.split():
        assert wanted in line


@pytest.mark.parametrize("name", [*PAIRS, *PAIRS.values()])
def test_unknown_variants(name):
    with pytest.raises(ValueError, match=rf"configs/{name}\.py has no variant .*resnet18"):
        load(name).get_config("resnet18")
