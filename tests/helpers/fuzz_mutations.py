"""Small random damage to bytes, to the parts of a container, to JSON-like trees and to tables."""

import io
import json
import re
import struct
import zipfile
import zlib

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 1000, 32767, 32768, 65535, 65536, 10**6, 2**31 - 1,
           2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
TEXT_NUMBERS = ("", "-1", "0", "1", "2", "3", "64", "1e9", "nan", "inf", "-inf", "1e400", "0x10",
                "65536", "4294967296", "18446744073709551616", "9" * 5000, "\u0661", "²", "1_0",
                " 1 ", "0.5", "-0")  # fmt: skip
TEXTS = ("", " ", "a", "NaN", "null", "true", "../../etc/passwd", "..", "/", "\\", "/etc/passwd",
         "C:\\x", "~", "a\0b", "\ufeff", "\u202e", "x" * 300, "x" * 140_000, '"', "'", ",", "\n",
         "\r", "\t", ";", "%s", "{}", "$HOME", "`id`", "source:b", "source:", "imagenet",
         *TEXT_NUMBERS)  # fmt: skip


def choice(rng, options):
    """One of a sequence, as it is: numpy's own makes arrays of them."""
    return options[int(rng.integers(len(options)))]


def place(rng, length):
    """A position; headers and trailers are hit more often than what lies between."""
    if length > 1000 and rng.random() < 0.7:
        near = int(rng.integers(500))
        return near if rng.random() < 0.6 else length - 1 - near
    return int(rng.integers(max(1, length)))


def mutate_bytes(rng, data, other=b""):
    """One to four changes; `other` is spliced in now and then."""
    data = bytearray(data)
    for _ in range(min(4, int(rng.geometric(0.6)))):
        _change(rng, data, other)
    return bytes(data)


def _change(rng, data, other):
    start = place(rng, len(data))
    end = min(len(data), start + int(2 ** rng.uniform(0, 8)))
    kind = int(rng.integers(10))
    if kind == 0 and start < len(data):
        data[start] ^= 1 << int(rng.integers(8))
    elif kind == 1 and start < len(data):
        data[start] = int(choice(rng, (0, 1, 127, 128, 255, int(rng.integers(256)))))
    elif kind == 2:
        del data[start:end]
    elif kind == 3:
        data[start:start] = data[start:end] * int(2 ** rng.uniform(0, 8))
    elif kind == 4:
        data[start:start] = rng.bytes(int(rng.integers(1, 20)))
    elif kind == 5:
        size = choice(rng, (2, 4, 8))
        number = choice(rng, NUMBERS) % 256**size
        data[start : start + size] = number.to_bytes(size, choice(rng, ("little", "big")))
    elif kind == 6:
        del data[start:]
    elif kind == 7 and other:
        data[start:] = other[place(rng, len(other)) :]
    elif kind == 8:
        found = list(re.finditer(rb"\d+", bytes(data[: 1 << 16])))
        if found:
            match = choice(rng, found)
            data[match.start() : match.end()] = choice(rng, TEXT_NUMBERS).encode()
    elif kind == 9:
        data[start:start] = choice(rng, TEXTS).encode("utf-8", "surrogatepass")


def mutate_zip(rng, data, other=b""):
    """Damage to a member whose checksum is then right, to the order, or to the archive itself."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data, other)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = int(rng.integers(len(members)))
    name, content = members[index]
    kind = rng.random()
    if kind < 0.1:
        members[index] = (choice(rng, members)[0], content)
    elif kind < 0.15:
        del members[index]
    elif kind < 0.2:
        members[index] = (name + choice(rng, TEXTS)[:60000], content)
    else:
        members[index] = (name, mutate_bytes(rng, content, choice(rng, members)[1]))
    compression = choice(rng, (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    return zip_bytes(members, compression)


def zip_bytes(members, compression=zipfile.ZIP_STORED):
    """An archive of (name, content), names twice as they come."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.filelist = [info for info in archive.filelist if info.filename]
            archive.NameToInfo.pop(name, None)  # no warning of a name that is there twice
            archive.writestr(name or "?", content)
    return file.getvalue()


