"""Finished tensors on disk, so that a run that was interrupted goes on where it was.

    with KeptTensors(directory, key) as kept:
        kept.save("model.layers.0.mlp.up_proj.weight", {"weight_packed": ...})
        kept.load(name)                                  # the parts, or None when they are not there

A file for each tensor, under a name that it only gets when it is whole; a file that cannot be read counts as missing.
`key` says what the tensors were made from: a directory of another key is emptied. One process at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from frontends.checkpoint import Checkpoint
from frontends.safetensors_header import TensorInfo, read_header
from ir.diagnostics import DiagnosticError
from passes.quantize.calibrate.safetensors_writer import array_entry, write_safetensors

_KEY = "key"


class KeptTensors:
    """See the module docstring. Raises DiagnosticError when the directory cannot be used."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory = directory
        self._lock = -1
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_over(key)
        except BlockingIOError:
            self._unlock()
            raise DiagnosticError("another run writes here", where=str(directory), hint="wait for it to end") from None
        except OSError as error:
            self._unlock()
            raise DiagnosticError(f"cannot be written: {error.strerror}", where=str(directory)) from error

    def _take_over(self, key: str) -> None:
        path = self.directory / _KEY
        if path.is_file() and path.read_text(errors="replace") == key:
            return
        for old in sorted(self.directory.glob("*.safetensors*")):
            old.unlink()
        path.write_text(key)

    def _path(self, name: str) -> Path:
        return self.directory / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a whole file is there."""
        return self._path(name).is_file()

    def save(self, name: str, parts: dict[str, np.ndarray]) -> None:
        """Writes the parts of a tensor."""
        write_safetensors(self._path(name), [array_entry(part, array) for part, array in parts.items()], {"name": name})

    def infos(self, name: str) -> dict[str, TensorInfo] | None:
        """Where the parts lie; None when there are none, or none that can be read."""
        if not self.has(name):
            return None
        try:
            found, metadata = read_header(self._path(name))
        except DiagnosticError:
            return None
        return found if metadata.get("name") == name else None

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """The parts of a tensor."""
        infos = self.infos(name)
        if infos is None:
            return None
        with Checkpoint(self.directory, infos, {}) as file:
            try:
                return {part: file.read_stored(part) for part in infos}
            except DiagnosticError:
                return None

    def remove(self) -> None:
        """Deletes all of it, when the result is where it belongs."""
        self._unlock()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._unlock()
