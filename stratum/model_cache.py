"""Artifacts built on the way to running a Hugging Face directory, kept under the hash of what decides them.

The key covers the small files of the directory (config, tokenizer, templates) byte by byte; of each weight file its
name, size, modification time and header; the target, dtype and pipeline; and the compiler's own sources, so that a
changed compiler never serves an old artifact. Entries are ordinary artifacts under `<cache>/models/`: they may be
copied, inspected, or removed at any time. Two processes that want the same entry build it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hw_targets.cache_dir import cache_root
from ir.diagnostics import DiagnosticError

COMPILER_PACKAGES = ("ir", "frontends", "hw_targets", "passes", "codegen")
WEIGHT_SUFFIXES = (".safetensors",)
SMALL_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
MAX_SMALL_BYTES = 256 << 20  # a tokenizer.json of a large vocabulary has tens of MB
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_KEY_DIGITS = 24


def cache_entry(model: Path, settings: list[str]) -> Path:
    """Where the artifact of `model` built with `settings` (any texts that decide the result) lies or would lie."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (*settings, sources_digest()):
        _frame(digest, part.encode())
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix in (*WEIGHT_SUFFIXES, *SMALL_FILE_SUFFIXES):  # a pipe would never answer
            _add_file(digest, path)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.resolve().name).strip("-.")[:60] or "model"
    return cache_root() / "models" / f"{stem}-{digest.hexdigest()[:_KEY_DIGITS]}"


def cached(entry: Path, build: Callable[[Path], object]) -> Path:
    """`entry`, after `build(entry)` when it is not there yet."""
    if (entry / "manifest.json").is_file():
        return entry
    with _lock(entry):
        if not (entry / "manifest.json").is_file():
            build(entry)
    return entry


def sources_digest() -> str:
    """Hash of the compiler's own sources."""
    digest = hashlib.blake2b(digest_size=16)
    root = Path(__file__).resolve().parent.parent
    for package in COMPILER_PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".lark", ".toml"):
                _frame(digest, str(path.relative_to(root)).encode())
                _frame(digest, path.read_bytes())
    return digest.hexdigest()


def _add_file(digest: hashlib.blake2b, path: Path) -> None:
    status = path.stat()
    _frame(digest, path.name.encode(errors="surrogateescape"))
    _frame(digest, str(status.st_size).encode())
    if path.suffix in WEIGHT_SUFFIXES:
        _frame(digest, str(status.st_mtime_ns).encode())
        with path.open("rb") as file:
            length = file.read(8)
            _frame(digest, length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES)))
    elif status.st_size <= MAX_SMALL_BYTES:
        _frame(digest, path.read_bytes())
    else:
        _frame(digest, str(status.st_mtime_ns).encode())


def _frame(digest: hashlib.blake2b, data: bytes) -> None:
    """Adds `data` behind its length: moving a byte from one part to the next changes the hash."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


@contextlib.contextmanager
def _lock(entry: Path) -> Iterator[None]:
    """One builder an entry; the others wait and then find it built."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(entry.with_name(f".{entry.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise DiagnosticError(
            f"the model cache cannot be written: {error.strerror}",
            where=str(entry.parent),
            hint="set STRATUM_CACHE to a directory with room, or name the artifact: compile-model build DIR -o OUT",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
