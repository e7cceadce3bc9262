"""Segments and planes: where the models are, what is measured there, and that it goes on."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmerge_jax.analysis import figures, surface_figures
from medmerge_jax.analysis.surface_figures import plane_figure, segment_figure
from medmerge_jax.analysis.surfaces import Plane, Segment, combine, measurement, plane, segment
from medmerge_jax.data import ResidentBatches
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predict import evaluate
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import Preprocessing
from medmerge_jax.models.layers import Conv, dense_head, global_average
from medmerge_jax.models.network import Network
from medmerge_jax.models.norm import BatchNorm, batch_statistics, resolve

CLASSES, SIZE = 3, 8


def random_model(seed):
    """A model of no network: parameters and statistics of float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "params": {"conv": {"kernel": normal(3, 3, 2, 4)}, "head": {"bias": normal(5)}},
        "batch_stats": {"bn": {"mean": normal(4), "var": np.exp(normal(4))}},
    }


def joined(model):
    leaves = jax.tree.leaves(model["params"])
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])


def nothing(variables):
    return {"test_loss": 0.0}


def bits(model):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(model).items()}


def test_the_models_are_points_to_the_bit():
    models, seen = [random_model(seed) for seed in range(3)], []

    def see(variables):
        seen.append(bits(variables))
        return {"test_loss": 0.0}

    segment(models[:2], see, points=3)
    assert [seen[0], seen[2]] == [bits(model) for model in models[:2]]
    seen.clear()
    plane(models, see, points=2)
    assert seen[:3] == [bits(model) for model in models]
    assert len(seen) == 3 + 2 * 2


def test_a_plane_has_the_distances_of_the_parameters():
    """Also at a point of the grid, that to any model: so axes and units are what they should be."""
    models = [random_model(seed) for seed in range(3)]
    vectors = [joined(model) for model in models]

    def distances(variables):
        here = joined(variables)
        return {f"test_{i}": np.linalg.norm(here - there) for i, there in enumerate(vectors)}

    found = plane(models, distances, points=4, margin=0.5)
    np.testing.assert_array_equal(found.corners[0], 0)
    assert found.corners[1, 1] == 0 < found.corners[1, 0]
    assert found.corners[2, 1] > 0
    for i, corner in enumerate(found.corners):
        wanted = np.hypot(found.x - corner[0], found.y[:, None] - corner[1])
        np.testing.assert_allclose(found.values[f"test_{i}"], wanted, rtol=1e-5)
        of_models = np.linalg.norm(found.corners - corner, axis=1)
        np.testing.assert_allclose(found.at_models[f"test_{i}"], of_models, rtol=1e-6, atol=1e-9)
    room = 0.5 * np.ptp(found.corners, axis=0).max()
    ends = [found.corners.min(axis=0) - room, found.corners.max(axis=0) + room]
    np.testing.assert_allclose(np.stack([found.x, found.y], 1)[[0, -1]], ends)


def test_running_statistics_go_along_and_stay_variances():
    models = [random_model(seed) for seed in range(2)]
    half, beyond = combine(models, (0.5, 0.5)), combine(models, (40.0, -39.0))
    b, c = (model["batch_stats"]["bn"] for model in models)
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            half["batch_stats"]["bn"][name], (b[name] + c[name]) / 2, rtol=1e-6
        )
    wanted = np.maximum(40 * b["var"] - 39 * c["var"], np.minimum(b["var"], c["var"]))
    assert (40 * b["var"] < 39 * c["var"]).any()
    np.testing.assert_allclose(beyond["batch_stats"]["bn"]["var"], wanted, rtol=1e-4)


def two_layers(u, v):
    return {"params": {"u": np.array([u], np.float64), "v": np.array([v], np.float64)}}


def squared_error(variables):
    """Of a network y = v u x taught y = x, over inputs of variance 1."""
    u, v = (float(leaf[0]) for leaf in variables["params"].values())
    return {"test_loss": (u * v - 1) ** 2, "train_loss": (u - 1) ** 2}


