import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.weights import read_tensors, write_safetensors
from medmerge_jax.weights.files import read_state_dicts

TENSORS = {
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.zeros((), np.int64),
    "half": np.array([1, 2], np.float16),
    "brain": np.array([1, 2], ml_dtypes.bfloat16),
    "flag": np.array([True]),
    "empty": np.zeros((0, 3)),
}


def test_safetensors_there_and_back(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    write_safetensors(path, TENSORS)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_tensors_of_safetensors_are_read_when_they_are_asked_for(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2)})
    (tensors,) = read_state_dicts(path).values()
    a, b = tensors["a"], tensors["b"]
    assert (a.shape, a.dtype, a.ndim) == ((2, 3), np.float64, 2)
    np.testing.assert_array_equal(a, [[0, 1, 2], [3, 4, 5]])
    assert np.asarray(a) is not np.asarray(a)  # nothing is kept
    write_safetensors(path, {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(2)})
    with pytest.raises(UserError, match=r"x\.safetensors: was changed while its tensor 'b' was"):
        np.asarray(b)
    path.unlink()
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be read \(No such file"):
        np.asarray(b)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(2)})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(path, {"a": np.ones(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, a=np.arange(5.0), b=np.zeros((2, 2)))
    else:
        write_safetensors(path, {"a": np.arange(5.0), "b": np.zeros((2, 2))})
    whole = path.read_bytes()
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"x\{suffix}: (cannot be read|is damaged)"):
            read_tensors(path)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], object))
    with pytest.raises(UserError, match=r"x\.npz: a holds pickled objects"):
        read_tensors(tmp_path / "x.npz")


def test_single_array_named_npz_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(2))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"or no \.npz file"):
        read_tensors(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", ["", ".pth", ".pth.tar", ".ckpt", ".bin", ".PTH", ".npz"])
@pytest.mark.parametrize("kind", ["safetensors", "npz", "zip", "stream"])
def test_the_content_decides_not_the_suffix(torch, tmp_path, kind, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz" and kind != "npz":
        pytest.skip("what is called .npz is read as such")
    if kind == "safetensors":
        write_safetensors(path, {"a": np.ones(3, np.float32)})
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.ones(3, np.float32))
    else:
        new = kind == "zip"
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=new)
    np.testing.assert_array_equal(read_tensors(path)["a"], [1, 1, 1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89HDF\r\n", "a file of HDF5.*Weights of PyTorch are wanted"),
        (b"\x1f\x8b\x08", "compressed by gzip. Unpack it"),
        (b"<!DOCTYPE html>", "a page of the web.*Fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (bytes(257) + b"ustar" + bytes(250), "a tar archive.*Unpack it"),
        (b"", r"no file of torch\.save"),
        (b"some text", r"no file of torch\.save"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, content, words):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"x.pth: .*{words}"):
        read_tensors(path)
    with pytest.raises(UserError, match=r"y\.pth: there is no such file"):
        read_tensors(tmp_path / "y.pth")


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_archives_of_very_many_entries_are_refused_at_once(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    whole = path.read_bytes()
    start = whole.index(b"PK\x01\x02")
    entry, end = whole[start : whole.index(b"PK\x05\x06")], whole[whole.index(b"PK\x05\x06") :]
    listed = entry * 200_000
    end = end[:12] + struct.pack("<I", len(listed)) + end[16:]
    path.write_bytes(whole[:start] + listed + end)
    begin = time.process_time()
    with pytest.raises(UserError, match=r"its list of entries has .* refused"):
        read_tensors(path)
    assert time.process_time() - begin < 2


def test_several_dicts_of_tensors_have_their_places_in_the_names(torch, tmp_path):
    content = {"a": {"x": torch.ones(1)}, "b": {"c": {"x": torch.zeros(1)}}, "epoch": 3}
    torch.save(content, tmp_path / "x.ckpt")
    assert read_tensors(tmp_path / "x.ckpt").keys() == {"a.x", "b.c.x"}
