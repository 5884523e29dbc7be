"""Model files: one safetensors file, its configuration strict JSON in the header.

Nothing in such a file can run: no pickle, no YAML, no eval, no import by name. The header is read
and checked first (its length, its JSON, every tensor's dtype, shape and place in the file against
what the reader expects and against the file's size), and only then is anything allocated.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as format_safetensors

Array = npt.NDArray[Any]
_MAX_HEADER = 4 << 20
_KEY = "safeshield"
_ITEM_SIZE = {"F32": 4, "I64": 8, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorFile:
    """A file whose header has been checked and whose tensors have not been read yet."""

    path: Path
    header: dict[str, Any]
    """The JSON object that was written with the tensors."""
    shapes: dict[str, tuple[int, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the header gives for one tensor."""
        if name not in self.shapes:
            raise ValueError(f"{self.path} has no tensor '{name}'")
        return self.shapes[name]

    def load(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        """Read the tensors, which must be those of `expected` and of these shapes.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape, or not finite.
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
        return dict(arrays)


def write_tensors(path: str | os.PathLike[str], arrays: Mapping[str, Array], header: object) -> None:
    """Write tensors and a JSON header, atomically: a reader never sees half a file.

    Raises:
        ValueError: the header is not strict JSON.
    """
    path = Path(path)
    text = json.dumps(header, allow_nan=False, sort_keys=True)
    content = format_safetensors(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, {_KEY: text}
    )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(path: str | os.PathLike[str], kind: str) -> TensorFile:
    """Read and check a file's header.

    Args:
        path: the file.
        kind: what its header's "format" must say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of this kind, is truncated, or its header does not hold
            together.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a safeshield file, or is truncated: its header should have "
                f"{length} bytes, the file has {size}"
            )
        raw = stream.read(length)
    table = _parse_json(raw, path)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_KEY), str):
        raise ValueError(f"{path} is a safetensors file, but not one of safeshield's")
    header = _parse_json(metadata[_KEY].encode(), path)
    if header.get("format") != kind:
        raise ValueError(
            f"{path} must be a '{kind}' file, got '{str(header.get('format'))[:60]}'"
        )
    return TensorFile(path, header, _shapes(table, size - 8 - length, path))


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        value = json.loads(raw, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: the header must be a JSON object")
    return value


def _shapes(table: dict[str, Any], room: int, path: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    spans = []
    for name, entry in table.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        span = entry.get("data_offsets") if isinstance(entry, dict) else None
        item = _ITEM_SIZE.get(entry.get("dtype")) if isinstance(entry, dict) else None
        if (
            item is None
            or not _whole_numbers(shape)
            or not _whole_numbers(span)
            or len(span) != 2
            or span[1] - span[0] != item * math.prod(shape)
        ):
            raise ValueError(f"{path}: the entry of tensor '{name[:80]}' does not hold together")
        shapes[name] = tuple(shape)
        spans.append(tuple(span))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"{path}: the tensors overlap or leave gaps")
        end = stop
    if end != room:
        raise ValueError(f"{path} is truncated or has a tail: {end} bytes of tensors, {room} found")
    return shapes


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 48 for x in value
    )
