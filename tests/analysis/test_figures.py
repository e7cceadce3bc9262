import io

import numpy as np
import PIL.Image
import pytest

from medmerge_jax.analysis import (
    coefficient_heatmap,
    comparison_figure,
    confusion_matrix_figure,
    figures,
    learning_curves,
    save_coefficients,
)

RESNET = [
    "conv1/kernel",
    "layer1/0/conv1/kernel",
    "layer1/0/conv2/kernel",
    "layer1/2/conv1/kernel",
    "layer1/10/conv1/kernel",
    "layer2/0/conv1/kernel",
    "layer2/0/downsample/0/kernel",
]
DENSENET = [
    "features/conv0/kernel",
    "features/denseblock1/denselayer1/conv1/kernel",
    "features/denseblock1/denselayer1/conv2/kernel",
    "features/transition1/conv/kernel",
    "features/denseblock2/denselayer1/conv1/kernel",
]


def coefficients(paths, offset=0.0):
    """Means 0.40, 0.41, ... in network order, handed over in alphabetical order."""
    return {p: np.array([0.3, 0.5]) + 0.01 * paths.index(p) + offset for p in sorted(paths)}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, instead of pixels."""
    written = []
    save = figures.save_figure

    def keep(figure, path, *formats):
        save(figure, path, *formats)
        written.append(figure)

    monkeypatch.setattr(figures, "save_figure", keep)
    return written


def assert_is_png(path):
    with PIL.Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100


def row(recipe, start, *values):
    found = {"mean": np.mean(values), "std": np.std(values, ddof=1) if len(values) > 1 else None}
    return {"recipe": recipe, "start": start, "macro_f1": {**found, "values": list(values)}}


def test_a_comparison_has_a_point_for_each_seed(drawn, tmp_path):
    rows = [row("lp_ft", "b", 0.5, 0.7), row("$x^", "c", 0.4), {"recipe": "ft", "start": "c"}]
    path = tmp_path / "comparison.png"
    assert comparison_figure(rows, "macro_f1", path, "lp_ft from b")
    assert_is_png(path)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lp_ft from b", "$x^ from c"]
    points = {tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"}
    assert points == {(0.5, 0.7), (0.4,)}
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [pytest.approx(0.6)]
    assert axes.get_xlabel() == "macro F1 of the test images"
    rows[1]["macro_f1"] |= {"low": 0.3, "high": 0.45}
    assert comparison_figure(rows, "macro_f1", path)
    ends = [list(line.get_xdata()) for line in drawn[1].axes[0].lines]
    assert [0.3, 0.45] in ends  # of a single run, the interval over its images
    assert not comparison_figure(rows[2:], "macro_f1", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_save_coefficients(tmp_path):
    path = tmp_path / "deep" / "coefficients.npz"
    save_coefficients(path, coefficients(RESNET))
    with np.load(path) as file:
        assert list(file) == RESNET
        assert all(file[name].dtype == np.float32 for name in file)
        np.testing.assert_allclose(file[RESNET[2]], [0.32, 0.52], rtol=1e-6)
    assert [child.name for child in path.parent.iterdir()] == ["coefficients.npz"]


def test_heatmap_has_a_cell_per_convolution_in_network_order(tmp_path, drawn):
    path = tmp_path / "figures" / "coefficients.png"
    rows = {"isic": coefficients(RESNET), "a$b_{": coefficients(RESNET, 0.2)}
    coefficient_heatmap(rows, path, parent_names=("ham10k", "imagenet"))
    assert_is_png(path)
    axes, bar = drawn[0].axes
    (image,) = axes.get_images()
    means = 0.40 + 0.01 * np.arange(7)
    np.testing.assert_allclose(image.get_array(), [means, means + 0.2])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["isic", "a$b_{"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["conv1", "layer1", "layer2"]
    assert axes.get_xticks().tolist() == [0, 2.5, 5.5]
    assert bar.get_ylabel() == "mean weight of ham10k"
    low, high = image.get_clim()
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high == pytest.approx(0.66)


def test_heatmap_of_a_densenet_and_of_rows_that_differ(tmp_path, drawn):
    rows = {"a": coefficients(DENSENET), "b": coefficients(DENSENET[:3])}
    coefficient_heatmap(rows, tmp_path / "c.png")
    (image,) = drawn[0].axes[0].get_images()
    assert np.isnan(image.get_array().filled(np.nan)).sum() == 2
    names = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert names == ["conv0", "denseblock1", "transition1", "denseblock2"]
    labels, paths, means = figures.heatmap(rows)
    assert (labels, paths) == (["a", "b"], DENSENET)
    assert np.isnan(means[1, 3:]).all()


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (3, 3, 3, 4)])
def test_heatmap_takes_any_granularity(shape):
    values = 0.5 + 0.1 * np.random.default_rng(0).normal(size=shape)
    _, _, means = figures.heatmap({"a": {"conv1/kernel": values}})
    np.testing.assert_allclose(means, [[values.mean()]])


def test_heatmap_of_three_parents_has_a_row_for_each(tmp_path, drawn):
    rows = {"isic": {"conv1/kernel": np.array([[0.2, 0.4], [0.5, 0.5]])}}
    labels, _, means = figures.heatmap(rows, 3, ["x", "y", "z"])
    assert labels == ["isic: x", "isic: y", "isic: z"]
    np.testing.assert_allclose(means, [[0.3], [0.5], [0.2]])
    coefficient_heatmap(rows, tmp_path / "c.png", num_parents=3)
    low, high = drawn[0].axes[0].get_images()[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"conv1/kernel: shape \(2, 2\), but 4 parents"):
        figures.heatmap(rows, 4)


def test_heatmap_without_coefficients(tmp_path):
    with pytest.raises(ValueError, match="no coefficients"):
        coefficient_heatmap({}, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_heatmap_of_untrained_coefficients(tmp_path):
    coefficient_heatmap({"a": {"conv1/kernel": np.full(4, 0.5)}}, tmp_path / "c.png")
    assert_is_png(tmp_path / "c.png")


def records():
    """Two stages, three and two epochs, the second without coefficients."""
    lines = [
        {
            "stage": stage,
            "epoch": epoch,
            "learning_rate": 1e-4,
            "train_loss": 1.0 / epoch,
            "val_loss": 2.0 / epoch,
            "val_accuracy": 0.1 * epoch,
            "val_macro_auc": None if epoch == 1 else 0.5,
            "val_num_examples": 100,
            "seconds": 2.0,
        }
        for stage, epochs in (("merge_lp", 3), ("ft", 2))
        for epoch in range(1, epochs + 1)
    ]
    for line in lines[:3]:
        line.update(coefficient_mean=0.5, coefficient_min=0.4, coefficient_max=0.6)
    return lines


def test_learning_curves_put_stages_one_after_another(tmp_path, drawn):
    learning_curves(records(), tmp_path / "curves.png")
    assert_is_png(tmp_path / "curves.png")
    panels = {axes.get_ylabel(): axes for axes in drawn[0].axes}
    assert list(panels) == ["loss", "validation", "learning rate", "coefficients"]
    lines = [line for line in panels["loss"].get_lines() if line.get_marker() == "."]
    drawn_points = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines]
    assert ([1, 2, 3], [1.0, 0.5, 1 / 3]) in drawn_points
    assert ([4, 5], [2.0, 1.0]) in drawn_points
    boundaries = [line.get_xdata() for line in panels["loss"].get_lines() if line not in lines]
    assert boundaries == [[3.5, 3.5]]
    assert [text.get_text() for text in panels["loss"].texts] == ["merge_lp", "ft"]
    legend = [text.get_text() for text in panels["validation"].get_legend().get_texts()]
    assert legend == ["accuracy", "macro AUC"]


def test_learning_curves_of_one_epoch_and_of_none(tmp_path):
    learning_curves(records()[:1], tmp_path / "one.png")
    assert_is_png(tmp_path / "one.png")
    learning_curves([{"stage": "s", "epoch": 1}], tmp_path / "bare.png")
    assert_is_png(tmp_path / "bare.png")
    learning_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_confusion_matrix_shows_counts_and_shares(tmp_path, drawn):
    matrix = np.array([[3, 1], [0, 0]])
    confusion_matrix_figure(matrix, ["no $x", "yes_"], tmp_path / "matrix.png")
    assert_is_png(tmp_path / "matrix.png")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.get_images()[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "3\n75%"),
        ((1, 0), "1\n25%"),
        ((0, 1), "0\n0%"),
        ((1, 1), "0\n0%"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["no $x", "yes_"]


def test_confusion_matrix_of_many_classes_has_no_numbers(tmp_path, drawn):
    confusion_matrix_figure(np.eye(20, dtype=int), [f"c{i}" for i in range(20)], tmp_path / "m.png")
    assert not drawn[0].axes[0].texts


@pytest.mark.parametrize("classes", [["0", "1", "2"], ["normal, benign tissue of it", "malignant"]])
def test_nothing_of_a_confusion_matrix_is_cut_off(tmp_path, classes):
    matrix = np.arange(len(classes) ** 2).reshape(len(classes), -1)
    confusion_matrix_figure(matrix, classes, tmp_path / "c.png")
    pixels = np.asarray(PIL.Image.open(tmp_path / "c.png").convert("L"))
    edges = [pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]]
    assert all(np.all(edge == 255) for edge in edges)


def test_legends_cover_no_curve(tmp_path, drawn):
    records = [{"stage": "ft", "epoch": e, "val_accuracy": e, "val_loss": -e} for e in range(9)]
    learning_curves(records, tmp_path / "curves.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    legends = [axes.get_legend() for axes in figure.axes]
    assert len(legends) == 2
    for axes, legend in zip(figure.axes, legends, strict=True):
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
