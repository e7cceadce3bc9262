"""`.npz` files that claim, hide or unpack to more than they are."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.storage.npz import read_npz


def header(shape, descr="<f4", version=b"\x01\x00"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_every_layout_are_read(tmp_path, rng, save):
    arrays = {
        "floats": rng.normal(size=(3, 4)),
        "columns": np.asfortranarray(rng.normal(size=(3, 4, 2))),
        "scalar": np.array(3, np.int8),
        "empty": np.zeros((0, 5), np.float16),
        "texts": np.array(["a", "ü", "😀"]),
        "one text": np.array("16 px"),
        "big-endian": np.arange(5, dtype=">i4"),
        "texts of others": np.array(["b"]).astype(">U3"),
    }
    save(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "shape", [(2**40,), (2**62, 2**62), (3,), (0, -1), (-2, -2), (2**70, 0, 2**70)], ids=str
)
def test_headers_that_are_not_true(tmp_path, shape):
    path = archive(tmp_path / "a.npz", a=header(shape) + bytes(16))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.npz: "):
        read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        header((1,), "|O") + bytes(8), header((2**60,), "|V0"), header((2**60,), "<U0"),
        header((1,), "<U1") + struct.pack("<I", 0x110000), b"text", b"",
        b"\x93NUMPY\x01\x00\x04\x00((((", b"\x93NUMPY\x01\x00\x88\x13" + b"(" * 5000,
        header((1,)) + bytes(5),
    ],
    ids=lambda content: repr(content[-20:]),
)  # fmt: skip
def test_members_that_are_no_array_of_numbers_or_texts(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.npz: "):
        read_npz(archive(tmp_path / "a.npz", a=content))


def test_other_members(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "text")
    with pytest.raises(UserError, match=r"a\.npz: its member 'notes\.txt' is no array"):
        read_npz(path)


def test_bombs_are_refused_by_their_declared_size(tmp_path):
    content = header((2**22,)) + bytes(2**24)
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, a=content)
    with pytest.raises(UserError, match=r"a\.npz: has \d+ bytes and would unpack to 16777\d+"):
        read_npz(path)
    assert read_npz(archive(path, a=content))["a"].shape == (2**22,)


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions(tmp_path, compression):
    """LZMA may ask for gigabytes before it unpacks anything."""
    path = archive(tmp_path / "a.npz", compression, a=header((1,)) + bytes(4))
    with pytest.raises(UserError, match="compressed in another way"):
        read_npz(path)


def test_an_array_is_no_archive(tmp_path):
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    (tmp_path / "a.npz").write_bytes(file.getvalue())
    with pytest.raises(UserError, match=r"no \.npz file"):
        read_npz(tmp_path / "a.npz")
