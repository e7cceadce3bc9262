"""Small copies of the published layouts, with their quirks, and what is to be read from them."""

import dataclasses
import pickle

import numpy as np
from PIL import Image

GRADES = ("0", "1", "2", "3", "4")
LESIONS = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
LESIONS_2019 = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")


@dataclasses.dataclass
class Example:
    """What one image must come out as. The split is None where the publisher gives none."""

    label: int | tuple
    pixels: np.ndarray
    group: str = ""
    split: str | None = None


def noise(number, height=9, width=12, channels=3):
    """Distinct images."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (height, width, channels)[: 2 if channels == 1 else 3], np.uint8)


def write_png(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path, "PNG")
    return pixels


def write_jpeg(path, pixels, **options):
    """Returns the pixels as they decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", **options)
    return np.asarray(Image.open(path))


def write_text(path, lines, newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(newline.join([*lines, ""]), encoding="utf-8", newline="")


def aptos2019(root):
    """`train.csv`, `train_images/`; beside them the files of the competition's unlabelled test."""
    expected, lines = {}, ["id_code,diagnosis"]
    for number in range(25):
        name, grade = f"{number * 7919:012x}", number % 5
        path = root / "train_images" / f"{name}.png"
        if number == 3:  # with an opaque alpha channel
            pixels = write_png(path, noise(number))
            Image.fromarray(pixels).convert("RGBA").save(path)
        elif number == 4:
            palette = Image.fromarray(noise(number)).quantize(16)
            palette.save(path)
            pixels = np.asarray(palette.convert("RGB"))
        else:
            pixels = write_png(path, noise(number, 9 + number))
        expected[name] = Example(grade, pixels)
        lines.append(f"{name},{grade}")
    write_text(root / "train.csv", lines)
    write_text(root / "test.csv", ["id_code", "0005cfc8afb6"])
    write_text(root / "sample_submission.csv", ["id_code,diagnosis", "0005cfc8afb6,0"])
    write_png(root / "test_images" / "0005cfc8afb6.png", noise(99))
    return expected


def eyepacs(root, variant="pooled"):
    """`trainLabels.csv`, `train/`, `retinopathy_solution.csv`, `test/`: two eyes per patient."""
    expected = {}
    train, test = ["image,level"], ["image,level,Usage"]
    for number in range(24):
        in_train = number < 16
        for side in ("left", "right"):
            name = f"{10 + 3 * number}_{side}"
            grade = (number + (side == "right" and number % 3 == 0)) % 5
            path = root / ("train" if in_train else "test") / f"{name}.jpeg"
            pixels = write_jpeg(path, noise(2 * number + (side == "left"), 16, 24))
            if number == 1:  # on its side, as a camera's metadata may say
                exif = Image.Exif()
                exif[0x0112] = 6
                stored = Image.open(path).copy()
                stored.save(path, "JPEG", exif=exif)
                pixels = np.rot90(np.asarray(Image.open(path)), -1)
            split = None if variant == "pooled" else "train" if in_train else "test"
            expected[name] = Example(grade, pixels, name.split("_")[0], split)
            (train if in_train else test).append(
                f"{name},{grade}" + ("" if in_train else ",Public" if number % 5 else ",Private")
            )
    write_text(root / "trainLabels.csv", train)
    write_text(root / "retinopathy_solution.csv", test)
    return expected


def eyepacs_kaggle(root):
    return eyepacs(root, "kaggle")


def ham10000_challenge(root):
    """The three parts of ISIC 2018, each table in a folder of its own, as its archive has it."""
    expected, number = {}, 24306
    groupings = ["image,lesion_id,diagnosis_confirm_type"]
    parts = {"Training": ("train", 28), "Validation": ("val", 7), "Test": ("test", 9)}
    for part, (split, count) in parts.items():
        lines = ["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"]
        stem = f"ISIC2018_Task3_{part}"
        for index in range(count):
            name, label = f"ISIC_{number:07d}", index // 2 % 7
            pixels = write_jpeg(root / f"{stem}_Input" / f"{name}.jpg", noise(number))
            group = f"HAM_{index // 2:07d}" if part == "Training" else f"(unknown lesion of {name})"
            expected[name] = Example(label, pixels, group, split)
            hot = ",".join("1.0" if one == label else "0.0" for one in range(7))
            lines.append(f"{name},{hot}")
            if part == "Training":
                groupings.append(f"{name},{group},histopathology")
            number += 1
        write_text(root / f"{stem}_GroundTruth" / f"{stem}_GroundTruth.csv", lines)
        for folder in (f"{stem}_Input", f"{stem}_GroundTruth"):
            write_text(root / folder / "LICENSE.txt", ["CC BY-NC"])
            write_text(root / folder / "ATTRIBUTION.txt", ["HAM10000"])
    write_text(root / "ISIC2018_Task3_Training_LesionGroupings.csv", groupings)
    return expected


def ham10000_training(root):
    """The same files; only their training images, without a split."""
    return {
        name: dataclasses.replace(example, split=None)
        for name, example in ham10000_challenge(root).items()
        if example.split == "train"
    }


def ham10000_dataverse(root, table="HAM10000_metadata.csv", delimiter=",", quote=""):
    """`HAM10000_metadata` without extension, and the images in two folders."""
    columns = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset"]
    expected = {}
    lines = [delimiter.join(columns)]
    for index in range(35):
        name, label = f"ISIC_{30000 + index * 37:07d}", index // 2 % 7
        group = f"HAM_{index // 2:07d}"
        folder = root / f"HAM10000_images_part_{1 + index % 2}"
        pixels = write_jpeg(folder / f"{name}.jpg", noise(index))
        expected[name] = Example(label, pixels, group)
        text = [group, name, LESIONS[label].lower(), "histo"]
        rest = ["male", "lower extremity", "vidir_modern"]
        cells = [f"{quote}{cell}{quote}" for cell in text] + ["80.0" if index % 3 else ""]
        lines.append(delimiter.join(cells + [f"{quote}{cell}{quote}" for cell in rest]))
    write_text(root / table, lines)
    return expected


def ham10000_dataverse_test(root):
    """With the test images, whose table there is made like the metadata; tabs and quotes."""
    expected = ham10000_dataverse(root, "HAM10000_metadata.tab", "\t", '"')
    for example in expected.values():
        example.split = "train"
    lines = ["lesion_id\timage_id\tdx\tdx_type\tage\tsex\tlocalization\tdataset"]
    for index in range(7):
        name = f"ISIC_{34524 + index:07d}"
        path = root / "ISIC2018_Task3_Test_Images" / f"{name}.jpg"
        expected[name] = Example(
            index, write_jpeg(path, noise(500 + index)), f"HAMTEST_{index:07d}", "test"
        )
        lines.append(
            f'"HAMTEST_{index:07d}"\t"{name}"\t"{LESIONS[index].lower()}"\t"histo"\t60.0\t"male"'
            '\t"back"\t"vidir_modern"'
        )
    write_text(root / "ISIC2018_Task3_Test_GroundTruth.tab", lines)
    return expected


def isic2019(root, images="ISIC_2019_Training_Input"):
    """Three sources, some lesions unknown; CRLF in one table, `_downsampled` in some names."""
    expected = {}
    truth = ["image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"]
    metadata = ["image,age_approx,anatom_site_general,lesion_id,sex"]
    for index in range(48):
        name = f"ISIC_{index * 11:07d}" + ("_downsampled" if index % 12 == 5 else "")
        label = index // 3 % 8
        pixels = write_jpeg(root / images / f"{name}.jpg", noise(index))
        known = index % 6 > 1
        lesion = f"{('MSK4', 'HAM', 'BCN')[index % 3]}_{index // 6:07d}" if known else ""
        expected[name] = Example(label, pixels, lesion or f"(unknown lesion of {name})")
        hot = ",".join("1.0" if one == label else "0.0" for one in range(9))
        truth.append(f"{name},{hot}")
        metadata.append(f"{name},{'' if index % 4 == 1 else '55.0'},anterior torso,{lesion},female")
    write_text(root / "ISIC_2019_Training_GroundTruth.csv", truth)
    write_text(root / "ISIC_2019_Training_Metadata.csv", metadata, "\r\n")
    return expected


def isic2019_unpacked_twice(root):
    """The archive holds a folder of its own name."""
    return isic2019(root, "ISIC_2019_Training_Input/ISIC_2019_Training_Input")


FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip


def chexpert(root, uncertain=0.0):
    """Training, validation and test table, lateral views, uncertain and empty labels."""
    expected = {}
    number = 0
    for table, split, count in (
        ("train", "train", 16), ("valid", "val", 4), ("test", "test", 4),
    ):  # fmt: skip
        about = "" if table == "test" else ",Sex,Age,Frontal/Lateral,AP/PA"
        lines = [f"Path{about},No Finding,{','.join(FINDINGS)}"]
        for patient in range(number, number + count):
            values = [(patient + finding) % 4 for finding in range(13)]
            cells = ",".join(("", "0.0", "1.0", "-1.0")[value] for value in values)
            labels = tuple((0.0, 0.0, 1.0, uncertain)[value] for value in values)
            for view in ("frontal", "lateral"):
                name = f"{table}/patient{patient:05d}/study1/view1_{view}.jpg"
                pixels = write_jpeg(root / name, noise(patient, channels=1))
                sex = "" if table == "test" else f",Female,68,{view.capitalize()},AP"
                lines.append(f"CheXpert-v1.0-small/{name}{sex},,{cells}")
                if view == "frontal":
                    expected[name] = Example(labels, pixels, f"patient{patient:05d}", split)
        number += count
        write_text(root / f"{table}.csv", lines)
    return expected


def chexpert_ones(root):
    return chexpert(root, 1.0)


def chexpert_ignore(root):
    return chexpert(root, float("nan"))


def rsna_pneumonia(root):
    """DICOM files of 16 bits with a window; a patient with two boxes; the third class."""
    import pydicom

    expected = {}
    boxes, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for index in range(24):
        name = f"{index * 123457:08x}-14fd-4e49-80ba-63a80b6bddd6"
        kind = ("Normal", "Lung Opacity", "No Lung Opacity / Not Normal")[index % 3]
        rows = ["1.0,2.0,3.0,4.0,1", "5.0,6.0,7.0,8.0,1"][: 1 + index % 2]
        for row in rows if kind == "Lung Opacity" else [",,,,0"]:
            boxes.append(f"{name},{row}")
            classes.append(f"{name},{kind}")
        pixels = noise(index, channels=1)
        dataset = pydicom.Dataset()
        dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        dataset.SOPInstanceUID = f"1.2.276.0.{index}"
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME1"
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelRepresentation = 0
        dataset.PixelData = (255 - pixels).tobytes()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        path = root / "stage_2_train_images" / f"{name}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        if kind in ("Normal", "Lung Opacity"):
            expected[name] = Example(index % 3, pixels, name)
    write_text(root / "stage_2_train_labels.csv", boxes)
    write_text(root / "stage_2_detailed_class_info.csv", classes)
    return expected


def cifar10(root):
    """The unpacked Python archive, six files of 20 images each."""
    names = [f"class {label}" for label in range(10)]
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    expected = {}
    for batch in range(6):
        images = np.stack([noise(100 * batch + row, 32, 32) for row in range(20)])
        labels = [row % 10 for row in range(20)]
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            train = batch < 5
            name = f"train_{20 * batch + row:05d}" if train else f"test_{row:05d}"
            expected[name] = Example(label, image, split=None if train else "test")
        data = images.transpose(0, 3, 1, 2).reshape(20, -1)
        name = f"data_batch_{batch + 1}" if batch < 5 else "test_batch"
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, 2))
    return expected


