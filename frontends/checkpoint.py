"""A checkpoint: its tensors by name, read one at a time.

    with open_checkpoint(Path("model")) as checkpoint:
        checkpoint.tensors["lm_head.weight"].shape
        checkpoint.read("lm_head.weight")              # a fresh array, nothing is kept
        checkpoint.read_rows("lm_head.weight", 0, 64)  # only these rows are read

Takes a Hugging Face directory (see `frontends.checkpoint_files`). Bytes are read when asked for, never mapped, so that
memory holds what the caller asked for and a file that shrinks meanwhile is a diagnostic instead of a crash; `byte_view`
maps one tensor for callers that want that. Refuses tensors that two shards hold, and tensors the index names in vain.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from frontends.checkpoint_files import WeightFiles, find_weight_files
from frontends.safetensors_header import MAX_TENSORS, TensorInfo, read_header
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import BF16, F16, F32, PlainFormat
from ir.location import Location
from ir.spelling import did_you_mean

# The dtypes of weights that the compiler takes; others are named in the diagnostic.
WEIGHT_FORMATS: dict[str, PlainFormat] = {"F32": F32, "F16": F16, "BF16": BF16}
# What the parts of quantized weights are stored in; numbers of 8 bits without a numpy dtype come as their bytes.
STORED_DTYPES: dict[str, np.dtype] = {
    **{name: format.dtype for name, format in WEIGHT_FORMATS.items()},
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
}
_OPEN_FILES = 8  # shards kept open at once


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads the headers of all weight files of a Hugging Face directory; no data yet."""
    found = find_weight_files(directory)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in found.files:
        here, strings = read_header(path)
        metadata.update(strings)
        for name, info in here.items():
            first = tensors.setdefault(name, info)
            if first is not info:
                message = f"tensor {name!r} is in {first.file.name} already"
                raise DiagnosticError(message, where=str(path), expected="every tensor in one file")
        if len(tensors) > MAX_TENSORS:
            raise DiagnosticError(f"has more than {MAX_TENSORS} tensors", where=str(directory))
    _check_index(found, tensors)
    return Checkpoint(directory, tensors, metadata)


def _check_index(found: WeightFiles, tensors: dict[str, TensorInfo]) -> None:
    """Every tensor that the index names is in the file it names."""
    lost = [f"{n} in {f}" for n, f in found.placement.items() if n not in tensors or tensors[n].file.name != f]
    if lost:
        notes = tuple(Diagnostic("missing", text) for text in lost[:20])
        if len(lost) > 20:
            notes += (Diagnostic("missing", f"and {len(lost) - 20} more"),)
        message = f"{len(lost)} tensors are not in the files that the index names for them"
        raise DiagnosticError.of(Diagnostic("error", message, Location(file=str(found.index)), notes))


