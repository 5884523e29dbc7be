"""Structural damage to files, for `fuzz.py`: of headers, lengths, dtypes, shapes, nesting and text.

A mutator takes the bytes of a file and a `random.Random`, and returns other bytes. It unpacks the
file, changes a part of what is inside, and packs it again, in most cases with a digest or a
checksum of the new contents, so that the reader comes to what stands behind it. Bytes that are no
such file raise an error, upon which the caller damages bytes instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import warnings
import zipfile
from typing import Any, TypeAlias

import numpy as np

from safeshield.data import storage
from safeshield.files import tensors
from safeshield.monitoring import flight_file

Value: TypeAlias = Any
"""JSON values, or an array, or an open HDF5 file."""
Rng = random.Random

# -- JSON ------------------------------------------------------------------------------------------

_RAW = "@raw:"
"""A text that begins so becomes JSON itself, without quotes."""
_RAW_TEXTS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "1" + "0" * 400, "9" * 5000, "-1e-400",
    "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, '{"a": 1, "a": 2}', '"\\ud800"',
    '"\\u0000"', "1.7976931348623157e308", "5e-324", "0.1e1", "tru", "",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    0.0, -0.0, 0.5, 1.5, -1.5, 1e-300, 1e300, 1e38, 4e38, "", "a", "inf", "-inf", "nan", "\u0000",
    "é", "../x", "/dev/zero", "x" * 300, [], {}, [[]], [0], [1, 2], {"": 0}, [None],
    "Box", "<f8", "O", "float32", "|O8", "(4096,)f8",
)  # fmt: skip


def _paths(value: Value, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    if isinstance(value, dict):
        for key in value:
            found += _paths(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 50)):
            found += _paths(value[i], (*at, i))
    return found


def _get(value: Value, path: tuple[Any, ...]) -> Value:
    for key in path:
        value = value[key]
    return value


def mutated_json(value: Value, rng: Rng) -> Value:
    """Return JSON values with one to three changes. Texts that begin with "@raw:" are not texts."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(_paths(value))
        if not path:
            if rng.random() < 0.02:
                return rng.choice([*_VALUES, _RAW + rng.choice(_RAW_TEXTS)])
            continue
        parent, key = _get(value, path[:-1]), path[-1]
        old = parent[key]
        kind = rng.randrange(12)
        if kind <= 1:
            parent[key] = rng.choice(_VALUES)
        elif kind == 2:
            parent[key] = _RAW + rng.choice(_RAW_TEXTS)
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            other = _get(value, rng.choice(_paths(value)))
            parent[key] = json.loads(json.dumps(other))
        elif kind == 5 and isinstance(parent, dict):
            parent[rng.choice(["", "x", "record", "__metadata__", key + "2"])] = old
        elif kind == 6 and isinstance(parent, list):
            parent.insert(key, old)
        elif kind == 7 and isinstance(old, list):
            few = len(json.dumps(old)) < 1000
            parent[key] = old * rng.choice((0, 2, 3, 100, 2000)) if few else old[:1]
        elif isinstance(old, bool) or old is None:
            parent[key] = rng.choice(_VALUES)
        elif isinstance(old, int):
            parent[key] = rng.choice(
                [old + 1, old - 1, -old, old * 2, old << 20, old << 40, float(old), old + 0.5]
            )
        elif isinstance(old, float):
            parent[key] = rng.choice([-old, old * 2, old / 3, old * 1e30, old * 1e-30, old + 1e-9])
        elif isinstance(old, str):
            at = rng.randrange(len(old) + 1)
            part = rng.choice(["", " ", "0", "@", "\n", "\u202e", "-", "9" * 40, "'", "%s", "{"])
            parent[key] = old[:at] + part + old[at + rng.randrange(3) :]
        elif isinstance(old, list) and old:
            parent[key] = rng.choice([old[:-1], old[::-1], [old], {"0": old}])
        else:
            parent[key] = rng.choice(_VALUES)
    return value


