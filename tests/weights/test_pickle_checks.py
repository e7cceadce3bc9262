"""Each check of the reader of `.pth` files, by what it says: none hides behind another."""

import pickle
import pickletools
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.storage import pickles
from medmerge_jax.weights import torch_pickle
from medmerge_jax.weights.torch_pickle import MAGIC_NUMBER, read_torch_file

FLOATS = np.arange(6, dtype=np.float32)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def plain(value):
    """A number, text, tuple or list, without memo."""
    if isinstance(value, tuple | list):
        kind = b"t" if isinstance(value, tuple) else b"l"
        return b"(" + b"".join(map(plain, value)) + kind
    return text(value) if isinstance(value, str) else pickle.dumps(value, protocol=2)[2:-1]


def call(name, *arguments):
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def storage(kind="torch.FloatStorage", key="0", size=6, view=b"", word="storage"):
    module, _, name = kind.rpartition(".")
    named = f"c{module}\n{name}\n".encode()
    return b"(" + text(word) + named + plain(key) + text("cpu") + plain(size) + view + b"tQ"


def tensor(of=None, offset=0, shape=(6,), strides=(1,)):
    of = storage() if of is None else of
    return call("torch._utils._rebuild_tensor_v2", of, plain(offset), plain(shape), plain(strides))


def dict_of(**values):
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def made(name, state):
    """An object of an unknown class, with a state."""
    return f"cuser\n{name}\n)R".encode() + state + b"b"


def module(parameters=b"}", modules=b"}"):
    return made("Module", dict_of(_parameters=parameters, _buffers=b"}", _modules=modules))


def whole(value):
    return b"\x80\x02" + value + b"."


def zipped(path, value, entries=None):
    entries = [("archive/data/0", FLOATS.tobytes())] if entries is None else entries
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", whole(value))
        for name, content in entries:
            archive.writestr(name, content)
    return path


def streamed(path, value, **changes):
    parts = {"magic": MAGIC_NUMBER, "version": 1001, "machine": {"little_endian": True}}
    parts |= {"keys": ["0"], "rest": struct.pack("<q", 6) + FLOATS.tobytes()} | changes
    magic, version, machine, keys, rest = parts.values()
    head, last = [magic, version, machine], pickle.dumps(keys, protocol=2)
    dumped = [pickle.dumps(part, protocol=2) for part in head]
    path.write_bytes(b"".join([*dumped, whole(value), last, rest]))
    return path


def refused(path, words):
    with pytest.raises(UserError, match=words) as error:
        read_torch_file(path)
    assert "is damaged" not in str(error.value)  # which is said of what no check has foreseen


def test_what_all_of_these_change_is_read(tmp_path):
    for write in (zipped, streamed):
        ((where, tensors),) = read_torch_file(write(tmp_path / "x", dict_of(t=tensor()))).items()
        assert (where, list(tensors)) == ("", ["t"])
        np.testing.assert_array_equal(tensors["t"], FLOATS)


