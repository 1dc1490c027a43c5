"""Opens a built artifact and proves it whole before anything of it runs.

Takes a directory, gives an `Artifact`: its manifest, its object code and its weights mapped read-only. Checks, in this
order: the format version, the manifest's own hash, the path, size and sha256 of every file (the weights: always the
size, their hash when below 64 MiB or when asked), the instruction set against this CPU. Refuses with one
RuntimeDiagnostic. The hashes prove that an artifact is undamaged, not that its author is to be trusted: it holds native
code, and running it means running that code.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runtime import host
from runtime.artifact_path import MANIFEST_NAME
from runtime.artifact_path import is_artifact as is_artifact  # found here as well
from runtime.cuda.modules import Image
from runtime.cuda.program import GpuStep
from runtime.cuda.program_reader import read_step
from runtime.errors import RuntimeDiagnostic
from runtime.loaded_weights import LoadedWeights
from runtime.manifest import FileInfo, Manifest, TargetInfo
from runtime.manifest_fields import REBUILD_HINT
from runtime.manifest_reader import MAX_MANIFEST_BYTES, parse_manifest
from runtime.memory import FileMapping
from runtime.weight_reader import Pread

FULL_HASH_BELOW_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20
_MAX_CODE_BYTES = 1 << 30


@dataclass(frozen=True)
class Artifact:
    """A checked artifact. `code` is the object file's bytes, the very bytes whose hash was checked; none for a GPU."""

    path: Path
    manifest: Manifest
    code: bytes

    @cached_property
    def gpu(self) -> GpuStep | None:
        """What a GPU runs, of an artifact that was built for one. Raises RuntimeDiagnostic for one that is damaged."""
        if not self.manifest.target.is_gpu:
            return None
        values, weights = self.manifest.raw.get("gpu"), self.manifest.weights
        where = str(self.path / MANIFEST_NAME)
        if not isinstance(values, dict):
            raise RuntimeDiagnostic("the artifact is for a GPU and has no program for one", where=where,
                                    hint=REBUILD_HINT)  # fmt: skip
        return read_step(values, where, weights.bytes, len(weights.pieces))

    def gpu_images(self) -> list[Image]:
        """The code for GPUs, checked again as it is read."""
        found = []
        for code in self.gpu.code if self.gpu is not None else ():
            found.append(Image(code.architecture, self.read_bytes(code.ptx), is_ptx=True))
            if code.cubin:
                found.append(Image(code.architecture, self.read_bytes(code.cubin), is_ptx=False))
        return found

    def read_bytes(self, name: str) -> bytes:
        """The content of one listed file, checked again; raises RuntimeDiagnostic when it is not listed or changed."""
        info = self.manifest.files.get(name)
        if info is None:
            raise RuntimeDiagnostic(f"the artifact has no file '{name}'", where=str(self.path), hint=REBUILD_HINT)
        return _read_checked(self.path, name, info)

    def has_file(self, name: str) -> bool:
        """Whether the manifest lists this file."""
        return name in self.manifest.files

    def map_weights(self) -> FileMapping:
        """The weights, mapped read-only; nothing is read yet. The size is checked on the very file that is mapped."""
        weights = self.manifest.weights
        with _opened(self.path, weights.file, weights.bytes) as descriptor:
            return FileMapping(descriptor, weights.bytes, where=str(self.path / weights.file))

    def load_weights(self, threads: int, preadv: Pread, but: Sequence[tuple[int, int]] = ()) -> LoadedWeights:
        """A copy of the weights in memory, but for some ranges; see LoadedWeights."""
        weights = self.manifest.weights
        with _opened(self.path, weights.file, weights.bytes) as descriptor:
            where = str(self.path / weights.file)
            return LoadedWeights(descriptor, weights.bytes, where=where, threads=threads, but=but, preadv=preadv)

    def open_weights(self) -> int:
        """A descriptor of the weights, checked as `map_weights` does; the caller closes it."""
        weights = self.manifest.weights
        with _opened(self.path, weights.file, weights.bytes) as descriptor:
            return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def open_artifact(path: str | os.PathLike[str], *, verify: bool = False) -> Artifact:
    """Loads and checks the artifact at `path`; `verify` hashes the weights whatever their size."""
    root = Path(path)
    manifest_path = root / MANIFEST_NAME
    manifest = parse_manifest(_read_manifest(root), str(manifest_path))
    code_name = "" if manifest.target.is_gpu else _code_file(manifest, str(manifest_path))
    code = b""
    for name, info in manifest.files.items():
        _check_relative(name, str(manifest_path))
        if name == code_name:
            code = _read_checked(root, name, info)
        elif name != manifest.weights.file:
            _check_file(root, name, info)
    _check_weights(root, manifest, verify)
    if not manifest.target.is_gpu:
        check_target(manifest.target, str(root))
    return Artifact(root, manifest, code)