def json_text(value: Value) -> str:
    """Return JSON values as text, in which "@raw:" texts stand without their quotes."""
    parts = json.dumps(value).split(f'"{_RAW}')
    text = parts[0]
    for part in parts[1:]:
        # The JSON string ends at the next quote that is not escaped by a backslash.
        end = 0
        while part[end] != '"':
            end += 2 if part[end] == "\\" else 1
        text += json.loads(f'"{part[:end]}"') + part[end + 1 :]
    return text


def mutate_json(raw: bytes, rng: Rng) -> bytes:
    """Change a JSON text."""
    return json_text(mutated_json(json.loads(raw), rng)).encode("utf-8", "surrogatepass")


def mutate_json_lines(raw: bytes, rng: Rng) -> bytes:
    """Change one line of JSON of several, or their order."""
    lines = raw.split(b"\n")
    at = rng.randrange(max(len(lines) - 1, 1))
    kind = rng.randrange(4)
    if kind == 0:
        lines.insert(at, rng.choice(lines))
    elif kind == 1:
        rng.shuffle(lines)
    else:
        lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


# -- arrays ----------------------------------------------------------------------------------------

_DTYPES = ("<f4", "<f8", "<f2", ">f4", "?", "u1", "<i8", "<i4", "<u8", "<c8", "S4", "U3", "M8[s]")


def _mutated_array(array: Value, rng: Rng) -> Value:
    """Return an array with other numbers, another dtype or another shape."""
    array = np.array(array)
    kind = rng.randrange(9)
    if kind <= 2 and array.size:
        flat = array.reshape(-1)
        for _ in range(rng.choice((1, 1, 5, flat.size))):
            value = rng.choice([0, 1, -1, 2, 1e30, -1e30, 1e38, 1e-40, np.nan, np.inf, 0.5])
            with np.errstate(all="ignore"):
                flat[rng.randrange(flat.size)] = np.array(value).astype(array.dtype)
        return array
    if kind == 3:
        with np.errstate(all="ignore"):
            return array.astype(rng.choice(_DTYPES))
    if kind == 4 and array.size:
        return array[: rng.randrange(len(array) + 1)] if array.ndim else array[None]
    if kind == 5 and array.ndim:
        return np.concatenate([array, array[: rng.choice((1, len(array)))]])
    if kind == 6:
        return array[..., None] if rng.random() < 0.5 else array[None]
    if kind == 7:
        return array.reshape(-1) if rng.random() < 0.5 else np.asfortranarray(array)
    return np.zeros((0, *array.shape[1:]), array.dtype) if rng.random() < 0.5 else array.T


