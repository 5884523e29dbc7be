"""Reading and writing logs as DSRL files, HDF5 or NPZ. Reading a file runs no code from it.

A file has DSRL's arrays (`DSRL_KEYS`). A file that this package wrote also has the labels
(`LABEL_KEYS`) and a header in strict JSON, which is an attribute of the HDF5 root or an array of
bytes in NPZ. Arrays are read in blocks into float32 arrays (bool for flags) that are allocated
once, whatever the file's dtypes are. Reading therefore takes the memory of the arrays and of one
block, which `files.reading` limits.

The header of our own files holds one SHA-256 digest over the names, dtypes and shapes of the
arrays, their data and the rest of the header. A mark outside the header (the comment of the
archive, an attribute in HDF5) says that there is one, so that a header that damage hides is missed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import h5py
import numpy as np
import numpy.typing as npt

from safeshield.files.atomic import written_whole
from safeshield.files.reading import (
    LOG_BYTES,
    LOG_EXPANSION,
    LOG_HEADER,
    LOG_MEMBERS,
    MIB,
    opened,
    read_exactly,
    size_of,
    strict_json,
)
from safeshield.files.tensors import LOG_SUFFIXES

DSRL_KEYS = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "costs",
    "terminals",
    "timeouts",
)
LABEL_KEYS = ("constraints", "next_constraints")
FLAG_KEYS = ("terminals", "timeouts")
VECTOR_KEYS = ("observations", "next_observations", "actions")
HEADER_KEY = "safeshield"
DIGEST_KEY = "sha256"
_MARK = "safeshield-log"
"""Comment of an NPZ archive, and name of an HDF5 attribute: the file has a header with a digest."""

_NPZ_SUFFIX = ".npz"
_MOST_NPY_HEADER = 10_000
"""Bytes of the header of an array in NPZ; NumPy has the same limit."""
_MOST_DIRECTORY = MIB
"""Bytes of the table of contents of an NPZ archive."""

_Put = Callable[[Any, Any], None]
"""A function (index, block) that stores a block, in the file's dtype, at an index of the array."""

BLOCK_BYTES = 4 << 20
"""Approximate size of the block that is read at once, in addition to the array itself."""
_MAX_THREADS = 8
# Smaller chunks are unpacked faster than they could be handed to a thread.
_LEAST_CHUNK = 1 << 12
# Blocks with fewer columns are copied column by column, because NumPy copies short rows slowly.
_FEW_COLUMNS = 16

Array = npt.NDArray[Any]
Header = dict[str, Any]


class StoredLog(NamedTuple):
    """The contents of a log's file."""

    arrays: dict[str, Array]
    """Arrays by key, float32 or bool."""
    header: Header | None
    """The header without its digest; None where the file has none."""
    stated: str | None
    """The digest that the header states; None where it states none, as in files of others."""
    found: str | None
    """The digest of the contents; None where none is stated."""


class _Raw(NamedTuple):
    """What a reader of one format returns."""

    arrays: dict[str, Array]
    header: bytes | None
    marked: bool
    """Whether the file has the mark of a header with a digest."""
    names: list[str]
    """Names of all members, also of unknown ones."""
    dtypes: dict[str, np.dtype[Any]]
    """Dtypes of the arrays in the file."""


def read_log(path: Path) -> StoredLog:
    """Read the arrays and the header of a log.

    The file is opened once. Sizes and dtypes are checked before memory is allocated. Links,
    external storage and pickled objects are refused. Unknown arrays are ignored. An array with one
    number for each step may have the shape (N, 1) in the file.

    Args:
        path: The file, .hdf5, .h5 or .npz.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is a folder, a pipe or a device.
        ValueError: The suffix is unknown, the file is damaged or has another format than its suffix
            says, keys are missing (the message lists missing and present ones), parts of an array
            were never written, lengths differ, an array does not hold numbers, or the file claims
            more than a limit of `files.reading`.
    """
    reader = _read_hdf5 if _is_hdf5(path) else _read_npz
    with opened(path) as stream, _damage_as_value_error(path):
        raw = reader(path, stream)
        header = None if raw.header is None else strict_json(raw.header, f"{path}: its header")
        stated = None if header is None else header.pop(DIGEST_KEY, None)
        if stated is None and raw.marked:
            _damaged(path, "its header, or the digest in it, is missing")
        if stated is None:
            return StoredLog(raw.arrays, header, None, None)
        found = log_digest(header or {}, raw.arrays, raw.names, raw.dtypes)
        return StoredLog(raw.arrays, header, str(stated), found)


