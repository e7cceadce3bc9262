import dataclasses
from pathlib import Path

import numpy as np
import pytest

from medmerge_jax.data import DataSet, Split
from medmerge_jax.data.dataset import build
from medmerge_jax.errors import UserError


def make_split(name, labels, groups=None, root="/somewhere"):
    ids = tuple(f"{name}/{row}" for row in range(len(labels)))
    paths = tuple(Path(root, one) for one in ids)
    multilabel = np.ndim(labels) == 2
    return Split(ids, paths, np.asarray(labels, np.float32 if multilabel else np.int32), groups)


def make_dataset(train=(0, 1, 1), val=(0, 1), test=(1, 0), groups=(None,) * 3, root="/somewhere"):
    splits = {
        name: make_split(name, labels, group, root)
        for name, labels, group in zip(
            ("train", "val", "test"), (train, val, test), groups, strict=True
        )
    }
    return DataSet("eyes", ("good", "bad"), np.ndim(train) == 2, splits)


def with_split(dataset, name, **changes):
    split = dataclasses.replace(dataset.splits[name], **changes)
    return dataclasses.replace(dataset, splits={**dataset.splits, name: split})


def test_classes_are_shown_with_what_they_mean():
    dataset = make_dataset()
    assert dataset.shown_classes == dataset.classes
    named = dataclasses.replace(dataset, titles={"bad": "of poor quality"})
    assert named.shown_classes == ("good", "bad of poor quality")
    assert named.fingerprint() == dataset.fingerprint()


def test_counts_and_sizes():
    dataset = make_dataset()
    dataset.check()
    assert dataset.num_classes == 2
    assert len(dataset.splits["train"]) == 3
    assert dataset.counts() == {
        "train": {"good": 1, "bad": 2},
        "val": {"good": 1, "bad": 1},
        "test": {"good": 1, "bad": 1},
    }


def test_counts_of_several_labels_leave_out_the_unknown():
    dataset = make_dataset(train=[(1, 1), (np.nan, 1)], val=[(0, 0)], test=[(np.nan, np.nan)])
    dataset.check()
    assert dataset.counts()["train"] == {"good": 1, "bad": 2}
    assert dataset.counts()["test"] == {"good": 0, "bad": 0}


