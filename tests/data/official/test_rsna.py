"""A small RSNA challenge: its two tables, and DICOM files as published."""

import io

import numpy as np
import pytest
from PIL import Image

from medmerge_jax.data.official.rsna_pneumonia import LAYOUT, read_rsna_pneumonia
from medmerge_jax.errors import UserError
from medmerge_jax.images.dicom import read_dicom

pydicom = pytest.importorskip("pydicom")

NORMAL, OPACITY, OTHER = "Normal", "Lung Opacity", "No Lung Opacity / Not Normal"

PATIENTS = {
    "0004cfab-14fd-4e49-80ba-63a80b6bddd6": OTHER,
    "00313ee0-9eaa-42f4-b0ab-c148ed3241cd": OTHER,
    "003d8fa0-6bf1-40ed-b54c-ac657f8495c5": NORMAL,
    "00436515-870c-4b36-a041-de91049b9ab4": OPACITY,  # two boxes
    "00569f44-917d-4c86-a842-81832af98c30": OTHER,
    "006cec2e-6ce2-4549-bffa-eadfcd1e9970": NORMAL,
    "00704310-78a8-4b38-8475-49f4573b2dbb": OPACITY,  # two boxes
    "008c19e8-a820-403a-930a-bc74a4053664": OPACITY,  # one
}
BOXES = {
    "00436515-870c-4b36-a041-de91049b9ab4": ["264.0,152.0,213.0,379.0", "562.0,152.0,256.0,453.0"],
    "00704310-78a8-4b38-8475-49f4573b2dbb": ["323.0,577.0,160.0,104.0", "695.0,575.0,162.0,137.0"],
    "008c19e8-a820-403a-930a-bc74a4053664": ["108.0,112.0,20.0,30.0"],
}
CHOSEN = {name: kind for name, kind in PATIENTS.items() if kind != OTHER}


def tables():
    boxes, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for name, kind in PATIENTS.items():
        for box in BOXES.get(name, [",,,"]):
            boxes.append(f"{name},{box},{int(kind == OPACITY)}")
            classes.append(f"{name},{kind}")
    return boxes, classes


def write_tables(root, boxes=None, classes=None):
    own_boxes, own_classes = tables()
    for name, text in (
        ("stage_2_train_labels.csv", boxes or own_boxes),
        ("stage_2_detailed_class_info.csv", classes or own_classes),
    ):
        (root / name).write_text("\n".join(text) + "\n", encoding="utf-8")


