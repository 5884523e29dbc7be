"""What is written to disk and read back: tensors with a header, and values that are checked."""

from safeshield.files.tensors import (
    FORMATS,
    TensorFile,
    read_by,
    read_tensors,
    register_format,
    write_tensors,
)

__all__ = ["FORMATS", "TensorFile", "read_by", "read_tensors", "register_format", "write_tensors"]
