import hashlib

import numpy as np
import pytest
from PIL import Image

from medmerge_jax.data import image_folder, synthetic, write_synthetic
from medmerge_jax.errors import UserError
from medmerge_jax.images import read_image

COUNTS = {"train": 70, "val": 9, "test": 8}


def contents(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(np.asarray(Image.open(path))).digest()
        for path in root.rglob("*.png")
    }


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_it_is_an_image_folder(tmp_path, kind):
    write_synthetic(tmp_path / "set", kind, COUNTS, size=16)
    dataset = image_folder(tmp_path / "set")
    dataset.check()
    assert dataset.classes == synthetic.KINDS[kind][0]
    for name, split in dataset.splits.items():
        assert len(split) == COUNTS[name]
        assert min(dataset.counts()[name].values()) >= 1
    with Image.open(dataset.splits["train"].paths[0]) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    assert not [path for path in tmp_path.iterdir() if path.name != "set"]


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_the_arguments_decide_the_pixels(tmp_path, kind):
    first = {"size": 16, "seed": 1, "appearance": 1}
    sets = {}
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 2}, "d": {"appearance": 2}}.items():
        write_synthetic(tmp_path / name, kind, COUNTS, **{**first, **changes})
        sets[name] = contents(tmp_path / name)
    assert sets["a"] == sets["b"]
    assert not set(sets["a"].values()) & set(sets["c"].values())
    assert not set(sets["a"].values()) & set(sets["d"].values())
    assert len(set(sets["a"].values())) == sum(COUNTS.values())  # no image twice


def test_what_is_there_is_left(tmp_path, monkeypatch):
    root = tmp_path / "set"
    write_synthetic(root, "fundus", COUNTS, size=16)
    monkeypatch.setattr(synthetic, "draw", None)  # drawing again would fail
    write_synthetic(root, "fundus", COUNTS, size=16)
    with pytest.raises(
        UserError, match=r"set: holds synthetic images of other settings, .*'size': 16"
    ):
        write_synthetic(root, "fundus", COUNTS, size=17)


def test_other_folders_are_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine: holds something else"):
        write_synthetic(tmp_path / "mine", "fundus", COUNTS, size=16)
    assert not list((tmp_path / "mine").iterdir())


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    calls = []
    real = synthetic.draw

    def draw(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(synthetic, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "set", "fundus", COUNTS, size=16)
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_the_faster_of_two_processes_wins(tmp_path, monkeypatch):
    root = tmp_path / "set"
    real = synthetic._write_split

    def write_split(*args):
        real(*args)
        monkeypatch.setattr(synthetic, "_write_split", real)
        write_synthetic(root, "lesion", COUNTS, size=16)

    monkeypatch.setattr(synthetic, "_write_split", write_split)
    write_synthetic(root, "lesion", COUNTS, size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(contents(root)) == sum(COUNTS.values())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kind": "brain"}, "synthetic kind 'brain': one of fundus, lesion, .* is wanted"),
        ({"appearance": 9}, "synthetic appearance 9: 0 to 3"),
        ({"size": 2}, "synthetic size 2"),
        ({"counts": {"train": 3}}, "at least one image per class, 4"),
        ({"counts": {}}, "at least one image per class"),
    ],
)
def test_bad_arguments(tmp_path, changes, words):
    arguments = {"kind": "fundus", "counts": COUNTS, "size": 16, **changes}
    with pytest.raises(UserError, match=words):
        write_synthetic(tmp_path / "set", **arguments)
    assert not list(tmp_path.iterdir())


def test_proportions():
    labels = synthetic._labels(400, (0.34, 0.24, 0.22, 0.2))
    np.testing.assert_allclose(np.bincount(labels) / 400, (0.34, 0.24, 0.22, 0.2), atol=0.01)
    np.testing.assert_array_equal(synthetic._labels(4, (0.97, 0.01, 0.01, 0.01)), range(4))


@pytest.mark.parametrize("size", [8, 33, 96])
@pytest.mark.parametrize("kind", synthetic.KINDS)
@pytest.mark.parametrize("appearance", range(len(synthetic.APPEARANCES)))
def test_any_size_and_appearance(kind, size, appearance):
    labels = np.arange(len(synthetic.KINDS[kind][0]))
    images = synthetic.draw(kind, labels, size, np.random.default_rng(0), appearance)
    assert images.shape == (len(labels), size, size, 3)
    assert images.dtype == np.uint8
    assert images.std() > 10


def test_grades_differ_in_red_and_yellow(tmp_path):
    """The lesions are there: grade 3 has the most of the bright yellow, grade 0 the least."""
    labels = np.repeat(np.arange(4), 40)
    images = synthetic.draw("fundus", labels, 64, np.random.default_rng(0)).astype(int)
    yellow = np.sum((images[..., 0] > 190) & (images[..., 1] > 170), axis=(1, 2))
    means = [yellow[labels == grade].mean() for grade in range(4)]
    assert means[3] > 1.3 * max(means[:3])
    dark = np.sum((images[..., 0] < 110) & (images[..., 0] > 60), axis=(1, 2))
    means = [dark[labels == grade].mean() for grade in range(4)]
    assert means[0] < means[1] < means[2]


def test_each_finding_is_there_where_its_class_says():
    """Of the two parents' sets one finding is the class, and the other comes and goes."""

    def share(kind, name, colour):
        labels = np.full(60, synthetic.KINDS[kind][0].index(name))
        images = synthetic.draw(kind, labels, 64, np.random.default_rng(0)).astype(int)
        return colour(*np.moveaxis(images, -1, 0)).mean(axis=(1, 2)).mean()

    def dark(red, green, blue):
        return (red > 60) & (red < 115)

    def yellow(red, green, blue):
        return (red > 190) & (green > 150)

    for colour, alone, other in (
        (dark, "retinopathy", "drusen"),
        (yellow, "drusen", "retinopathy"),
    ):
        with_it = [share("retina", name, colour) for name in (alone, "both")]
        without = [share("retina", name, colour) for name in (other, "none")]
        assert min(with_it) > 1.3 * max(without)
        assert share(alone, alone, colour) > 1.3 * share(alone, "none", colour)
        both = [share(other, name, colour) for name in synthetic.KINDS[other][0]]
        assert max(both) < 1.3 * min(both)
        assert max(without) < np.mean(both) < max(with_it)


def test_a_linear_classifier_is_far_from_perfect(tmp_path):
    """The task is not given away by the mean colour."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    for kind in synthetic.KINDS:
        labels = np.tile(np.arange(len(synthetic.KINDS[kind][0])), 400)[:400]
        colours = synthetic.draw(kind, labels, 16, rng).mean(axis=(1, 2)) / 255
        model = LogisticRegression(C=1e3, max_iter=1000).fit(colours[:200], labels[:200])
        assert model.score(colours[200:], labels[200:]) < 0.7


def test_the_file_is_what_was_drawn(tmp_path):
    write_synthetic(tmp_path / "set", "fundus", {"train": 8}, size=16)
    path = next((tmp_path / "set").rglob("*.png"))
    np.testing.assert_array_equal(read_image(path, 16), np.asarray(Image.open(path)))