class Checkpoint:
    """The tensors of a model. `tensors` is in order of files and offsets; `metadata` are the files' own strings."""

    def __init__(self, directory: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        self.directory = directory
        self.tensors = tensors
        self.metadata = metadata
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises DiagnosticError with the nearest name when there is none."""
        if name not in self.tensors:
            hint = did_you_mean(name, self.tensors)
            raise DiagnosticError(f"has no tensor {name!r}{hint}", where=str(self.directory))
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a fresh array of its shape, in float32, float16 or bfloat16 (ml_dtypes)."""
        info = self.info(name)
        return self._array(info, 0, info.nbytes, info.shape, weight_format(info).dtype)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) along axis 0, reading only their bytes; the whole tensor when it is a scalar."""
        info = self.info(name)
        return self._rows(info, first, last, weight_format(info).dtype)

    def read_stored(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Like `read_rows`, of any dtype in `STORED_DTYPES`: what the file holds, whatever it stands for."""
        info = self.info(name)
        return self._rows(info, first, (info.shape or (1,))[0] if last is None else last, stored_dtype(info))

    def read_columns(self, name: str, first: int, last: int) -> np.ndarray:
        """Columns [first, last) of a matrix, in the dtypes of `read_stored`; of every row only these bytes are read."""
        info = self.info(name)
        if len(info.shape) != 2 or not 0 <= first <= last <= info.shape[1]:
            raise ValueError(f"columns {first} to {last} of {name}, which is {info.shape}")
        dtype = stored_dtype(info)
        rows, columns = info.shape
        if last - first == columns:
            return self._array(info, 0, info.nbytes, info.shape, dtype)
        array = np.empty((rows, last - first), dtype)
        width = (last - first) * dtype.itemsize
        target = array.view(np.uint8).reshape(-1).data
        for row in range(rows):
            self._fill(info, (row * columns + first) * dtype.itemsize, target[row * width : (row + 1) * width])
        return array

    def _rows(self, info: TensorInfo, first: int, last: int, dtype: np.dtype) -> np.ndarray:
        if not info.shape:
            return self._array(info, 0, info.nbytes, (), dtype)
        if not 0 <= first <= last <= info.shape[0]:
            raise ValueError(f"rows {first} to {last} of {info.name}, which has {info.shape[0]}")
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._array(info, first * row, (last - first) * row, (last - first, *info.shape[1:]), dtype)

    def byte_view(self, name: str) -> memoryview:
        """The raw bytes of a tensor, mapped read-only; unmapped when the view and all made of it are gone.

        The file must not shrink while the view lives.
        """
        info = self.info(name)
        if info.nbytes == 0:
            return memoryview(b"")
        start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
        end = info.offset + info.nbytes
        with self._lock:
            descriptor = self._descriptor(info.file)
            if os.fstat(descriptor).st_size < end:
                raise _cut_short(info)
            mapped = mmap.mmap(descriptor, end - start, access=mmap.ACCESS_READ, offset=start)
        return memoryview(mapped)[info.offset - start :]

    def _array(self, info: TensorInfo, start: int, nbytes: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = np.empty(math.prod(shape), dtype)
        assert array.nbytes == nbytes, f"{info.name}: {nbytes} bytes for {array.nbytes}"
        self._fill(info, start, array.view(np.uint8).data)
        return array.reshape(shape)

    def _fill(self, info: TensorInfo, start: int, target: memoryview) -> None:
        """Reads the bytes of a tensor from its byte `start` until `target` is full."""
        done = 0
        with self._lock:  # a file that another thread reads must not be closed for the newest one
            descriptor = self._descriptor(info.file)
            while done < len(target):
                try:
                    count = os.preadv(descriptor, [target[done:]], info.offset + start + done)
                except OSError as error:
                    message = f"tensor {info.name!r} cannot be read: {error.strerror or error}"
                    raise DiagnosticError(message, where=str(info.file)) from None
                if count == 0:
                    raise _cut_short(info)
                done += count

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DiagnosticError(f"cannot be opened: {error.strerror or error}", where=str(path)) from None
        self._open[path] = descriptor
        if len(self._open) > _OPEN_FILES:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        return descriptor

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def weight_format(info: TensorInfo) -> PlainFormat:
    """The number format of a weight. Raises DiagnosticError naming a dtype that is not taken."""
    if info.dtype not in WEIGHT_FORMATS:
        raise DiagnosticError(
            f"tensor {info.name!r} has dtype {info.dtype}", where=str(info.file), expected=", ".join(WEIGHT_FORMATS)
        )
    return WEIGHT_FORMATS[info.dtype]


def stored_dtype(info: TensorInfo) -> np.dtype:
    """The numpy dtype that `read_stored` gives. Raises DiagnosticError naming a dtype that cannot be read."""
    if info.dtype not in STORED_DTYPES:
        raise DiagnosticError(
            f"tensor {info.name!r} has dtype {info.dtype}", where=str(info.file), expected=", ".join(STORED_DTYPES)
        )
    return STORED_DTYPES[info.dtype]


def _cut_short(info: TensorInfo) -> DiagnosticError:
    return DiagnosticError(
        f"the file ends within tensor {info.name!r}, bytes {info.offset} to {info.offset + info.nbytes}",
        where=str(info.file),
        expected="the file as it was when its header was read",
    )
