"""For each kind of input: valid files, how to damage them, and the public reader of them."""

import dataclasses
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from helpers import small_layouts
from helpers.fuzz_mutations import (
    choice,
    mutate_bytes,
    mutate_json,
    mutate_png,
    mutate_table,
    mutate_tree,
    mutate_zip,
    strange,
    zip_bytes,
)
from medmerge_jax.errors import UserError


@dataclasses.dataclass
class Case:
    """Inputs, and what is done with them.

    Attributes:
      seeds: Inputs that load.
      mutate: Called as mutate(rng, input), makes another one.
      read: Writes an input down and reads it.
      attacks: Inputs that are refused, whatever else they try.
      memory: Bytes that reading one of them may take, at most; the inputs have kilobytes.
    """

    seeds: Sequence[Any]
    mutate: Callable[[np.random.Generator, Any], Any]
    read: Callable[[Any], Any]
    attacks: Sequence[Any] = ()
    memory: int = 2**28


IMAGE_MEMORY = 3 * 2**30
"""A few kilobytes may be an image of 89 million pixels of one colour, which is not refused."""


class Canary:
    """Leaves a file behind if its pickle is ever executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def _reader(path, read):
    def run(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read(path)

    return run


def _spliced(mutate, seeds):
    return lambda rng, data: mutate(rng, data, choice(rng, seeds))


# Weights


def _tensors():
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "bn1.running_var": np.ones(4, np.float16),
        "bn1.num_batches_tracked": np.zeros((), np.int64),
        "fc.weight": rng.normal(size=(3, 4)),
    }


def _resnet20():
    from helpers.random_models import variables_of
    from medmerge_jax.weights import variables_to_torch

    return variables_to_torch("resnet20", variables_of(0))


def _text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _number(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def torch_pickle(tensors):
    """What torch.save pickles of a state dict, in which each tensor has a storage."""
    kinds = {"float32": "Float", "float64": "Double", "float16": "Half", "int64": "Long"}
    parts = [b"\x80\x02}("]
    for key, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(stride // tensor.itemsize for stride in tensor.strides)
        storage = f"ctorch\n{kinds[str(tensor.dtype)]}Storage\n".encode() + _text(str(key))
        storage = b"(" + _text("storage") + storage + _text("cpu") + _number(tensor.size) + b"tQ"
        rest = b"K\0" + _number(tensor.shape) + _number(strides) + b"\x89ccollections\n"
        parts.append(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest)
        parts.append(b"OrderedDict\n)RtR")
    return b"".join([*parts, b"u."])


def torch_zip(tensors, data=None):
    members = [("archive/data.pkl", torch_pickle(tensors) if data is None else data)]
    members += [("archive/byteorder", b"little"), ("archive/version", b"3\n")]
    members += [(f"archive/data/{key}", one.tobytes()) for key, one in enumerate(tensors.values())]
    return zip_bytes(members)


def torch_stream(tensors, data=None):
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    keys = [str(key) for key in range(len(tensors))]
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    data = torch_pickle(tensors) if data is None else data
    storages = [struct.pack("<q", one.size) + one.tobytes() for one in tensors.values()]
    return b"".join([*head, data, pickle.dumps(keys, 2), *storages])


def _attacks(folder):
    canary = Canary(folder / "canary")
    return [pickle.dumps({"state_dict": {"a": canary}}, protocol) for protocol in range(6)]


def _read_tensors(path):
    from medmerge_jax.weights import read_tensors

    for tensor in read_tensors(path).values():
        assert isinstance(tensor, np.ndarray) and not tensor.dtype.hasobject


def safetensors_file(folder):
    seeds = [safetensors.numpy.save(_tensors(), {"format": "pt"})]

    def mutate(rng, data):
        if rng.random() < 0.5:
            return mutate_bytes(rng, data)
        (length,) = struct.unpack("<Q", data[:8])
        header = mutate_json(rng, json.loads(data[8 : 8 + length]))
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return Case(seeds, mutate, _reader(folder / "a.safetensors", _read_tensors))


def pth(folder):
    tensors = _tensors()
    seeds = [torch_zip(tensors)]
    attacks = [torch_zip(tensors, data) for data in _attacks(folder)]
    read = _reader(folder / "a.pth", _read_tensors)
    return Case(seeds, _spliced(mutate_zip, attacks), read, attacks)


def pth_stream(folder):
    tensors = _tensors()
    seeds = [torch_stream(tensors)]
    attacks = [torch_stream(tensors, data) for data in _attacks(folder)]
    read = _reader(folder / "a.pt", _read_tensors)
    return Case(seeds, _spliced(mutate_bytes, attacks), read, attacks)


def _npz(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def npz(folder):
    objects = np.array([Canary(folder / "canary")], object)
    seeds = [
        _npz(**_tensors()),
        _npz(np.savez_compressed, **_tensors()),
        _npz(a=np.asfortranarray(np.ones((3, 4)))),
    ]
    read = _reader(folder / "a.npz", _read_tensors)
    return Case(seeds, _spliced(mutate_zip, seeds), read, [_npz(a=objects)])


CARD = {
    "architecture": "resnet20", "num_classes": 4, "classes": ["a", "b", "c", "d"],
    "image_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "multilabel": False,
    "parents": {"b": {"source": "random"}}, "recipe": "ft", "data_fingerprint": "0" * 64,
    "origin": "here", "sha256": "0" * 64, "versions": {"jax": "0.10"}, "licence": "mit",
    "results": {"data": "eyes", "split": "test", "metrics": {"accuracy": 0.5}},
}  # fmt: skip

TIMM = {
    "architecture": "resnet20", "num_classes": 4, "num_features": 64,
    "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
        "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic", "num_classes": 4,
        "label_names": ["a", "b", "c", "d"],
    },
}  # fmt: skip


def model(folder):
    """A model directory, of which the weights' header or the card is damaged; then a merge."""
    from medmerge_jax.weights import load_model, load_parent, load_weights, save_model

    weights = safetensors.numpy.save(_resnet20(), {"format": "pt"})
    (length,) = struct.unpack("<Q", weights[:8])
    header, rest = json.loads(weights[8 : 8 + length]), weights[8 + length :]

    def mutate(rng, seed):
        kind = rng.random()
        if kind < 0.6:
            return weights, mutate_json(rng, CARD)
        if kind < 0.7:
            return mutate_bytes(rng, weights), b"{}"
        changed = mutate_json(rng, header)
        return struct.pack("<Q", len(changed)) + changed + rest, b"{}"

    def read(files):
        (folder / "model.safetensors").write_bytes(files[0])
        (folder / "model.json").write_bytes(files[1])
        load_weights("resnet20", folder / "model.safetensors")
        _, card = load_parent(folder, "resnet20")
        model_of_it = load_model(folder)
        parents = {**card, "file": "weights"}
        save_model(
            folder / "copy", dataclasses.replace(model_of_it, provenance={"parents": parents})
        )
        use_card(card)

    return Case([(weights, json.dumps(CARD).encode())], mutate, read)


