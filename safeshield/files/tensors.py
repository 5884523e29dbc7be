"""Model files: safetensors files with the configuration as strict JSON in the header.

Reading a file runs no code from it: there is no pickle, no YAML, no eval and no import by name. The
file is opened once, and all is read from that descriptor. The reader checks the header before it
allocates any memory: its length, its JSON, and the dtype, shape and offsets of every tensor against
the expected ones, against the size of the file and against the limits of `reading`. A SHA-256
digest of the header and of every tensor detects damage, and edits by whoever does not renew it. A
file may also hold a signature of this digest (`signing`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as format_safetensors

from safeshield.files.atomic import written_whole
from safeshield.files.reading import (
    MODEL_HEADER,
    MODEL_NUMBERS,
    opened,
    read_exactly,
    size_of,
    strict_json,
)
from safeshield.files.signing import NOT_VERIFIED, UNSIGNED, check_signature, signature_of

if TYPE_CHECKING:
    from safeshield.files.signing import PrivateKey, PublicKey

Array = npt.NDArray[Any]
_KEY = "safeshield"
_CONTENTS = ("header", "sha256", "signature")
TRAINING_HASHES = "episodes/training"
"""Tensor of agents and shields that holds the hashes of the episodes of the training log."""
TRAINING_EPISODES = "training_episodes"
"""Field of the header with the number of these hashes; missing or null where they are not known."""
AGENT, SHIELD, CHECKPOINT = "agent", "shield", "checkpoint"
LOG_SUFFIXES = (".hdf5", ".h5", ".npz")
"""Endings of the files of logs, which are not files of tensors."""
FORMATS: dict[str, tuple[str, str]] = {}
"""The file formats that this process can read. The key is the format named in the header; the value
says what such a file holds and which function reads it."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}