def pneumoniamnist(root):
    """Greyscale images with a label each."""
    return _medmnist(root, "pneumoniamnist", 1, lambda row: [row % 2])


def chestmnist(root):
    """Greyscale images with 14 labels each."""
    return _medmnist(
        root, "chestmnist_64", 1, lambda row: [(2473 * row >> bit) % 2 for bit in range(14)]
    )


def bloodmnist(root):
    """Colour images with a label each."""
    return _medmnist(root, "bloodmnist", 3, lambda row: [row % 8])


def _medmnist(root, name, channels, labels):
    arrays, expected = {}, {}
    root.mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train", 16, 1), ("val", 8, 100), ("test", 9, 200)):
        rows = [labels(first + row) for row in range(count)]
        images = np.stack([noise(first + row, 8, 8, channels) for row in range(count)])
        arrays |= {f"{split}_images": images, f"{split}_labels": np.array(rows, np.uint8)}
        for row in range(count):
            label = rows[row][0] if len(rows[row]) == 1 else tuple(map(float, rows[row]))
            expected[f"{split}_{row:06d}"] = Example(label, images[row], split=split)
    np.savez_compressed(root / f"{name}.npz", **arrays)
    return expected


CASES = {
    "aptos2019": aptos2019,
    "eyepacs/pooled": eyepacs,
    "eyepacs/kaggle": eyepacs_kaggle,
    "ham10000/published": ham10000_challenge,
    "ham10000/training": ham10000_training,
    "ham10000/published (Dataverse)": ham10000_dataverse,
    "ham10000/published (Dataverse with test)": ham10000_dataverse_test,
    "isic2019": isic2019,
    "isic2019 (unpacked twice)": isic2019_unpacked_twice,
    "chexpert/zeros": chexpert,
    "chexpert/ones": chexpert_ones,
    "chexpert/ignore": chexpert_ignore,
    "rsna_pneumonia": rsna_pneumonia,
    "cifar10": cifar10,
    "medmnist/pneumoniamnist": pneumoniamnist,
    "medmnist/chestmnist_64": chestmnist,
    "medmnist/bloodmnist": bloodmnist,
}
"""What writes each layout, by the builder's name (and a note)."""