def timm(folder):
    """timm's config.json beside weights."""
    from medmerge_jax.weights import load_model, save_model

    weights = safetensors.numpy.save(_resnet20(), {"format": "pt"})

    def read(data):
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes(data)
        save_model(folder / "copy", load_model(folder))

    seeds = [json.dumps(TIMM).encode()]
    return Case(seeds, lambda rng, data: mutate_json(rng, json.loads(data)), read)


def use_card(card):
    """What the program does with a parent's card."""
    from medmerge_jax.data.hashing import find_hashes
    from medmerge_jax.recipes.inputs import _provenance

    _provenance({"source": "a folder", **card})
    find_hashes(Path(card["file"]), card.get("data_fingerprint"))


# Images


def _read_image(path):
    from medmerge_jax.images.decode import read_image

    assert read_image(path, 16).shape == (16, 16, 3)
    read_image(path, 8, "crop")


def _image(format, pixels, mode=None, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def jpeg(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    seeds = [
        _image("JPEG", small_layouts.noise(0, 40, 60)),
        _image("JPEG", small_layouts.noise(1, 40, 60), progressive=True, exif=exif),
        _image("JPEG", small_layouts.noise(2, 200, 300), "L", quality=30),
        _image("JPEG", small_layouts.noise(3, 24, 24), "CMYK", icc_profile=b"x" * 200),
    ]
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    read = _reader(folder / "a.jpg", _read_image)
    return Case(seeds, _spliced(mutate_bytes, seeds), read, [program], IMAGE_MEMORY)


def png(folder):
    colour = small_layouts.noise(0, 40, 60)
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    seeds = [
        _image("PNG", colour),
        _image("PNG", colour, "RGBA"),
        _image("PNG", colour, "P", transparency=3),
        _image("PNG", colour, "1"),
        _image("PNG", colour, "L", dpi=(72, 72)),
        file.getvalue(),
    ]
    read = _reader(folder / "a.png", _read_image)
    return Case(seeds, _spliced(mutate_png, seeds), read, memory=IMAGE_MEMORY)


def dicom_file(pixels, syntax=None, **elements):
    import pydicom
    from pydicom.encaps import encapsulate

    dataset = pydicom.Dataset()
    dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    bits = 8 * pixels.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = 0
    compressed = elements.pop("compressed", None)
    dataset.PixelData = encapsulate([compressed]) if compressed else pixels.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _dicom_seeds():
    import pydicom
    from pydicom import uid

    grey, deep = small_layouts.noise(0, 20, 30, 1), small_layouts.noise(1, 20, 30, 1).astype("<u2")
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 8])
    table.add_new("LUTData", "US", list(range(256)))
    seeds = [
        dicom_file(grey, ModalityLUTSequence=pydicom.Sequence([table])),
        dicom_file(
            deep, WindowCenter="100", WindowWidth="50", RescaleSlope="2", RescaleIntercept="-1"
        ),
        dicom_file(deep, uid.ImplicitVRLittleEndian, VOILUTFunction="SIGMOID"),
        dicom_file(small_layouts.noise(2, 20, 30)),
        dicom_file(grey, uid.JPEGBaseline8Bit, compressed=_image("JPEG", grey)),
        dicom_file(grey, uid.JPEG2000Lossless, compressed=_image("JPEG2000", grey)),
    ]
    dataset = pydicom.dcmread(io.BytesIO(seeds[3]))
    dataset.compress(uid.RLELossless)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return [*seeds, file.getvalue()]