def mutate_png(rng, data, other=b""):
    """Damage to a chunk whose checksum is then right, or to anything."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data, other)
    chunks, position = [], 8
    while position + 8 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        chunks.append((data[position + 4 : position + 8], data[position + 8 :][:length]))
        position += 12 + length
    index = int(rng.integers(len(chunks)))
    name, content = chunks[index]
    kind = rng.random()
    if kind < 0.1:
        chunks.insert(int(rng.integers(len(chunks) + 1)), chunks[index])
    elif kind < 0.2:
        new = choice(rng, (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"PLTE", b"tRNS", b"acTL"))
        chunks.insert(1, (new, b"a\0\0" + zlib.compress(rng.bytes(50))))
    elif name == b"IDAT" and kind < 0.6:
        raw = mutate_bytes(rng, zlib.decompressobj().decompress(content))
        chunks[index] = (name, zlib.compress(raw))
    else:
        chunks[index] = (name, mutate_bytes(rng, content))
    return data[:8] + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def strange(rng, depth=2):
    """A value that nobody expects."""
    kind = int(rng.integers(9))
    if kind == 0:
        return choice(rng, (None, True, False))
    if kind == 1:
        return int(choice(rng, (*NUMBERS, 10**30, 10**400))) * int(choice(rng, (1, -1)))
    if kind == 2:
        return float(choice(rng, (0.0, -1.0, 0.5, 1e300, 1e-300, "nan", "inf", "-inf")))
    if kind in (3, 4, 5):
        return choice(rng, (*TEXTS, "\ud800"))
    if depth == 0:
        return []
    items = [strange(rng, depth - 1) for _ in range(int(rng.integers(4)))]
    return items if kind < 8 else {str(index): item for index, item in enumerate(items)}


def mutate_tree(rng, tree, values=strange):
    """One to three changes to a copy of a JSON-like tree."""
    for _ in range(int(rng.integers(1, 4))):
        tree = _changed(rng, tree, values)
    return tree


def _changed(rng, tree, values):
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if _list(tree) else []
    if not keys or rng.random() < 0.1:
        return values(rng)
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    key, kind = choice(rng, keys), rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.15:
        copy[key] = tree
    elif kind < 0.2 and isinstance(copy, dict):
        copy[choice(rng, TEXTS)] = copy.pop(key)
    else:
        copy[key] = _changed(rng, copy[key], values)
    return copy if isinstance(tree, dict) else type(tree)(copy)


def _list(tree):
    return isinstance(tree, list | tuple)


def mutate_json(rng, tree):
    """Bytes of a file that is JSON, nearly."""
    data = json.dumps(mutate_tree(rng, tree)).encode()
    kind = rng.random()
    if kind < 0.25:
        return mutate_bytes(rng, data)
    if kind < 0.3:
        return b'{"a":' * 100_000 if kind < 0.28 else b"[" * 100_000
    return data


def mutate_table(rng, data):
    """A CSV file with other cells, rows or columns, or damaged as bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    rows = [line.split(b",") for line in data.split(b"\n")]
    for _ in range(int(rng.integers(1, 4))):
        index = int(rng.integers(len(rows))) if rng.random() < 0.8 else 0
        row, kind = rows[index], rng.random()
        if kind < 0.7:
            column = int(rng.integers(len(row)))
            text = choice(rng, TEXTS).encode()
            row[column] = text if rng.random() < 0.7 else row[column] + text
        elif kind < 0.8:
            rows.insert(int(rng.integers(len(rows))), list(choice(rng, rows)))
        elif kind < 0.9:
            column = int(rng.integers(len(rows[0])))
            rows = [[cell for at, cell in enumerate(row) if at != column] for row in rows]
        else:
            column = int(rng.integers(len(rows[0])))
            rows = [[*row, *row[column : column + 1]] for row in rows]
        rows = [row or [b""] for row in rows]
    return b"\n".join(b",".join(row) for row in rows)
