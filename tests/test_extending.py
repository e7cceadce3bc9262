"""A user's config file that registers things of its own: no file of the package is edited."""

import json

import pytest

from medmerge_jax.weights.files import read_tensors

pytestmark = pytest.mark.slow  # it trains

CONFIG = '''
from helpers import tiny_config
from helpers.tiny_network import OneLayer
from medmerge_jax.evaluation.metrics import metric
from medmerge_jax.merging import weighted_average
from medmerge_jax.models.mergers import merger
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.models.registry import ModelSpec, register
from medmerge_jax.recipes.recipes import recipe


@merger
def first_mostly(task, *, share: float = 0.5):
    """The first parent by `share`, the others by what is left."""
    others = len(task.parents) - 1
    return weighted_average(task.to_merge(), [share, *[(1 - share) / others] * others])


register(
    ModelSpec(
        name="one_layer",
        build=OneLayer,
        num_features=8,
        preprocessing=Preprocessing(16),
        torch_head="fc",
    )
)


@metric(title="images that are not right", higher_is_better=False)
def mistakes(predictions):
    """The number of images whose class is not predicted."""
    return sum(predictions.predicted != predictions.labels)


@recipe(merges=True)
def merge_probe(experiment):
    """Merges without training, then trains the head alone."""
    return experiment.linear_probe(experiment.merged())


def get_config(variant=""):
    config = tiny_config.get_config(variant)
    config.architecture = "one_layer"
    config.merge_ft.method = "first_mostly"
    return config
'''


@pytest.fixture
def command(warm_programs, compiled_programs, tmp_path):
    """Calls the program on a config file with the text above."""
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)

    def call(*flags):
        cache = {"MEDMERGE_JAX_CACHE": str(compiled_programs)}
        return warm_programs.run([f"--config={path}", *flags], tmp_path, **cache)

    return call


def test_each_is_used_from_the_command_line(command, tmp_path):
    flags = [f"--workdir={tmp_path}/run", "--config.recipe=merge_probe"]
    options = ["--config.merge_ft.options.share=0.875", "--config.select.metric=mistakes"]
    result = command(*flags, *options)
    assert result.returncode == 0, result.stderr
    assert "| images that are not right |" in result.stdout
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (found["recipe"], found["method"]) == ("merge_probe", "first_mostly")
    assert [stage["name"] for stage in found["stages"]] == ["lp"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line)["val_mistakes"] for line in lines]
    assert found["stages"][0]["best_val_mistakes"] == min(values)
    assert found["test"]["mistakes"] == round(12 * (1 - found["test"]["accuracy"]))
    assert "images that are not right" in (tmp_path / "run" / "report.html").read_text()
    tensors = read_tensors(tmp_path / "run" / "model" / "model.safetensors")
    assert {name for name in tensors if name.startswith(("conv", "fc"))} == {
        "conv.weight", "fc.weight", "fc.bias",
    }  # fmt: skip
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert recorded["merge_ft"]["options"]["share"] == 0.875
    assert recorded["merge_ft"]["options"]["alpha"] is None


def test_mistakes_are_named_as_those_in_what_is_built_in(command, tmp_path):
    flags = [f"--workdir={tmp_path}/run", "--config.recipe=merge_probep"]
    flags += ["--config.merge_ft.method=first_mostle", "--config.compare.recipes=x"]
    result = command(*flags, "--config.architecture=one_later", "--config.select.metric=mistake")
    assert result.returncode == 2
    assert "architecture = 'one_later': did you mean 'one_layer'?" in result.stderr
    assert "select.metric = 'mistake': did you mean 'mistakes'?" in result.stderr
    assert "recipe = 'merge_probep': did you mean 'merge_probe'?" in result.stderr
    assert "merge_ft.method = 'first_mostle': did you mean 'first_mostly'?" in result.stderr
    assert "compare.recipes has 'x': one of ft, " in result.stderr
    options = [f"--config.merge_ft.options.{option}" for option in ("shar=1", "share=all")]
    result = command(flags[0], "--config.recipe=merge_probe", *options)
    assert "merge_ft.options.shar: did you mean 'share'?" in result.stderr
    assert "the option 'share' is 'all'; one number is wanted" in result.stderr