def dicom(folder):
    import pydicom

    from medmerge_jax.images.dicom import read_dicom

    seeds = _dicom_seeds()

    def mutate(rng, data):
        if rng.random() < 0.6:
            return mutate_bytes(rng, data, choice(rng, seeds))
        dataset = pydicom.dcmread(io.BytesIO(data))
        element = choice(rng, list(dataset))
        numbers = (*range(5), 8, 16, 32, 255, 65535, -1)
        others = ("", "1", "nan", "1e400", "x", None, [1, 2], b"", rng.bytes(9))
        value = choice(rng, numbers + others)
        if rng.random() < 0.2:
            del dataset[element.tag]
        else:
            element._value = value  # unchecked
        file = io.BytesIO()
        try:
            dataset.save_as(file, enforce_file_format=False)
        except Exception:  # cannot be written
            return mutate_bytes(rng, data)
        return file.getvalue()

    return Case(seeds, mutate, _reader(folder / "a.dcm", read_dicom), memory=IMAGE_MEMORY)


# Tables and layouts


def table(folder):
    """`image_table` on a table of each kind of labels."""
    from medmerge_jax.data import image_table

    names = [f"{name}.png" for name in "abcdefghijkl"]
    for number, name in enumerate([*names, "sub/a.png", "sub/m.png"]):
        small_layouts.write_png(folder / "images" / name, small_layouts.noise(number, 4, 4))
    (folder / "secret.png").write_bytes((folder / "images/a.png").read_bytes())
    indices = list(enumerate(names[1:]))
    splits = ("train", "val", "test")
    tables = [
        (
            ["image,label,split,group"],
            [f"{n},{i % 2},{splits[i % 3]},{i // 6}" for i, n in indices],
        ),
        (["filename,class"], [f"images/{n},{'ab'[i % 2]}" for i, n in indices]),
        (["image,x,y"], [f"{n},{i % 2}.0,{1 - i % 2}.0" for i, n in indices]),
        (["image,x,y,"], [f"{n},{i % 2},,"  for i, n in indices]),
    ]  # fmt: skip
    columns = [(), (), ("x", "y"), ("x", "y")]
    seeds = [
        ("\n".join([*head, *rows, ""]).encode(), index) for index, (head, rows) in enumerate(tables)
    ]

    def mutate(rng, seed):
        return mutate_table(rng, seed[0]), seed[1]

    def read(seed):
        data, index = seed
        (folder / "a.csv").write_bytes(data)
        found = image_table(
            folder / "a.csv", folder / "images", label_columns=columns[index], multilabel=index == 3
        )
        _check_paths(found, folder / "images")

    return Case(seeds, mutate, read)


