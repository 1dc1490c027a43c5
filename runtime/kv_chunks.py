"""Positions of a sequence as records for a file: a checked header and the packed bytes, on whole pages.

A record holds the blocks of up to `chunk` positions of all layers and heads exactly as they lie in the cache, or the
ring of a low-bit cache. Its header says whose they are (`key`: the artifact and its KV format), which writing they come
from (`serial`) and which positions; a CRC-32 covers both. A record that is read back is believed only when all of that
is what was expected: files are hostile, and disks lie.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from runtime.kv_cache import CONTEXT_MULTIPLE
from runtime.manifest import KVInfo, Manifest
from runtime.memory import PAGE_BYTES

MAGIC = b"STRATKV1"
KEY_BYTES = 16
HEADER_BYTES = 128
RECORD_BYTES = 2 << 20  # what a chunk aims at: long enough to read at full speed, short enough to keep a few in memory
BLOCKS, RING = 0, 1
_HEADER = struct.Struct("<8s16sQIIQQQI")  # magic, key, serial, kind, 0, first, last, payload bytes, CRC-32


@dataclass(frozen=True)
class RecordName:
    """What a record says it is: positions first..last of the writing `serial` under `key`."""

    key: bytes
    serial: int
    kind: int
    first: int
    last: int

    def pack(self, payload_bytes: int, checksum: int) -> bytes:
        """The header."""
        return _HEADER.pack(
            MAGIC, self.key, self.serial, self.kind, 0, self.first, self.last, payload_bytes, checksum
        )  # fmt: skip


def kv_key(manifest: Manifest) -> bytes:
    """Whose keys and values these are: the artifact, weights and code, and the format they are packed in."""
    kv: KVInfo = manifest.kv
    shape = (kv.layers, kv.num_kv_heads, kv.head_dim, kv.format, kv.bytes_per_position, kv.bytes_per_slot, kv.block)
    files = sorted((name, info.bytes, info.sha256) for name, info in manifest.files.items())
    text = repr((shape, files, manifest.raw.get("manifest_sha256")))
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def chunk_positions(bytes_per_position: int) -> int:
    """Positions of a chunk of about 2 MiB, a multiple of 64."""
    return max(1, RECORD_BYTES // max(1, bytes_per_position) // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def record_bytes(payload_bytes: int) -> int:
    """What a record takes in a file: whole pages."""
    return -(-(HEADER_BYTES + payload_bytes) // PAGE_BYTES) * PAGE_BYTES


def write_record(record: np.ndarray, name: RecordName, source: np.ndarray) -> None:
    """Fills `record` (u8, at least `record_bytes(source.size)`) with the header and the bytes of `source`."""
    end = HEADER_BYTES + source.size
    record[:HEADER_BYTES] = 0
    record[HEADER_BYTES:end].reshape(source.shape)[...] = source
    record[end:] = 0
    header = name.pack(source.size, 0)
    checksum = zlib.crc32(record[HEADER_BYTES:end].data, zlib.crc32(header))
    record[: _HEADER.size] = np.frombuffer(name.pack(source.size, checksum), np.uint8)


def record_fault(record: np.ndarray, name: RecordName, payload_bytes: int) -> str:
    """Why `record` is not the one that was written as `name`, '' when it is. No byte beyond `record` is looked at."""
    if len(record) < HEADER_BYTES + payload_bytes:
        return f"has {len(record)} bytes instead of {HEADER_BYTES + payload_bytes}"
    magic, key, serial, kind, _, first, last, size, checksum = _HEADER.unpack(record[: _HEADER.size].tobytes())
    if magic != MAGIC:
        return "does not begin as a record of keys and values does"
    if key != name.key:
        return "belongs to another model or format"
    if (serial, kind, first, last, size) != (name.serial, name.kind, name.first, name.last, payload_bytes):
        return f"holds positions {first}..{last} of writing {serial} where {name.first}..{name.last} were expected"
    payload = record[HEADER_BYTES : HEADER_BYTES + payload_bytes]
    return "" if zlib.crc32(payload.data, zlib.crc32(name.pack(size, 0))) == checksum else "has a wrong checksum"


def read_record(record: np.ndarray, target: np.ndarray) -> None:
    """Copies the payload of a record that has no fault to `target`, a view of the cache."""
    target[...] = record[HEADER_BYTES : HEADER_BYTES + target.size].reshape(target.shape)