class _Entry(NamedTuple):
    """The place of one tensor in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    """Its first byte, counted from the beginning of the file."""


@dataclass(frozen=True)
class TensorFile:
    """A file whose header has been checked and whose tensors have not been read yet."""

    path: Path
    """The file."""
    header: dict[str, Any]
    """The JSON object that was written with the tensors."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the tensors, by name."""
    dtypes: dict[str, np.dtype[Any]]
    """Dtypes of the tensors, by name."""
    digest: object
    """SHA-256 digest that the file states."""
    signature: str | None
    """Ed25519 signature of this digest, in hexadecimal; None where the file is not signed."""
    _stream: BinaryIO = field(repr=False, compare=False)
    """The open file, from which the tensors are read even if another one has its name by then."""
    _offsets: dict[str, int] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._stream.close)

    @property
    def size(self) -> int:
        """Number of bytes of the file."""
        return size_of(self._stream)

    @property
    def signed(self) -> str:
        """Whether the file is signed: "unsigned", or "signed, not verified"."""
        return UNSIGNED if self.signature is None else NOT_VERIFIED

    def verify(self, key: PublicKey) -> None:
        """Check that the stated digest is signed with the private key that belongs to `key`.

        `load` compares the digest with the contents.

        Raises:
            ImportError, OSError, TypeError, ValueError: See `signing.check_signature`.
        """
        check_signature(self.path, self.digest, self.signature, key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor `name` according to the header."""
        if name not in self.shapes:
            raise ValueError(f"{self.path} has no tensor '{name}'")
        return self.shapes[name]

    def load(
        self,
        expected: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, npt.DTypeLike] | None = None,
    ) -> dict[str, Array]:
        """Return the tensors by name, after a check of their names and shapes.

        Args:
            expected: Shape of every tensor, by name.
            dtypes: Dtypes of the tensors that are not float32, by name.

        Raises:
            ValueError: A tensor is missing, unknown, of another shape or dtype, or not finite; or
                the contents do not match the digest.
        """
        missing = sorted(set(expected) - set(self.shapes))
        unknown = sorted(set(self.shapes) - set(expected))
        if missing or unknown:
            raise ValueError(
                f"{self.path} does not hold the tensors that its header describes: missing "
                f"{missing[:5]}, unknown {unknown[:5]}"
            )
        for name, shape in expected.items():
            if self.shapes[name] != tuple(shape):
                raise ValueError(
                    f"{self.path}: tensor '{name}' must have shape {tuple(shape)}, "
                    f"got {self.shapes[name]}"
                )
            dtype = np.dtype((dtypes or {}).get(name, np.float32))
            if self.dtypes[name] != dtype:
                raise ValueError(
                    f"{self.path}: tensor '{name}' must be {dtype}, got {self.dtypes[name]}"
                )
        arrays = {name: self._read(name) for name in self.shapes}
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(
                    f"{self.path}: tensor '{name}' holds NaN or infinity; the file is damaged or "
                    "the training that wrote it diverged"
                )
        try:
            digest = content_digest(self.header, arrays)
        except ValueError:  # A number in the header is too large for a float.
            digest = ""
        if digest != self.digest:
            raise ValueError(
                f"{self.path} is damaged or was edited: its contents do not have the SHA-256 "
                "digest that it names; copy it again, or save it again with this release"
            )
        return arrays

    def _read(self, name: str) -> Array:
        """Return a tensor, which is read into an array of its own."""
        array = np.empty(self.shapes[name], self.dtypes[name])
        view = array.data.cast("B") if array.size else memoryview(b"")
        self._stream.seek(self._offsets[name])
        while len(view):
            count = self._stream.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{self.path} is damaged: it ends inside the tensor '{name}'")
            view = view[count:]
        return array


def write_tensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Array],
    header: object,
    sign: PrivateKey | None = None,
) -> None:
    """Write tensors and a JSON header atomically, so that a reader never sees a partial file.

    Args:
        path: The file.
        arrays: Tensors by name.
        header: JSON values that describe the tensors.
        sign: Private Ed25519 key, or the path of its PEM file, that signs the file; None for none.

    Raises:
        ValueError: The header is not strict JSON, or there is no such key in the key's file.
        ImportError: `sign` is given, and the extra `sign` is not installed.
        OSError: The file cannot be written; see `files.atomic.check_writable`.
    """
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # The metadata has one key, because the order of several keys would vary between runs.
    digest = content_digest(header, plain)
    signature = {} if sign is None else {"signature": signature_of(digest, sign)}
    text = _dump({"header": header, "sha256": digest, **signature})
    content = format_safetensors(plain, {_KEY: text})
    with written_whole(Path(path)) as part:
        part.write_bytes(content)


def read_tensors(path: str | os.PathLike[str], kind: str | None = None) -> TensorFile:
    """Return a file whose header has been read and checked, and whose tensors can then be loaded.

    Args:
        path: Path of the file.
        kind: Required "format" of the header; by default any format.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: The path is a folder.
        ValueError: The file is not of this kind or is truncated, its header is not consistent, or
            it has metadata that its digest does not cover.
    """
    path = Path(path)
    try:
        stream = opened(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "a folder" if isinstance(error, IsADirectoryError) else "no such file"
        raise type(error)(
            f"path must name a file that save() has written, got '{path}', which is {what}: check "
            "the name and the working directory"
        ) from error
    try:
        metadata, entries = _table(path, stream)
        return _checked(path, kind, stream, metadata, entries)
    except BaseException:
        stream.close()
        raise


def _checked(
    path: Path,
    kind: str | None,
    stream: BinaryIO,
    metadata: dict[str, Any],
    entries: dict[str, _Entry],
) -> TensorFile:
    """Return the file of a table of tensors, after a check of our part of the header."""
    if _KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a safeshield file")
    if len(metadata) > 1:
        # The digest covers this entry alone, and so does a signature.
        raise ValueError(
            f"{path}: the metadata must hold '{_KEY}' alone, which digest and signature cover, got "
            f"{sorted(metadata)!r:.120}; save the file again with this release"
        )
    contents = strict_json(_encoded(metadata[_KEY]), f"{path}: the header")
    header = contents.get("header")
    found = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(found, str) or found != (kind or found):
        wanted = "a safeshield file" if kind is None else f"a '{kind}' file"
        raise ValueError(f"{path} must be {wanted}, got '{str(found)[:60]}'{_read_by(found, kind)}")
    signature = contents.get("signature")
    if not set(contents) <= set(_CONTENTS) or not isinstance(signature, str | None):
        raise ValueError(
            f"{path}: the contents must be {list(_CONTENTS)}, where signature is a text or "
            f"missing, got {sorted(contents)!r:.80}"
        )
    return TensorFile(
        path,
        header,
        {name: entry.shape for name, entry in entries.items()},
        {name: entry.dtype for name, entry in entries.items()},
        contents.get("sha256"),
        signature,
        stream,
        {name: entry.offset for name, entry in entries.items()},
    )


def _encoded(text: object) -> bytes:
    # A lone surrogate, which JSON can write as an escape, has no bytes and is refused later.
    return text.encode(errors="replace") if isinstance(text, str) else b""


def _table(path: Path, stream: BinaryIO) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """Return the metadata and the places of the tensors of a safetensors file.

    The places are checked against each other and against the size of the file.

    Raises:
        ValueError: The file has another format, or a limit is exceeded.
    """
    try:
        length = int.from_bytes(read_exactly(stream, 8), "little")
        size = size_of(stream)
        if 8 + length > size and length > MODEL_HEADER.value:
            raise ValueError("it does not begin with the length of a header, as .safetensors do")
        if 8 + length > size:
            raise ValueError(f"its header has {length} bytes, and the file {size}")
        MODEL_HEADER.check(length, "it")
        table = strict_json(read_exactly(stream, length), "its table of tensors")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata must be an object")
        entries = {name: _entry(name, entry) for name, entry in table.items()}
        MODEL_NUMBERS.check(sum(math.prod(one.shape) for one in entries.values()), "it")
        place = 0
        ends = {name: one["data_offsets"][1] for name, one in table.items()}
        for name, entry in sorted(entries.items(), key=lambda one: (one[1].offset, ends[one[0]])):
            count = math.prod(entry.shape) * entry.dtype.itemsize
            if entry.offset != place or ends[name] != place + count:
                raise ValueError(f"the tensor {name!r:.60} does not follow the one before it")
            place += count
        if place != size - 8 - length:
            raise ValueError(f"it has {size - 8 - length} bytes of tensors, and needs {place}")
    except ValueError as error:
        raise ValueError(
            f"{path} is not a safeshield file, or is truncated or has extra bytes: {error}"
        ) from error
    moved = {name: one._replace(offset=8 + length + one.offset) for name, one in entries.items()}
    return metadata, moved


def _entry(name: str, data: object) -> _Entry:
    if not isinstance(data, dict) or set(data) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of the tensor {name!r:.60} is not one")
    shape, offsets = data["shape"], data["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, *offsets)):
        raise ValueError(f"the place of the tensor {name!r:.60} is not one")
    if len(shape) > 32 or not isinstance(data["dtype"], str) or data["dtype"] not in _DTYPES:
        raise ValueError(
            f"tensors must be of {list(_DTYPES)} with at most 32 axes, got {data['dtype']!r:.40} "
            f"with {len(shape)}"
        )
    return _Entry(_DTYPES[data["dtype"]], tuple(shape), offsets[0])


def sign_file(
    path: str | os.PathLike[str], key: PrivateKey, out: str | os.PathLike[str] | None = None
) -> None:
    """Sign a file of any format, after a check of its digest.

    Args:
        path: The file. A signature that it has is replaced.
        key: Private Ed25519 key, or the path of its PEM file.
        out: File to write; by default `path` itself.

    Raises:
        ImportError: The extra `sign` is not installed.
        OSError: There is no such file, or `out` cannot be written.
        ValueError: The file is damaged, or there is no such key in the key's file.
    """
    file = read_tensors(path)
    arrays = file.load(file.shapes, file.dtypes)
    write_tensors(path if out is None else out, arrays, file.header, key)


def hash_shapes(header: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of the tensor of training hashes by its name, ``{}`` where there is none.

    `header` is the header of an agent or a shield.

    Raises:
        ValueError: The number of episodes is not a whole number of at least 0.
    """
    count = header.get(TRAINING_EPISODES)
    if count is None:
        return {}
    if type(count) is not int or count < 0:
        raise ValueError(f"{TRAINING_EPISODES} must be a whole number, got {count!r:.40}")
    return {TRAINING_HASHES: (count,)}


def register_format(name: str, holds: str, reader: str) -> None:
    """Register a file format in `FORMATS`. The module that defines a format calls this.

    Args:
        name: Value of "format" in the header.
        holds: AGENT, SHIELD or CHECKPOINT.
        reader: Name of the function that reads the format, such as `Shield.load`.

    Raises:
        ValueError: The name is already registered for another reader.
    """
    if FORMATS.setdefault(name, (holds, reader)) != (holds, reader):
        raise ValueError(
            f"the file format '{name}' is read by {FORMATS[name][1]}; choose another file_format"
        )


def read_by(kind: object) -> str:
    """Return the end of an error message, which says what reads a file of the format `kind`."""
    known = FORMATS.get(str(kind))
    if known is not None:
        return f"; {known[1]} reads it"
    return (
        "; no imported module reads it: import the module that defines it (those of this package "
        "are in safeshield.algorithms), or pass it as --plugin FILE.py"
    )


def _read_by(found: object, wanted: str | None) -> str:
    """Return what `read_by` does, and for an agent in place of a shield what makes a shield."""
    name = str(found)
    # FORMATS contains a format of this package only after its module has been imported.
    own = name.startswith("safeshield-") and name != "safeshield-checkpoint"
    agent = FORMATS[name][0] == AGENT if name in FORMATS else own
    if not agent or FORMATS.get(str(wanted), ("", ""))[0] != SHIELD:
        return read_by(found)
    reads = read_by(found) if name in FORMATS else "; safeshield.load_agent reads it"
    return (
        f"{reads}. It is the file of an agent: where the agent has a shield, `safeshield calibrate "
        "FILE ENVIRONMENT OUT` writes this shield, calibrated, to OUT"
    )


def _dump(value: object) -> str:
    return json.dumps(value, allow_nan=False, sort_keys=True)


def content_digest(header: object, arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256 digest of JSON values and of arrays by name, in hexadecimal."""
    digest = hashlib.sha256(_dump(header).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