def log_digest(
    header: Header,
    arrays: Mapping[str, Array],
    names: list[str],
    dtypes: Mapping[str, np.dtype[Any]],
) -> str:
    """Return the SHA-256 digest of the contents of a log, in hexadecimal.

    Args:
        header: The header without the digest.
        arrays: The arrays by key, float32 or bool.
        names: Names of all members of the file but the header.
        dtypes: Dtypes of the arrays in the file.
    """
    with ThreadPoolExecutor(max(1, min(_cores(), _MAX_THREADS))) as pool:
        datas = list(pool.map(_data_digest, arrays.values()))
    told = {
        name: [dtypes[name].str, list(array.shape), data]
        for (name, array), data in zip(arrays.items(), datas, strict=True)
    }
    text = json.dumps([header, sorted(names), told], allow_nan=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _data_digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def write_log(path: Path, arrays: Mapping[str, Array], header: Header) -> None:
    """Write a log atomically: `path` holds either the old file or the whole new one.

    Args:
        path: The file, .hdf5, .h5 or .npz.
        arrays: Arrays by key: those of `DSRL_KEYS` and `LABEL_KEYS`.
        header: Spaces, kind of labels and provenance, as JSON values.

    Raises:
        ValueError: The suffix of `path` is unknown.
        OSError: The file cannot be written; see `files.atomic.check_writable`.
    """
    # The header is hashed as it will be read: JSON turns tuples into lists and keys into texts.
    plain = json.loads(json.dumps(header, allow_nan=False))
    dtypes = {key: array.dtype for key, array in arrays.items()}
    digest = log_digest(plain, arrays, list(arrays), dtypes)
    text = json.dumps({**plain, DIGEST_KEY: digest})
    write = _write_hdf5 if _is_hdf5(path) else _write_npz
    with written_whole(path) as part:
        write(part, arrays, text)


def _is_hdf5(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in LOG_SUFFIXES:
        raise ValueError(f"path must end in .hdf5, .h5 or .npz, got {str(path)!r}")
    return suffix != _NPZ_SUFFIX


def _write_hdf5(path: Path, arrays: Mapping[str, Array], header: str) -> None:
    # The header of a wide space may exceed 64 KiB, and attributes of that size need HDF5 1.8.
    with _Sink(path, "wb+") as sink, h5py.File(sink, "w", libver=("v108", "v108")) as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", shuffle=True)
        file.attrs[HEADER_KEY] = np.frombuffer(header.encode(), dtype=np.uint8)
        file.attrs[_MARK] = np.uint8(1)
    if sink.failed is not None:
        raise sink.failed


class _Sink(io.FileIO):
    """A file that keeps the first error of writing, in place of passing it to the HDF5 library.

    The library would print an error for each of its objects, and again at the end of the process.

    Attributes:
        failed: The error; None before. What is written after it is dropped.
    """

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer
        """Write all bytes, unless a write has failed before; return their number."""
        view = memoryview(data).cast("B")
        left = view
        try:
            while self.failed is None and len(left):
                left = left[super().write(left) or 0 :]
        except OSError as error:
            self.failed = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Change the size of the file, unless a write has failed before; return the size."""
        try:
            if self.failed is None:
                return super().truncate(size)
        except OSError as error:
            self.failed = error
        return size or 0


def _write_npz(path: Path, arrays: Mapping[str, Array], header: str) -> None:
    contents = {**arrays, HEADER_KEY: np.frombuffer(header.encode(), dtype=np.uint8)}
    with path.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **contents)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _MARK.encode()


def _read_hdf5(path: Path, stream: BinaryIO) -> _Raw:
    signature = read_exactly(stream, 8)
    stream.seek(0)
    if signature != b"\x89HDF\r\n\x1a\n":
        _damaged(path, "it is no HDF5 file")
    # No chunk cache is needed, because blocks end where chunks end and each is unpacked once.
    with h5py.File(stream, "r", rdcc_nbytes=0) as file:
        LOG_MEMBERS.check(len(file), str(path))
        present = list(file)
        keys = _keys_to_read(path, present)
        entries = {key: _plain_dataset(path, file, key) for key in keys}
        claims = {key: (entry.shape, entry.dtype) for key, entry in entries.items()}
        chunks = [math.prod(one.chunks or ()) * one.dtype.itemsize for one in entries.values()]
        _check_claims(path, size_of(stream), claims, max(chunks))
        for key, entry in entries.items():
            missing, total = missing_parts(entry)
            if missing:
                _damaged(path, f"{missing} of {total} parts of {key!r} were never written")
        header = None
        if HEADER_KEY in file.attrs:
            stored = file.attrs.get_id(HEADER_KEY)
            if stored.dtype != np.uint8:
                _damaged(path, "its header is not a JSON text")
            LOG_HEADER.check(math.prod(stored.shape), str(path))
            header = np.asarray(file.attrs[HEADER_KEY]).tobytes()
        marked = _MARK in file.attrs
        arrays = {key: _hdf5_array(key, entry) for key, entry in entries.items()}
        dtypes = {key: dtype for key, (_, dtype) in claims.items()}
        return _Raw(arrays, header, marked, present, dtypes)


def _plain_dataset(path: Path, file: Any, key: str) -> Any:  # noqa: ANN401 - h5py has no types
    # Soft and external links, external storage and virtual datasets read other files.
    entry = file[key] if isinstance(file.get(key, getlink=True), h5py.HardLink) else None
    if not isinstance(entry, h5py.Dataset) or entry.external or entry.is_virtual:
        _damaged(path, f"{key!r} is not an array stored in this file")
    return entry


def _hdf5_array(key: str, entry: Any) -> Array:  # noqa: ANN401
    out = _empty(key, entry.shape)
    read_into(out, entry, functools.partial(_put, key, out))
    return _squeezed(key, out)


# -- chunks of HDF5 ---------------------------------------------------------------------------
# The HDF5 library unpacks one chunk after the other on one core. Where gzip, with or without the
# shuffle filter, is the only compression, chunks are read packed and unpacked by several threads.


def missing_parts(entry: Any) -> tuple[int, int]:  # noqa: ANN401 - h5py has no types
    """Return how many chunks of an array were never written, and how many chunks it has.

    A writer that was interrupted leaves chunks out, and HDF5 reads them as zeros. `entry` is the
    array, an `h5py.Dataset`.
    """
    if entry.chunks is None:
        total, written = 1, int(entry.id.get_storage_size() > 0)
    else:
        counts = (math.ceil(n / c) for n, c in zip(entry.shape, entry.chunks, strict=True))
        total, written = math.prod(counts), entry.id.get_num_chunks()
    return (total - written, total) if entry.size else (0, total)


def read_into(out: Array, entry: Any, put: _Put) -> None:  # noqa: ANN401
    """Read a whole array of an HDF5 file into memory, block by block.

    Args:
        out: Array that is filled, of the shape of `entry`.
        entry: The array in the file, an `h5py.Dataset`.
        put: Function (index, block) that converts a block to the dtype of `out` and stores it at
            `index` of `out`. It may be called from several threads at once.

    Raises:
        OSError, ValueError, zlib.error: A chunk is damaged.
    """
    threads = min(_cores(), _MAX_THREADS)
    filters = _gzip_pipeline(entry)
    if filters is not None and threads > 1:
        _unpack_into(out, entry, put, filters, threads)
        return
    rows = max(1, BLOCK_BYTES * len(entry) // max(1, entry.nbytes))
    if entry.chunks is not None:
        rows = math.ceil(rows / entry.chunks[0]) * entry.chunks[0]
    for start in range(0, len(entry), rows):
        part = slice(start, min(start + rows, len(entry)))
        if entry.dtype == out.dtype == np.float32:
            entry.read_direct(out[part], part)
        else:
            put(part, entry[part])


def _unpack_into(
    out: Array,
    entry: Any,  # noqa: ANN401
    put: _Put,
    filters: list[int],
    threads: int,
) -> None:
    chunk, dtype = entry.chunks, entry.dtype

    def unpack(corner: tuple[int, ...], stored: tuple[int, bytes]) -> None:
        skipped, packed = stored
        block = _unpacked(packed, skipped, filters, math.prod(chunk), dtype).reshape(chunk)
        where = tuple(
            slice(a, min(a + b, n)) for a, b, n in zip(corner, chunk, out.shape, strict=True)
        )
        block = block[tuple(slice(one.stop - one.start) for one in where)]
        if block.ndim == 2 and block.shape[1] < min(_FEW_COLUMNS, out.shape[1]):
            for column in range(block.shape[1]):
                put((where[0], where[1].start + column), block[:, column])
        else:
            put(where, block)

    starts = (range(0, n, c) for n, c in zip(entry.shape, chunk, strict=True))
    corners = itertools.product(*starts)
    batch = max(threads, BLOCK_BYTES // (math.prod(chunk) * dtype.itemsize))
    with ThreadPoolExecutor(threads) as pool:
        while some := list(itertools.islice(corners, batch)):
            # Only this thread reads chunks, because two threads in h5py's chunk reads can deadlock.
            stored = [entry.id.read_direct_chunk(corner) for corner in some]
            for _ in pool.map(unpack, some, stored):
                pass


def _unpacked(
    packed: bytes, skipped: int, filters: list[int], count: int, dtype: np.dtype[Any]
) -> Array:
    """Return a chunk with its filters undone in reverse order.

    `skipped` is a bit mask of the filters that the writer did not apply to this chunk.
    """
    size = count * dtype.itemsize
    raw = np.frombuffer(packed, np.uint8)
    for number, kind in reversed(list(enumerate(filters))):
        if skipped >> number & 1:
            continue
        if kind == h5py.h5z.FILTER_DEFLATE:
            # Unpack at most one byte more than expected, to bound the memory for a hostile chunk.
            unpacker = zlib.decompressobj()
            raw = np.frombuffer(unpacker.decompress(raw.data, size + 1), np.uint8)
            if not unpacker.eof:
                raise ValueError(f"a chunk ends early or has more than the expected {size} bytes")
        elif dtype.itemsize > 1:
            planes = raw.reshape(dtype.itemsize, -1)
            raw = np.empty(planes.shape[::-1], np.uint8)
            for byte, plane in enumerate(planes):
                raw[:, byte] = plane
    if raw.size != size:
        raise ValueError(f"a chunk has {raw.size} bytes, but must have {size}")
    return raw.reshape(-1).view(dtype)


def _gzip_pipeline(entry: Any) -> list[int] | None:  # noqa: ANN401
    """Return the filters of an array in the order of writing.

    The result is None where `_unpacked` cannot undo them.
    """
    size = 0 if entry.chunks is None else math.prod(entry.chunks) * entry.dtype.itemsize
    if not size or not _LEAST_CHUNK <= size <= BLOCK_BYTES:
        return None
    creation = entry.id.get_create_plist()
    filters = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
    gzip, shuffle = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
    plain = h5py.h5t.py_create(entry.dtype, logical=True) == entry.id.get_type()
    return filters if plain and filters in ([gzip], [shuffle, gzip]) else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- NPZ ----------------------------------------------------------------------------------------


def _read_npz(path: Path, stream: BinaryIO) -> _Raw:
    buffered = io.BufferedReader(stream)  # type: ignore[type-var]
    _check_directory(path, buffered, size_of(stream))
    with zipfile.ZipFile(buffered) as archive:
        LOG_MEMBERS.check(len(archive.namelist()), str(path))
        for one in archive.infolist():
            if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                _damaged(
                    path, f"{one.filename!r:.60} is compressed in a way that NumPy does not use"
                )
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if len(members) < len(archive.namelist()):
            _damaged(path, "a member occurs twice")
        keys = _keys_to_read(path, list(members))
        claims = {}
        for key in keys:
            with archive.open(members[key]) as member:
                shape, _, dtype = _npy_header(member)
            claims[key] = (shape, dtype)
        _check_claims(path, size_of(stream), claims)
        header = None
        if HEADER_KEY in members:
            with archive.open(members[HEADER_KEY]) as member:
                shape, _, dtype = _npy_header(member)
                if dtype != np.uint8:
                    _damaged(path, "its header is not a JSON text")
                LOG_HEADER.check(math.prod(shape), str(path))
                # Reading up to the end makes zipfile compare the checksum.
                header = member.read(math.prod(shape) + 1)
        arrays = {key: _npz_array(archive, members[key], key) for key in keys}
        dtypes = {key: dtype for key, (_, dtype) in claims.items()}
        names = [name for name in members if name != HEADER_KEY]
        return _Raw(arrays, header, archive.comment == _MARK.encode(), names, dtypes)


def _check_directory(path: Path, stream: BinaryIO, size: int) -> None:
    """Refuse an archive whose table of contents is large, before `zipfile` reads it."""
    stream.seek(max(0, size - 2**16 - 22))
    tail = read_exactly(stream, 2**16 + 22)
    at = tail.rfind(b"PK\5\6")
    if 0 <= at <= len(tail) - 22 and struct.unpack_from("<I", tail, at + 12)[0] > _MOST_DIRECTORY:
        _damaged(path, f"its table of contents has more than {_MOST_DIRECTORY} bytes")
    stream.seek(0)


def _npz_array(archive: zipfile.ZipFile, member: str, key: str) -> Array:
    with archive.open(member) as stream:
        shape, by_columns, dtype = _npy_header(stream)
        out = _empty(key, shape)
        numbers: Any = out.T.flat if by_columns else out.reshape(-1)
        size = BLOCK_BYTES // dtype.itemsize
        for start in range(0, out.size, size):
            part = slice(start, min(start + size, out.size))
            wanted = (part.stop - start) * dtype.itemsize
            block = stream.read(wanted)
            if len(block) < wanted:
                raise EOFError(f"{member!r} is shorter than its header says")
            _put(key, numbers, part, np.frombuffer(block, dtype))
        # Reading past the end makes zipfile compare the checksum of the member.
        if stream.read(1):
            raise ValueError(f"{member!r} is longer than its header says")
    return _squeezed(key, out)


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:  # noqa: ANN401
    magic = stream.read(8)
    version = np.lib.format.read_magic(io.BytesIO(magic))
    read, size = {
        (1, 0): (np.lib.format.read_array_header_1_0, 2),
        (2, 0): (np.lib.format.read_array_header_2_0, 4),
    }.get(version, (None, 0))
    if read is None:
        raise ValueError(f"unknown .npy version {version}")
    # The length is checked here, because NumPy reads the header before it looks at its length.
    packed = stream.read(size)
    length = int.from_bytes(packed, "little")
    if len(packed) < size or length > _MOST_NPY_HEADER:
        raise ValueError(f"the header of an array has {length} bytes")
    return read(io.BytesIO(packed + stream.read(length)))


def _empty(key: str, shape: tuple[int, ...]) -> Array:
    return np.empty(shape, np.bool_ if key in FLAG_KEYS else np.float32)


def _put(key: str, out: Any, part: Any, block: Array) -> None:  # noqa: ANN401 - or a flatiter
    if key in FLAG_KEYS:
        # Compare bytes, because a damaged file may store other bytes than 0 and 1 as booleans.
        raw = block.view(np.uint8) if block.dtype == np.bool_ else block
        if not ((raw == 0) | (raw == 1)).all():
            raise ValueError(f"{key!r} must hold booleans (or 0 and 1 alone)")
    with np.errstate(over="ignore"):
        out[part] = block


def _squeezed(key: str, array: Array) -> Array:
    column = key not in VECTOR_KEYS and array.ndim == 2 and array.shape[1] == 1
    return array.reshape(-1) if column else array


def _check_claims(
    path: Path,
    size: int,
    claims: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    block: int = 0,
) -> None:
    """Check the dtypes, lengths and sizes of arrays before any is allocated.

    Args:
        path: The file.
        size: Its size in bytes.
        claims: Shape and dtype of each array in the file.
        block: Bytes of the largest block that is unpacked at once.
    """
    total = block
    for key, (shape, dtype) in claims.items():
        if dtype.kind not in "fiub":
            raise ValueError(f"{path}: {key!r} must hold numbers, got dtype {dtype}")
        total += math.prod(shape) * (1 if key in FLAG_KEYS else 4)
    most = max(LOG_BYTES.value, LOG_EXPANSION * size)
    if total > most:
        raise ValueError(f"{path}: it claims {LOG_BYTES.text(total, most)}")
    lengths = {key: shape[0] if shape else None for key, (shape, _) in claims.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        raise ValueError(
            f"{path}: every key must have the same first axis N, got {lengths}; a part of the log "
            "is missing: make the file again, or cut all keys to the same whole episodes"
        )


def _keys_to_read(path: Path, present: list[str]) -> list[str]:
    missing = [key for key in DSRL_KEYS if key not in present]
    labels = [key for key in LABEL_KEYS if key in present]
    if len(labels) == 1:
        missing += [key for key in LABEL_KEYS if key not in present]
    if missing:
        raise ValueError(
            f"{path}: missing keys {missing}; present keys {sorted(present)}; a log needs DSRL's "
            f"keys {list(DSRL_KEYS)}, and both or neither of {list(LABEL_KEYS)}"
        )
    return [*DSRL_KEYS, *labels]


def _damaged(path: Path, reason: str) -> NoReturn:
    raise ValueError(f"{path} is damaged or not a log: {reason}; copy or download it again")


@contextlib.contextmanager
def _damage_as_value_error(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        _damage(path, error)
    except (
        OSError,
        EOFError,
        RuntimeError,
        KeyError,
        TypeError,
        MemoryError,
        OverflowError,
        NotImplementedError,
        SyntaxError,
        AttributeError,
        struct.error,
        tokenize.TokenError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        _damage(path, error)


def _damage(path: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"{path} is damaged or not a log: {type(error).__name__}: {error}; "
        "copy or download it again"
    ) from error