def _check_paths(dataset, root):
    for split in dataset.splits.values():
        for path in split.paths:
            assert path.resolve().is_relative_to(root.resolve()), path


def _layout(name, write, tables, variant="", mutate=mutate_table):
    def case(folder):
        from medmerge_jax.data.official import official_data_set

        root = folder / "layout"
        write(root)
        original = {table: (root / table).read_bytes() for table in tables}
        seeds = list(original.items())
        attacks = []
        if name == "cifar10" and mutate is mutate_bytes:
            attack = {"data": Canary(folder / "canary"), "labels": [0]}
            attacks = [(tables[0], pickle.dumps(attack, protocol)) for protocol in range(6)]

        def read(seed):
            (root / seed[0]).write_bytes(seed[1])
            try:
                dataset = official_data_set(
                    name, root, variant=variant, split_table=_split(root, seed[0])
                )
            finally:
                (root / seed[0]).write_bytes(original[seed[0]])
            _check_paths(dataset, root)

        return Case(seeds, lambda rng, seed: (seed[0], mutate(rng, seed[1])), read, attacks)

    return case


def _split(root, name):
    return root / name if name == "splits.csv" else ""


def _aptos_with_splits(root):
    expected = small_layouts.aptos2019(root)
    rows = [
        f"{name}.png,{one.label},{('train', 'val', 'test')[i % 3]}"
        for i, (name, one) in enumerate(expected.items())
    ]
    small_layouts.write_text(root / "splits.csv", ["filename,class,split", *rows])


def _isic(part, kind="GroundTruth"):
    stem = f"ISIC2018_Task3_{part}_{kind}"
    return f"{stem}/{stem}.csv"


def _cifar_archive(root):
    small_layouts.cifar10(root)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    for path in (root / "cifar-10-batches-py").iterdir():
        path.unlink()


def _mutate_archive(rng, data):
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    return gzip.compress(mutate_bytes(rng, gzip.decompress(data)), 1)


def hashes(folder):
    from medmerge_jax.data.hashing import ImageHashes, find_overlap, load_hashes
    from medmerge_jax.weights.layout import HASHES_FILE, read_hashes, write_hashes

    rng = np.random.default_rng(0)
    ours = ImageHashes(
        tuple(f"{i}.png" for i in range(9)), ("train",) * 9,
        rng.integers(0, 2**63, (9, 4)).astype(np.uint64),
        rng.integers(0, 2**63, (9, 2)).astype(np.uint64),
        "16 px, squash",
    )  # fmt: skip
    path, seeds = folder / HASHES_FILE, []
    for save in (
        lambda: ours.save(path, "f" * 64),
        lambda: write_hashes(path, ours.perceptual, "f" * 64),
    ):
        save()
        seeds.append(path.read_bytes())

    def read(path):
        read_hashes(path.with_name("model.safetensors"), "f" * 64)
        found, _ = load_hashes(path)
        find_overlap(ours, found.training())
        ours.inheriting([found])

    return Case(seeds, mutate_zip, _reader(path, read))


# Configs and run directories


def config(folder):
    """A config of any content, as an unlocked ConfigDict and by the names of its fields."""
    import ml_collections

    from medmerge_jax.config import default_config
    from medmerge_jax.studies.checks import check_config

    whole = default_config().to_dict()
    whole["merge_ft"]["options"] = {"alpha": 0.5}
    whole["recipe"], whole["compare"]["recipes"] = "compare", ("merge_ft", "ft")
    seeds = [
        default_config().to_dict(),
        whole,
        {**whole, "sources": {"b": default_config().to_dict()}},
    ]

    def values(rng):
        others = (b"x", (), (1, 2), {1, 2}, np.float32(1), np.zeros(2), print, 1j, Path("x"))
        return strange(rng) if rng.random() < 0.7 else choice(rng, others)

    def read(tree):
        try:
            made = ml_collections.ConfigDict(tree)
        except Exception:  # is no config in the first place
            raise UserError("no config") from None
        check_config(made)

    def mutate(rng, tree):
        if rng.random() < 0.8:
            return mutate_tree(rng, tree, values)
        # Nearly all that is strange is refused; another number of epochs is not.
        group = choice(rng, ("lp", "ft", "fgg"))
        key = choice(rng, [k for k, v in tree[group].items() if type(v) in (int, float)])
        return {**tree, group: {**tree[group], key: tree[group][key] + 1}}

    return Case(seeds, mutate, read)


