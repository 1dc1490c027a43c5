"""The header of a safetensors file, read as if its author were an enemy.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes, the little-endian header length N; N bytes
of JSON, `{"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}`; then the data. `read_header` gives one
`TensorInfo` a tensor. Refused: lengths beyond the file or 100 MB, anything but that JSON, duplicate keys, byte counts
that are not shape times dtype, and data with gaps, overlaps, missing or extra bytes. Time and memory are bounded by
the length of the header: it is read entry by entry, never as one tree.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontends.json_file import file_size, parse_json
from ir.diagnostics import DiagnosticError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_TENSORS = 500_000  # five times the largest checkpoint known (a thousand billion parameters in 384 experts)
MAX_RANK = 8
MAX_ENTRY_CHARS = 4096  # one tensor's JSON object: eight dimensions need less than 300
MAX_NAME_CHARS = 1024

_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\n\r]*")

# Bits of one element. All that the format names are known, so that every file can be checked; reading is another
# matter, see `frontends.checkpoint`.
_NAMES_BY_BITS = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    6: "F6_E2M3 F6_E3M2",
    4: "F4",
}
DTYPE_BITS = {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from `offset`, counted from the start of `file`, row-major."""

    name: str
    dtype: str  # the format's spelling: "F32", "BF16", ...
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors by name in order of their data, the `__metadata__` strings) of one file."""
    size = file_size(path)
    text, data_start = _header_text(path, size)
    reader = _HeaderReader(path, text, data_start)
    reader.read()
    ordered = sorted(reader.tensors.values(), key=lambda t: (t.offset, t.nbytes, t.name))
    _check_coverage(path, ordered, data_start, size)
    return {t.name: t for t in ordered}, reader.metadata


def _header_text(path: Path, size: int) -> tuple[str, int]:
    """(the JSON text, where the data begins)."""
    if size < 8:
        raise _fault(path, f"is {size} bytes long, too short for a safetensors file", "8 bytes of header length first")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                expected = f"at most {size - 8}, what is left of the {size} bytes of the file"
                claim = f"the header claims {length} bytes at byte 0"
                raise _fault(path, f"{claim} (the file is cut short, or no safetensors file)", expected)
            if length > MAX_HEADER_BYTES:
                raise _fault(path, f"the header claims {length} bytes at byte 0", f"at most {MAX_HEADER_BYTES}")
            data = file.read(length)
    except OSError as error:
        raise _fault(path, f"cannot be read: {error.strerror or error}") from None
    if len(data) != length:
        raise _fault(path, f"the header ends after {len(data)} of {length} bytes", "a file that nobody is writing to")
    if not data.startswith(b"{"):
        raise _fault(path, "the header at byte 8 does not begin with '{'", "a JSON object of tensors")
    try:
        return data.decode("utf-8"), 8 + length
    except UnicodeDecodeError as error:
        raise _fault(path, f"the header is not UTF-8 at byte {8 + error.start}") from None


class _HeaderReader:
    """Reads `{"name": {...}, ...}` one entry at a time; positions in messages count characters of the header."""

    def __init__(self, path: Path, text: str, data_start: int) -> None:
        self.path = path
        self.text = text
        self.data_start = data_start
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}

    def read(self) -> None:
        end = self._object(0, self._member)
        if self.text[end:].strip(" \t\r\n"):
            raise self._bad(end, "text follows the closing '}'")

    def _object(self, start: int, read_member: Callable[[str, int], int]) -> int:
        """Calls `read_member(key, position of the value)`, which gives the end of the value; the end of the object."""
        at = self._skip(start + 1)
        if self.text[at : at + 1] == "}":
            return at + 1
        while True:
            key, at = self._string(at)
            at = self._skip(at)
            if self.text[at : at + 1] != ":":
                raise self._bad(at, f"expected ':' after {key[:80]!r}")
            at = self._skip(read_member(key, self._skip(at + 1)))
            mark = self.text[at : at + 1]
            if mark == "}":
                return at + 1
            if mark != ",":
                raise self._bad(at, f"expected ',' or '}}' after the value of {key[:80]!r}")
            at = self._skip(at + 1)

    def _member(self, name: str, at: int) -> int:
        if name == "__metadata__":
            if self.text[at : at + 1] != "{" or self.metadata:
                raise self._bad(at, "expected one '__metadata__', an object of strings")
            return self._object(at, self._metadata_member)
        if name in self.tensors:
            raise self._bad(at, f"tensor {name!r} appears twice")
        if len(self.tensors) >= MAX_TENSORS:
            raise self._bad(at, f"there are more than {MAX_TENSORS} tensors")
        self.tensors[name], end = self._tensor(name, at)
        return end

    def _metadata_member(self, key: str, at: int) -> int:
        if key in self.metadata:
            raise self._bad(at, f"metadata key {key[:80]!r} appears twice")
        self.metadata[key], end = self._string(at)
        return end

    def _tensor(self, name: str, at: int) -> tuple[TensorInfo, int]:
        where = f"tensor {name[:200]!r}"
        if not name or len(name) > MAX_NAME_CHARS:
            raise self._bad(at, f"{where} has a name of {len(name)} characters", f"1 to {MAX_NAME_CHARS}")
        # No value of a well-formed entry holds a brace, so the first closing one ends it.
        end = self.text.find("}", at, at + MAX_ENTRY_CHARS) + 1
        if self.text[at : at + 1] != "{" or end == 0:
            raise self._bad(at, f"{where} has no entry", '{"dtype": ..., "shape": [...], "data_offsets": [...]}')
        entry = parse_json(self.text[at:end], f"{self.path}: {where} at byte {8 + at}")
        if sorted(entry) != ["data_offsets", "dtype", "shape"]:
            keys = ", ".join(sorted(entry)[:8]) or "nothing"
            raise self._bad(at, f"{where} has the fields {keys}", "dtype, shape and data_offsets")
        return self._checked(name, where, at, entry), end

    def _checked(self, name: str, where: str, at: int, entry: dict[str, Any]) -> TensorInfo:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise self._bad(at, f"{where} has the unknown dtype {str(dtype)[:40]!r}", f"one of {', '.join(DTYPE_BITS)}")
        if not _is_count_list(shape) or len(shape) > MAX_RANK:
            raise self._bad(at, f"{where} has the shape {str(shape)[:80]}", f"at most {MAX_RANK} numbers >= 0")
        if not _is_count_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(at, f"{where} has data_offsets {str(offsets)[:80]}", "[begin, end] with begin <= end")
        begin, end = offsets
        bits = math.prod(shape) * DTYPE_BITS[dtype]  # Python integers do not wrap
        if bits != (end - begin) * 8:
            expected = f"{bits // 8} bytes, the product of its shape {shape} and dtype {dtype}"
            raise self._bad(at, f"{where} has {end - begin} bytes at data offset {begin}", expected)
        return TensorInfo(name, dtype, tuple(shape), end - begin, self.path, self.data_start + begin)

    def _string(self, at: int) -> tuple[str, int]:
        if self.text[at : at + 1] != '"':
            raise self._bad(at, "expected a string")
        try:
            return _DECODER.raw_decode(self.text, at)
        except json.JSONDecodeError as error:
            raise self._bad(error.pos, error.msg) from None

    def _skip(self, at: int) -> int:
        blank = _BLANKS.match(self.text, at)
        return blank.end() if blank else at

    def _bad(self, at: int, message: str, expected: str = "") -> DiagnosticError:
        return _fault(self.path, f"bad header at byte {8 + at}: {message}", expected)


def _is_count_list(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_coverage(path: Path, ordered: list[TensorInfo], data_start: int, size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    reached = data_start
    before = "the header"
    for tensor in ordered:
        here = f"tensor {tensor.name!r} at byte {tensor.offset}"
        if tensor.offset < reached:
            message = f"{here} overlaps {before}, which ends at byte {reached}"
            raise _fault(path, message, "tensors that share no byte")
        if tensor.offset > reached:
            message = f"{tensor.offset - reached} bytes between {before} and {here} belong to nothing"
            raise _fault(path, message, "data without gaps")
        reached = tensor.offset + tensor.nbytes
        before = f"tensor {tensor.name!r}"
        if reached > size:
            message = f"{before} needs bytes {tensor.offset} to {reached}, but the file ends at byte {size}"
            raise _fault(path, message, "the whole file; this one may be a download that was interrupted")
    if reached < size:
        message = f"{size - reached} bytes after {before}, from byte {reached}, belong to nothing"
        raise _fault(path, message, "data that ends with the last tensor")


def _fault(path: Path, message: str, expected: str = "") -> DiagnosticError:
    return DiagnosticError(message, where=str(path), expected=expected)
