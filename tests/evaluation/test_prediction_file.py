"""Predictions of many images in a CSV file, and the command that writes it."""

import csv
import itertools

import numpy as np
import pytest
from helpers import tiny_network
from helpers.random_models import variables_of
from PIL import Image

import medmerge_jax as mm
from medmerge_jax.commands import entry, predict
from medmerge_jax.data.listing import list_images
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation import images as evaluation_images
from medmerge_jax.evaluation.prediction_file import write_predictions
from medmerge_jax.models.preprocessing import Preprocessing

CLASSES = ("healthy", "=1+1", "cat, dog")


@pytest.fixture
def model():
    return make_model(0)


def make_model(seed, classes=CLASSES, size=16, **facts):
    tiny_network.register_architecture()
    variables = variables_of(seed, num_classes=3, architecture=tiny_network.ARCHITECTURE)
    look = Preprocessing(size)
    return mm.Model(tiny_network.ARCHITECTURE, variables, look, classes, **facts)


@pytest.fixture
def folder(tmp_path):
    """Images of two folders, one of which is broken, and a file that is no image."""
    rng = np.random.default_rng(0)
    for index in range(70):
        path = tmp_path / "scans" / ("a", "b")[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    (tmp_path / "scans" / "a" / "broken.png").write_bytes(b"no image")
    (tmp_path / "scans" / "notes.doc").write_bytes(b"x")
    return tmp_path / "scans"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def probabilities_of(row):
    return [float(value) for name, value in row.items() if name.startswith("probability_")]


def test_a_line_for_each_image_as_predict_has_it(model, folder, tmp_path):
    images = list_images([folder])
    assert len(images.notes) == 1
    written = write_predictions({"m": model}, images, tmp_path / "new" / "p.csv", batch_size=8)
    rows = rows_of(tmp_path / "new" / "p.csv")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))
    assert [row["image"] for row in rows] == names
    assert list(rows[0]) == [
        *("image", "predicted"), *(f"probability_{name}" for name in CLASSES), "problem",
    ]  # fmt: skip
    broken, *others = sorted(rows, key=lambda row: row["problem"] == "")
    assert broken["image"] == "a/broken.png"
    assert broken["problem"].startswith("is not an image")
    assert {broken["predicted"], broken["probability_healthy"]} == {""}
    wanted = mm.predict(model, [folder / row["image"] for row in others])
    np.testing.assert_allclose([probabilities_of(row) for row in others], wanted, atol=1e-6)
    predicted = [CLASSES[index].replace("=1", "'=1") for index in wanted.argmax(axis=1)]
    assert [row["predicted"] for row in others] == predicted
    assert (written.images, written.problems, written.resumed) == (71, 1, 0)
    assert sum(written.predicted.values()) == 70
    assert [path.name for path in (tmp_path / "new").iterdir() if "part" in path.name] == []


@pytest.mark.parametrize("torn", [b"", b"[0.1, 0.2"])
def test_it_goes_on_after_a_stop_with_what_is_whole(model, folder, tmp_path, monkeypatch, torn):
    images, out = list_images([folder]), tmp_path / "p.csv"
    write_predictions({"m": model}, images, tmp_path / "whole.csv", batch_size=8)
    decode, stopped = evaluation_images.prepared_pixels, itertools.count()

    def stop(image, row, look):
        if next(stopped) > 40:
            raise KeyboardInterrupt
        return decode(image, row, look)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation_images, "prepared_pixels", stop)
        write_predictions({"m": model}, images, out, batch_size=8)
    assert not out.exists()
    with (tmp_path / ".p.csv.part").open("ab") as file:
        file.write(torn)
    decoded = []
    monkeypatch.setattr(
        evaluation_images,
        "prepared_pixels",
        lambda image, row, look: decoded.append(row) or decode(image, row, look),
    )
    written = write_predictions({"m": model}, images, out, batch_size=8)
    assert 8 <= written.resumed < 41
    assert sorted(decoded) == list(range(written.resumed, 71))
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_was_begun_with_another_model_or_other_images_is_begun_anew(
    model, folder, tmp_path, monkeypatch
):
    images, out = list_images([folder]), tmp_path / "p.csv"

    def refuse(*_):
        raise OSError(28, "No space left on device")

    for other in ({"n": make_model(1)}, images):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr("medmerge_jax.evaluation.prediction_file.write_atomically", refuse)
            write_predictions({"m": model}, images, out)
        if isinstance(other, dict):
            assert write_predictions(other, images, out).resumed == 0
        else:
            assert write_predictions({"m": model}, list_images([folder / "a"]), out).resumed == 0
            assert len(rows_of(out)) == 36


