"""Arrays of an HDF5 file into arrays that are already there, without another copy of them.

The HDF5 library unpacks one chunk after the other, on one core. Chunks that were packed by gzip
alone, with shuffled bytes or not, are therefore fetched packed and unpacked by several threads.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Put = Callable[[Any, Any], None]
"""Puts a block, in the file's dtype, where an index of the array says."""

BLOCK_BYTES = 4 << 20
"""About what is read at once beside the array itself."""
_MAX_THREADS = 8
# A smaller chunk is unpacked before a thread would have been told of it.
_LEAST_CHUNK = 1 << 12
# Fewer columns than these are copied one by one: numpy is slow at many short rows.
_FEW_COLUMNS = 16


def missing_parts(entry: Any) -> tuple[int, int]:  # noqa: ANN401 - h5py has no types
    """Return how many parts of an array were never written, and how many it has.

    A writer that was stopped leaves chunks out, and HDF5 reads those as zeros.
    """
    if entry.chunks is None:
        total, written = 1, int(entry.id.get_storage_size() > 0)
    else:
        counts = (math.ceil(n / c) for n, c in zip(entry.shape, entry.chunks, strict=True))
        total, written = math.prod(counts), entry.id.get_num_chunks()
    return (total - written, total) if entry.size else (0, total)


def read_into(out: Array, entry: Any, put: Put) -> None:  # noqa: ANN401
    """Read all of an array into `out`, of the same shape; `put` converts.

    Raises:
        OSError, ValueError, zlib.error: a chunk is damaged.
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
    put: Put,
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
            # Fetched by this thread alone: two that read chunks through h5py can wait for ever.
            stored = [entry.id.read_direct_chunk(corner) for corner in some]
            for _ in pool.map(unpack, some, stored):
                pass


def _unpacked(
    packed: bytes, skipped: int, filters: list[int], count: int, dtype: np.dtype[Any]
) -> Array:
    """Undo the filters, last first, but for those that the writer skipped at this chunk (bits)."""
    size = count * dtype.itemsize
    raw = np.frombuffer(packed, np.uint8)
    for number, kind in reversed(list(enumerate(filters))):
        if skipped >> number & 1:
            continue
        if kind == h5py.h5z.FILTER_DEFLATE:
            # At most a byte more than fits: what a hostile chunk expands to is not kept.
            unpacker = zlib.decompressobj()
            raw = np.frombuffer(unpacker.decompress(raw.data, size + 1), np.uint8)
            if not unpacker.eof:
                raise ValueError(f"a chunk ends early or has more than its {size} bytes")
        elif dtype.itemsize > 1:
            planes = raw.reshape(dtype.itemsize, -1)
            raw = np.empty(planes.shape[::-1], np.uint8)
            for byte, plane in enumerate(planes):
                raw[:, byte] = plane
    if raw.size != size:
        raise ValueError(f"a chunk has {raw.size} bytes, must have {size}")
    return raw.reshape(-1).view(dtype)


def _gzip_pipeline(entry: Any) -> list[int] | None:  # noqa: ANN401
    """The filters of an array that `_unpacked` can undo, in the order of writing; else None."""
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
