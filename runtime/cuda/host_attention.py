"""The CPU beside a GPU, attending to keys and values that lie in the host's memory: its native code from the artifact.

`AttentionProgram` is what the manifest says under `gpu.attention`: which layers have code, which launches of each
program it stands for, and what the CPU's form of the cache takes. `AttentionCode` loads the object for this CPU and
runs one layer of a step. `codegen.nvptx.host.attention` says how functions are called.

Refuses damaged manifests, layers without code and CPUs that no object is for, with one RuntimeDiagnostic each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime import host
from runtime.artifact import MANIFEST_NAME, Artifact
from runtime.cuda.host_experts import HostProgram
from runtime.cuda.program import GpuProgram, GpuStep
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import KVInfo
from runtime.manifest_fields import REBUILD_HINT, Fields
from runtime.native import NativeCode
from runtime.team import WorkerTeam

_LARGEST = 1 << 24  # numbers of a row
_NO_CODE = "keys and values of every layer on the GPU: allow more device memory, or a shorter context (--ctx)"


@dataclass(frozen=True)
class AttentionPlace:
    """The function of a layer in a program, for its launches first .. last."""

    function: str
    first: int
    last: int


@dataclass(frozen=True)
class AttentionLayer:
    """Numbers of a token: `columns` of the joint projection, `angles` of a row of cosines, `queries`, all f32; bytes of
    its output. `places` by program."""

    columns: int
    angles: int
    queries: int
    out_bytes: int
    places: dict[str, AttentionPlace]


@dataclass(frozen=True)
class AttentionProgram:
    """Layers by number; the cache of one layer, in the CPU's form; object files with the triple and the features that
    each wants."""

    layers: dict[int, AttentionLayer]
    cache: KVInfo | None
    code: tuple[tuple[str, str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, artifact: Artifact) -> AttentionProgram:
        """What an artifact has for the CPU beside a GPU; empty where it has nothing."""
        gpu: Any = artifact.manifest.raw.get("gpu")
        where = str(artifact.path / MANIFEST_NAME)
        values = gpu.get("attention", {}) if isinstance(gpu, dict) else {}
        if not isinstance(values, dict):
            raise RuntimeDiagnostic("gpu.attention is no object", where=where, hint=REBUILD_HINT)
        if not values or artifact.gpu is None:
            return cls({}, None, ())
        return _read(Fields(values, where, "gpu.attention"), artifact.gpu)

    def chosen(self, layers: Sequence[int], artifact: Artifact) -> dict[int, AttentionLayer]:
        """Those of some layers. Raises RuntimeDiagnostic for one that the CPU has no code for."""
        for layer in layers:
            if layer not in self.layers:
                raise RuntimeDiagnostic(
                    f"the CPU has no attention for layer {layer} of this artifact", where=str(artifact.path),
                    expected=_NO_CODE, hint=REBUILD_HINT,
                )  # fmt: skip
        return {layer: self.layers[layer] for layer in sorted(layers)}

    def file(self) -> str:
        """The object for this CPU; "" for none."""
        return HostProgram({}, self.code).file_for(host.host_architecture(), host.host_features())

    def kv_info(self, layers: int) -> KVInfo:
        """The cache of so many layers."""
        one = self.cache
        assert one is not None
        return KVInfo(
            layers, one.num_kv_heads, one.head_dim, one.format, layers * one.bytes_per_position, one.block,
            layers * one.bytes_per_slot, one.recent, one.ring,
        )  # fmt: skip


def _read(fields: Fields, step: GpuStep) -> AttentionProgram:
    layers: dict[int, AttentionLayer] = {}
    programs = {program.name: program for program in step.programs}
    for entry in fields.children("layers", 1 << 16):
        layer = entry.integer("layer", 0, max(0, step.kv.layers - 1))
        columns, angles, queries, out_bytes = (
            entry.integer(name, 1, _LARGEST) for name in ("columns", "angles", "queries", "out_bytes")
        )
        places: dict[str, AttentionPlace] = {}
        for place in entry.children("places", 64):
            program = programs.get(place.text("program"))
            if program is None:
                place.fail("program", f"one of {', '.join(programs)}", place.values.get("program"))
            last = len(program.launches) - 1
            first = place.integer("first", 0, max(0, last))
            places[program.name] = AttentionPlace(place.text("function"), first, place.integer("last", first, last))
        if layer in layers or len(places) != len(programs):
            entry.fail("places", "one in each program, of a layer that is named once", len(places))
        layers[layer] = AttentionLayer(columns, angles, queries, out_bytes, places)
    one = fields.child("cache")
    kv = KVInfo(
        1, one.integer("heads", 1, 1 << 16), one.integer("head_dim", 1, 1 << 16), one.text("format"),
        one.integer("bytes_per_position", 1, _LARGEST), one.integer("block", 1, 64),
        one.integer("bytes_per_slot", 0, 1 << 30), one.integer("recent", 0, 1 << 20), one.integer("ring", 0, 1 << 20),
    )  # fmt: skip
    code = []
    for entry in fields.children("code", 64):
        features = entry.values.get("features")
        if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
            entry.fail("features", "a list of names", features)
        code.append((entry.text("file"), entry.text("triple"), tuple(str(name) for name in features or ())))
    return AttentionProgram(layers, kv, tuple(code))


class AttentionCode:
    """Code of an artifact, with `threads` threads of its own."""

    def __init__(self, artifact: Artifact, file: str, functions: Sequence[str], threads: int) -> None:
        self._where, self._closed = str(artifact.path / file), False
        self._native = NativeCode(artifact.read_bytes(file), sorted(set(functions)), where=self._where)
        try:
            self._team = WorkerTeam(self._native, threads)
        except BaseException:
            self._native.close()
            raise

    @property
    def threads(self) -> int:
        return self._team.threads

    def run(self, function: str, words: Sequence[int]) -> None:
        """One layer of a step; `words` are the function's arguments behind its team. Raises RuntimeDiagnostic where a
        thread did not come to a barrier in time."""
        arguments = (ctypes.c_int64 * (2 + len(words)))(self._team.threads, self._team.address, *words)
        if self._team.run(self._native.functions[function], ctypes.addressof(arguments)):
            raise RuntimeDiagnostic(
                "the CPU's threads did not finish attention in time", where=self._where,
                hint="leave the CPU some cores, or allow more device memory, so that the KV cache lies on the GPU",
            )  # fmt: skip

    def close(self) -> None:
        """Ends the threads. Code that a thread did not come back from stays."""
        closed, self._closed = self._closed, True
        if not closed and self._team.close():
            self._native.close()


def open_attention(
    artifact: Artifact, program: AttentionProgram, chosen: Sequence[AttentionLayer], threads: int | None = None
) -> AttentionCode:
    """The code for this CPU with `threads` threads (one for each core where nothing is said: whoever drives the GPU
    waits). Raises RuntimeDiagnostic where the artifact has none."""
    file = program.file()
    if not file:
        raise RuntimeDiagnostic(
            f"the artifact has no attention for this CPU ({host.host_architecture()})", where=str(artifact.path),
            expected=_NO_CODE,
        )  # fmt: skip
    functions = [place.function for layer in chosen for place in layer.places.values()]
    count = host.available_cores().default_threads if threads is None else threads
    return AttentionCode(artifact, file, functions, count)


def launches_of(program: GpuProgram, layer: AttentionLayer) -> range:
    """The numbers of a layer's launches that the CPU does the work of."""
    place = layer.places[program.name]
    return range(place.first, place.last + 1)