def test_the_mean_of_models_that_see_images_and_order_classes_otherwise(model, folder, tmp_path):
    other = make_model(1, CLASSES[::-1], size=24)
    paths = sorted((folder / "b").glob("*.png"))
    first, second = mm.predict(model, paths), mm.predict(other, paths)
    np.testing.assert_allclose(
        mm.predict([model, other], paths), (first + second[:, ::-1]) / 2, atol=1e-6
    )
    write_predictions({"m": model, "n": other}, list_images(paths), tmp_path / "p.csv")
    rows = rows_of(tmp_path / "p.csv")
    assert [row["image"] for row in rows] == [path.name for path in paths]
    found = [probabilities_of(row) for row in rows]
    np.testing.assert_allclose(found, (first + second[:, ::-1]) / 2, atol=1e-6)
    with pytest.raises(UserError, match=r"one of healthy.* and n one of a, b, c; models that are"):
        write_predictions({"m": model, "n": make_model(1, ("a", "b", "c"))}, list_images(paths),
                          tmp_path / "q.csv")  # fmt: skip


def test_of_several_labels_those_above_a_half_are_predicted(folder, tmp_path):
    model = make_model(0, multilabel=True)
    write_predictions({"m": model}, list_images([folder / "b"]), tmp_path / "p.csv")
    rows = rows_of(tmp_path / "p.csv")
    for row in rows:
        above = [c for c, p in zip(CLASSES, probabilities_of(row), strict=True) if p > 0.5]
        assert row["predicted"].removeprefix("'") == "|".join(above)
    assert len({row["predicted"] for row in rows}) > 1


def test_memory_does_not_grow_with_the_number_of_images(model, folder, tmp_path):
    """Of 700 images no more are decoded than are soon needed."""
    paths = sorted(folder.glob("*/[0-9]*.png")) * 10
    alive, most = [], []

    class Lazily(list):
        def __getitem__(self, row):
            alive.append(row)
            return super().__getitem__(row)

    stream = evaluation_images.stream([model], Lazily(paths), batch_size=8)
    for chunk in stream:
        most.append(max(alive) - chunk.rows.start)
    assert chunk.rows.stop == 700
    assert max(most) < 8 * (evaluation_images.usable_cores() + 4)


class TestListing:
    def test_ids_are_below_the_folder_that_holds_all(self, folder):
        files = list_images([folder / "a" / "00.png", folder / "b"])
        assert files.ids[:2] == ["a/00.png", "b/01.png"]
        assert list_images([folder / "b" / "01.png"]).ids == ["01.png"]

    def test_a_table_names_images_and_missing_ones_have_no_file(self, folder, tmp_path):
        table = folder / "wanted.csv"
        table.write_text("who;image\nann;a/00\nbob;zz.png\nann;01.PNG\nann;a/00\n")
        images = list_images([table])
        assert images.ids == ["a/00", "zz.png", "01.PNG", "a/00"]
        names = [path and path.name for path in images.paths]
        assert names == ["00.png", None, "01.png", "00.png"]
        assert any("separated by" in note for note in images.notes)
        elsewhere = tmp_path / "x.csv"
        elsewhere.write_text("who,scan\nann,a/00\n")
        with pytest.raises(UserError, match="none is usual; --image-column NAME"):
            list_images([elsewhere], folder)
        assert list_images([elsewhere], folder, "scan").paths == [folder / "a" / "00.png"]

    def test_what_cannot_be_meant_is_refused(self, folder, tmp_path):
        (folder / "t.csv").write_text("image\n00.png\n")
        (tmp_path / "empty").mkdir()
        for message, *arguments in (
            (r"gone: there is no such file", [tmp_path / "gone"]),
            (r"t\.csv: a table is to be given alone", [folder / "t.csv", folder / "a"]),
            (r"empty: there is no image in it", [tmp_path / "empty"]),
            (r"a root and an image column are a table's", [folder], folder),
            (r"1 of 1 rows have no image", [folder / "t.csv"], folder / "b"),
        ):
            with pytest.raises(UserError, match=message):
                list_images(*arguments)


def test_the_command(model, folder, tmp_path, capsys):
    mm.save_model(tmp_path / "model", model)
    out = tmp_path / "p.csv"
    predict.main([str(tmp_path / "model"), str(folder), "--out", str(out)])
    printed = capsys.readouterr()
    assert f"wrote {out}: 71 images; predicted " in printed.out
    assert "warning: 1 images cannot be used" in printed.err
    assert "1 file is left out" in printed.err
    assert len(rows_of(out)) == 71
    assert "predict" in entry.COMMANDS
    with pytest.raises(SystemExit):
        predict.main([str(tmp_path / "model"), str(folder), "--out", str(out), "--batch-size=0"])
