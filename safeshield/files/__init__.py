"""Reading and writing of files: tensors with a header, and checks of the values in them."""

from safeshield.files.tensors import (
    FORMATS,
    TensorFile,
    read_by,
    read_tensors,
    register_format,
    sign_file,
    write_tensors,
)

__all__ = [
    "FORMATS",
    "TensorFile",
    "read_by",
    "read_tensors",
    "register_format",
    "sign_file",
    "write_tensors",
]
