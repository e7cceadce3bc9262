"""Recipes and studies on a vision transformer: no batch norms, and coefficients that are tied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

import medmerge_jax as mm
from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import vit
from medmerge_jax.models.registry import MODELS, register
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.studies import run

NAME, WIDTH, DEPTH, HEADS = "vit_of_two_blocks", 24, 2, 3


@pytest.fixture(scope="module", autouse=True)
def architecture():
    build = functools.partial(vit.VisionTransformer, WIDTH, DEPTH, HEADS, grid=2)
    register(
        dataclasses.replace(
            MODELS["deit_tiny_patch16_224"],
            name=NAME,
            build=build,
            num_features=WIDTH,
            tie=functools.partial(vit.tie, HEADS),
            spaces=functools.partial(vit.spaces, HEADS),
        )
    )
    yield
    del MODELS._entries[NAME]


def config_of(recipe):
    config = tiny_config.get_config().unlock()
    config.architecture, config.image_size, config.recipe = NAME, 32, recipe
    return config


@pytest.mark.slow
def test_medmerge_learns_a_coefficient_per_head(tmp_path):
    config = config_of("medmerge")
    config.merge.learning_rate = 0.01
    for seed, name in enumerate("bc"):
        model = mm.create_model(NAME, 2)
        variables = model.init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
        mm.save_weights(tmp_path / f"{name}.safetensors", NAME, variables)
        config.parents[name] = str(tmp_path / f"{name}.safetensors")
    results = run(config, tmp_path / "run")
    assert set(results) >= {"val", "test"}
    coefficients = read_npz(tmp_path / "run" / "coefficients.npz")
    assert len(coefficients) == 1 + 4 * DEPTH
    assert coefficients["blocks/1/attn/qkv/kernel"].shape == (HEADS,)
    assert all(np.abs(x - 0.5).max() > 1e-3 for x in coefficients.values()), coefficients
    assert (tmp_path / "run" / "report.html").exists()
    model = mm.load_model(tmp_path / "run")
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert mm.predict(model, images).shape == (2, len(model.classes))


@pytest.mark.slow
def test_the_last_block_is_fine_tuned_and_generates_with_stochastic_depth(tmp_path):
    """The same draws in every run; what is frozen is the parent's to the bit."""
    variables = mm.create_model(NAME, 2).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    mm.save_weights(tmp_path / "c.safetensors", NAME, variables)
    ends = []
    for name, drop_path in (("one", 0.5), ("again", 0.5), ("none", 0.0)):
        config = config_of("fgg")
        config.parents, config.start = {"c": str(tmp_path / "c.safetensors")}, "c"
        config.drop_path, config.ft.blocks, config.ft.layer_decay = drop_path, 1, 0.5
        config.fgg.epochs, config.fgg.cycle = 4, 2
        run(config, tmp_path / name)
        assert len(list((tmp_path / name / "kept").iterdir())) > 0
        model = mm.load_model(tmp_path / name).variables["params"]
        ends.append({path: np.asarray(leaf).tobytes() for path, leaf in flatten(model).items()})
    assert ends[0] == ends[1] != ends[2]
    for path, leaf in flatten(variables["params"]).items():
        trained = path.startswith(("blocks/1/", "norm/", "head/"))
        assert trained == (ends[0][path] != np.asarray(leaf).tobytes()), path


@pytest.mark.slow
def test_there_is_nothing_to_recalibrate(tmp_path, capsys):
    config = config_of("merge_ft")
    config.merge_ft.method = "uniform"
    run(config, tmp_path)
    assert f"{NAME} has no batch norms" in capsys.readouterr().err


@pytest.mark.slow
def test_heads_are_aligned_before_they_are_merged(tmp_path):
    config = config_of("medmerge_aligned")
    assert set(run(config, tmp_path / "medmerge")) >= {"val", "test"}
    config.recipe, config.merge_ft.method = "merge_ft", "activation_matching"
    assert set(run(config, tmp_path / "merge_ft")) >= {"val", "test"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge_ft.method": "zipit"}, "'zipit': the units of blocks/0/attn lie in 3 heads"),
        ({"merge_ft.method": "matched_averaging"}, "averaging': .* take weight_matching or"),
        ({"ft.blocks": 3}, "ft.blocks = 3: vit_of_two_blocks has 2 blocks"),
        (
            {"image_size": 40, "recipe": "medmerge"},
            "config.image_size = 40: .* a multiple of 16 pixels",
        ),
    ],
)
def test_what_a_transformer_cannot_do_is_refused_before_anything_is_read(changes, words, tmp_path):
    config = config_of("merge_ft")
    config.update_from_flattened_dict(changes)
    if "image_size" not in changes:  # which is looked at when the parents are known to be there
        config.parents.b = "nowhere.pth"  # the first complaint of a run that has begun
    with pytest.raises(UserError, match=words):
        run(config, tmp_path)


@pytest.mark.slow
def test_fission_fusion_of_a_transformer(tmp_path):
    config = config_of("fission_fusion")
    config.grid.learning_rates, config.start = (1e-3, 1e-4), "c"
    config.fgg.epochs, config.lp.epochs, config.ft.epochs = 5, 1, 1
    results = run(config, tmp_path)
    assert {"soups/uniform", "soups/greedy", "soups/GoU", "soups/GoG"} <= set(results["jobs"])
