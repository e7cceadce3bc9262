"""Which classes of a model and a data set are one, and what becomes of the predictions."""

import numpy as np
import pytest
from scipy.special import softmax

from medmerge_jax.data import DataSet, Split
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.evaluate import match_classes

MODEL = ("MEL", "NV", "BCC", "SCC")


def data_set(classes, labels, multilabel=False, **kwargs):
    ids = tuple(f"image{number}" for number in range(len(labels)))
    split = Split(ids, (), np.array(labels), tuple(f"patient{n % 3}" for n in range(len(labels))))
    return DataSet("clinic", tuple(classes), multilabel, {"test": split}, **kwargs)


@pytest.fixture
def logits(rng):
    return rng.normal(size=(6, 4)).astype(np.float32)


def test_the_same_classes_are_left_as_they_are(logits):
    dataset = data_set("0123", [0, 3, 2, 1, 1, 0])
    match = match_classes(("0", "1", "2", "3"), dataset)
    found = match.predictions(logits, dataset.splits["test"])
    np.testing.assert_array_equal(found.logits, logits)
    np.testing.assert_array_equal(found.labels, dataset.splits["test"].labels)
    assert (found.classes, found.ordinal, match.notes) == (dataset.classes, True, ())
    assert (found.ids, found.groups.tolist()) == (dataset.splits["test"].ids, [0, 1, 2, 0, 1, 2])
    assert found.counts() == {"0": 2, "1": 2, "2": 1, "3": 1}


def test_names_in_another_order(logits):
    dataset = data_set(("SCC", "MEL", "NV", "BCC"), [0, 1, 2, 3, 3, 0])
    match = match_classes(MODEL, dataset)
    found = match.predictions(logits, dataset.splits["test"])
    np.testing.assert_array_equal(found.logits, logits[:, [3, 0, 1, 2]])
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 3, 3, 0])
    assert match.notes == ("classes are matched by name: SCC, MEL, NV, BCC",)
    assert found.ordinal is False


def test_several_outputs_that_are_one_class_add_up(logits):
    dataset = data_set(("malignant", "benign"), [0, 1, 1, 0, 0, 1])
    given = {"malignant": ["SCC", "MEL", "BCC"], "benign": "NV"}
    found = match_classes(MODEL, dataset, classes=given).predictions(logits, dataset.splits["test"])
    probabilities = softmax(logits.astype(np.float64), axis=1)
    wanted = np.stack([1 - probabilities[:, 1], probabilities[:, 1]], axis=1)
    np.testing.assert_allclose(softmax(found.logits, axis=1), wanted, rtol=1e-6)
    assert found.classes == ("malignant", "benign")


