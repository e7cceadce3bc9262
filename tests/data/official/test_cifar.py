"""CIFAR's official Python archives: small copies with the same files, keys and pickles."""

import builtins
import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from medmerge_jax.data.official.cifar import CIFAR10, CIFAR100, read_cifar10, read_cifar100
from medmerge_jax.errors import UserError

NAMES = ["airplane", "automobile", "bird", "cat"]
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
PER_BATCH = 8


# A pickle as Python 2 and its numpy wrote them: protocol 2, text and arrays as byte strings,
# dicts and lists with memo, `numpy.core.multiarray._reconstruct` for arrays.
def number(value):
    return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else long_text(value)


def long_text(value):
    return b"T" + struct.pack("<i", len(value)) + value


def strings(values):
    return b"](" + b"".join(map(text, values)) + b"e"


def numbers(values):
    return b"](" + b"".join(map(number, values)) + b"e"


def array(values, fortran=False, dtype="u1"):
    raw = values.tobytes(order="F" if fortran else "C")
    shape = number(values.shape[0]) + number(values.shape[1]) + b"\x86"
    state = b"(" + number(1) + shape
    state += b"cnumpy\ndtype\n" + text(dtype) + number(0) + number(1) + b"\x87R"
    state += b"(" + number(3) + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + number(0) + b"tb"
    state += (b"\x88" if fortran else b"\x89") + long_text(raw) + b"t"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85"
    return made + text("b") + b"\x87R" + state + b"b"