def check_target(target: TargetInfo, where: str) -> None:
    """Refuses code this machine cannot run: another architecture or system, or features the CPU lacks."""
    architecture = host.host_architecture()
    wanted = host.normalized_architecture(target.triple)
    retarget = "build it again for this machine: compile-model build MODEL -o OUT --target host"
    if wanted != architecture:
        raise RuntimeDiagnostic(
            f"the artifact holds {wanted} code (target {target.name}), this machine is {architecture}",
            where=where,
            hint=retarget,
        )
    if ("linux" in target.triple) != sys.platform.startswith("linux"):
        raise RuntimeDiagnostic(
            f"the artifact was built for {target.triple}, this system is {sys.platform}", where=where, hint=retarget
        )
    features = host.host_features()
    missing = sorted({name.lstrip("+") for name in target.features} - features)
    if missing:
        portable = host.best_portable_target(features)
        also = f", or --target {portable}, which this CPU can run" if portable != "host" else ""
        raise RuntimeDiagnostic(
            f"this CPU lacks instructions the artifact needs: {', '.join(missing)}",
            where=where,
            expected=f"a CPU with all features of target {target.name}",
            hint=retarget + also,
        )


def _read_manifest(root: Path) -> bytes:
    if not root.is_dir():
        raise RuntimeDiagnostic("no such artifact directory", where=str(root), hint=REBUILD_HINT)
    path = root / MANIFEST_NAME
    if not path.exists():
        is_checkpoint = (root / "config.json").is_file()
        raise RuntimeDiagnostic(
            f"not an artifact: it has no {MANIFEST_NAME}",
            where=str(root),
            hint=f"this is a checkpoint; build it first: compile-model build {root} -o OUT" if is_checkpoint
            else REBUILD_HINT,
        )  # fmt: skip
    with _opened(root, MANIFEST_NAME, None) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_MANIFEST_BYTES:
            raise RuntimeDiagnostic(
                f"the manifest has {size} bytes", where=str(path), expected=f"at most {MAX_MANIFEST_BYTES}"
            )
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(MAX_MANIFEST_BYTES)


def _code_file(manifest: Manifest, where: str) -> str:
    """The one object file of the artifact."""
    names = sorted(name for name in manifest.files if name.startswith("code/") and name.endswith(".o"))
    if len(names) != 1:
        raise RuntimeDiagnostic(
            f"the artifact lists {len(names)} object files", where=where, expected="one file code/*.o",
            hint=REBUILD_HINT,
        )  # fmt: skip
    if manifest.files[names[0]].bytes > _MAX_CODE_BYTES:
        raise RuntimeDiagnostic(f"{names[0]} is larger than {_MAX_CODE_BYTES} bytes", where=where, hint=REBUILD_HINT)
    return names[0]


def _check_weights(root: Path, manifest: Manifest, verify: bool) -> None:
    weights = manifest.weights
    if verify or weights.bytes < FULL_HASH_BELOW_BYTES:
        _check_file(root, weights.file, manifest.files[weights.file])
        return
    with _opened(root, weights.file, weights.bytes):
        pass  # path, kind and size are checked by opening


def _check_file(root: Path, name: str, info: FileInfo) -> None:
    digest = hashlib.sha256()
    with _opened(root, name, info.bytes) as descriptor:
        for chunk in _chunks(descriptor):
            digest.update(chunk)
    if digest.hexdigest() != info.sha256:
        raise _changed(root, name, "was changed after the artifact was written (its sha256 differs)")


def _read_checked(root: Path, name: str, info: FileInfo) -> bytes:
    with _opened(root, name, info.bytes) as descriptor:
        content = b"".join(_chunks(descriptor))
    if hashlib.sha256(content).hexdigest() != info.sha256:
        raise _changed(root, name, "was changed after the artifact was written (its sha256 differs)")
    return content


def _chunks(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        yield chunk


def _check_relative(name: str, where: str) -> None:
    """A listed path stays inside the artifact: relative, forward slashes, no '.' or '..' parts."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise RuntimeDiagnostic(
            f"the manifest lists the path {name!r}", where=where, expected="a plain path inside the artifact"
        )


@contextmanager
def _opened(root: Path, name: str, nbytes: int | None) -> Iterator[int]:
    """A descriptor of one regular file inside the artifact, of exactly `nbytes` when given.

    Links that lead out of the artifact are refused. Non-blocking, so that a pipe in a file's place cannot hang us.
    """
    _check_relative(name, str(root / MANIFEST_NAME))
    path = root / name
    real_root, real_path = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([real_root, real_path]) != real_root:
        raise RuntimeDiagnostic("a link leads out of the artifact", where=str(path), expected="a file inside it")
    try:
        descriptor = os.open(real_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        raise RuntimeDiagnostic(
            f"cannot read this file of the artifact: {fault.strerror}", where=str(path), hint=REBUILD_HINT
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RuntimeDiagnostic("not a regular file", where=str(path), hint=REBUILD_HINT)
        if nbytes is not None and status.st_size != nbytes:
            raise _changed(root, name, f"has {status.st_size} bytes instead of {nbytes}")
        yield descriptor
    finally:
        os.close(descriptor)


def _changed(root: Path, name: str, how: str) -> RuntimeDiagnostic:
    return RuntimeDiagnostic(f"{name} {how}", where=str(root / name), hint=REBUILD_HINT)