def _mutated_arrays(arrays: dict[str, Any], rng: Rng) -> dict[str, Any]:
    arrays = dict(arrays)
    name = rng.choice(sorted(arrays))
    kind = rng.randrange(8)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[rng.choice(["x", "", "a/b", "..", name + "2"])] = arrays[name]
    elif kind == 2:
        other = rng.choice(sorted(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    else:
        arrays[name] = _mutated_array(arrays[name], rng)
    return arrays


# -- safetensors -----------------------------------------------------------------------------------


def _unpacked_tensors(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    size = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + size])
    contents = json.loads(table.pop("__metadata__")[tensors._KEY])
    arrays = {}
    for name, entry in table.items():
        first, last = entry["data_offsets"]
        data = raw[8 + size + first : 8 + size + last]
        arrays[name] = np.frombuffer(data, tensors._DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return contents, arrays


def mutate_tensors(raw: bytes, rng: Rng) -> bytes:
    """Change the header, the table or the tensors of an agent, a shield or a checkpoint."""
    contents, arrays = _unpacked_tensors(raw)
    kind = rng.randrange(10)
    if kind <= 5:
        contents["header"] = mutated_json(contents["header"], rng)
    elif kind <= 8:
        arrays = _mutated_arrays(arrays, rng)
    else:
        contents = mutated_json(contents, rng)
    if kind != 9 and rng.random() < 0.9:
        with contextlib.suppress(ValueError):  # Of what is not JSON there is no digest.
            header = json.loads(json_text(contents["header"]))
            contents["sha256"] = tensors.content_digest(header, arrays)
    packed = tensors.format_safetensors(arrays, {tensors._KEY: json_text(contents)})
    if rng.random() < 0.1:
        size = int.from_bytes(packed[:8], "little")
        table = json_text(mutated_json(json.loads(packed[8 : 8 + size]), rng)).encode()
        packed = struct.pack("<Q", len(table)) + table + packed[8 + size :]
    return packed


# -- logs ------------------------------------------------------------------------------------------


def _sealed(header: Value, arrays: dict[str, Any], rng: Rng) -> str:
    """Return the header of a log with a digest of these arrays, as it would be read."""
    text = json_text(mutated_json(header, rng) if rng.random() < 0.5 else header)
    try:
        plain = json.loads(text)
        plain.pop(storage.DIGEST_KEY, None)
        as_read = {key: x.astype("?" if x.dtype == bool else "f4") for key, x in arrays.items()}
        dtypes = {key: x.dtype for key, x in arrays.items()}
        plain[storage.DIGEST_KEY] = storage.log_digest(plain, as_read, list(arrays), dtypes)
        return json.dumps(plain)
    except Exception:  # Of such contents there is no digest.
        return text


def mutate_npz(raw: bytes, rng: Rng) -> bytes:
    """Change the arrays, the header or the members of an NPZ log."""
    if rng.random() < 0.3:
        return _mutated_zip(raw, rng)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        if sum(one.file_size for one in archive.infolist()) > 10**8:
            raise ValueError("a file from the corpus may claim any size")
    with np.load(io.BytesIO(raw), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop(storage.HEADER_KEY).tobytes())
    arrays = _mutated_arrays(arrays, rng) if rng.random() < 0.7 else arrays
    text = _sealed(header, arrays, rng)
    out = io.BytesIO()
    arrays[storage.HEADER_KEY] = np.frombuffer(text.encode(), np.uint8)
    save = np.savez if rng.random() < 0.3 else np.savez_compressed
    save(out, **{name: x for name, x in arrays.items() if name != "file"}, allow_pickle=False)
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = storage._MARK.encode() if rng.random() < 0.9 else b""
    return out.getvalue()


def _mutated_zip(raw: bytes, rng: Rng) -> bytes:
    """Change members of an archive: headers of arrays, names, methods, twice the same."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = [(one.filename, archive.read(one)) for one in archive.infolist()]
        comment = archive.comment
    at = rng.randrange(len(members))
    name, data = members[at]
    kind = rng.randrange(7)
    if kind <= 3 and data[:6] == b"\x93NUMPY":
        size = int.from_bytes(data[8:10], "little")
        text = data[10 : 10 + size].decode("latin1")
        old, new = rng.choice([
            ("(", "(9" + "9" * rng.randrange(18)), ("<f4", rng.choice(_DTYPES)), ("<f4", "|O"),
            ("False", "True"), (",)", ", 1)"), ("(", "(0, "), ("(", "(-1, "), ("'descr'", "'x'"),
            ("<f4", "('<f4', (999999, 9999))"), ("(", "(" * 150), ("False", "2 ** 9999999"),
            ("shape", "shape\x00"), ("False", "[" * 9999),
        ])  # fmt: skip
        text = text.replace(old, new, 1).rstrip() + "\n"
        data = (
            data[:6]
            + b"\x02\x00"
            + struct.pack("<I", len(text))
            + text.encode()
            + data[10 + size :]
        )
    elif kind == 4:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == 5:
        members.append((name, rng.choice(members)[1]))
    else:
        name = rng.choice(["../x.npy", "x", "/x.npy", name[:-4], name.upper(), "a/" + name, ""])
    members[at] = name, data
    out = io.BytesIO()
    warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    with zipfile.ZipFile(out, "w", rng.choice(methods)) as archive:
        for one, content in members:
            archive.writestr(one, content)
        archive.comment = comment
    packed = out.getvalue()
    if rng.random() < 0.3:
        # A size in a local or central header that is not that of the member.
        marks = [i for i in range(len(packed) - 4) if packed[i : i + 4] in (b"PK\1\2", b"PK\3\4")]
        place = rng.choice(marks) + rng.choice((6, 8, 10, 14, 18, 20, 22, 24, 26, 28, 30))
        wide = rng.choice((0, 1, 99, 2**31, 2**32 - 1)).to_bytes(4, "little")
        packed = packed[:place] + wide + packed[place + 4 :]
    return packed


def mutate_hdf5(raw: bytes, rng: Rng) -> bytes:
    """Change the arrays, their storage, the header or the links of an HDF5 log."""
    import h5py

    with h5py.File(io.BytesIO(raw), "r") as file:
        found = {name: file[name] for name in file}
        # A file may claim any size, also one from the corpus.
        small = [n for n, x in found.items() if isinstance(x, h5py.Dataset) and x.size < 10**6]
        arrays = {name: found[name][()] for name in small}
        header = json.loads(file.attrs[storage.HEADER_KEY].tobytes())
    arrays = _mutated_arrays(arrays, rng) if rng.random() < 0.6 else arrays
    text = _sealed(header, arrays, rng)
    out = io.BytesIO()
    packed = {"compression": "gzip"}
    odd = rng.choice(sorted(arrays)) if rng.random() < 0.5 else ""
    with h5py.File(out, "w", libver=rng.choice(["earliest", "latest"])) as file:
        for name, array in arrays.items():
            if name == odd:
                _stored_oddly(file, name, array, rng)
            elif name:
                file.create_dataset(name, data=array, **(packed if array.ndim else {}))
        written = np.frombuffer(text.encode(), np.uint8)
        kind = rng.randrange(12)
        file.attrs[storage.HEADER_KEY] = (
            text if kind == 0 else written[:0] if kind == 1 else written
        )
        if kind != 2:
            file.attrs[storage._MARK] = np.uint8(1)
    return out.getvalue()


def _stored_oddly(file: Value, name: str, array: Value, rng: Rng) -> None:
    import h5py

    kind = rng.randrange(14)
    shape = array.shape
    first = max(shape[0] // 2, 1) if shape and shape[0] else 1
    chunks = (first, *shape[1:]) if shape and all(shape) else None
    if kind == 0:
        file[name] = h5py.SoftLink(rng.choice(["/x", "/", "/" + name]))
    elif kind == 1:
        file[name] = h5py.ExternalLink("/etc/passwd", "/x")
    elif kind == 2:
        file.create_group(name)
    elif kind == 3 and chunks:
        one = file.create_dataset(name, shape, array.dtype, chunks=chunks)
        one[:first] = array[:first]
    elif kind == 4:
        layout = h5py.VirtualLayout(shape, array.dtype)
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape)
        file.create_virtual_dataset(name, layout)
    elif kind == 5:
        file.create_dataset(name, (2 ** rng.choice((20, 30, 40)), *shape[1:]), "f4", chunks=True)
    elif kind == 6 and shape:
        file.create_dataset(name, data=array, chunks=chunks, compression="lzf", shuffle=True)
    elif kind == 7 and shape:
        file.create_dataset(name, data=array, chunks=chunks, fletcher32=True, compression="gzip")
    elif kind == 8 and array.dtype.kind == "f" and chunks:
        file.create_dataset(name, data=array, chunks=chunks, scaleoffset=4)
    elif kind == 9:
        file.create_dataset(name, data=[str(x) for x in array.ravel()[:3]])
    elif kind == 10:
        file.create_dataset(name, data=array.astype([("x", "f4")]))
    elif kind == 11:
        file.create_dataset(name, data=h5py.Empty("f4"))
    elif kind == 12 and chunks:
        file.create_dataset(
            name, data=array, chunks=(1,) * len(shape), maxshape=(None,) * len(shape)
        )
    else:
        file.create_dataset(name, data=array)


# -- flights ---------------------------------------------------------------------------------------


def mutate_flight(raw: bytes, rng: Rng) -> bytes:
    """Change headers, counts, orders and rows of a flight, with checksums that are right."""
    frames = [(one.rows, one.first, bytes(one.payload)) for one in flight_file.read_frames(raw)[0]]
    at = rng.randrange(len(frames))
    rows, first, payload = frames[at]
    kind = rng.randrange(9)
    if kind <= 3:
        rows, first, payload = frames[0]
        frames[0] = rows, first, json_text(mutated_json(json.loads(payload), rng)).encode()
    elif kind == 4:
        frames[at] = rng.choice([0, 1, rows + 1, 2**32 - 1]), first, payload
    elif kind == 5:
        frames[at] = rows, rng.choice([0, first + 1, 2**63, 2**64 - 1]), payload
    elif kind == 6:
        frames.insert(rng.randrange(len(frames) + 1), frames[at])
    elif kind == 7:
        del frames[at]
    elif payload:
        data = bytearray(payload)
        for _ in range(rng.choice((1, 4, 64))):
            place = rng.randrange(len(data))
            number = rng.choice([np.nan, np.inf, 1e300, -1.0, 0.0])
            new = rng.choice([b"\0", b"\xff" * 8, struct.pack("<d", number), b"\x80"])
            data[place : place + len(new)] = new
        frames[at] = rows, first, bytes(data[: len(payload)])
    packed = b""
    for rows, first, payload in frames:
        packed += flight_file._head(rows, first, payload) + payload
    return packed


# -- graphs ----------------------------------------------------------------------------------------


def mutate_onnx(raw: bytes, rng: Rng) -> bytes:
    """Change the metadata or the nodes of a graph, with a digest that is right."""
    import onnx

    from safeshield.shield import export

    model = onnx.load_from_string(raw)
    told = next(one for one in model.metadata_props if one.key == "safeshield")
    header = json.loads(told.value)
    if rng.random() < 0.3:
        del model.graph.node[rng.randrange(len(model.graph.node))]
    else:
        header = json.loads(json_text(mutated_json(header, rng)))
    if rng.random() < 0.9:
        header.pop("sha256", None)
        header["sha256"] = export._digest(model.graph, header)
    told.value = json.dumps(header)
    if rng.random() < 0.1:
        model.metadata_props.append(rng.choice(list(model.metadata_props)))
    packed: bytes = model.SerializeToString()
    return packed


# -- text ------------------------------------------------------------------------------------------

_TOKENS = (
    "&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system ['true']\n", "!!binary x\n", "? ",
    "- ", "[", "]", "{", "}", ": ", "| \n", "> \n", "--- \n", "1e999", "-.inf", ".nan", "0x10",
    "0o7", "190:20:30", "2001-12-14t21:59:43.10-05:00", "~", "null", "yes", "'",
    '"', '"""', "\\u0000",
    "\t", "#", "=", "\n", "inf", "nan", "9" * 5000, "1_000", "[[x]]\n", "[x]\n", "a.b = 1\n",
    "1979-05-27",
    "a: &a [x, x, x, x, x, x, x, x, x]\n", "b: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n",
    "c: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n", "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n",
    "e: &e [*d, *d, *d, *d, *d, *d, *d, *d]\n", "f: &f [*e, *e, *e, *e, *e, *e, *e, *e]\n",
    "g: [*f, *f, *f, *f, *f, *f, *f, *f]\n", "x: &x [*x]\n", "hidden: *g\n", "seed: *f\n",
    "\ufeff", "\r", "[" * 1500, "{a: " * 500, "a." * 2000 + "b = 1\n", "true", "-0", "1.5", "none",
)  # fmt: skip
_BOMB = "".join(token for token in _TOKENS if token[:2] in ("a:", "b:", "c:", "d:", "e:", "f:"))


def mutate_text(raw: bytes, rng: Rng) -> bytes:
    """Change a text by tokens of YAML, TOML and CSV, and by its own lines."""
    text = raw.decode("utf-8", "surrogateescape")
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = text.splitlines(keepends=True) or [""]
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            lines.insert(at, rng.choice(lines))
        elif kind == 1:
            del lines[at]
        elif kind == 2 and "=" in lines[at]:
            lines[at] = lines[at].partition("=")[0] + "= " + rng.choice(_TOKENS) + "\n"
        elif kind == 3 and ":" in lines[at]:
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(_TOKENS) + "\n"
        elif kind == 4 and rng.random() < 0.2:
            name = lines[at].partition(":")[0].strip() or "x"
            lines = [_BOMB, f"{name}: *f\n"]
        else:
            place = rng.randrange(len(lines[at]) + 1)
            cut = place + rng.choice((0, 0, 1, 5))
            lines[at] = lines[at][:place] + rng.choice(_TOKENS) + lines[at][cut:]
        text = "".join(lines)
    return text.encode("utf-8", "surrogateescape")
