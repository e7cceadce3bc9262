"""The command surface on models of files and drawn images."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from helpers import random_models, tiny_config
from helpers.tiny_config import ARCHITECTURE

import medmerge_jax as mm
from medmerge_jax import merging, weights
from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten, unflatten
from medmerge_jax.recipes.inputs import load_data
from medmerge_jax.recipes.surfaces import Settings, surface
from medmerge_jax.studies.checks import check_config

ENDS = Settings(points=2)
variables_of = functools.partial(random_models.variables_of, architecture=ARCHITECTURE)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    return check_config(tiny_config.get_config())


@pytest.fixture
def save(tmp_path, config):
    """Saves a model of the data's classes with its card, and returns its folder."""
    classes = load_data(config, tmp_path / "drawn").classes

    def call(name, variables, **fields):
        count = flatten(variables)["params/head/bias"].shape[0]
        card = {"classes": classes if count == len(classes) else (), "image_size": 16, **fields}
        model = weights.model_from_card(ARCHITECTURE, variables, card)
        weights.save_model(tmp_path / name, model)
        return str(tmp_path / name)

    return call


@pytest.fixture
def models(save):
    return [save(f"m{seed}", variables_of(seed)) for seed in range(2)]


def test_the_ends_predict_what_the_models_do(models, config, tmp_path):
    results = surface(models, config, tmp_path / "out", ENDS)
    split = load_data(config, tmp_path / "drawn").splits["test"]
    for end, name in ((0, models[0]), (-1, models[1])):
        model = mm.load_model(name)
        probabilities = mm.predict(model, split.paths).astype(np.float64)
        loss = -np.log(probabilities[np.arange(len(split)), split.labels]).mean()
        assert results["values"]["test_loss"][end] == pytest.approx(loss, rel=1e-4)
    assert json.loads((tmp_path / "out" / "surface.json").read_text()) == results
    assert [one["model"] for one in results["models"]] == ["m0", "m1"]
    assert results["data"]["images"] == {"train": 16, "test": 12}
    assert str(tmp_path) not in (tmp_path / "out" / "surface.json").read_text()
    assert (tmp_path / "out" / "surface.png").stat().st_size > 1000
    # The same from anywhere: the file of points is found to be of the same models.
    (tmp_path / "m1").rename(tmp_path / "moved")
    again = surface([models[0], str(tmp_path / "moved")], config, tmp_path / "out", ENDS)
    assert again["values"] == results["values"]
    with pytest.raises(UserError, match="of other models, images or settings"):
        surface([str(tmp_path / "moved"), models[0]], config, tmp_path / "out", ENDS)


@pytest.mark.slow
@pytest.mark.parametrize("align", ["weight_matching", "activation_matching"])
def test_aligned_models_are_near_and_compute_the_same(models, save, config, tmp_path, align):
    """The first is the second with other units in each place, and some noise."""
    second = mm.load_model(models[1]).variables
    rng = np.random.default_rng(0)
    flat = {
        p: x + rng.normal(0, 1e-3, x.shape).astype(np.float32) for p, x in flatten(second).items()
    }
    noise = np.sqrt(sum(np.sum((flat[p] - x) ** 2) for p, x in flatten(second).items()
                        if p.startswith("params/")))  # fmt: skip
    order = merging.random_permutations(merging.find_spaces(second), 3)
    first = save("first", merging.permute_variables(unflatten(flat), order))
    plain = surface([first, models[1]], config, tmp_path / "plain", ENDS)
    settings = dataclasses.replace(ENDS, align=align, recalibrate=True, num_images=5)
    aligned = surface([first, models[1]], config, tmp_path / "aligned", settings)
    assert plain["distance"] > 10 * noise
    if align == "weight_matching":
        assert aligned["distance"] == pytest.approx(noise, rel=1e-3)
    else:  # random networks have units that are dead on drawn images, which nothing matches
        assert aligned["distance"] < 0.9 * plain["distance"]
    assert aligned["data"]["images"] == {"train": 5, "test": 5}
    whole = dataclasses.replace(settings, num_images=0)
    aligned = surface([first, models[1]], config, tmp_path / "whole", whole)
    for name, values in plain["values"].items():
        np.testing.assert_allclose(aligned["values"][name], values, rtol=1e-4, err_msg=name)
    assert f"recalibrated_{name}" in aligned["values"]


@pytest.mark.slow
def test_a_plane_through_two_and_their_merged_model(models, save, config, tmp_path):
    parents = [mm.load_model(name).variables for name in models]
    flats = [flatten(one) for one in parents]
    third = {p: 0.3 * x + 0.6 * flats[1][p] + 0.1 * abs(x) for p, x in flats[0].items()}
    merged = save("merged", unflatten(third))
    settings = Settings(points=3, num_images=4)
    results = surface([*models, merged], config, tmp_path / "out", settings)
    ends = surface([merged, models[0]], config, tmp_path / "ends",
                   dataclasses.replace(settings, points=2))  # fmt: skip
    for name, (first, _, last) in results["at_models"].items():
        assert np.shape(results["values"][name]) == (3, 3)
        assert [last, first] == pytest.approx(ends["values"][name], rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "classes", "words"),
    [
        ({"classes": ["a", "b", "c", "d"]}, 4, r"m2: classes \('a', 'b', .* has \("),
        ({}, 7, "m2: classes 7, but .*m0 has 4; between whole models both must be the same"),
        ({"image_size": 24}, 4, r"m2: preprocessing .*size=24.* has .*size=16"),
        ({"multilabel": True}, 4, "m2: multilabel True, but .*m0 has False"),
    ],
)
def test_models_of_other_kinds_are_refused_by_name(
    models, save, config, tmp_path, fields, classes, words
):
    other = save("m2", variables_of(2, num_classes=classes), **fields)
    with pytest.raises(UserError, match=words):
        surface([models[0], other], config, tmp_path / "out", ENDS)


def test_what_cannot_be_measured_is_refused_first(models, save, config, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 models; two, for a segment, or three"):
        surface(models[:1], config, out, ENDS)
    with pytest.raises(UserError, match=r"points 1, margin 0\.25: 2 points or more"):
        surface(models, config, out, Settings(points=1))
    with pytest.raises(UserError, match="model 1 and model 2 have the same parameters"):
        surface(models[:1] * 2, config, out, ENDS)
    data = dataclasses.replace(config.data, kind="folder", root=str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"data\.root = .*there is no such file"):
        surface(models, dataclasses.replace(config, data=data), out, ENDS)
    others = [save(f"other{seed}", variables_of(seed), classes=list("vwxy")) for seed in range(2)]
    with pytest.raises(UserError, match=r"its classes are \['v', .* those of clinic_2 are \["):
        surface(others, config, out, ENDS)
