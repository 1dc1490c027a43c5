"""Compiled objects kept on disk under the hash of everything that went into them.

An entry is a file `<cache>/objects/<first two digits>/<key>.o`: a magic line, the blake2b of key and payload, the
payload. It is written to a temporary name and renamed, checked on every read (a damaged entry counts as absent and is
removed), and the least recently used entries go when the cache outgrows its limit. Nothing else is trusted about the
directory, and a cache that cannot be written (read-only home, full disk) only costs time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from hw_targets.cache_dir import cache_root

_MAGIC = b"stratum-object-1\n"
_DIGEST_BYTES = 32
_STALE_TEMPORARY_SECONDS = 3600.0


def content_key(parts: Sequence[bytes | str]) -> str:
    """Hex key of `parts`. Each is framed by its length, so moving a byte from one part to the next changes the key."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class ObjectCache:
    """`get(key)` and `put(key, payload)` over a directory. Several processes may share it."""

    def __init__(self, directory: Path | None = None, *, max_bytes: int = 1 << 30) -> None:
        self.directory = directory if directory is not None else cache_root() / "objects"
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0

    def path_of(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.o"

    def get(self, key: str) -> bytes | None:
        """The payload stored under `key`, or None. A hit makes the entry the most recently used."""
        path = self.path_of(key)
        try:
            data = path.read_bytes()
        except OSError:
            self.misses += 1
            return None
        payload = data[len(_MAGIC) + _DIGEST_BYTES :]
        if data[: len(_MAGIC) + _DIGEST_BYTES] != _MAGIC + _checksum(key, payload):
            with contextlib.suppress(OSError):
                path.unlink()
            self.misses += 1
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        self.hits += 1
        return payload

    def put(self, key: str, payload: bytes) -> bool:
        """Stores `payload`; False when the directory cannot be written. Evicts the oldest entries over the limit."""
        path = self.path_of(key)
        temporary = path.with_name(f".{key[:16]}-{secrets.token_hex(6)}.tmp")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(_MAGIC + _checksum(key, payload) + payload)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return False
        self.prune(keep=key)
        return True

    def prune(self, *, keep: str = "") -> int:
        """Removes the least recently used entries until the rest fits `max_bytes`; returns how many went.

        The entry `keep` stays. Temporary files that a killed process left an hour ago go too.
        """
        entries: list[tuple[float, int, str]] = []
        now = time.time()
        for path in self.directory.glob("??/*"):
            try:
                stat = path.stat()
                if path.suffix == ".tmp" and now - stat.st_mtime > _STALE_TEMPORARY_SECONDS:
                    path.unlink()
                elif path.suffix == ".o":
                    entries.append((stat.st_mtime, stat.st_size, str(path)))
            except OSError:
                continue  # another process removed it
        total = sum(size for _, size, _ in entries)
        removed = 0
        for _, size, name in sorted(entries):
            if total <= self.max_bytes:
                break
            if keep and Path(name).stem == keep:
                continue
            with contextlib.suppress(OSError):
                os.unlink(name)
                removed += 1
            total -= size
        return removed


def _checksum(key: str, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST_BYTES, key=key.encode()[:64]).digest()
