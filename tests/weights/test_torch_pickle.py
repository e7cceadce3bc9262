"""Reading `.pth` files of any content: tensors exactly, everything else as one clear error."""

import builtins
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from helpers.parameters import some_slow

from medmerge_jax.errors import UserError
from medmerge_jax.weights.torch_pickle import MAGIC_NUMBER
from medmerge_jax.weights.torch_pickle import read_torch_file as read_state_dicts

LAYOUTS = ["zip", "stream"]


def read_torch_file(path):
    """The only state dict in it."""
    (tensors,) = read_state_dicts(path).values()
    return tensors


def save(torch, content, path, layout):
    torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    return path


def zip_of(data, path, entries=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in entries:
            archive.writestr(name, content)
    return path


def stream_of(data, path, keys=(), storages=b""):
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, protocol=2) for value in (MAGIC_NUMBER, 1001, machine)]
    path.write_bytes(b"".join([*head, data, pickle.dumps(list(keys), protocol=2), storages]))
    return path


def tensor_pickle(shape, strides, offset=0, size=6, kind="FloatStorage", key="0"):
    """The pickle of {"t": tensor}, whatever its sizes, as torch.save would write it."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += number(size) + b"tQ"
    arguments = b"(" + storage + number(offset) + number(shape) + number(strides) + b"\x89}t"
    return b"\x80\x02}" + text("t") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


FLOATS = np.arange(6, dtype=np.float32)


def written(layout, path, data, floats=FLOATS, key="0"):
    """A file with one storage, in either layout."""
    if layout == "zip":
        return zip_of(data, path, [(f"archive/data/{key}", floats.tobytes())])
    storages = struct.pack("<q", floats.size) + floats.tobytes()
    return stream_of(data, path, [key], storages)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_views_and_parameters(torch, tmp_path, layout):
    base = torch.arange(24.0).reshape(4, 6)
    content = OrderedDict(
        transposed=base.t()[1:, ::2],
        shared=base[1],
        expanded=torch.tensor([1.0, 2.0]).expand(3, 2),
        scalar=torch.tensor(3),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.ones(2)),
        **{
            str(dtype).removeprefix("torch."): torch.tensor([0, 1, 2]).to(dtype)
            for dtype in (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
                torch.uint8,
                torch.bool,
                torch.complex64,
            )
        },
    )
    found = read_torch_file(save(torch, content, tmp_path / "x.pth", layout))

    assert found.keys() == content.keys()
    for name, tensor in content.items():
        wanted = tensor.detach()
        assert found[name].shape == tuple(wanted.shape)
        assert str(found[name].dtype) == str(wanted.dtype).removeprefix("torch.")
        if name == "bfloat16":
            wanted = wanted.float()
        np.testing.assert_array_equal(found[name].astype(wanted.numpy().dtype), wanted.numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_are_unwrapped(torch, tmp_path, layout, key):
    state = torch.nn.BatchNorm2d(3).state_dict()
    content = {
        "epoch": 3,
        "best": 0.5,
        "notes": ["a", ("b", None, True)],
        key: state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]},
    }
    found = read_torch_file(save(torch, content, tmp_path / "x.pth", layout))
    assert found.keys() == state.keys()
    np.testing.assert_array_equal(found["running_var"], np.ones(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_python_2(tmp_path, layout):
    """Names are byte strings there, and an OrderedDict a list of lists."""
    tensor = tensor_pickle((2, 3), (3, 1)).removeprefix(b"\x80\x02}X\x01\0\0\0t")
    pairs = b"(](](U\x01t" + tensor.removesuffix(b"s.") + b"eetR."
    data = b"\x80\x02ccollections\nOrderedDict\n" + pairs
    found = read_torch_file(written(layout, tmp_path / "x.pth", data))
    np.testing.assert_array_equal(found["t"], FLOATS.reshape(2, 3))


def test_views_of_storages_as_pytorch_0_1_wrote_them(tmp_path):
    data = tensor_pickle((2,), (1,)).replace(b"K\x06tQ", b"K\x06(X\x01\0\0\x00vK\x03K\x02ttQ")
    path = stream_of(data, tmp_path / "x.pth", ["0"], struct.pack("<q", 6) + FLOATS.tobytes())
    np.testing.assert_array_equal(read_torch_file(path)["t"], [3, 4])


def test_a_view_beyond_its_storage_is_refused_by_name(tmp_path):
    """Five elements and two more, of six."""
    data = tensor_pickle((2,), (1,)).replace(b"K\x06tQ", b"K\x06(X\x01\0\0\x00vK\x05K\x02ttQ")
    path = stream_of(data, tmp_path / "x.pth", ["0"], struct.pack("<q", 6) + FLOATS.tobytes())
    with pytest.raises(UserError, match="starts at 5 with 2 elements, but the storage has 6"):
        read_torch_file(path)


class Canary:
    """Leaves a file behind if its pickle is ever executed."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(canary):
    touch = f"open({str(canary)!r}, 'w').close()"
    system = Canary(os.system, f"touch {canary}")
    return {
        "system": system,
        "eval": Canary(builtins.eval, touch),
        "exec": Canary(builtins.exec, touch),
        "getattr": Canary(getattr, Canary(__import__, "os"), "system"),
        "in_state_dict": {"state_dict": OrderedDict(weight=system)},
        "in_list": {"epoch": [1, (2, {"x": system})]},
        "as_key": {Canary(os.mkdir, str(canary)): 1},
        "loads": Canary(pickle.loads, pickle.dumps(system)),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("layout", [*LAYOUTS, "bare"])
@pytest.mark.parametrize("attack", list(attacks("")))
def test_code_never_runs(tmp_path, attack, layout, protocol):
    canary, path = tmp_path / "canary", tmp_path / "x.pth"
    data = pickle.dumps(attacks(canary)[attack], protocol=protocol)
    if layout == "bare":
        path.write_bytes(data)
    else:
        {"zip": zip_of, "stream": stream_of}[layout](data, path)

    with pytest.raises(UserError, match=r"x\.pth: (it holds|its pickle|this is no file)"):
        read_torch_file(path)
    assert not canary.exists()

    # The attack is real: plain pickle falls for it. ("getattr" only gets hold of the function.)
    if attack != "getattr":
        pickle.loads(data)
        assert canary.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attack", [name for name in attacks("") if name != "as_key"])
def test_tensors_beside_code_are_read_and_it_never_runs(torch, tmp_path, attack, layout):
    canary = tmp_path / "canary"
    content = {"state_dict": {"a": torch.ones(2)}, "beside": attacks(canary)[attack]}
    path = save(torch, content, tmp_path / "x.pth", layout)
    np.testing.assert_array_equal(read_torch_file(path)["a"], [1, 1])
    assert not canary.exists()
    if attack != "getattr":
        torch.load(path, weights_only=False)
        assert canary.exists()


class Setter(dict):
    """Its pickle sets a state, keys and elements, of which each would run code if it were made."""

    def __reduce__(self):
        return (Setter, (), {"x": 1}, iter([1, 2]), iter([("k", 3)]))

    def __setstate__(self, state):
        raise AssertionError("was made")

    __setitem__ = append = extend = __hash__ = __eq__ = __setstate__


def test_what_is_made_of_unknown_classes_stays_inert(torch, tmp_path):
    content = [Setter(), {"weights": {"a": torch.ones(2)}}]
    path = save(torch, {"x": content[0], **content[1]}, tmp_path / "x.pth", "zip")
    assert list(read_state_dicts(path)) == ["weights"]


OPCODE_ATTACKS = {
    # Known globals, used for what they are not.
    "set attributes of a global": b"ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aK\1sb",
    "set slots of a global": b"ctorch._utils\n_rebuild_tensor_v2\nN}X\1\0\0\0aK\1s\x86b",
    "call a storage type": b"ctorch\nFloatStorage\n)R",
    "make an object": b"ccollections\nOrderedDict\n)\x81",
    "make an object with words": b"\x80\x04ccollections\nOrderedDict\n)}\x92",
    "make an object of a storage type": b"ctorch\nFloatStorage\n)\x81",
    "old-style instance": b"(icollections\nUserDict\n",
    "dotted name": b"\x80\x04X\x0b\0\0\0collectionsX\x15\0\0\0OrderedDict.__init__.x\x93",
    "extension registry": b"\x82\x01",
    "huge memo": b"Nr\xff\xff\xff\x7f0}",
    "persistent id of a module": b"(X\6\0\0\0modulectorch\nFloatStorage\nNNtQ",
    "text persistent id": b"Pstorage\n",
    "tensor of a dict": b"ctorch._utils\n_rebuild_tensor_v2\n(}K\0)}\x89}tR",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "parameter of a number": b"ctorch._utils\n_rebuild_parameter\n(K\1\x89}tR",
    "tuple of a number": b"ctorch\nSize\nK\1\x85R",
    "unhashable key": b"}}K\1s",
    "endless key": b"}\x8a\x09" + bytes(8) + b"\x01Ns",
    "no opcode": b"\xff",
    "a number": b"K\1",
    "an empty dict": b"}",
    "a bare global": b"}X\1\0\0\0actorch\nSize\ns",
    "nothing on the stack": b"",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attack", OPCODE_ATTACKS)
def test_misused_opcodes_are_one_clear_error(tmp_path, attack, layout):
    data = b"\x80\x02" + OPCODE_ATTACKS[attack] + b"."
    path = {"zip": zip_of, "stream": stream_of}[layout](data, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: "):
        read_torch_file(path)


@pytest.mark.parametrize("attack", [name for name in OPCODE_ATTACKS if "make an object" in name])
def test_objects_are_made_of_placeholders_alone(tmp_path, attack):
    """Also where what is made would be harmless, as an empty OrderedDict is."""
    path = zip_of(b"\x80\x02" + OPCODE_ATTACKS[attack] + b".", tmp_path / "x.pth")
    with pytest.raises(UserError, match="its pickle makes an object of StandIn; refused"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("set attributes of a global", r"modifies torch\._utils\._rebuild_tensor_v2; refused"),
        ("set slots of a global", r"modifies torch\._utils\._rebuild_tensor_v2; refused"),
        ("call a storage type", "calls FloatStorage; refused"),
        ("unhashable key", "a dict with the key dict; refused"),
        ("endless key", "a dict with the key int; refused"),
        ("no opcode", r"no opcode is b'\\xff'"),
        ("tensor of a dict", "from something that is not a storage"),
    ],
)
def test_misuse_of_what_is_known_is_refused_by_name(tmp_path, attack, words):
    path = zip_of(b"\x80\x02" + OPCODE_ATTACKS[attack] + b".", tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        read_torch_file(path)


@pytest.mark.parametrize("name", ["EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"])
def test_opcodes_that_reach_outside_of_the_file_are_refused_by_name(tmp_path, name):
    data = b"\x80\x05" + getattr(pickle, name) + b"\x01\0\0\0."
    with pytest.raises(UserError, match=f"its pickle uses the opcode {name}, which is refused"):
        read_torch_file(zip_of(data, tmp_path / "x.pth"))


def test_tensors_and_storages_cannot_be_modified(tmp_path):
    data = tensor_pickle((2, 3), (3, 1))
    for change in (data.replace(b"Rs.", b"R}bs."), data.replace(b"tQ", b"tQ}b")):
        with pytest.raises(UserError, match="modifies a"):
            read_torch_file(written("zip", tmp_path / "x.pth", change))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"shape": (2, 4), "strides": (4, 1)},
        {"shape": (2, 3), "strides": (4, 1)},
        {"shape": (2, 3), "strides": (3, 1), "offset": 1},
        {"shape": (6,), "strides": (1,), "offset": -1},
        {"shape": (6,), "strides": (-1,)},
        {"shape": (-6,), "strides": (1,)},
        {"shape": (6,), "strides": (1, 1)},
        {"shape": (2.0, 3), "strides": (3, 1)},
        {"shape": (2**62, 4), "strides": (0, 0)},
        {"shape": (2, 2**63), "strides": (2**63, 1)},
        {"shape": (1,) * 70, "strides": (1,) * 70},
        {"shape": [2, 3], "strides": (3, 1)},
        {"shape": (6,), "strides": (1,), "size": 7},
        {"shape": (6,), "strides": (1,), "size": 5},
        {"shape": (6,), "strides": (1,), "size": -6},
        {"shape": (6,), "strides": (1,), "size": 2**62},
        {"shape": (6,), "strides": (1,), "kind": "DoubleStorage"},
        {"shape": (6,), "strides": (1,), "kind": "OtherStorage"},
        {"shape": (6,), "strides": (1,), "key": "7"},
    ],
    ids=str,
)
def test_sizes_are_checked(tmp_path, layout, sizes):
    with pytest.raises(UserError, match=r"x\.pth: ") as caught:
        read_torch_file(written(layout, tmp_path / "x.pth", tensor_pickle(**sizes)))
    # By our own checks, not by NumPy's, which would say that the file is damaged; but for shapes
    # that NumPy alone refuses.
    if sizes["shape"] not in ((2**62, 4), (1,) * 70):
        assert "is damaged" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_truncation_is_one_clear_error(torch, tmp_path, layout):
    path = save(torch, torch.nn.BatchNorm2d(3).state_dict(), tmp_path / "x.pth", layout)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.pth: "):
            read_torch_file(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flipped_bytes_never_raise_anything_else(torch, tmp_path, layout, rng):
    path = save(torch, torch.nn.BatchNorm2d(3).state_dict(), tmp_path / "x.pth", layout)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for position in rng.integers(0, len(whole), 300):
        damaged = whole.copy()
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged.tobytes())
        try:
            read_torch_file(path)
        except UserError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"PK\x03\x04" + bytes(90)])
