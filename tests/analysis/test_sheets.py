"""Contact sheets and figures over layers: what is drawn, with names of every kind."""

import io

import numpy as np
import PIL.Image
import pytest

from medmerge_jax.analysis import layer_figures, sheets
from medmerge_jax.analysis.coefficients import Target, Trajectory, depth
from medmerge_jax.analysis.csv_files import write_csv
from medmerge_jax.analysis.features import strongest_channels
from medmerge_jax.analysis.rank import rank_correlation
from medmerge_jax.analysis.sheets import Cell, contact_sheet

LAYERS = ["conv1/kernel", "layer1/0/conv1/kernel", "layer1/0/conv2/kernel", "layer2/0/conv1/kernel"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    written = []
    for module in (sheets, layer_figures):
        save = module.save_figure
        monkeypatch.setattr(
            module, "save_figure", lambda f, path, save=save: (save(f, path), written.append(f))
        )
    return written


def assert_is_whole(path):
    """A PNG whose border is white, so that nothing is cut off."""
    with PIL.Image.open(io.BytesIO(path.read_bytes())) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 100
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 255).all()


def test_a_sheet_has_all_cells_and_no_name_is_cut_off(tmp_path, drawn, rng):
    picture = rng.integers(0, 256, (20, 30, 3), np.uint8)
    name = "is actinic keratosis, intraepithelial carcinoma\nsaid $x^ <b>"
    heat = np.zeros((4, 5))
    heat[1, 2] = 3.0
    rows = [[Cell(picture, name), Cell(picture, "", heat)],
            [Cell(np.arange(6.0).reshape(2, 3), "map", None, -1.0, 9.0)]]  # fmt: skip
    contact_sheet(rows, tmp_path / "sheet.png", ["a_{model", "b"])
    assert_is_whole(tmp_path / "sheet.png")
    first, second, third, empty = drawn[0].axes
    assert first.get_title().replace("\n", " ") == name.replace("\n", " ")
    assert max(map(len, first.get_title().split("\n"))) <= 17
    assert (first.get_ylabel(), third.get_ylabel()) == ("a_{model", "b")
    shown, laid = second.get_images()
    np.testing.assert_array_equal(shown.get_array(), picture)
    rows, columns = np.unravel_index(np.argmax(laid.get_array()), laid.get_array().shape)
    assert 5 <= rows <= 9 and 12 <= columns <= 17  # of 20 and 30, where 1 of 4 and 2 of 5 are
    assert float(np.max(laid.get_alpha())) <= 0.75 and float(np.min(laid.get_alpha())) == 0
    (only,) = third.get_images()
    assert only.get_clim() == (-1.0, 9.0)
    np.testing.assert_array_equal(only.get_array(), np.arange(6.0).reshape(2, 3))
    assert not empty.axison and not empty.get_images()


def test_channels_that_vary_most(rng):
    maps = [rng.normal(size=(2, 4, 4, 5)) * np.array([1, 9, 0, 4, 2]) for _ in range(2)]
    maps[1][..., 4] *= 20
    assert strongest_channels(maps, 3) == [4, 1, 3]
    assert strongest_channels([np.zeros((1, 2, 2, 3))], 2) == [0, 1]


def target(label, rng, parents=("b", "c")):
    shape = (6,) if len(parents) == 2 else (len(parents) - 1, 6)
    runs = [{path: rng.normal(0.5, 0.1, shape) for path in LAYERS} for _ in range(2)]
    return Target(label, parents, tuple(runs))


def test_depth_has_a_map_of_means_and_one_of_spreads(tmp_path, drawn, rng):
    found = depth([target("isic $2019", rng), target("aptos", rng)])
    layer_figures.depth_figure(found, tmp_path / "depth.png")
    assert_is_whole(tmp_path / "depth.png")
    above, below, bar, _ = drawn[0].axes
    np.testing.assert_array_equal(above.get_images()[0].get_array(), found.mean)
    np.testing.assert_array_equal(below.get_images()[0].get_array(), found.inside)
    assert [label.get_text() for label in above.get_yticklabels()] == ["isic $2019", "aptos"]
    assert [label.get_text() for label in below.get_xticklabels()] == ["conv1", "layer1", "layer2"]
    low, high = above.get_images()[0].get_clim()
    assert (low + high) / 2 == pytest.approx(0.5)
    assert bar.get_ylabel() == "mean weight\nof b"


def test_a_trajectory_has_a_line_for_each_layer(tmp_path, drawn, rng):
    values = rng.normal(0.5, 0.1, (4, 3, len(LAYERS), 2)) ** 2
    one = Trajectory("run $x", ("b", "c"), np.arange(1, 4), LAYERS, values)
    layer_figures.trajectory_figure([one, one], tmp_path / "t.png")
    assert_is_whole(tmp_path / "t.png")
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels[:3]] == ["conv1", "layer1", "layer2"]
    assert len(panels) == 6
    lines = [line.get_ydata() for line in panels[1].lines if line.get_marker() == "."]
    np.testing.assert_array_equal(lines, values[0, :, 1:3, 0].T)
    band = panels[1].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx((values[0] + values[1])[:, 1, 0].max())
    assert panels[0].get_ylabel() == "run $x\nweight of b"


def test_correlations_by_depth(tmp_path, drawn, rng):
    values, scores = rng.normal(size=(5, 4)), np.arange(5.0)
    values[:, 2] = scores
    found = rank_correlation(LAYERS, values, scores)
    labels = ("mean weight of b", "b minus c")
    path = tmp_path / "rank.png"
    layer_figures.rank_figure(found, values.mean(axis=1), scores, ["a$"] * 5, labels, path)
    assert_is_whole(path)
    left, right = drawn[0].axes
    np.testing.assert_allclose([bar.get_height() for bar in left.patches], found.rho)
    assert left.get_ylabel() == "rank correlation, n = 5"
    assert [text.get_text() for text in right.texts] == ["a$"] * 5


def test_similarities_of_each_two_models(tmp_path, drawn, rng):
    matrix = rng.uniform(size=(7, 7))
    matrix[0] = np.nan
    layers = [["bn1", "layer1/0", "layer2/0"], ["conv0", "block1/1", "block1/2", "block2/1"]]
    layer_figures.cka_figure(matrix, ["a $b", "c"], layers, tmp_path / "cka.png")
    assert_is_whole(tmp_path / "cka.png")
    panels = drawn[0].axes
    assert not panels[1].axison
    np.testing.assert_array_equal(panels[2].get_images()[0].get_array(), matrix[3:, :3])
    assert (panels[2].get_ylabel(), panels[2].get_xlabel()) == ("c", "a $b")
    assert [label.get_text() for label in panels[2].get_yticklabels()] == [
        "conv0", "block1", "block2",
    ]  # fmt: skip


def test_a_csv_file_computes_nothing(tmp_path):
    write_csv(tmp_path / "x.csv", ["=a", "b"], [["@f", 1], ["x,y", float("nan")], ["-1", 0.1]])
    assert (tmp_path / "x.csv").read_text() == "'=a,b\n'@f,1\n\"x,y\",\n-1,0.1\n"