def run_directory(folder):
    """config.json, metrics.jsonl and results.json, as resuming reads them."""
    from medmerge_jax.storage.run_directory import RunDirectory

    recorded = {"config": {"a": 1, "b": {"c": [1, 2]}}, "data_fingerprint": "0" * 64,
                "parent_fingerprints": {"b": "1" * 64}, "versions": {"jax": "0.10"}}  # fmt: skip
    metrics = {"accuracy": 0.5, "macro_f1": None, "num_examples": 4}
    results = {
        "recipe": "ft", "start": "b", "architecture": "resnet20", "seed": 0, "val": metrics,
        "test": metrics, "wall_seconds": 1.5, "stages": [{"name": "ft", "epochs": 2}],
        "data": {
            "name": "a", "classes": ["a", "b"], "fingerprint": "0", "counts": {"train": {"a": 1}},
        },
        "parents": {"b": {"source": "random"}}, "versions": {"jax": "0.10"},
    }  # fmt: skip
    rows = [{"recipe": "ft", "start": "b", "accuracy": {"mean": 0.5, "std": 0.1, "values": [0.5]}}]
    record = {"stage": "ft", "epoch": 1, "loss": 0.5, "images_per_second": 10.0}
    seeds = [
        ("config.json", recorded), ("results.json", results), ("metrics.jsonl", record),
        ("results.json", {"recipe": "compare", "table": rows, "seeds": [0, 1]}),
    ]  # fmt: skip

    def mutate(rng, seed):
        return seed[0], mutate_json(rng, seed[1]) + b"\n"

    def read(seed):
        name, data = seed
        directory = RunDirectory(folder / "run")
        directory.path.mkdir(exist_ok=True)
        for path in directory.path.iterdir():
            path.unlink()
        (directory.path / name).write_bytes(
            data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n"
        )
        read_run(directory, recorded)

    return Case(seeds, mutate, read)


def read_run(directory, recorded):
    directory.check_config(recorded["config"])
    directory.record_config(recorded["config"], "0" * 64, {"b": "1" * 64}, {})
    directory.records()
    directory.rewind("ft", 0)
    read_results(directory)


def read_results(directory):
    """As `recipes.run` does with a finished run."""
    from medmerge_jax.analysis import results_text
    from medmerge_jax.recipes.run import finished

    results = finished(directory)
    if results is not None:
        results_text(results)


LAYOUTS = {
    "aptos2019": ("aptos2019", _aptos_with_splits, ("train.csv", "splits.csv")),
    "eyepacs": ("eyepacs", small_layouts.eyepacs, ("trainLabels.csv", "retinopathy_solution.csv")),
    "ham10000": (
        "ham10000", small_layouts.ham10000_challenge,
        (_isic("Training"), _isic("Test"), "ISIC2018_Task3_Training_LesionGroupings.csv"),
    ),
    "ham10000_dataverse": (
        "ham10000", small_layouts.ham10000_dataverse, ("HAM10000_metadata.csv",)
    ),
    "isic2019": (
        "isic2019", small_layouts.isic2019,
        ("ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"),
    ),
    "chexpert": ("chexpert", small_layouts.chexpert, ("train.csv", "valid.csv", "test.csv")),
    "rsna": (
        "rsna_pneumonia", small_layouts.rsna_pneumonia,
        ("stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"),
    ),
    "cifar": (
        "cifar10", small_layouts.cifar10,
        ("cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"), "", mutate_bytes,
    ),
    "cifar_archive": ("cifar10", _cifar_archive, ("cifar-10-python.tar.gz",), "", _mutate_archive),
    "pneumoniamnist": (
        "medmnist", small_layouts.pneumoniamnist, ("pneumoniamnist.npz",), "", mutate_zip
    ),
    "chestmnist": ("medmnist", small_layouts.chestmnist, ("chestmnist_64.npz",), "", mutate_zip),
}  # fmt: skip

CASES = {
    "safetensors": safetensors_file,
    "pth": pth,
    "pth_stream": pth_stream,
    "npz": npz,
    "model": model,
    "timm": timm,
    "jpeg": jpeg,
    "png": png,
    "dicom": dicom,
    "table": table,
    **{name: _layout(*arguments) for name, arguments in LAYOUTS.items()},
    "hashes": hashes,
    "config": config,
    "run_directory": run_directory,
}