def test_fingerprint_is_of_the_contents_and_not_of_the_place():
    first = make_dataset()
    assert first.fingerprint() == make_dataset(root="/elsewhere").fingerprint()
    others = [
        make_dataset(train=(1, 1, 0)),
        make_dataset(val=(0,)),
        dataclasses.replace(first, classes=("bad", "good")),
        with_split(first, "test", ids=("test/0", "test/9")),
        DataSet(
            "eyes",
            first.classes,
            False,
            {**first.splits, "val": first.splits["test"], "test": first.splits["val"]},
        ),
        make_dataset(train=[(1, 0), (0, 1), (0, 1)], val=[(0, 1), (1, 0)], test=[(0, 1), (1, 0)]),
    ]
    fingerprints = {first.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(fingerprints) == 1 + len(others)


def test_fingerprint_of_unknown_labels_is_stable():
    other_nan = np.uint32(0x7FC00001).view(np.float32)
    datasets = [
        make_dataset(train=[(1, nan), (0, 1)], val=[(0, 1)], test=[(1, 1)])
        for nan in (np.nan, other_nan)
    ]
    assert datasets[0].fingerprint() == datasets[1].fingerprint()
    zero = make_dataset(train=[(1, 0), (0, 1)], val=[(0, 1)], test=[(1, 1)])
    assert zero.fingerprint() != datasets[0].fingerprint()


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_empty_split(name):
    with pytest.raises(UserError, match=f"data set eyes: the split '{name}' is empty"):
        make_dataset(**{name: ()}).check()


def test_class_without_training_image():
    with pytest.raises(UserError, match=r"no training image of \['bad'\] .*\{'bad': 2\}"):
        make_dataset(train=(0, 0)).check()


@pytest.mark.parametrize("label", [-1, 2])
def test_label_outside_the_classes(label):
    with pytest.raises(UserError, match=rf"'val', image val/1: the label is {label}; .* 2 classes"):
        make_dataset(val=(0, label)).check()


def test_half_a_label():
    with pytest.raises(
        UserError, match=r"'test', image test/0: the label is .*0\.5.*0, 1 or unknown"
    ):
        make_dataset(train=[(1, 1)], val=[(0, 1)], test=[(0.5, 1)]).check()


def test_one_class_only():
    dataset = dataclasses.replace(make_dataset(train=(0,), val=(0,), test=(0,)), classes=("good",))
    with pytest.raises(UserError, match=r"the only class is \['good'\]"):
        dataset.check()


def test_duplicated_ids():
    within = with_split(make_dataset(), "val", ids=("val/0", "val/0"))
    with pytest.raises(
        UserError, match="the image val/0 occurs twice, in the splits 'val' and 'val'"
    ):
        within.check()
    across = with_split(make_dataset(), "test", ids=("test/0", "train/2"))
    with pytest.raises(UserError, match="train/2 occurs twice, in the splits 'train' and 'test'"):
        across.check()


@pytest.mark.parametrize("assignment", [[0, 0, 0, 1, 1, 2], [2, 0, 1, 0, 0, 1]])
def test_images_that_come_decoded_follow_their_rows(assignment):
    pixels = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    names = [str(row) for row in range(6)]
    paths = [Path("archive.npz")] * 6
    labels = np.array([0, 1, 0, 1, 0, 1])
    images = Split(tuple(names), tuple(paths), labels, pixels=pixels)
    dataset = build("x", ("a", "b"), images, np.array(assignment), (0.6, 0.2, 0.2), 0)
    for split in dataset.splits.values():
        rows = [int(name) for name in split.ids]
        np.testing.assert_array_equal(split.pixels, pixels[rows])
        # Neighbours are not copied: data sets may be as large as the memory.
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        assert np.shares_memory(split.pixels, pixels) == neighbours


def test_groups_are_kept_where_splits_ignore_them():
    names = [str(row) for row in range(60)]
    groups = [str(row // 2) for row in range(60)]
    labels = np.arange(60) % 2
    images = Split(tuple(names), tuple(map(Path, names)), labels, tuple(groups))
    homes = {}
    for by_group in (True, False):
        dataset = build("x", ("a", "b"), images, None, (0.6, 0.2, 0.2), 0, split_by_group=by_group)
        for split in dataset.splits.values():
            assert split.groups == tuple(groups[int(name)] for name in split.ids)
        homes[by_group] = [set(split.groups) for split in dataset.splits.values()]
    assert not homes[True][0] & homes[True][1] | homes[True][0] & homes[True][2]
    assert homes[False][0] & homes[False][2]


@pytest.mark.parametrize(
    ("classes", "ordinal", "ordered"),
    [
        (("0", "1", "2"), None, True),
        (("2", "10"), None, True),
        (("10", "2"), None, False),
        (("0", "1", "2"), False, False),
        (("none", "mild", "severe"), None, False),
        (("none", "mild", "severe"), True, True),
        (("1", "2", "other"), None, False),
    ],
)
def test_the_order_of_classes_is_known_of_numbers_or_because_it_is_said(classes, ordinal, ordered):
    assert DataSet("eyes", classes, False, {}, ordinal).ordered == ordered
    assert not DataSet("x-rays", classes, True, {}, ordinal).ordered


def test_a_data_set_of_the_images_to_evaluate_on():
    dataset = make_dataset(groups=(("p", "p", "q"), ("r", "s"), ("t", "t")))
    test = dataset.only("test")
    assert list(test.splits) == ["test"] and test.splits["test"] is dataset.splits["test"]
    whole = dataset.only("all").splits["test"]
    assert whole.ids == sum((dataset.splits[name].ids for name in ("train", "val", "test")), ())
    assert [path.as_posix() for path in whole.paths] == [f"/somewhere/{one}" for one in whole.ids]
    assert whole.labels.tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert whole.groups == tuple("ppqrstt")
    assert dataset.only("all").fingerprint() != test.fingerprint()
    # Images without a group would be one group if others had one.
    assert make_dataset(groups=(("p",) * 3, None, None)).only("all").splits["test"].groups is None


def test_a_split_to_evaluate_on_may_lack_classes_but_not_images():
    dataset = make_dataset(train=(0,), val=(), test=(0, 0))
    dataset.only("test").check_images()
    assert len(dataset.only("all").splits["test"]) == 3
    with pytest.raises(UserError, match="the split 'val' is empty"):
        dataset.only("val")
    with pytest.raises(UserError, match="image test/1: the label is 5"):
        make_dataset(test=(0, 5)).only("test").check_images()


def test_decoded_images_of_all_splits_follow_their_rows():
    dataset = make_dataset()
    for number, name in enumerate(("train", "val", "test")):
        pixels = np.full((len(dataset.splits[name]), 2, 2), number, np.uint8)
        dataset = with_split(dataset, name, pixels=pixels)
    whole = dataset.only("all").splits["test"]
    assert whole.pixels[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_folds_are_of_all_train_and_val_images_and_never_part_a_group():
    groups = tuple(f"patient {row % 10}" for row in range(20))  # those of val are in train, too
    labels = [row % 2 for row in range(20)]
    dataset = make_dataset(
        train=labels[:12], val=labels[12:], groups=(groups[:12], groups[12:], ("p", "q"))
    )
    known = [*dataset.splits["train"].ids, *dataset.splits["val"].ids]
    folds = [dataset.in_folds(5, fold, seed=0).splits for fold in range(5)]
    assert sorted(one for fold in folds for one in fold["val"].ids) == sorted(known)
    for fold in folds:
        assert set(fold["train"].ids) == set(known) - set(fold["val"].ids)
        assert not set(fold["train"].groups) & set(fold["val"].groups)
        assert fold["test"] is dataset.splits["test"]
    another = dataset.in_folds(5, 0, seed=1).splits
    assert set(another["val"].ids) != set(folds[0]["val"].ids)
    with pytest.raises(UserError, match="make no 11 folds"):
        dataset.in_folds(11, 0, seed=0)
