"""A parent's own normalisation of images goes into its stem."""

import dataclasses

import jax
import numpy as np
import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.models import Preprocessing, get_spec
from medmerge_jax.weights import as_published, fold_normalisation

GREY = Preprocessing(32, "squash", (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


@pytest.mark.parametrize("name", ["resnet20", "densenet121"])
def test_the_stem_gives_the_same_inside_of_the_image(name, make_variables, rng):
    variables, spec = make_variables(name), get_spec(name)
    published = spec.preprocessing
    folded = fold_normalisation(name, variables, GREY, published)
    images = rng.random((2, 32, 32, 3))

    def stem(tree, preprocessing):
        module, norm = (one.replace(".", "/").split("/") for one in (spec.stem, spec.stem_norm))
        leaf, mean = tree["params"], tree["batch_stats"]
        for part in module:
            leaf = leaf[part]
        for part in norm:
            mean = mean[part]
        x = (images - preprocessing.mean) / preprocessing.std
        kernel = np.asarray(leaf["kernel"], np.float64)
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x.astype(np.float32), kernel.astype(np.float32), (1, 1), "VALID",
            dimension_numbers=dimensions, precision="highest",
        )  # fmt: skip
        return np.asarray(y) - mean["mean"]

    before, after = stem(variables, GREY), stem(folded, published)
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
    assert np.abs(stem(variables, published) - before).max() > 0.1


def test_what_was_adapted_is_said_and_nothing_else_changes(make_variables, assert_same):
    variables = make_variables("resnet20")
    same, card, note = as_published("resnet20", variables, {"mean": [0.485, 0.456, 0.406]})
    assert_same(same, variables)
    assert card == {"mean": [0.485, 0.456, 0.406]} and not note
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "notes": ["first"]}
    folded, card, note = as_published("resnet20", variables, given)
    assert card["mean"] == [0.485, 0.456, 0.406]
    assert card["notes"][0] == "first"
    assert "its first convolution and batch norm were adapted" in card["notes"][1] == note
    changed = [
        str(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(folded), jax.tree.leaves(variables), strict=True
        )
        if not np.array_equal(a, b)
    ]
    assert len(changed) == 2


def test_an_architecture_without_a_stem_is_refused(make_variables, monkeypatch):
    monkeypatch.setattr(
        "medmerge_jax.weights.normalisation.get_spec",
        lambda name: dataclasses.replace(get_spec(name), stem=""),
    )
    with pytest.raises(UserError, match="does not say what its stem is"):
        fold_normalisation("resnet20", make_variables("resnet20"), GREY, Preprocessing(32))