def test_a_barrier_that_is_known():
    """Both networks are perfect, with signs apart: between them is (1 − (1 − 2t)²)², 1 midway."""
    models = [two_layers(1.0, 1.0), two_layers(-1.0, -1.0)]
    found = segment(models, squared_error, points=9)
    t = found.shares
    np.testing.assert_allclose(found.values["test_loss"], (1 - (1 - 2 * t) ** 2) ** 2, atol=1e-6)
    assert found.barrier("test_loss") == (pytest.approx(1.0), 0.5)
    assert found.distance == pytest.approx(np.sqrt(8))
    # A convex loss, from 0 to 4, has none.
    np.testing.assert_allclose(found.values["train_loss"], (2 * t) ** 2, atol=1e-6)
    assert found.barrier("train_loss") == (0.0, 0.0)


def test_a_barrier_is_above_the_line_between_the_ends():
    found = Segment(np.linspace(0, 1, 5), 1.0, {"test_loss": np.array([1.0, 2, 3, 3, 3])})
    assert found.barrier("test_loss") == (1.0, 0.5)
    undefined = Segment(np.linspace(0, 1, 3), 1.0, {"test_loss": np.array([1.0, np.nan, 3])})
    assert undefined.barrier("test_loss") is None


def test_what_was_interrupted_goes_on_with_the_same_numbers(tmp_path):
    models, calls = [random_model(seed) for seed in range(3)], []

    def third_root(variables):
        """A number that no decimal fraction is, and one that is undefined sometimes."""
        calls.append(float(np.abs(joined(variables)).sum() ** (1 / 3)))
        return {"test_loss": calls[-1], "test_auc": None if len(calls) == 2 else np.inf}

    def killed(variables):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return third_root(variables)

    whole = plane(models, third_root, points=3)
    wanted, file = calls.copy(), tmp_path / "new" / "points.json"
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        plane(models, killed, points=3, file=file)
    found = plane(models, third_root, points=3, file=file)
    assert calls == wanted
    again = plane(models, third_root, points=3, file=file)
    assert calls == wanted  # nothing was left to measure
    for one in (found, again):
        np.testing.assert_array_equal(one.values["test_loss"], whole.values["test_loss"])
        np.testing.assert_array_equal(one.at_models["test_loss"], whole.at_models["test_loss"])
        assert np.isnan(one.values["test_auc"]).all()


def test_points_of_something_else_are_refused(tmp_path):
    models, file = [random_model(seed) for seed in range(2)], tmp_path / "points.json"
    segment(models, nothing, points=3, file=file, key="a")
    for changes in ({"points": 4, "key": "a"}, {"points": 3, "key": "b"}):
        with pytest.raises(UserError, match=r"points\.json: holds points of other models"):
            segment(models, nothing, file=file, **changes)
    for content in ("{", json.dumps([1]), json.dumps({"key": "a"})):
        file.write_text(content)
        with pytest.raises(UserError, match=r"points\.json: holds no measured points .*remove it"):
            segment(models, nothing, points=3, file=file, key="a")


def test_models_between_which_there_is_nothing():
    a, b, c = (random_model(seed) for seed in range(3))
    with pytest.raises(ValueError, match="3 models; 2 are wanted"):
        segment([a, b, c], nothing)
    with pytest.raises(ValueError, match="2 models; 3 are wanted"):
        plane([a, b], nothing)
    with pytest.raises(ValueError, match="model 1 and model 2 have the same parameters"):
        segment([a, {**a, "batch_stats": b["batch_stats"]}], nothing)
    with pytest.raises(ValueError, match="lie on one line"):
        plane([a, b, combine([a, b], (0.5, 0.5))], nothing)
    with pytest.raises(ValueError, match="1 points; 2 or more"):
        segment([a, b], nothing, points=1)
    other = {**b, "params": {**b["params"], "head": {"bias": np.zeros(6, np.float32)}}}
    with pytest.raises(ValueError, match=r"head/bias: shape \(5,\) in model 1, shape \(6,\)"):
        segment([a, other], nothing)


# Networks on images


class Small(nn.Module):
    """What there must be: a batch norm and a head."""

    @nn.compact
    def __call__(self, x, train=False, use_running_average=None):
        """Maps (n, h, w, 3) to logits."""
        x = BatchNorm(name="bn")(Conv(4, 3, name="conv")(x), resolve(train, use_running_average))
        return dense_head(4, CLASSES)(global_average(nn.relu(x)))


@pytest.fixture(scope="module")
def network():
    return Network(Small(), Preprocessing(SIZE, mean=(0.5,) * 3, std=(0.25,) * 3))


@pytest.fixture(scope="module")
def networks(network):
    init = jax.jit(network.model.init)
    return [init(jax.random.key(seed), jnp.zeros((1, SIZE, SIZE, 3))) for seed in range(2)]