def dictionary(**values):
    items = b"".join(text(key) + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


def images(seed, count=PER_BATCH):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def cifar10_files(**changes):
    files = {}
    for seed, name in enumerate([*BATCHES, "test_batch"]):
        labels = [(row + seed) % len(NAMES) for row in range(PER_BATCH)]
        files[name] = dictionary(
            batch_label=text(f"training batch {seed + 1} of 5"),
            labels=numbers(labels),
            data=array(images(seed)),
            filenames=strings([f"cat_s_{row:06d}.png" for row in range(PER_BATCH)]),
        )
    files["batches.meta"] = dictionary(
        num_cases_per_batch=number(PER_BATCH), label_names=strings(NAMES), num_vis=number(3072)
    )
    files["readme.html"] = b"<meta http-equiv=refresh>"
    return {name: data for name, data in (files | changes).items() if data is not None}


def as_folder(tmp_path, files, folder="cifar-10-batches-py"):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, data in files.items():
        (tmp_path / folder / name).write_bytes(data)
    return tmp_path / folder


def as_archive(tmp_path, files, folder="cifar-10-batches-py", name="cifar-10-python.tar.gz"):
    # In another order than they are read: the official archive is not sorted either.
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        home = tarfile.TarInfo(folder)
        home.type = tarfile.DIRTYPE
        archive.addfile(home)
        for member, data in sorted(files.items(), reverse=True):
            info = tarfile.TarInfo(f"{folder}/{member}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return tmp_path / name


LAYOUTS = {"folder": as_folder, "archive": as_archive}


def check_cifar10(records, files_of):
    """Every label, split and pixel; `files_of(name)` is the path of a batch's images."""
    assert records.classes == tuple(NAMES)
    assert records.groups is None
    train = 5 * PER_BATCH
    assert records.ids == tuple(
        [f"train_{row:05d}" for row in range(train)] + [f"test_{row:05d}" for row in range(8)]
    )
    for seed, name in enumerate([*BATCHES, "test_batch"]):
        rows = slice(seed * PER_BATCH, (seed + 1) * PER_BATCH)
        expected = [(row + seed) % len(NAMES) for row in range(PER_BATCH)]
        assert list(records.labels[rows]) == expected
        assert set(records.paths[rows]) == {files_of(name)}
        planes = images(seed).reshape(-1, 3, 32, 32)
        for channel in range(3):
            np.testing.assert_array_equal(
                records.pixels[rows][..., channel], planes[:, channel], strict=True
            )
    assert np.issubdtype(records.labels.dtype, np.integer)
    assert records.pixels.flags.c_contiguous  # an image is read in one go
    splits = np.array(records.splits)
    assert set(splits[train:]) == {"test"}
    # A tenth, one image of each class.
    assert sorted(records.labels[splits == "val"]) == [0, 1, 2, 3]
    assert np.count_nonzero(splits == "train") == train - 4


def test_unpacked_folder(tmp_path):
    folder = as_folder(tmp_path, cifar10_files())
    check_cifar10(read_cifar10(tmp_path), lambda name: folder / name)
    check_cifar10(read_cifar10(folder), lambda name: folder / name)


def test_archive_as_downloaded(tmp_path):
    path = as_archive(tmp_path, cifar10_files())
    check_cifar10(read_cifar10(tmp_path), lambda name: path)
    check_cifar10(read_cifar10(path), lambda name: path)


def test_the_folder_goes_before_the_archive(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not read")
    folder = as_folder(tmp_path, cifar10_files())
    check_cifar10(read_cifar10(tmp_path), lambda name: folder / name)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [str, str.encode])
def test_written_again_by_python_3(tmp_path, protocol, kind):
    files = cifar10_files()
    for seed, name in enumerate([*BATCHES, "test_batch"]):
        labels = [(row + seed) % len(NAMES) for row in range(PER_BATCH)]
        content = {kind("labels"): labels, kind("data"): images(seed)}
        files[name] = pickle.dumps(content, protocol=protocol)
    content = {kind("label_names"): [kind(name) for name in NAMES]}
    files["batches.meta"] = pickle.dumps(content, protocol=protocol)
    folder = as_folder(tmp_path, files)
    check_cifar10(read_cifar10(tmp_path), lambda name: folder / name)


def test_the_pickles_here_are_those_of_python_2(tmp_path):
    """Python's own unpickler and numpy read them as they read the official files."""
    with pytest.MonkeyPatch.context() as patch:
        core = pytest.importorskip("numpy._core.multiarray")
        patch.setitem(__import__("sys").modules, "numpy.core.multiarray", core)
        content = pickle.loads(cifar10_files()["data_batch_2"], encoding="bytes")
    assert list(content) == [b"batch_label", b"labels", b"data", b"filenames"]
    np.testing.assert_array_equal(content[b"data"], images(1), strict=True)
    assert content[b"labels"] == [1, 2, 3, 0, 1, 2, 3, 0]


def test_an_array_stored_column_by_column(tmp_path):
    files = cifar10_files()
    labels = [(row + 2) % len(NAMES) for row in range(PER_BATCH)]
    files["data_batch_3"] = dictionary(labels=numbers(labels), data=array(images(2), fortran=True))
    folder = as_folder(tmp_path, files)
    check_cifar10(read_cifar10(tmp_path), lambda name: folder / name)


def test_validation_images_are_always_the_same(tmp_path):
    as_folder(tmp_path, cifar10_files())
    assert read_cifar10(tmp_path).splits == read_cifar10(tmp_path).splits


def cifar100_files(**changes):
    files = {}
    for seed, (name, count) in enumerate((("train", 20), ("test", 6))):
        files[name] = dictionary(
            filenames=strings([f"x_{row}.png" for row in range(count)]),
            batch_label=text("training batch 1 of 1"),
            fine_labels=numbers([row % 3 for row in range(count)]),
            coarse_labels=numbers([row % 2 for row in range(count)]),
            data=array(images(seed, count)),
        )
    files["meta"] = dictionary(
        fine_label_names=strings(["apple", "aquarium_fish", "baby"]),
        coarse_label_names=strings(["aquatic_mammals", "fish"]),
    )
    files["file.txt~"] = b""
    return files | changes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar100_has_fine_labels(tmp_path, layout):
    LAYOUTS[layout](
        tmp_path, cifar100_files(), "cifar-100-python",
        **({"name": "cifar-100-python.tar.gz"} if layout == "archive" else {}),
    )  # fmt: skip
    records = CIFAR100.read(tmp_path, "")
    assert records.classes == ("apple", "aquarium_fish", "baby")
    assert list(records.labels) == [row % 3 for row in range(20)] + [row % 3 for row in range(6)]
    assert list(records.splits).count("val") == 3  # at least one of each class
    assert list(records.splits)[20:] == ["test"] * 6
    pixels = np.concatenate([images(0, 20), images(1, 6)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(records.pixels, np.moveaxis(pixels, 1, -1))


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"neither cifar-10-python\.tar\.gz nor cifar-10-batches"):
        CIFAR10.read(tmp_path, "")
    with pytest.raises(UserError, match=r"neither cifar-100-python\.tar\.gz"):
        read_cifar100(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_batch(tmp_path, layout):
    LAYOUTS[layout](tmp_path, cifar10_files(data_batch_4=None), "cifar-10-batches-py")
    if layout == "folder":
        (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink(missing_ok=True)
    with pytest.raises(UserError, match="data_batch_4"):
        read_cifar10(tmp_path)


def batch(labels=None, data=None, **more):
    labels = [row % 4 for row in range(PER_BATCH)] if labels is None else labels
    return dictionary(
        labels=labels if isinstance(labels, bytes) else numbers(labels),
        data=array(images(0)) if data is None else data, **more,
    )  # fmt: skip


MALFORMED = {
    "no labels": (dictionary(data=array(images(0))), "there is no 'labels'"),
    "no data": (dictionary(labels=numbers([0])), "there is no 'data'"),
    "label too large": (batch([0, 1, 2, 3, 0, 4, 0, 0]), "row 5: the label is 4; .* 0 to 3"),
    "label text": (batch(strings(["cat"] * 8)), "row 0: the label is b?'cat'"),
    "label true": (batch(b"](" + b"\x88" * 8 + b"e"), "row 0: the label is True"),
    "too few labels": (batch([0, 1]), "2 labels for 8 images"),
    "labels no list": (batch(text("abc")), "no list of labels for 8 images"),
    "data no array": (batch(data=text("abc")), "'data' is bytes"),
    "other type": (batch(data=array(images(0), dtype="i1")), "array of type 'i1'; u1"),
    "other shape": (batch(data=array(images(0)[:, :3000])), r"\(8, 3000\); \(n, 3072\)"),
    "short data": (batch(data=array(images(0)).replace(b"K\x08", b"K\x09", 1)), "9 images have"),
    "no dict": (b"\x80\x02]q\x00.", "holds list; a dict is wanted"),
    "empty": (b"", "damaged or incomplete"),
    "no pickle": (b"<html>404 not found</html>", "damaged or incomplete"),
    "array modified": (batch(data=array(images(0)) + b"Nb"), "refused|damaged"),
    "array without content": (
        batch(
            data=b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            + number(0) + b"\x85" + text("b") + b"\x87R"
        ),
        "without content",
    ),
    "other global": (batch(extra=b"cnumpy\nfromfile\n"), r"asks for numpy\.fromfile.*refused"),
    "ndarray called": (batch(extra=b"cnumpy\nndarray\n)R"), r"calls numpy\.ndarray; refused"),
    "global modified": (batch(extra=b"cnumpy\nndarray\n}b"), r"modifies numpy\.ndarray; refused"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "holds NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_malformed_batches(tmp_path, case, layout):
    data, message = MALFORMED[case]
    LAYOUTS[layout](tmp_path, cifar10_files(data_batch_1=data))
    with pytest.raises(UserError, match=message) as caught:
        read_cifar10(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "data_batch_1" in str(caught.value)


def test_names_that_are_none(tmp_path):
    as_folder(tmp_path, cifar10_files(**{"batches.meta": dictionary(label_names=numbers([1]))}))
    with pytest.raises(UserError, match=r"batches\.meta: 'label_names' is list; a list of names"):
        read_cifar10(tmp_path)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CANARY = "MEDMERGE_TEST_CANARY"


def trip(*_):
    os.environ[CANARY] = "tripped"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "attack",
    [
        Attack(trip, 1),
        Attack(os.putenv, CANARY, "tripped"),
        Attack(exec, f"import os; os.environ[{CANARY!r}] = 'tripped'"),
        Attack(builtins.eval, f"__import__('os').environ.setdefault({CANARY!r}, 'tripped')"),
        Attack(getattr, "a", "upper"),
    ],
    ids=["function", "system", "exec", "eval", "getattr"],
)
def test_code_is_refused_and_never_runs(tmp_path, monkeypatch, attack, protocol, layout):
    monkeypatch.delenv(CANARY, raising=False)
    content = {"labels": [0], "data": attack}
    files = cifar10_files(data_batch_3=pickle.dumps(content, protocol=protocol))
    LAYOUTS[layout](tmp_path, files)
    with pytest.raises(UserError, match=r"data_batch_3: its pickle asks for .*refused"):
        read_cifar10(tmp_path)
    assert CANARY not in os.environ


def test_the_canary_works(monkeypatch):
    monkeypatch.delenv(CANARY, raising=False)
    pickle.loads(pickle.dumps(Attack(exec, f"import os; os.environ[{CANARY!r}] = 'tripped'")))
    assert os.environ[CANARY] == "tripped"


def test_a_truncated_archive_is_one_user_error(tmp_path):
    path = as_archive(tmp_path, cifar10_files())
    whole = path.read_bytes()
    for length in [0, 1, 5, 10, 100, *range(1000, len(whole) - 8, len(whole) // 9)]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz"):
            read_cifar10(tmp_path)


def test_a_truncated_batch_is_one_user_error(tmp_path):
    folder = as_folder(tmp_path, cifar10_files())
    whole = (folder / "test_batch").read_bytes()
    for length in range(0, len(whole), len(whole) // 23):
        (folder / "test_batch").write_bytes(whole[:length])
        with pytest.raises(UserError, match="test_batch"):
            read_cifar10(tmp_path)


def test_an_archive_of_another_kind(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=f"{path}: is damaged"):
        read_cifar10(tmp_path)
    as_archive(tmp_path, {"data_batch_1.bin": b"binary version"}, "cifar-10-batches-bin")
    with pytest.raises(UserError, match="is it the Python version"):
        read_cifar10(tmp_path)


def test_a_file_of_any_size_is_refused_by_its_header(tmp_path):
    info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    info.size = 2**40
    with gzip.open(tmp_path / "cifar-10-python.tar.gz", "wb") as file:
        file.write(info.tobuf())
    with pytest.raises(UserError, match="more than any file of CIFAR"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_archive_that_unpacks_to_any_size(tmp_path, kind):
    """Other files, that have to be passed by, and names and headers, which tarfile reads whole."""
    info = tarfile.TarInfo("cifar-10-batches-py/readme.html")
    info.size, info.type = 2**32, kind
    with gzip.open(tmp_path / "cifar-10-python.tar.gz", "wb") as file:
        file.write(info.tobuf() + bytes(2**20))
    with pytest.raises(UserError, match="unpacks to more than 536870912 bytes"):
        read_cifar10(tmp_path)


def test_a_file_twice(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    data = cifar10_files()["test_batch"]
    with tarfile.open(path, "w:gz") as archive:
        for folder in ("a", "b"):
            info = tarfile.TarInfo(f"{folder}/test_batch")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match="is there twice"):
        read_cifar10(tmp_path)


def test_the_layouts_say_what_to_download():
    for layout in (CIFAR10, CIFAR100):
        assert layout.homepage in layout.instructions
        assert "@techreport" in layout.citation
        assert layout.licence
