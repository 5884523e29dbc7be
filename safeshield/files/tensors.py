"""Model files: safetensors files with the configuration as strict JSON in the header.

Reading a file runs no code from it: there is no pickle, no YAML, no eval and no import by name. The
reader checks the header before it allocates any memory: its length, its JSON, and the dtype, shape
and offsets of every tensor against the expected ones and against the size of the file. A SHA-256
digest of the header and of every tensor detects damage, and edits by whoever does not renew it. A
file may also hold a signature of this digest (`signing`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as format_safetensors

from safeshield.files.atomic import written_whole
from safeshield.files.signing import NOT_VERIFIED, UNSIGNED, check_signature, signature_of

if TYPE_CHECKING:
    from safeshield.files.signing import PrivateKey, PublicKey

Array = npt.NDArray[Any]
_MAX_HEADER = 4 << 20
_KEY = "safeshield"
_CONTENTS = ("header", "sha256", "signature")
TRAINING_HASHES = "episodes/training"
"""Tensor of agents and shields that holds the hashes of the episodes of the training log."""
TRAINING_EPISODES = "training_episodes"
"""Field of the header with the number of these hashes; missing or null where they are not known."""
AGENT, SHIELD, CHECKPOINT = "agent", "shield", "checkpoint"
FORMATS: dict[str, tuple[str, str]] = {}
"""The file formats that this process can read. The key is the format named in the header; the value
says what such a file holds and which function reads it."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("f4"),
    "I64": np.dtype("i8"),
    "U8": np.dtype("u1"),
}


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
    signature: str | None = None
    """Ed25519 signature of this digest, in hexadecimal; None where the file is not signed."""

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
        try:
            arrays = parse_safetensors(self.path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
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
        return dict(arrays)


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
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise (IsADirectoryError if path.is_dir() else FileNotFoundError)(
            f"path must name a file that save() has written, got '{path}', which is {what}: check "
            "the name and the working directory"
        )
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    try:
        if length > _MAX_HEADER:
            raise SafetensorError(f"a header of {length} bytes")
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            kinds = {name: one.get_dtype() for name, one in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safeshield file, or is truncated or has extra bytes: {error}"
        ) from error
    if _KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a safeshield file")
    if len(metadata) > 1:
        # The digest covers this entry alone, and so does a signature.
        raise ValueError(
            f"{path}: the metadata must hold '{_KEY}' alone, which digest and signature cover, got "
            f"{sorted(metadata)!r:.120}; save the file again with this release"
        )
    unknown = sorted(set(kinds.values()) - set(_DTYPES))
    if unknown:
        raise ValueError(f"{path}: tensors must be of {list(_DTYPES)}, got {unknown}")
    dtypes = {name: _DTYPES[kind] for name, kind in kinds.items()}
    contents = _parse_json(metadata[_KEY].encode(), path)
    header = contents.get("header")
    found = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(found, str) or found != (kind or found):
        wanted = "a safeshield file" if kind is None else f"a '{kind}' file"
        raise ValueError(f"{path} must be {wanted}, got '{str(found)[:60]}'{read_by(found)}")
    signature = contents.get("signature")
    if not set(contents) <= set(_CONTENTS) or not isinstance(signature, str | None):
        raise ValueError(
            f"{path}: the contents must be {list(_CONTENTS)}, where signature is a text or "
            f"missing, got {sorted(contents)!r:.80}"
        )
    return TensorFile(path, header, shapes, dtypes, contents.get("sha256"), signature)


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


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        value = json.loads(raw, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: the header must be a JSON object")
    return value


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
