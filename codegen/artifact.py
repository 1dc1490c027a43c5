"""Writes an artifact directory so that it is there whole or not at all.

`ArtifactWriter(out)` collects the files in a hidden sibling directory, hashing each while it is written;
`finish(manifest)` adds the hashes, writes `manifest.json` last, flushes everything to the disk and renames the
directory to `out`. An error, Ctrl-C or a missing `finish` removes the sibling. A killed build leaves it behind under
a name that nothing loads, and the next build to the same place removes it: a live build holds a lock on its
directory, a dead one does not. The bytes depend on the content alone: no time, host or path is recorded.

Refuses to replace anything but an artifact, a disk without room (before writing, and when it fills meanwhile), and
unwritable places, each with one DiagnosticError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from codegen.file_system import exchange_directories, sync_directory
from ir.diagnostics import DiagnosticError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = 256 << 20
_SLACK_BYTES = 1 << 20  # directories, the manifest, rounding to blocks
_BACKGROUND_BYTES = 1 << 16  # smaller writes are hashed where they are
_COPY_BYTES = 1 << 20
_PAGE_BYTES = 2 << 20  # of a huge page: the page cache has one where a file was written so much at a time


@dataclass(frozen=True)
class FileRecord:
    """What is known of a finished file."""

    nbytes: int
    sha256: str


class HashedFile:
    """A file of the artifact while it is written: `write(data)` stores and hashes, each on its own CPU.

    What goes to the system are whole huge pages, and the rest at `flush`. Weights that are mapped right after they were
    written are then read through large pages: measured 8-25 % more bandwidth than through those of 4 KiB.
    """

    def __init__(self, descriptor: int, writer: ArtifactWriter, threads: ThreadPoolExecutor) -> None:
        self.nbytes = 0
        self._descriptor = descriptor
        self._writer = writer
        self._threads = threads
        self._sha256 = hashlib.sha256()
        self._begun = bytearray()  # of a huge page

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Appends `data`; when this returns, the caller may reuse its memory."""
        view = memoryview(data).cast("B")
        if len(view) < _BACKGROUND_BYTES:
            self._sha256.update(view)
            self._append(view)
        else:
            hashed = self._threads.submit(self._sha256.update, view)
            try:
                self._append(view)
            finally:
                hashed.result()
        self.nbytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Stores what is left."""
        self._store(memoryview(self._begun))
        self._begun = bytearray()

    def _append(self, view: memoryview) -> None:
        if self._begun:
            missing = _PAGE_BYTES - len(self._begun)
            self._begun += view[:missing]
            view = view[missing:]
            if len(self._begun) == _PAGE_BYTES:
                self.flush()
        whole = len(view) - len(view) % _PAGE_BYTES
        self._store(view[:whole])
        self._begun += view[whole:]

    def _store(self, view: memoryview) -> None:
        while view:
            with self._writer.reporting():
                written = os.write(self._descriptor, view)
            view = view[written:]

    def record(self) -> FileRecord:
        """Size and hash of what was written so far."""
        return FileRecord(self.nbytes, self._sha256.hexdigest())


class ArtifactWriter:
    """Builds one artifact; see the module's docstring.

        with ArtifactWriter(out, expected_bytes=n) as writer:
            with writer.open("weights/weights.bin") as file: ...
            writer.add("graph.ir", text)
            writer.finish(manifest)

    `expected_bytes` is what the caller knows it will write; the disk is asked for room before the first byte.
    """

    def __init__(self, out: str | os.PathLike[str], *, expected_bytes: int = 0) -> None:
        self.out = Path(os.path.realpath(out))
        self.expected_bytes = expected_bytes
        self.files: dict[str, FileRecord] = {}
        self._directory: Path | None = None
        self._lock = -1
        self._threads = ThreadPoolExecutor(2, "artifact-hash")

    def __enter__(self) -> Self:
        with self.reporting():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            check_replaceable(self.out)
            remove_stale(self.out)
            self._check_room()
            self._directory, self._lock = _make_locked_sibling(self.out)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def directory(self) -> Path:
        """Where the files are while the artifact is built."""
        if self._directory is None:
            raise RuntimeError("the artifact writer is not open")
        return self._directory

    @contextmanager
    def open(self, path: str) -> Iterator[HashedFile]:
        """A new file at `path` (relative, forward slashes), flushed to the disk at the end."""
        _check_path(path)
        if path in self.files or path == MANIFEST_NAME:
            raise ValueError(f"{path} is written twice")
        target = self.directory / path
        with self.reporting():
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            file = HashedFile(descriptor, self, self._threads)
            yield file
            file.flush()
            with self.reporting():
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.files[path] = file.record()

    def add(self, path: str, content: bytes | str) -> None:
        """A file of this content."""
        with self.open(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)

    def copy(self, path: str, source: str | os.PathLike[str]) -> None:
        """A file with the content of `source`."""
        try:
            with open(source, "rb") as original, self.open(path) as file:
                while block := original.read(_COPY_BYTES):
                    file.write(block)
        except OSError as fault:
            raise DiagnosticError(f"cannot copy into the artifact: {fault.strerror}", where=str(source)) from None

    def finish(self, manifest: dict[str, Any]) -> Path:
        """Completes `manifest` (format version, files, its own hash), makes the artifact durable and visible."""
        complete = dict(manifest)
        complete["format_version"] = FORMAT_VERSION
        complete["files"] = {path: {"bytes": f.nbytes, "sha256": f.sha256} for path, f in sorted(self.files.items())}
        complete["manifest_sha256"] = manifest_digest(complete)
        text = json.dumps(complete, sort_keys=True, indent=1, allow_nan=False) + "\n"
        with self.open("manifest.json.new") as file:
            file.write(text.encode())
        del self.files["manifest.json.new"]
        directory = self.directory
        with self.reporting():
            os.rename(directory / "manifest.json.new", directory / MANIFEST_NAME)
            for folder in _folders(directory, self.files):
                sync_directory(folder)
            check_replaceable(self.out)  # it may have changed since the build began
            self._publish(directory)
            sync_directory(self.out.parent)
        return self.out

    def _publish(self, directory: Path) -> None:
        """Puts the finished directory at `out`; what was there takes its place and is then removed."""
        if not self.out.exists() or not any(self.out.iterdir()):
            os.rename(directory, self.out)  # an empty directory may be replaced directly
            self._directory = None
            return
        if exchange_directories(directory, self.out):
            return  # `__exit__` removes the old artifact under the temporary name
        old = self.out.with_name(_hidden_name(self.out))
        os.rename(self.out, old)
        os.rename(directory, self.out)
        self._directory = old

    def _check_room(self) -> None:
        needed = self.expected_bytes + _SLACK_BYTES
        free = _free_bytes(self.out.parent)
        if needed > free:
            raise _no_room(self.out, needed, free)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turns an operating system error inside of it into the diagnostic that the user gets."""
        try:
            yield
        except OSError as fault:
            reason = fault.strerror or str(fault)
            if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                where = str(fault.filename or self.out)
                raise DiagnosticError(f"cannot write the artifact: {reason}", where=where) from None
            free = 0
            with contextlib.suppress(OSError):
                free = _free_bytes(self.out.parent)
            written = sum(record.nbytes for record in self.files.values())
            raise _no_room(self.out, max(self.expected_bytes, written) + _SLACK_BYTES, free, reason) from None


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 over the canonical JSON (sorted keys, no spaces, ASCII) of everything but `manifest_sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_replaceable(out: Path) -> None:
    """Raises DiagnosticError unless `out` is absent, an empty directory, or an artifact holding only its own files."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise DiagnosticError("refusing to replace a file", where=str(out), hint="name a directory for the artifact")
    if not any(out.iterdir()):
        return
    listed = _listed_files(out)
    if listed is None:
        raise DiagnosticError(
            "refusing to replace a directory that is not an artifact",
            where=str(out),
            expected=f"no directory, an empty one, or one with the {MANIFEST_NAME} of an artifact",
            hint="name another directory, or remove this one yourself",
        )
    found = [str(p.relative_to(out).as_posix()) for p in sorted(out.rglob("*")) if not p.is_dir() or p.is_symlink()]
    foreign = [name for name in found if name not in listed and name != MANIFEST_NAME]
    if foreign:
        raise DiagnosticError(
            f"refusing to replace an artifact that holds other files too: {', '.join(foreign[:5])}",
            where=str(out),
            hint="move them elsewhere, or name another directory",
        )


def _listed_files(directory: Path) -> dict[str, Any] | None:
    """The files that the directory's manifest lists; None when it has no artifact's manifest."""
    path = directory / MANIFEST_NAME
    try:
        if not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
            return None
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not {"format_version", "stratum_version", "files"} <= set(manifest):
        return None
    return manifest["files"] if isinstance(manifest["files"], dict) else None


def remove_stale(out: Path) -> list[Path]:
    """Removes what killed builds of `out` left beside it; returns what was removed. Running builds are left alone."""
    removed = []
    prefix = _hidden_prefix(out)
    for path in sorted(out.parent.iterdir()):
        if not path.name.startswith(prefix) or path.is_symlink() or not path.is_dir():
            continue
        lock = _try_lock(path)
        if lock >= 0:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            removed.append(path)
    return removed


def _hidden_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _hidden_name(out: Path) -> str:
    return _hidden_prefix(out) + secrets.token_hex(6)


def _make_locked_sibling(out: Path) -> tuple[Path, int]:
    """(new directory beside `out`, descriptor holding its lock)."""
    while True:
        path = out.with_name(_hidden_name(out))
        os.mkdir(path)
        lock = _try_lock(path)
        # Between the two calls another build may have taken the unlocked directory for a dead one.
        if lock >= 0 and path.exists():
            return path, lock
        if lock >= 0:
            os.close(lock)


def _try_lock(path: Path) -> int:
    """A descriptor that holds the exclusive lock on a directory; -1 when a living process has it or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _folders(directory: Path, files: Iterable[str]) -> list[Path]:
    """`directory` and every folder in it that a file lies in, deepest first."""
    found = {PurePosixPath(p) for name in files for p in PurePosixPath(name).parents}
    ordered = sorted(found | {PurePosixPath(".")}, key=lambda p: (-len(p.parts), str(p)))
    return [directory / p for p in ordered]


def _check_path(path: str) -> None:
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is not a plain relative path")


def _free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _no_room(out: Path, needed: int, free: int, reason: str = "") -> DiagnosticError:
    said = f" ({reason})" if reason else ""
    needed_mib, free_mib = needed / 2**20, free / 2**20
    return DiagnosticError(
        f"not enough room on the disk{said}: the artifact needs {needed_mib:,.1f} MiB, {free_mib:,.1f} are free",
        where=str(out),
        hint="free some space, or name an output directory on another disk",
    )
