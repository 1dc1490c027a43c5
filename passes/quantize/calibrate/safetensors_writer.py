"""Writes safetensors files tensor by tensor: sizes are known first, bytes are made when it is their turn.

    write_safetensors(path, [Entry("a.weight", "BF16", (4, 8), lambda: [array])])

Bytes go to a temporary name that is renamed when all are there. Raises DiagnosticError when the disk refuses.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ir.diagnostics import DiagnosticError

ITEM_BYTES = {
    **dict.fromkeys(("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_NAMES = {
    "int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
}  # fmt: skip
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. `make` gives its bytes, in parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


def array_entry(name: str, array: np.ndarray) -> Entry:
    """An entry of an array that is there already."""
    return Entry(name, dtype_name(array.dtype), array.shape, lambda: [np.ascontiguousarray(array).tobytes()])


def dtype_name(dtype: np.dtype) -> str:
    """What safetensors calls it."""
    return _NAMES[dtype.name]


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: dict[str, str] | None = None,
    tell: Callable[[int], None] | None = None,
) -> None:
    """The file with all entries in order; `tell` gets the number of bytes of each part written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for entry in entries:
                written = 0
                for data in entry.make():
                    view = memoryview(data).cast("B")
                    for start in range(0, len(view), _CHUNK):
                        file.write(view[start : start + _CHUNK])
                    written += len(view)
                    if tell is not None:
                        tell(len(view))
                assert written == entry.nbytes, f"{entry.name}: {written} bytes for {entry.nbytes}"
        os.replace(part, path)
    except OSError as error:
        raise DiagnosticError(f"cannot be written: {error.strerror}", where=str(path)) from error
