"""The README's Python runs as it stands."""

import itertools
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers import small_layouts
from helpers.random_models import variables_of

import medmerge_jax as mm
from medmerge_jax.errors import UserError
from medmerge_jax.models.mergers import MERGERS, describe_merger
from medmerge_jax.recipes.recipes import RECIPES
from medmerge_jax.registry import summary
from medmerge_jax.studies.checks import check_config
from medmerge_jax.studies.jobs import STUDIES

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def weight_files(tmp_path, monkeypatch):
    """The files that the README names, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("medical", "natural")):
        variables = variables_of(seed, 3, "resnet18")
        mm.save_weights(f"{name}.safetensors", "resnet18", variables)


def test_the_config_with_three_parents():
    config = run(block("config.parents.d"))["get_config"]()
    check_config(config)
    assert list(config.parents) == ["b", "c", "d"]


def test_the_config_with_a_further_data_set():
    config = check_config(run(block("default_evaluate_on"))["get_config"]())
    one = config.evaluate_on["idrid"]
    assert (one.data.root, one.split) == ("idrid", "all")
    assert one.classes == {"healthy": "0", "ill": ("1", "2", "3", "4")}


def test_the_builder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = small_layouts.aptos2019(tmp_path / "aptos2019")
    train = run(block("tfds.builder"))["train"]
    assert 0 < len(train) < len(expected)
    assert all(one["label"] == expected[one["id"].decode()].label for one in train)


def test_a_recipe_and_a_merger_of_ones_own(monkeypatch):
    for registry in (MERGERS, RECIPES):
        monkeypatch.setattr(registry, "_entries", dict(registry))
    config = run(block("@merger"))["get_config"]().unlock()
    config.merge_ft.options.share = 0.7
    assert check_config(config).merge_ft.options["share"] == 0.7
    assert describe_merger("first_mostly")[1] == "share=0.5"
    config.merge_ft.options.share = "most"
    with pytest.raises(UserError, match="'share' is 'most'; one number is wanted"):
        check_config(config)


def test_a_model_that_predicts(tmp_path, monkeypatch, write_images):
    monkeypatch.chdir(tmp_path)
    mm.save_weights("medical.safetensors", "resnet20", variables_of(0, 3))
    mm.save_model("runs/aptos", mm.load_model("medical.safetensors"))
    write_images(Path("eye.png"), size=32)
    names = run(block("mm.predict"))
    assert names["probabilities"].shape == (1, 3)
    assert {"model.safetensors", "model.json", "README.md"} <= {
        p.name for p in Path("exported").iterdir()
    }


def test_the_merge_of_two_files(weight_files):
    names = run(block("init_coefficients(parents"))
    kernels = [tree["params"]["conv1"]["kernel"] for tree in names["parents"]]
    merged = names["variables"]["params"]["conv1"]["kernel"]
    assert jnp.allclose(merged, (kernels[0] + kernels[1]) / 2)
    assert "head" not in names["variables"]["params"]


def test_the_merge_of_nnx_models():
    names = run(block("nnx."))
    kernels = [names[model].conv.kernel[...] for model in "bc"]
    assert jnp.allclose(names["model"].conv.kernel[...], (kernels[0] + kernels[1]) / 2)


def test_the_tables_of_recipes_and_mergers_are_the_registries():
    recipes = [f"| `{name}` | {summary(one.function)} |" for name, one in RECIPES.items()]
    assert table("--config.recipe") == recipes
    assert table("study") == [f"| `{n}` | {summary(one.function)} |" for n, one in STUDIES.items()]
    mergers = []
    for name in MERGERS:
        text, options = describe_merger(name)
        code = ", ".join(f"`{one}`" for one in options.split(", ") if options)
        mergers.append(f"| `{name}` | {text} | {code} |")
    assert table("method") == mergers


def table(title):
    """The rows of the README's table whose first column has this title."""
    lines = README.read_text().splitlines()
    (start,) = [n for n, line in enumerate(lines) if re.match(rf"\| `?{title}`? \|", line)]
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))


def test_commands_name_files_that_are_there():
    for config in re.findall(r"--config (\S+?\.py)", README.read_text()):
        # That of one's own stands in the README itself.
        assert config == "mine.py" or (README.parent / config).is_file()


def block(text):
    """The one block that has the text in it."""
    (found,) = [one for one in BLOCKS if text in one]
    return found


def run(code):
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names
