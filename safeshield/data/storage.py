"""Reading and writing logs as DSRL files, HDF5 or NPZ, without ever running what they hold.

A file has DSRL's arrays (`DSRL_KEYS`), and, when this package wrote it, the labels
(`LABEL_KEYS`) and a strict-JSON header: an attribute of the HDF5 root, an array of bytes in NPZ.
Arrays are read block by block into float32 (flags: bool) arrays that are allocated once, whatever
the file's own dtypes are: reading takes the memory of the arrays and of one block.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt

from safeshield.data import hdf5

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

_HDF5_SUFFIXES = (".hdf5", ".h5")
_NPZ_SUFFIX = ".npz"
_MAX_HEADER_BYTES = 1 << 29
# Deflate cannot shrink data more than 1032 times: a file that claims more holds no such arrays.
_MAX_EXPANSION = 1100

Array = npt.NDArray[Any]
Header = dict[str, Any]


def read_log(path: Path) -> tuple[dict[str, Array], Header | None]:
    """Read the known arrays, as float32 or bool, and the header of a log.

    Sizes and dtypes are checked before anything is allocated; links, external storage and pickled
    objects are refused. Unknown arrays are ignored. A key of one number a step may be (N, 1) in
    the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown, the file is damaged or not what its suffix says, keys
            are missing (the message lists missing and present ones), parts of an array were never
            written, lengths differ, or an array holds no numbers.
    """
    reader = _read_hdf5 if _is_hdf5(path) else _read_npz
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with _damage_as_value_error(path):
        arrays, header_text = reader(path)
        header = None if header_text is None else _parse_header(path, header_text)
    return arrays, header


def write_log(path: Path, arrays: Mapping[str, Array], header: Header) -> None:
    """Write a log, atomically: `path` holds the old file or the whole new one, never a part.

    Raises:
        ValueError: the suffix of `path` is unknown.
        FileNotFoundError: its folder does not exist.
    """
    text = json.dumps(header, allow_nan=False)
    if _is_hdf5(path):
        _replace(path, lambda part: _write_hdf5(part, arrays, text))
    else:
        _replace(path, lambda part: _write_npz(part, arrays, text))


def _is_hdf5(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in (*_HDF5_SUFFIXES, _NPZ_SUFFIX):
        raise ValueError(f"path must end in .hdf5, .h5 or .npz, got {str(path)!r}")
    return suffix in _HDF5_SUFFIXES


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: make the folder {path.parent} first")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        write(part)
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_hdf5(path: Path, arrays: Mapping[str, Array], header: str) -> None:
    # The format of HDF5 1.8 is the oldest whose attributes may exceed 64 KiB (wide spaces).
    with h5py.File(path, "w", libver=("v108", "v108")) as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", shuffle=True)
        file.attrs[HEADER_KEY] = np.frombuffer(header.encode(), dtype=np.uint8)


def _write_npz(path: Path, arrays: Mapping[str, Array], header: str) -> None:
    contents = {**arrays, HEADER_KEY: np.frombuffer(header.encode(), dtype=np.uint8)}
    with path.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **contents)


def _read_hdf5(path: Path) -> tuple[dict[str, Array], bytes | None]:
    if not h5py.is_hdf5(path):
        _damaged(path, "it is no HDF5 file")
    # No cache of chunks: blocks end where chunks do, so that each is unpacked once.
    with h5py.File(path, "r", rdcc_nbytes=0) as file:
        present = list(file)
        keys = _keys_to_read(path, present)
        entries = {key: _plain_dataset(path, file, key) for key in keys}
        _check_claims(path, {key: (entry.shape, entry.dtype) for key, entry in entries.items()})
        for key, entry in entries.items():
            missing, total = hdf5.missing_parts(entry)
            if missing:
                _damaged(path, f"{missing} of {total} parts of {key!r} were never written")
        arrays = {key: _hdf5_array(key, entry) for key, entry in entries.items()}
        if HEADER_KEY not in file.attrs:
            return arrays, None
        stored = file.attrs.get_id(HEADER_KEY)
        if stored.dtype != np.uint8 or math.prod(stored.shape) > _MAX_HEADER_BYTES:
            _damaged(path, "its header is not a JSON text")
        return arrays, np.asarray(file.attrs[HEADER_KEY]).tobytes()


def _plain_dataset(path: Path, file: Any, key: str) -> Any:  # noqa: ANN401 - h5py has no types
    # Soft and external links, external storage and virtual datasets read other files.
    entry = file[key] if isinstance(file.get(key, getlink=True), h5py.HardLink) else None
    if not isinstance(entry, h5py.Dataset) or entry.external or entry.is_virtual:
        _damaged(path, f"{key!r} is not an array stored in this file")
    return entry


def _hdf5_array(key: str, entry: Any) -> Array:  # noqa: ANN401
    out = _empty(key, entry.shape)
    hdf5.read_into(out, entry, functools.partial(_put, key, out))
    return _squeezed(key, out)


def _read_npz(path: Path) -> tuple[dict[str, Array], bytes | None]:
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        keys = _keys_to_read(path, list(members))
        claims = {}
        for key in keys:
            with archive.open(members[key]) as stream:
                shape, _, dtype = _npy_header(stream)
            claims[key] = (shape, dtype)
        _check_claims(path, claims)
        arrays = {key: _npz_array(archive, members[key], key) for key in keys}
        if HEADER_KEY not in members:
            return arrays, None
        with archive.open(members[HEADER_KEY]) as stream:
            shape, _, dtype = _npy_header(stream)
            if dtype != np.uint8 or math.prod(shape) > _MAX_HEADER_BYTES:
                _damaged(path, "its header is not a JSON text")
            return arrays, stream.read(_MAX_HEADER_BYTES)


def _npz_array(archive: zipfile.ZipFile, member: str, key: str) -> Array:
    with archive.open(member) as stream:
        shape, by_columns, dtype = _npy_header(stream)
        out = _empty(key, shape)
        numbers: Any = out.T.flat if by_columns else out.reshape(-1)
        size = hdf5.BLOCK_BYTES // dtype.itemsize
        for start in range(0, out.size, size):
            part = slice(start, min(start + size, out.size))
            wanted = (part.stop - start) * dtype.itemsize
            block = stream.read(wanted)
            if len(block) < wanted:
                raise EOFError(f"{member!r} is shorter than its header says")
            _put(key, numbers, part, np.frombuffer(block, dtype))
        # The checksum of a member is compared where it ends.
        if stream.read(1):
            raise ValueError(f"{member!r} is longer than its header says")
    return _squeezed(key, out)


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:  # noqa: ANN401
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"unknown .npy version {version}")
    return read(stream)


def _empty(key: str, shape: tuple[int, ...]) -> Array:
    return np.empty(shape, np.bool_ if key in FLAG_KEYS else np.float32)


def _put(key: str, out: Any, part: Any, block: Array) -> None:  # noqa: ANN401 - or a flatiter
    if key in FLAG_KEYS:
        # As bytes: a damaged bool may hold any, and would be true and equal to nothing.
        raw = block.view(np.uint8) if block.dtype == np.bool_ else block
        if not ((raw == 0) | (raw == 1)).all():
            raise ValueError(f"{key!r} must hold booleans (or 0 and 1 alone)")
    with np.errstate(over="ignore"):
        out[part] = block


def _squeezed(key: str, array: Array) -> Array:
    column = key not in VECTOR_KEYS and array.ndim == 2 and array.shape[1] == 1
    return array.reshape(-1) if column else array


def _check_claims(path: Path, claims: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
    total = 0
    for key, (shape, dtype) in claims.items():
        if dtype.kind not in "fiub":
            raise ValueError(f"{path}: {key!r} must hold numbers, got dtype {dtype}")
        total += math.prod(shape) * dtype.itemsize
    most = _MAX_EXPANSION * path.stat().st_size
    if total > most:
        _damaged(path, f"it claims {total} bytes of arrays, more than its size can hold ({most})")
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


def _parse_header(path: Path, text: bytes) -> Header:
    try:
        header = json.loads(text.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header is not a JSON text ({error})")
    if not isinstance(header, dict):
        _damaged(path, "its header is not a JSON object")
    return header


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not strict JSON")


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
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        _damage(path, error)


def _damage(path: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"{path} is damaged or not a log: {type(error).__name__}: {error}; "
        "copy or download it again"
    ) from error