def test_garbage(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: "):
        read_torch_file(path)


def test_other_layouts_are_named(tmp_path):
    path = tmp_path / "x.pth"
    data = tensor_pickle((6,), (1,))
    for entry in ("archive/code/model.py", "archive/constants.pkl"):
        with pytest.raises(UserError, match="TorchScript"):
            read_torch_file(zip_of(data, path, [(entry, b"")]))
    with pytest.raises(UserError, match="big-endian"):
        read_torch_file(zip_of(data, path, [("archive/byteorder", b"big")]))
    with pytest.raises(UserError, match="compressed"):
        read_torch_file(zip_of(data, path, compression=zipfile.ZIP_DEFLATED))
    np.savez(path.with_suffix(".npz"), a=np.zeros(1))
    with pytest.raises(UserError, match=r"but not of torch\.save"):
        read_torch_file(path.with_suffix(".npz"))


def test_stream_headers_are_checked(tmp_path):
    path = stream_of(tensor_pickle((6,), (1,)), tmp_path / "x.pth")
    with pytest.raises(UserError, match="list of storages"):
        read_torch_file(path)
    whole = path.read_bytes()
    for old, new, message in [
        (b"M\xe9\x03.", b"M\xea\x03.", "protocol is 1002"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "little-endian"),
    ]:
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            read_torch_file(path)


def test_nothing_of_a_file_outlives_it(tmp_path):
    """An attack on this module's own state would show in the next file."""
    good = written("zip", tmp_path / "good.pth", tensor_pickle((6,), (1,)))
    for attack in OPCODE_ATTACKS.values():
        with pytest.raises(UserError):
            read_torch_file(zip_of(b"\x80\x02" + attack + b".", tmp_path / "bad.pth"))
        np.testing.assert_array_equal(read_torch_file(good)["t"], FLOATS)


def test_reading_needs_no_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = written("stream", tmp_path / "x.pth", tensor_pickle((6,), (1,)))
    np.testing.assert_array_equal(read_torch_file(path)["t"], FLOATS)


# Short pickles that ask for much time or memory, or for more of the stack than Python has.
BOMBS = {
    # (((), ()), ((), ())), ... : to hash or to show 2 ** 60 tuples.
    "nested tuples as a key": b"}" + b")" + b"2\x86" * 60 + b"Ns",
    "nested tuples as keys": b"}(" + b")" + b"2\x86" * 60 + b"Nu",
    "nested tuples in a dict": b"(" + b")" + b"2\x86" * 60 + b"Nd",
    "nested tuples in an OrderedDict": (
        b"ccollections\nOrderedDict\n]" + b")" + b"2\x86" * 60 + b"N\x86a\x85R"
    ),
    "nested tuples in a set": b"\x8f(" + b")" + b"2\x86" * 60 + b"\x90",
    "nested tuples in a frozen set": b"(" + b")" + b"2\x86" * 60 + b"\x91",
    "nested tuples as a storage": b")" + b"2\x86" * 60 + b"Q",
    "nested tuples as a size": tensor_pickle((7,), (1,))[3:-1].replace(
        b"K\x07\x85", b")" + b"2\x86" * 60
    ),
    "deep tuples as a key": b"})" + b"\x85" * 300_000 + b"Ns",
    "copies of a list": (
        b"](" + b"N)\x86" * 99_999 + b"eq\x01("
        + b"ccollections\nOrderedDict\nh\x01\x85R" * 999 + b"l"
    ),
    "copies as sizes": (
        b"](" + b"N" * 100_000 + b"eq\x01(" + b"ctorch\nSize\nh\x01\x85R" * 999 + b"l"
    ),
    "enormous bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "enormous byte array": b"\x96" + struct.pack("<Q", 2**40),
    "enormous frame": b"\x95" + struct.pack("<Q", 2**40),
    # Of sizes that the machine would give, for a file of a few bytes.
    "large bytes": b"\x8e" + struct.pack("<Q", 2**30),
    "large byte array": b"\x96" + struct.pack("<Q", 2**30),
    "large frame": b"\x95" + struct.pack("<Q", 2**30),
    "enormous key": b"}\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20 + b"Ns",
}  # fmt: skip

COSTLY_BOMBS = ("deep tuples as a key", "copies of a list")
"""Seconds pass before it is clear what they ask for."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bomb", some_slow(BOMBS, *COSTLY_BOMBS))
def test_bombs_are_refused_at_once(tmp_path, bomb, layout):
    path = tmp_path / "x.pth"
    {"zip": zip_of, "stream": stream_of}[layout](b"\x80\x02" + BOMBS[bomb] + b".", path)
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.pth: ") as caught:
        read_torch_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(caught.value)) < 500
    assert peak < 2**29
    assert time.process_time() - start < 20


@pytest.mark.slow
def test_endless_pickles_are_refused(tmp_path):
    path = zip_of(b"\x80\x02" + b"]" * 2**22 + b".", tmp_path / "x.pth")
    with pytest.raises(UserError, match="more than 2097152 opcodes"):
        read_torch_file(path)