UNKNOWN = "a storage of unknown kind"
UNFIT = "which do not fit together"
VALUES = {
    "no persistent id": (plain(1) + b"Q", "refers to 1, not to a storage"),
    "a short persistent id": (b")Q", r"refers to \(\), not to a storage"),
    "another word": (tensor(storage(word="other")), "not to a storage"),
    "a storage of another type": (tensor(storage("torch.Size")), UNKNOWN),
    "a storage of no type": (tensor(storage("user.Kind")), UNKNOWN),
    "a storage of another library": (tensor(storage("user.FloatStorage")), UNKNOWN),
    "a key that is no text": (tensor(storage(key=0)), UNKNOWN),
    "true elements": (tensor(storage(size=True)), UNKNOWN),
    "negative elements": (tensor(storage(size=-6)), UNKNOWN),
    "two descriptions": (
        dict_of(t=tensor(), u=tensor(storage("torch.IntStorage"))),
        "'0' is described in two ways",
    ),
    "a view that is a number": (tensor(storage(view=plain(1))), "'0' is malformed"),
    "a view of two": (tensor(storage(view=plain(("v", 0)))), "'0' is malformed"),
    "a view from a text": (tensor(storage(view=plain(("v", "0", 1)))), "starts at '0'"),
    "a view of a text": (tensor(storage(view=plain(("v", 0, "1")))), "with '1' elements"),
    "a view from below": (tensor(storage(view=plain(("v", -1, 1)))), "starts at -1"),
    "a view of less than none": (tensor(storage(view=plain(("v", 1, -1)))), "with -1 elements"),
    "a view from beyond": (tensor(storage(view=plain(("v", 5, 2)))), "but the storage has 6"),
    "sizes in a list": (tensor(shape=[6]), "has the sizes list"),
    "true sizes": (tensor(shape=(True,)), "has the sizes"),
    "negative strides": (tensor(strides=(-1,)), "has the sizes"),
    "a true offset": (tensor(offset=True), UNFIT),
    "a negative offset": (tensor(offset=-1), UNFIT),
    "more strides": (tensor(strides=(1, 1)), UNFIT),
    "a parameter of a number": (
        call("torch._utils._rebuild_parameter", plain(1)),
        "a parameter is built from something that is not a tensor",
    ),
    "a class of an unknown function": (
        call("torch._tensor._rebuild_from_type_v2", b"cuser\nf\n", b"N", b")"),
        "built from something unknown",
    ),
    "a class of no arguments": (
        call("torch._tensor._rebuild_from_type_v2", b"ctorch\nSize\n", b"N", b"N"),
        "built from something unknown",
    ),
    "pairs that are a number": (call("collections.OrderedDict", plain(1)), "not a list of pairs"),
    "pairs of numbers": (call("collections.OrderedDict", plain([1])), "not a list of pairs"),
    "pairs of three": (call("collections.OrderedDict", plain([(1, 2, 3)])), "not a list of pairs"),
    "a key of a pair": (
        call("collections.OrderedDict", plain([((), 1)])), r"a dict with the key \(\)",
    ),
    "a size that is a number": (call("torch.Size", plain(7)), "a size is 7; a few numbers"),
    "a size of many": (call("torch.Size", plain((1,) * 65)), "a size is tuple; a few numbers"),
    "beyond the storage": (dict_of(t=tensor(offset=1)), "reaches beyond its storage of 6 elements"),
    "no names": (dict_of(t=plain(1)), "holds dict, and in it no tensors by name; a state dict"),
    "unknown things": (made("Thing", b"N"), r"global 'user\.Thing'.*of 'user\.Thing' nothing is"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values(tmp_path, case):
    value, words = VALUES[case]
    refused(zipped(tmp_path / "x.pth", value), words)


STREAMS = {
    "another magic number": ({"magic": 1}, "no file of torch.save"),
    "magic of another type": ({"magic": float(MAGIC_NUMBER)}, "no file of torch.save"),
    "another protocol": ({"version": 1002}, "its protocol is 1002; 1001 is wanted"),
    "a protocol of another type": ({"version": 1001.0}, "its protocol is 1001.0"),
    "a machine that is no dict": ({"machine": [1]}, "little-endian"),
    "a machine that does not say": ({"machine": {"x": 1}}, "little-endian"),
    "a big-endian machine": ({"machine": {"little_endian": False}}, "little-endian"),
    "no list of keys": ({"keys": "0"}, "list of storages does not match"),
    "keys that are no texts": ({"keys": [0]}, "list of storages does not match"),
    "keys of two types": ({"keys": ["0", 0]}, "list of storages does not match"),
    "a key too many": ({"keys": ["0", "1"]}, "list of storages does not match"),
    "no key": ({"keys": []}, "list of storages does not match"),
    "a key twice": ({"keys": ["0", "0"]}, "list of storages does not match"),
    "no bytes": ({"rest": b""}, "ends before storage '0'"),
    "half a size": ({"rest": bytes(7)}, "ends before storage '0'"),
    "another size": (
        {"rest": struct.pack("<q", 5) + FLOATS.tobytes()},
        "'0' has 5 elements where 6 are announced",
    ),
    "a byte too few": (
        {"rest": struct.pack("<q", 6) + FLOATS.tobytes()[:-1]},
        "ends inside storage '0': 23 of 24 bytes",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams(tmp_path, case):
    changes, words = STREAMS[case]
    refused(streamed(tmp_path / "x.pth", dict_of(t=tensor()), **changes), words)


def test_a_stream_that_begins_with_what_is_forbidden(tmp_path):
    (tmp_path / "x.pth").write_bytes(whole(plain(1) + b"Q"))
    refused(tmp_path / "x.pth", "not to a storage")


def change_entry(path, name, **fields):
    """Sets sizes in the archive's list of entries."""
    content = bytearray(path.read_bytes())
    start = content.index(name.encode(), content.index(b"PK\x01\x02")) - 46
    for field, value in fields.items():
        struct.pack_into("<I", content, start + {"compressed": 20, "size": 24}[field], value)
    path.write_bytes(content)


def test_entries(tmp_path):
    path, value, name = tmp_path / "x.pth", dict_of(t=tensor()), "archive/data/0"
    refused(zipped(path, value, [("other/data.pkl", b"")]), "one entry <name>/data.pkl is wanted")
    refused(zipped(path, value, [("archive/code/x.py", b"")]), "TorchScript")
    refused(zipped(path, value, [("archive/byteorder", b"big")]), "big-endian")
    refused(zipped(path, value, []), "entry archive/data/0 is missing")
    refused(zipped(path, value, [(name, FLOATS[:5].tobytes())]), "has 20 bytes; 24 are wanted")
    zipped(path, value, [])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, FLOATS.tobytes())
    refused(path, "entry archive/data/0 is compressed")
    entry = "archive/data.pkl"
    size = len(whole(value))
    change_entry(zipped(path, value), entry, size=size + 1)
    refused(path, r"data\.pkl has more bytes than the file")
    change_entry(zipped(path, value), entry, size=2**31, compressed=2**31)
    refused(path, r"data\.pkl has more bytes than the file")


def test_entries_inside_each_other(tmp_path, monkeypatch):
    """Python itself refuses these since 3.11.8: here it is one before."""
    inside = bytes(4000)
    fields = (20, 0, 0, 0, 33, zlib.crc32(inside), len(inside), len(inside), 14, 0)
    header = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + b"archive/data/1"
    outside = header + inside
    value = dict_of(
        t=tensor(storage("torch.ByteStorage", size=len(outside))),
        u=tensor(storage("torch.ByteStorage", key="1", size=len(inside))),
    )
    path = zipped(tmp_path / "x.pth", value, [("archive/data/0", outside), ("archive/data/1", b"")])
    written = bytearray(path.read_bytes())
    listed = written.rindex(b"PK\x01\x02")  # the last entry, which shall be the one inside
    struct.pack_into("<3I", written, listed + 16, zlib.crc32(inside), len(inside), len(inside))
    struct.pack_into("<I", written, listed + 42, written.index(header))
    path.write_bytes(written)

    class Former(zipfile.ZipFile):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for info in self.infolist():
                if hasattr(info, "_end_offset"):
                    info._end_offset = None

    monkeypatch.setattr(torch_pickle.zipfile, "ZipFile", Former)
    refused(path, "its entries have more bytes than the file")


def test_the_list_of_entries_may_not_be_long(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.pth", dict_of(t=tensor()))
    monkeypatch.setattr("medmerge_jax.storage.archives.MOST_BYTES", 50)
    with pytest.raises(UserError, match=r"its list of entries has 1\d\d bytes, 50 at most"):
        read_torch_file(path)
    (tmp_path / "y.pth").write_bytes(b"PK\x03\x04" + bytes(90))
    with pytest.raises(UserError, match="not a zip file"):
        read_torch_file(tmp_path / "y.pth")


def names(path):
    return {where: list(tensors) for where, tensors in read_torch_file(path).items()}


def test_where_tensors_are_found(tmp_path):
    path = tmp_path / "x.pth"
    value = b"}(" + plain(1) + tensor() + text("a") + tensor() + text("b") + plain(2) + b"u"
    assert names(zipped(path, value)) == {"": ["a"]}
    value = tensor()
    for _ in range(8):
        value = dict_of(m=value)
    assert names(zipped(path, value)) == {".".join("m" * 7): ["m"]}
    for _ in range(2):
        value = dict_of(m=value)
    refused(zipped(path, value), "no tensors by name")
    # Of a class of its own, and in objects of unknown classes: attributes, slots and items.
    own = call(
        "torch._tensor._rebuild_from_type_v2", b"ctorch._utils\n_rebuild_tensor_v2\n", b"N",
        b"(" + storage() + plain(0) + plain((6,)) + plain((1,)) + b"t",
    )  # fmt: skip
    state = dict_of(t=own)
    assert names(zipped(path, made("Thing", state))) == {"": ["t"]}
    assert names(zipped(path, made("Thing", b"(" + state + b"}t"))) == {"": ["t"]}
    items = b"cuser\nDict\n)R(" + text("t") + tensor() + b"u"
    assert names(zipped(path, dict_of(x=items))) == {"x": ["t"]}
    # As Python makes objects without calling their class, with arguments or words and without.
    for make in (b")\x81", b"(K\x01t\x81", b")}\x92"):
        value = b"cuser\nThing\n" + make + state + b"b"
        assert names(zipped(path, dict_of(x=value))) == {"x": ["t"]}
    value = call("copyreg._reconstructor", b"cuser\nThing\n", b"N", b"N") + state + b"b"
    assert names(zipped(path, value)) == {"": ["t"]}


def test_what_else_a_file_may_hold(tmp_path):
    """Objects without a state, devices, byte arrays: tensors beside them are read."""
    array = b"\x96" + struct.pack("<Q", 3) + b"abc"
    for other in (made("Thing", b")"), call("torch.device", text("cpu")), array):
        value = dict_of(other=other, t=tensor())
        assert names(zipped(tmp_path / "x.pth", value)) == {"": ["t"]}


def test_modules(tmp_path):
    path = tmp_path / "x.pth"
    inner = module(dict_of(weight=tensor(), bias=b"N"))
    assert names(zipped(path, module(dict_of(w=tensor()), dict_of(a=inner)))) == {
        "": ["w", "a.weight"]
    }
    named = b"(" + text("module") + b"cuser\nNet\n" + text("net.py") + text("class Net") + b"tQ"
    old = named + b")R" + dict_of(_parameters=dict_of(w=tensor()), _modules=b"}") + b"b"
    assert names(streamed(path, old)) == {"": ["w"]}
    # Without `_modules` it is an object like others.
    value = made("Thing", dict_of(_parameters=dict_of(w=tensor())))
    assert names(zipped(path, value)) == {"_parameters": ["w"]}
    value = made("Thing", dict_of(_modules=dict_of(w=tensor())))
    assert names(zipped(path, value)) == {"_modules": ["w"]}
    # A place for a module may be empty, and what holds the parameters of a class of its own.
    items = b"cuser\nDict\n)R(" + text("w") + tensor() + b"u"
    assert names(zipped(path, module(items, dict_of(a=b"N")))) == {"": ["w"]}
    value = inner
    for _ in range(90):
        value = module(modules=dict_of(m=value))
    refused(zipped(path, value), "modules are too many or inside each other")


def twice(count, last, around):
    """The last thing in two places of a thing that is in two places, and so on."""
    value = last + b"q\x01"
    for _ in range(count):
        value = around(value, b"h\x01") + b"q\x01"
    return value


def test_things_that_are_in_many_places_are_looked_at_once(tmp_path):
    path, start = tmp_path / "x.pth", time.process_time()
    tree = twice(24, module(), lambda a, b: module(modules=dict_of(a=a, b=b)))
    refused(zipped(path, tree), "modules are too many or inside each other")
    many = twice(7, b"}", lambda a, b: dict_of(a=a, **{f"b{n}": b for n in range(30)}))
    refused(zipped(path, many), "no tensors by name")
    assert time.process_time() - start < 5


def test_tensors_without_elements(tmp_path):
    path = tmp_path / "x.pth"
    value = dict_of(t=tensor(storage(size=0), offset=9, shape=(0, 3), strides=(3, 1)))
    assert read_torch_file(zipped(path, value, [("archive/data/0", b"")]))[""]["t"].shape == (0, 3)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_torch_file(tmp_path)


def test_the_longest_key_is_allowed_and_one_bit_more_is_not():
    pickles.check_keys([2**60 - 1, -(2**60) + 1])
    for key in (2**60, -(2**60)):
        with pytest.raises(pickles.ForbiddenError, match="a dict with the key"):
            pickles.check_keys([key])


def test_as_many_opcodes_as_are_allowed_are_read(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.pth", dict_of(t=tensor()))
    opcodes = sum(1 for _ in pickletools.genops(whole(dict_of(t=tensor()))))
    monkeypatch.setattr(pickles._Opcodes, "left", opcodes)
    assert list(read_torch_file(path)[""]) == ["t"]
    monkeypatch.setattr(pickles._Opcodes, "left", opcodes - 1)
    refused(path, "opcodes; refused")


def test_a_list_of_entries_of_the_greatest_length_is_read(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.pth", dict_of(t=tensor()))
    with zipfile.ZipFile(path) as archive:
        length = sum(46 + len(one.filename) for one in archive.infolist())
    monkeypatch.setattr("medmerge_jax.storage.archives.MOST_BYTES", length)
    assert list(read_torch_file(path)[""]) == ["t"]
    monkeypatch.setattr("medmerge_jax.storage.archives.MOST_BYTES", length - 1)
    refused(path, f"its list of entries has {length} bytes, {length - 1} at most")


def test_what_is_shown_of_a_value():
    assert pickles.shown((1, "a", None, 2.5, 3, 4)) == "(1, 'a', None, 2.5, 3, 4)"
    assert pickles.shown((1,) * 7) == "tuple"
    assert pickles.shown((2**64, None)) == "(int, None)"


def test_what_might_run_code_is_refused_with_advice(tmp_path):
    keys = b"}(" + plain((1, 2)) + plain(1) + b"u"  # a tuple
    with pytest.raises(UserError) as error:
        read_torch_file(zipped(tmp_path / "x.pth", keys))
    assert torch_pickle.ADVICE in str(error.value)


@pytest.mark.parametrize(("start", "count"), [(0, 6), (0, 0), (6, 0), (2, 4)])
def test_views_from_end_to_end_are_read(tmp_path, start, count):
    view = plain(("v", start, count))
    one = tensor(storage(view=view), shape=(count,), strides=(1,))
    for write in (zipped, streamed):
        tensors = read_torch_file(write(tmp_path / "x.pth", dict_of(t=one)))[""]
        np.testing.assert_array_equal(tensors["t"], FLOATS[start : start + count])


def test_a_size_of_as_many_numbers_as_numpy_has_axes_is_read(tmp_path):
    def sizes(count):
        return dict_of(t=tensor(), size=call("torch.Size", plain([1] * count)))

    assert names(zipped(tmp_path / "x.pth", sizes(64))) == {"": ["t"]}
    refused(zipped(tmp_path / "y.pth", sizes(65)), "a size is list; a few numbers are wanted")


def test_state_dicts_are_found_as_deep_as_is_looked(tmp_path):
    def nested(depth):
        value = dict_of(t=tensor())
        for _ in range(depth):
            value = dict_of(a=value)
        return value

    depth = torch_pickle.DEEPEST
    assert names(zipped(tmp_path / "x.pth", nested(depth))) == {".".join("a" * depth): ["t"]}
    refused(zipped(tmp_path / "y.pth", nested(depth + 1)), "no tensors by name")


def modules(depth):
    """One inside the other, a parameter in the innermost."""
    value = module(parameters=dict_of(w=tensor()))
    for _ in range(depth):
        value = module(modules=dict_of(m=value))
    return value


def test_modules_are_read_as_deep_and_as_many_as_are_allowed(tmp_path, monkeypatch):
    deepest = 10 * torch_pickle.DEEPEST
    (tensors,) = names(zipped(tmp_path / "x.pth", modules(deepest))).values()
    assert tensors == ["m." * deepest + "w"]
    refused(zipped(tmp_path / "y.pth", modules(deepest + 1)), "too many or inside each other")
    monkeypatch.setattr(torch_pickle, "MOST_MODULES", 4)
    assert names(zipped(tmp_path / "x.pth", modules(3))) == {"": ["m.m.m.w"]}
    refused(zipped(tmp_path / "y.pth", modules(4)), "too many or inside each other")


@pytest.mark.parametrize(
    "value",
    [
        b"(" + text("module") + text("Net") + text("net.py") + text("") + b"tQ",
        tensor(b"(" + text("storage") + text("Float") + text("0") + text("cpu") + plain(6) + b"tQ"),
    ],
    ids=["a module of no class", "a storage of a text"],
)
def test_persistent_ids_of_texts_are_refused(tmp_path, value):
    refused(zipped(tmp_path / "x.pth", dict_of(t=value)), "refers to ")


def test_a_file_that_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth: cannot be read \(No such file"):
        read_torch_file(tmp_path / "nowhere.pth")