def test_several_labels_that_are_one_output(logits):
    dataset = data_set("01234", [4, 0, 1, 2, 3, 0])
    given = {"0": "No_DR", **dict.fromkeys("1234", "DR")}
    match = match_classes(("DR", "No_DR"), dataset, classes=given)
    found = match.predictions(logits[:, :2], dataset.splits["test"])
    np.testing.assert_array_equal(found.labels, [1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(found.logits, logits[:, [1, 0]])
    assert (found.classes, found.ordinal) == (("0", "DR"), True)
    mixed = match_classes(("DR", "No_DR"), dataset, classes={**given, "3": "No_DR"})
    assert not mixed.ordinal  # 0 and 3 are one class, and 1 lies between them


def test_what_has_no_partner_is_left_out_if_asked(logits):
    dataset = data_set(("MEL", "NV", "DF"), [0, 2, 1, 2, 1, 0])
    with pytest.raises(
        UserError, match=r"partner: \['BCC', 'SCC'\] of the model's .* and \['DF'\] of"
    ):
        match_classes(MODEL, dataset)
    match = match_classes(MODEL, dataset, unmapped="drop")
    found = match.predictions(logits, dataset.splits["test"])
    rows = [0, 2, 4, 5]
    assert found.ids == tuple(f"image{row}" for row in rows)
    assert found.groups.tolist() == [0, 2, 1, 2]
    np.testing.assert_array_equal(found.labels, [0, 1, 1, 0])
    kept = softmax(logits.astype(np.float64), axis=1)[rows][:, :2]
    np.testing.assert_allclose(
        softmax(found.logits, axis=1), kept / kept.sum(axis=1, keepdims=True), rtol=1e-6
    )
    assert [note.partition(" are left out")[0] for note in match.notes[1:]] == [
        "images of DF", "the model's BCC, SCC",
    ]  # fmt: skip
    others = data_set(("MEL", "NV", "DF"), [2, 2])
    with pytest.raises(UserError, match=r"no image is of any of the classes \['MEL', 'NV'\]"):
        match.predictions(logits[:2], others.splits["test"])


def test_a_model_without_names_is_matched_by_number(logits):
    dataset = data_set(("a", "b", "c", "d"), [0, 1, 2, 3, 3, 0])
    match = match_classes(4, dataset)
    assert match.outputs == ((0,), (1,), (2,), (3,))
    assert "taken by number: 0 is a, 1 is b, 2 is c, 3 is d" in match.notes[0]
    with pytest.raises(UserError, match=r"does not say its 3 classes' names, and clinic has 4"):
        match_classes(3, dataset)
    given = {"a": "2", "b": ["0", "1"]}
    found = match_classes(3, dataset, classes=given, unmapped="drop")
    assert found.outputs == ((2,), (0, 1))


def test_several_labels_per_image(logits):
    labels = np.array([[1, 0, np.nan], [0, 1, 1]], np.float32)
    dataset = data_set(("edema", "mass", "other"), labels, multilabel=True)
    match = match_classes(("mass", "edema", "nodule", "x"), dataset, True, unmapped="drop")
    found = match.predictions(logits[:2], dataset.splits["test"])
    np.testing.assert_array_equal(found.logits, logits[:2][:, [1, 0]])
    np.testing.assert_array_equal(found.labels, labels[:, :2])
    assert found.counts() == {"edema": 1, "mass": 1}
    with pytest.raises(UserError, match="the model gives one class per image, and clinic has sev"):
        match_classes(("edema", "mass", "other"), dataset)
    with pytest.raises(UserError, match="no two are the same one"):
        match_classes(("a",), dataset, True, dict.fromkeys(dataset.classes, "a"))


@pytest.mark.parametrize(
    ("classes", "unmapped", "words"),
    [
        ({"mel": "MEL"}, "error", "classes of clinic: there is no 'mel'; .*one of MEL, NV"),
        ({"MEL": "melanoma"}, "error", "classes of the model: there is no 'melanoma'"),
        ({"MEL": 3}, "error", "there is no 3"),
        ({"MEL": []}, "error", "'MEL' is mapped to nothing"),
        ({"MEL": "MEL"}, "error", r"partner: \['NV', 'BCC', 'SCC'\] of .* and \['NV'\]"),
        ({"MEL": "MEL"}, "drop", r"only \['MEL'\] have partners; 2 or more are wanted"),
        ({"MEL": ["MEL", "SCC"], "NV": ["NV", "SCC"]}, "drop", "they must share all or none"),
        (dict.fromkeys(("MEL", "NV"), "MEL"), "drop", "2 or more are wanted"),
    ],
)
def test_mappings_that_cannot_be_used(classes, unmapped, words):
    with pytest.raises(UserError, match=words):
        match_classes(MODEL, data_set(("MEL", "NV"), [0, 1]), classes=classes, unmapped=unmapped)


def test_no_name_in_common():
    with pytest.raises(UserError, match=r"\['MEL', .*\] of the model's .* and \['0', '1'\] of"):
        match_classes(MODEL, data_set("01", [0, 1]), unmapped="drop")
