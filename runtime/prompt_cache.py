"""A prompt's keys and values in a file, for the next run of the same model.

`PromptCache(path, session)` opens the file where there is one; `reuse` fills a slot with the positions that a new
prompt has in common with it, `save` writes those of a slot under the same name, at once or not at all. The file:

    page 0          header: whose (artifact and KV format), how many tokens, positions a chunk, seconds a position took
    tokens          a record: i32 token ids
    chunks, ring    the records of `runtime.kv_loader.records_of`

The file is hostile: what it says of sizes must be what its length is, every record is checked when it is read, and what
is damaged is computed again. Raises RuntimeDiagnostic for a file of another model, or that is no such file.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.generation import GenerationParams, TokenEvent, generate
from runtime.kv_chunks import (
    HEADER_BYTES,
    KEY_BYTES,
    RING,
    RecordName,
    chunk_positions,
    kv_key,
    record_bytes,
    record_fault,
    write_record,
)
from runtime.kv_loader import LoadFault, RecordLoader, StoredRecord, place, records_of
from runtime.load_or_compute import choose_split
from runtime.memory import PAGE_BYTES, Reservation
from runtime.session import Session
from runtime.weight_reader import Pread, WeightReader

MAGIC = b"STRATPC1"
TOKENS = 2  # kind of the record of ids
ASSUMED_BYTES_PER_S = 1e9
_HEADER = struct.Struct("<8s16sQIIdI")  # magic, key, tokens, positions a chunk, serial, seconds a position, CRC-32
_HINT = "name another file, or delete this one"


@dataclass(frozen=True)
class Reused:
    """What a prompt had in common with the file: `positions` are in the slot now, `computed` of them computed again.

    `fault` says what could not be read, '' when all could.
    """

    positions: int
    computed: int
    read_bytes: int
    seconds: float
    fault: str = ""

    def __str__(self) -> str:
        text = (
            f"prompt cache: {self.positions} positions were there, {self.computed} of them computed again, "
            f"{self.read_bytes / 1e6:.1f} MB read in {self.seconds:.2f} s"
        )
        return f"{text}; damaged: {self.fault}" if self.fault else text


class PromptCache:
    """One file and one session. Nothing of the file stays open between calls."""

    def __init__(self, path: str | os.PathLike[str], session: Session, *, preadv: Pread = os.preadv) -> None:
        self.path, self.session, self._preadv = Path(path), session, preadv
        self._key = kv_key(session.manifest)
        self._ids: np.ndarray = np.empty(0, np.int32)
        self._chunk, self._serial, self._compute_s = 0, 0, 0.0
        if os.path.lexists(self.path):
            self._read_head()

    @property
    def tokens(self) -> list[int]:
        """Whose positions the file holds."""
        return self._ids.tolist()

    def common(self, ids: Sequence[int]) -> int:
        """Positions that the prompt `ids` may take from the file: its last token is always computed."""
        most = min(len(ids) - 1, len(self._ids), self.session.max_context)
        if most <= 0:
            return 0
        differ = np.flatnonzero(self._ids[:most] != np.asarray(ids[:most]))
        common = int(differ[0]) if len(differ) else most
        kv, info = self.session.kv, self.session.manifest.kv
        if len(self._ids) > kv.capacity:  # the last chunk would not fit into this session's cache
            common = min(common, kv.capacity // self._chunk * self._chunk)
        if len(self._ids) > self.session.whole_positions:  # nor of more chunks than are in memory together
            common = min(common, self.session.whole_positions // self._chunk * self._chunk)
        if info.ring and len(self._ids) - common >= info.ring - info.recent - 2 * info.block:
            return 0  # too far back: the 16-bit positions before it are gone
        return common

    def reuse(self, slot: int, ids: Sequence[int]) -> Reused:
        """Begins the sequence in `slot` with what `ids` has in common with the file."""
        started_s = time.perf_counter()
        positions = self.common(ids)
        if not positions:
            return Reused(0, 0, 0, 0.0)
        records = [
            replace(record, offset=self._start + record.offset)
            for record in self._records()
            if record.name.kind == RING or record.name.first < positions
        ]
        blocks = [record.chunk for record in records if record.name.kind != RING]
        blocks[-1] = replace(blocks[-1], last=positions)
        prices = self.session.prices(ASSUMED_BYTES_PER_S, self._compute_s)
        split = choose_split(blocks, prices).split if prices is not None else 0
        if split == positions:
            return Reused(0, 0, 0, 0.0)
        computed, fault, nbytes = self._bring(slot, ids[:positions], records, split)
        why = str(fault.why) if fault is not None else ""
        return Reused(positions, computed, nbytes, time.perf_counter() - started_s, why)

    def _bring(
        self, slot: int, ids: Sequence[int], records: Sequence[StoredRecord], split: int
    ) -> tuple[int, LoadFault | None, int]:
        descriptor, size = self._opened()
        memory = Reservation(size, what="a prompt cache")
        reader = WeightReader(
            str(self.path), descriptor, size, memory.view(),
            threads=2, preadv=self._preadv, what="the prompt cache", hint=_HINT,
        )  # fmt: skip
        loader = RecordLoader(self.session.kv, reader, memory)
        try:
            computed, fault = self.session.bring_prefix(slot, ids, loader, records, split)
            return computed, fault, reader.counters.bytes
        finally:
            reader.close()
            loader.settle()  # after an interrupt it may still copy
            memory.close()

    def save(self, slot: int, ids: Sequence[int]) -> bool:
        """Writes the positions of `ids`, all that `slot` has; False when the file has them already.

        Raises RuntimeDiagnostic when it cannot be written; a file that was there stays as it was.
        """
        if len(ids) != self.session.filled(slot):
            raise RuntimeDiagnostic(f"slot {slot} has {self.session.filled(slot)} positions, not {len(ids)}")
        array = np.asarray(ids, dtype=np.int32)
        if np.array_equal(array, self._ids):
            return False
        temporary = ""
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            try:
                self._write(descriptor, slot, array)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            os.replace(temporary, self.path)
        except OSError as fault:
            raise RuntimeDiagnostic(
                f"the prompt cache cannot be written: {fault.strerror or fault}",
                where=str(self.path),
                expected="room for it in a folder that may be written to",
            ) from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        self._read_head()
        return True

    def _write(self, descriptor: int, slot: int, ids: np.ndarray) -> None:
        serial = zlib.crc32(ids.data)
        prices = self.session.prices(ASSUMED_BYTES_PER_S, self._compute_s)
        with self.session.in_memory(slot) as kv:
            chunk = chunk_positions(kv.bytes_per_position)
            head = [MAGIC, self._key, len(ids), chunk, serial, prices.compute_s if prices is not None else 0.0]
            packed = _HEADER.pack(*head, zlib.crc32(_HEADER.pack(*head, 0)))
            _put(descriptor, packed.ljust(PAGE_BYTES, b"\0"))
            tokens = StoredRecord(RecordName(self._key, serial, TOKENS, 0, len(ids)), 0, ids.nbytes)
            parts = [(tokens, ids.view(np.uint8))]
            parts += [
                (record, place(kv, slot, record.name))
                for record in records_of(kv, self._key, serial, chunk, len(ids), len(ids) - 1)
            ]
            for record, source in parts:
                buffer = np.empty(record.nbytes, np.uint8)
                write_record(buffer, record.name, source)
                _put(descriptor, buffer.data)

    def _records(self) -> list[StoredRecord]:
        """Chunks and ring, counted from the first of them."""
        count = len(self._ids)
        return list(records_of(self.session.kv, self._key, self._serial, self._chunk, count, count - 1))

    @property
    def _start(self) -> int:
        """First byte of the chunks."""
        return PAGE_BYTES + record_bytes(self._ids.nbytes)

    def _opened(self) -> tuple[int, int]:
        """A descriptor, and the size of the file."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as fault:
            raise self._refusal(f"cannot be read: {fault.strerror}") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise self._refusal("is no file")
        return descriptor, status.st_size

    def _read_head(self) -> None:
        """The header and the tokens, checked against the length of the file."""
        descriptor, size = self._opened()
        try:
            page = os.pread(descriptor, PAGE_BYTES, 0)
            if len(page) < PAGE_BYTES or page[: len(MAGIC)] != MAGIC:
                raise self._refusal("is not a prompt cache")
            magic, key, count, chunk, serial, compute_s, checksum = _HEADER.unpack_from(page)
            if zlib.crc32(_HEADER.pack(magic, key, count, chunk, serial, compute_s, 0)) != checksum:
                raise self._refusal("has a damaged header")
            if key != self._key:
                raise self._refusal("was made with another model, or another format of its KV cache")
            nbytes = 4 * count
            if not 0 < nbytes <= size - PAGE_BYTES - HEADER_BYTES or chunk != self._own_chunk:
                raise self._refusal(f"has {size} bytes, too few for {count} tokens")
            if not (math.isfinite(compute_s) and compute_s >= 0):
                raise self._refusal("has a damaged header")
            record = np.frombuffer(os.pread(descriptor, record_bytes(nbytes), PAGE_BYTES), np.uint8)
            fault = record_fault(record, RecordName(key, serial, TOKENS, 0, count), nbytes)
            if fault:
                raise self._refusal(f"has damaged tokens: their record {fault}")
        finally:
            os.close(descriptor)
        self._ids = record[HEADER_BYTES : HEADER_BYTES + nbytes].view(np.int32)
        self._chunk, self._serial, self._compute_s = chunk, serial, compute_s
        expected = self._start + sum(record.nbytes for record in self._records())
        if size != expected:
            self._ids = np.empty(0, np.int32)
            raise self._refusal(f"has {size} bytes instead of {expected}")

    @property
    def _own_chunk(self) -> int:
        return chunk_positions(self.session.manifest.kv.bytes_per_position)

    def _refusal(self, what: str) -> RuntimeDiagnostic:
        return RuntimeDiagnostic(f"this file {what}", where=str(self.path), hint=_HINT)


class CachedGeneration:
    """`runtime.generation.generate` in slot 0 with a prompt cache; the prompt is checked at once.

    `reused` is set when the first token is there, and `fault` when the cache could not be written afterwards: that
    never ends a text.
    """

    def __init__(self, cache: PromptCache, ids: Sequence[int], params: GenerationParams, **ends: Any) -> None:
        self.reused: Reused | None = None
        self.fault: RuntimeDiagnostic | None = None
        self._cache, self._ids = cache, list(ids)
        self._generate = partial(generate, cache.session, self._ids, params, **ends)
        self._generate()  # whatever is wrong with the prompt is told now

    def events(self) -> Iterator[TokenEvent]:
        """As `generate` yields them."""
        self.reused = self._cache.reuse(0, self._ids)
        for number, event in enumerate(self._generate(reuse=self.reused.positions)):
            if number == 0:
                try:
                    self._cache.save(0, self._ids)
                except RuntimeDiagnostic as fault:
                    self.fault = fault
            yield event


def _put(descriptor: int, data: bytes | memoryview) -> None:
    """All of it."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


assert _HEADER.size <= PAGE_BYTES and KEY_BYTES == 16
