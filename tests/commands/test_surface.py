"""`python -m medmerge_jax surface`: what it prints and leaves, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.random_models import variables_of

from medmerge_jax import weights
from medmerge_jax.commands import surface
from medmerge_jax.errors import UserError

TINY = Path(__file__).parents[1] / "helpers" / "tiny_config.py"


@pytest.fixture
def models(tmp_path):
    for seed in range(2):
        card = {"image_size": 16}
        model = weights.model_from_card("resnet20", variables_of(seed), card)
        weights.save_model(tmp_path / f"m{seed}", model)
    return tmp_path


@pytest.mark.slow
def test_a_segment_goes_on_and_prints_its_barriers(models):
    def call(*arguments):
        command = [sys.executable, "-m", "medmerge_jax", "surface", "m0", "m1", f"--config={TINY}"]
        return subprocess.run(
            [*command, "--out", "out", "--points=3", *arguments],
            env={**os.environ, "MEDMERGE_JAX_CACHE": str(models / "cache")},
            cwd=models, capture_output=True, text=True, check=False,
        )  # fmt: skip

    data = ("--config.data.synthetic.counts=9,6,7", "--config.select.metric", "accuracy")
    found = call(*data)
    assert found.returncode == 0, found.stderr
    results = json.loads((models / "out" / "surface.json").read_text())
    assert results["data"]["images"] == {"train": 9, "test": 7}
    assert list(results["values"]) == [
        f"{split}_{name}" for split in ("train", "test") for name in ("loss", "accuracy")
    ]
    height = results["barriers"]["test_loss"]["height"]
    losses = results["values"]["test_loss"]
    assert height == pytest.approx(max(0, losses[1] - np.mean([losses[0], losses[2]])))
    assert f"barrier of test_loss: {height:.4f}" in found.stdout
    first, *rows = found.stdout.splitlines()
    assert first.split() == ["m0", "m1"]
    assert rows[0].split() == ["train_loss", *(f"{results['values']['train_loss'][i]:.4f}"
                                               for i in (0, 2))]  # fmt: skip
    refused = call(*data, "--recalibrate")
    assert refused.returncode == 2
    assert "points.json: holds points of other models, images or settings" in refused.stderr


def test_numbers_that_are_undefined_are_printed_as_such():
    results = {
        "models": [{"model": "a"}, {"model": "longer"}],
        "values": {"test_loss": [None, 1.0, 2.0]},
        "barriers": {"test_loss": None},
    }
    assert surface._text(results).splitlines() == [
        "           a  longer",
        "test_loss  -  2.0000",
        "barrier of test_loss: undefined",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--align", "zipit"], "invalid choice: 'zipit'"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, words, capsys):
    with pytest.raises(SystemExit) as left:
        surface._parse(["a", "b", *arguments])
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_models_stand_anywhere_beside_the_flags():
    options = surface._parse(["a", "--points", "3", "b", "--out", "o", "c"])
    assert (options.models, options.points, options.out) == (["a", "b", "c"], 3, Path("o"))


def test_a_config_is_wanted(tmp_path):
    with pytest.raises(UserError, match="--config FILE is missing"):
        surface.main(["a", "b", "--out", str(tmp_path)])
