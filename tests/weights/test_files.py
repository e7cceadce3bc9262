import ml_dtypes
import numpy as np
import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.weights import read_tensors, write_safetensors

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


def test_missing_files_and_other_suffixes(tmp_path):
    with pytest.raises(UserError, match=r"x\.npz: there is no such file"):
        read_tensors(tmp_path / "x.npz")
    (tmp_path / "x.h5").touch()
    with pytest.raises(UserError, match=r"the suffix is '\.h5'; wanted \.safetensors"):
        read_tensors(tmp_path / "x.h5")
