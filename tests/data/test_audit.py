"""That the audit finds what makes results too good, and counts it."""

import numpy as np
import pytest

from medmerge_jax.data.audit import audit_data_set, overlapping, short_text, without
from medmerge_jax.data.dataset import DataSet, Split
from medmerge_jax.data.hashing import hash_images
from medmerge_jax.data.synthetic import draw
from medmerge_jax.errors import UserError

SPLITS = ("train", "val", "test")


def make(counts=(12, 6, 8), groups=None, seed=0, labels=None, multilabel=False):
    """A data set of drawn images, and its pixels."""
    images = draw("lesion", np.arange(sum(counts)) % 4, 64, np.random.default_rng(seed), 1)
    ends = np.cumsum(counts).tolist()
    splits, pixels = {}, {}
    for name, start, end in zip(SPLITS, [0, *ends], ends, strict=False):
        rows = range(start, end)
        ids = tuple(f"{seed}/{row}" for row in rows)
        part = np.asarray([row % 2 for row in rows], np.int32) if labels is None else labels[rows]
        splits[name] = Split(ids, ids, part, None if groups is None else tuple(groups[start:end]))
        pixels[name] = images[start:end]
    return DataSet("moles", ("a", "b"), multilabel, splits), pixels


def audited(dataset, pixels, parents=None):
    return audit_data_set(dataset, hash_images(dataset, pixels, "squash"), parents)


def test_a_clean_set():
    found = audited(*make())
    assert found["images"] == {"train": 12, "val": 6, "test": 8}
    assert found["counts"]["test"] == {"a": 4, "b": 4}
    assert found["groups"] is None
    assert [pair["images"] for pair in found["duplicates"]] == [0, 0, 0]
    assert found["warnings"] == []
    assert short_text(found) == [
        "data moles: 12 train, 6 val, 8 test images; no image is in two splits"
    ]


def test_groups_in_two_splits():
    groups = [f"p{row // 2}" for row in range(26)]
    dataset, pixels = make(groups=groups)
    assert audited(dataset, pixels)["groups"]["in_several_splits"] == 0
    groups[18] = groups[19] = "p0"  # two test images of a training patient
    groups[12] = "p0"
    groups[20] = "p7"  # one of a validation patient
    found = audited(*make(groups=groups))["groups"]
    assert found["groups"] == 12
    assert found["in_several_splits"] == 2
    assert found["by_splits"] == {"train and val": 1, "train and test": 1, "val and test": 2}
    assert found["images"] == {"train": 2, "val": 3, "test": 3}
    assert found["examples"] == ["p0", "p7"]
    text = audited(*make(groups=groups))["warnings"][0]
    assert "2 of 12 groups" in text
    assert "3 of 8 test images" in text


@pytest.mark.parametrize("multilabel", [False, True])
def test_images_in_two_splits(multilabel):
    rows = np.arange(26)
    labels = np.stack([rows % 2, rows % 3 == 0], axis=1).astype(np.float32)
    labels[3, 1] = np.nan
    dataset, pixels = make(labels=labels if multilabel else rows % 2, multilabel=multilabel)
    pixels["test"] = pixels["test"].copy()
    pixels["test"][0] = pixels["train"][0]
    pixels["test"][2] = np.clip(pixels["train"][5].astype(int) + 3, 0, 255)  # of another label
    pixels["test"][5] = pixels["val"][1]
    if multilabel:
        pixels["val"] = pixels["val"].copy()
        pixels["val"][3] = pixels["train"][3]  # unknown there and known here: 15 % 3 == 0
    found = {(pair["of"], pair["in"]): pair for pair in audited(dataset, pixels)["duplicates"]}
    pair = found["test", "train"]
    assert (pair["images"], pair["exact"]) == (2, 1)
    assert pair["examples"] == [["0/18", "0/0"], ["0/20", "0/5"]]
    assert pair["other_label"] == 1
    assert found["test", "val"]["images"] == 1
    assert found["val", "train"]["images"] == multilabel
    assert found["val", "train"]["other_label"] == multilabel
    warnings = audited(dataset, pixels)["warnings"]
    assert any("2 of 8 test images are in train too (1 with the same pixels" in w for w in warnings)


def test_images_of_a_parents_training():
    dataset, pixels = make()
    hashes = hash_images(dataset, pixels, "squash")
    other, others = make(seed=1)
    others["train"] = others["train"].copy()
    others["train"][:2] = pixels["test"][3:5]
    others["train"][2] = pixels["val"][0]
    others["test"] = others["test"].copy()
    others["test"][:8] = pixels["test"]  # it was not trained on these
    parents = {"b": hash_images(other, others, "squash"), "c": None}
    found = audit_data_set(dataset, hashes, parents)
    assert found["parents"]["c"] is None
    assert found["parents"]["b"]["training_images"] == 12
    assert found["parents"]["b"]["test"]["images"] == 2
    assert found["parents"]["b"]["val"]["images"] == 1
    text = "\n".join(short_text(found))
    assert "parent b was trained on 2 of 8 test images (0 by name, 2 by looks)" in text
    assert "data.exclude_overlap = True leaves them out" in text
    assert "the training images of parent c are not known" in text

    rows = overlapping(hashes, parents)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in rows.items()} == {
        "val": [0],
        "test": [3, 4],
    }
    kept = without(dataset, rows)
    assert kept.splits["train"] is dataset.splits["train"]
    assert kept.splits["val"].ids == dataset.splits["val"].ids[1:]
    assert len(kept.splits["test"]) == 6
    np.testing.assert_array_equal(
        kept.splits["test"].labels, np.delete(dataset.splits["test"].labels, [3, 4])
    )
    assert kept.fingerprint() != dataset.fingerprint()
    assert not any(mask.any() for mask in overlapping(hashes.without(rows), parents).values())


def test_nothing_left():
    dataset, _ = make()
    everything = {"test": np.ones(8, bool)}
    with pytest.raises(UserError, match=r"on all 8 images of the split 'test'.*exclude_overlap"):
        without(dataset, everything)


def test_without_hashes_groups_are_checked_all_the_same():
    dataset, _ = make(groups=["p"] * 26)
    found = audit_data_set(dataset)
    assert found["groups"]["in_several_splits"] == 1
    assert found["duplicates"] == []