def write_dicom(path, image):
    """As in the challenge: 8-bit JPEG, MONOCHROME2, without window or rescale."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.276.0.7230010.3.1.4.8323329.28530.1517874485.775526"
    dataset.Modality, dataset.ViewPosition = "CR", "PA"
    dataset.PatientID = path.stem
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = image.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = 0
    dataset.LossyImageCompression = "01"
    dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return np.asarray(Image.open(io.BytesIO(buffer.getvalue())))


def shade(name):
    ramp = np.arange(16 * 24).reshape(16, 24) / 8
    return (ramp + 20 * list(PATIENTS).index(name)).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    write_tables(tmp_path)
    (tmp_path / "stage_2_train_images").mkdir()
    for name in PATIENTS:
        write_dicom(tmp_path / "stage_2_train_images" / f"{name}.dcm", shade(name))
    return tmp_path


def test_every_label_and_pixel(root, tmp_path):
    records = LAYOUT.read(root, "")
    assert records.classes == (NORMAL, OPACITY)
    assert records.ids == tuple(CHOSEN)
    assert [records.classes[label] for label in records.labels] == list(CHOSEN.values())
    assert np.issubdtype(records.labels.dtype, np.integer)
    assert records.groups == records.ids
    assert records.splits is None
    for name, path in zip(records.ids, records.paths, strict=True):
        assert path == root / "stage_2_train_images" / f"{name}.dcm"
        expected = write_dicom(tmp_path / "again.dcm", shade(name))
        np.testing.assert_array_equal(np.asarray(read_dicom(path)), expected)
        assert np.abs(expected.astype(int) - shade(name)).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg"])
def test_converted_images(root, suffix):
    for name in PATIENTS:
        path = root / "stage_2_train_images" / f"{name}.dcm"
        Image.fromarray(shade(name)).save(path.with_suffix(suffix))
        path.unlink()
    for name, path in zip(CHOSEN, read_rsna_pneumonia(root).paths, strict=True):
        assert path == root / "stage_2_train_images" / f"{name}{suffix}"


def test_the_published_images_go_before_converted_ones(root):
    for name in PATIENTS:
        path = root / "stage_2_train_images" / f"{name}.png"
        Image.fromarray(shade(name)).save(path)
    assert {path.suffix for path in read_rsna_pneumonia(root).paths} == {".dcm"}


def test_images_of_the_third_class_need_not_be_there(root):
    for name, kind in PATIENTS.items():
        if kind == OTHER:
            (root / "stage_2_train_images" / f"{name}.dcm").unlink()
    assert read_rsna_pneumonia(root).ids == tuple(CHOSEN)


def test_byte_order_marks_are_no_part_of_the_first_column(root):
    boxes, classes = tables()
    write_tables(root, ["\ufeff" + boxes[0], *boxes[1:]], ["\ufeff" + classes[0], *classes[1:]])
    assert read_rsna_pneumonia(root).ids == tuple(CHOSEN)


def boxes_with(old, new):
    boxes, classes = tables()
    text = "\n".join(boxes)
    assert old in text
    return text.replace(old, new, 1).split("\n"), classes


def classes_with(old, new):
    boxes, classes = tables()
    text = "\n".join(classes)
    assert old in text
    return boxes, text.replace(old, new, 1).split("\n")


# Lines: 2 and 3 other, 4 normal, 5 and 6 an opacity with two boxes, 7 other, 8 normal,
# 9 and 10 two boxes, 11 one box.
BOX_TABLE, CLASS_TABLE = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
MALFORMED = {
    "no Target": (boxes_with("Target", "target"), BOX_TABLE, "'?Target'?"),
    "no class": (classes_with("class", "label"), CLASS_TABLE, "'?class'?"),
    "target text": (boxes_with("453.0,1", "453.0,yes"), BOX_TABLE, "line 6.*'Target'.*'yes'"),
    "target 2": (boxes_with("453.0,1", "453.0,2"), BOX_TABLE, "line 6.*'Target'.*'2'"),
    "no target": (boxes_with("453.0,1", "453.0,"), BOX_TABLE, "line 6.*'Target'"),
    "class text": (classes_with(",Normal", ",normal"), CLASS_TABLE, "line 4.*'normal'"),
    "no patient": (
        classes_with("003d8fa0-6bf1-40ed-b54c-ac657f8495c5", ""), CLASS_TABLE, "line 4.*patientId",
    ),
    "two classes": (
        classes_with("4b36-a041-de91049b9ab4,Lung Opacity\n", "4b36-a041-de91049b9ab4,Normal\n"),
        CLASS_TABLE, "line 6.*'Lung Opacity' here and 'Normal' at line 5",
    ),
    "duplicate normal": (
        classes_with("006cec2e-6ce2-4549-bffa-eadfcd1e9970", list(PATIENTS)[2]),
        CLASS_TABLE, "line 8.*has a row already, at line 4",
    ),
    "duplicate empty box": (
        boxes_with("006cec2e-6ce2-4549-bffa-eadfcd1e9970", list(PATIENTS)[2]),
        BOX_TABLE, "line 8.*has a row already, at line 4",
    ),
    "duplicate box": (
        boxes_with("562.0,152.0,256.0,453.0", "264.0,152.0,213.0,379.0"),
        BOX_TABLE, "line 6.*has a row already, at line 5",
    ),
    "tables differ": (
        boxes_with("495c5,,,,,0", "495c5,1,2,3,4,1"), BOX_TABLE, "line 4.*'Normal'.*line 4",
    ),
    "unknown patient": (
        boxes_with("0004cfab", "ffffffff"), BOX_TABLE, "line 2.*'ffffffff.*is not in",
    ),
    "semicolons": (
        ([line.replace(",", ";") for line in tables()[0]], tables()[1]), BOX_TABLE, "semicolon",
    ),
    "a field too many": (classes_with(",Normal", ",Normal,x"), CLASS_TABLE, "line 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tables(root, case):
    (boxes, classes), table, message = MALFORMED[case]
    write_tables(root, boxes, classes)
    with pytest.raises(UserError, match=message) as caught:
        read_rsna_pneumonia(root)
    assert str(caught.value).startswith(str(root / table))


def test_a_patient_without_boxes(root):
    boxes, classes = tables()
    write_tables(root, [*boxes[:3], *boxes[4:]], classes)
    with pytest.raises(UserError, match=f"{CLASS_TABLE}.*line 4.*is not in .*{BOX_TABLE}"):
        read_rsna_pneumonia(root)


@pytest.mark.parametrize("content", [None, b""])
def test_missing_and_empty_images(root, content):
    path = root / "stage_2_train_images" / f"{list(PATIENTS)[3]}.dcm"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{CLASS_TABLE}.*line 5") as caught:
        read_rsna_pneumonia(root)
    assert list(PATIENTS)[3] in str(caught.value)


def test_an_image_without_pixels_is_named_when_it_is_read(root):
    path = root / "stage_2_train_images" / f"{list(PATIENTS)[3]}.dcm"
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(path)
    assert path in read_rsna_pneumonia(root).paths
    with pytest.raises(UserError, match=f"{path}: has no pixels"):
        read_dicom(path)


@pytest.mark.parametrize("name", [BOX_TABLE, CLASS_TABLE])
def test_missing_tables(root, name):
    (root / name).unlink()
    with pytest.raises(UserError, match=name):
        read_rsna_pneumonia(root)


@pytest.mark.parametrize("name", ["../secret", "a/b", "..\\secret", ".."])
def test_a_patient_outside_the_folder(root, name):
    patient = next(iter(CHOSEN))
    write_tables(root, *([line.replace(patient, name) for line in one] for one in tables()))
    (root / "secret.dcm").write_bytes(b"secret")
    message = "line 4: column 'patientId' holds .*; a name without folders"
    with pytest.raises(UserError, match=message):
        read_rsna_pneumonia(root)
