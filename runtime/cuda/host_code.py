"""Native code for the CPU beside a GPU: the objects that an artifact has, the one for this CPU, threads that run it.

What it computes is said by `runtime.cuda.host_experts` and `runtime.cuda.host_attention`. Damaged manifests are refused
with one RuntimeDiagnostic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime import host
from runtime.artifact import MANIFEST_NAME, Artifact
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import REBUILD_HINT, Fields
from runtime.native import NativeCode
from runtime.team import WorkerTeam


@dataclass(frozen=True)
class HostObjects:
    """Object files, with the triple and the features that each wants."""

    files: tuple[tuple[str, str, tuple[str, ...]], ...] = ()

    @classmethod
    def read(cls, fields: Fields) -> HostObjects:
        """`code` of a part of the manifest."""
        files = []
        for entry in fields.children("code", 64):
            features = entry.values.get("features")
            if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
                entry.fail("features", "a list of names", features)
            files.append((entry.text("file"), entry.text("triple"), tuple(str(name) for name in features or ())))
        return cls(tuple(files))

    def file_for(self, architecture: str, features: frozenset[str]) -> str:
        """The object that asks most of what such a CPU has; "" for none."""
        fits = [
            (len(wanted), name)
            for name, triple, wanted in self.files
            if host.normalized_architecture(triple) == architecture and features.issuperset(wanted)
        ]
        return max(fits)[1] if fits else ""

    def file_here(self) -> str:
        """The object for this CPU; "" for none."""
        return self.file_for(host.host_architecture(), host.host_features())


def host_part(artifact: Artifact, name: str) -> Fields | None:
    """The part `name` of what the manifest says under `gpu`; None where it says nothing."""
    gpu: Any = artifact.manifest.raw.get("gpu")
    where = str(artifact.path / MANIFEST_NAME)
    values = gpu.get(name, {}) if isinstance(gpu, dict) else {}
    if not isinstance(values, dict):
        raise RuntimeDiagnostic(f"gpu.{name} is no object", where=where, hint=REBUILD_HINT)
    return Fields(values, where, f"gpu.{name}") if values else None


class HostTeam:
    """Functions of an object, run by `threads` threads of its own."""

    def __init__(self, artifact: Artifact, file: str, functions: Iterable[str], threads: int) -> None:
        self.where, self._closed = str(artifact.path / file), False
        self._native = NativeCode(artifact.read_bytes(file), sorted(set(functions)), where=self.where)
        try:
            self._team = WorkerTeam(self._native, threads)
        except BaseException:
            self._native.close()
            raise

    @property
    def threads(self) -> int:
        return self._team.threads

    def run(self, function: str, words: Sequence[int]) -> bool:
        """Whether all threads came to the end in time. `words` are the function's arguments behind its team."""
        arguments = (ctypes.c_int64 * (2 + len(words)))(self._team.threads, self._team.address, *words)
        return not self._team.run(self._native.functions[function], ctypes.addressof(arguments))

    def close(self) -> None:
        """Ends the threads. Code that a thread did not come back from stays."""
        closed, self._closed = self._closed, True
        if not closed and self._team.close():
            self._native.close()