@pytest.fixture
def splits(rng):
    def split(count):
        images = rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
        return ResidentBatches(images, rng.integers(0, CLASSES, count).astype(np.int32), 4)

    return {"train": split(11), "test": split(8)}


def test_the_ends_have_the_models_numbers_also_recalibrated(network, networks, splits):
    """Every training image counts once in what is recalibrated, those that fill a batch do not."""
    options = {"multilabel": False, "metric": "accuracy"}
    measure = measurement(network, splits, recalibrate_on=splits["train"], **options)
    found = segment(networks, measure, points=2)
    images = np.concatenate([np.asarray(batch["inputs"])[:valid]
                             for batch, valid in splits["train"].ordered()])  # fmt: skip
    parts = [images[:4], images[4:8], images[8:]]
    for end, variables in ((0, networks[0]), (-1, networks[1])):
        statistics = [
            batch_statistics(network.model, variables, network.normalise(jnp.asarray(part)))
            for part in parts
        ]
        mean = jax.tree.map(lambda a, b, c: (4 * a + 4 * b + 3 * c) / 11, *statistics)
        for prefix, model in (
            ("", variables),
            ("recalibrated_", {**variables, "batch_stats": mean}),
        ):
            for split, batches in splits.items():
                wanted = evaluate(network, model, batches, multilabel=False)
                for name in ("loss", "accuracy"):
                    value = found.values[f"{prefix}{split}_{name}"][end]
                    assert value == pytest.approx(wanted[name], rel=1e-6 if not prefix else 1e-4)
    assert len(found.values) == 2 * 2 * 2


def test_logits_beyond_all_numbers_are_undefined(network, networks, splits):
    measure = measurement(network, {"test": splits["test"]}, multilabel=False)
    huge = jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), networks[0])
    assert measure(huge) == {"test_loss": None, "test_macro_f1": None}


# Figures


@pytest.fixture
def drawn(monkeypatch):
    written, save = [], figures.save_figure

    def keep(figure, path):
        save(figure, path)
        written.append(figure)

    monkeypatch.setattr(surface_figures, "save_figure", keep)
    return written


def test_a_segment_has_a_panel_for_losses_and_one_for_the_metric(tmp_path, drawn):
    names = ("train_loss", "test_loss", "test_macro_f1", "recalibrated_test_loss")
    shares = np.linspace(0, 1, 5)
    values = {name: i + shares for i, name in enumerate(names)}
    segment_figure(Segment(shares, 2.5, values), ("a$b", "c_d"), tmp_path / "s.png")
    (figure,) = drawn
    losses, metric = figure.axes
    assert losses.get_legend_handles_labels()[1] == ["train", "test", "test, recalibrated"]
    assert losses.get_ylabel() == "loss" and metric.get_ylabel() == "macro f1"
    (line,) = [one for one in metric.lines if len(one.get_xdata()) == 5]
    np.testing.assert_array_equal(line.get_ydata(), values["test_macro_f1"])
    for axes in figure.axes:
        texts = [label.get_text() for label in axes.get_xticklabels()]
        assert [texts[0], texts[-1]] == ["a$b", "c_d"]


def test_a_plane_marks_the_models_with_their_values(tmp_path, drawn):
    corners = np.array([[0.0, 0], [4, 0], [1, 2]])
    x, y = np.linspace(-1, 5, 7), np.linspace(-1, 3, 5)
    loss = np.hypot(x, y[:, None])
    loss[0, 0] = np.nan
    undefined = np.full_like(loss, np.nan)
    found = Plane(
        x, y, corners, {"test_loss": loss, "recalibrated_test_loss": undefined},
        {"test_loss": np.array([0.0, 4, 2.24]), "recalibrated_test_loss": np.full(3, np.nan)},
    )  # fmt: skip
    plane_figure(found, ("a", "b", "$c"), tmp_path / "p.png")
    (figure,) = drawn
    first, second, *_ = figure.axes
    assert first.get_title() == "test loss"
    assert second.get_title() == "test loss, recalibrated"
    for axes, values in ((first, ("0", "4", "2.24")), (second, ("nan",) * 3)):
        assert [text.get_text() for text in axes.texts] == [
            f"{name} {value}" for name, value in zip(("a", "b", "$c"), values, strict=True)
        ]
        np.testing.assert_allclose([line.get_xydata()[0] for line in axes.lines], corners)
