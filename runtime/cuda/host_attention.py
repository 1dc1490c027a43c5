"""The CPU beside a GPU, attending to keys and values that lie in the host's memory: its native code from the artifact.

`AttentionProgram` is what the manifest says under `gpu.attention`: which layers have code, which launches of each
program it stands for, and what the CPU's form of the cache takes. `AttentionCode` loads the object for this CPU and
runs one layer of a step. `codegen.nvptx.host.attention` says how functions are called.

Refuses damaged manifests, layers without code and CPUs that no object is for, with one RuntimeDiagnostic each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime import host
from runtime.artifact import Artifact
from runtime.cuda.host_code import HostObjects, HostTeam, host_part
from runtime.cuda.program import GpuStep
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import KVInfo
from runtime.manifest_fields import REBUILD_HINT, Fields

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
    code: HostObjects

    @classmethod
    def of(cls, artifact: Artifact) -> AttentionProgram:
        """What an artifact has for the CPU beside a GPU; empty where it has nothing."""
        fields = host_part(artifact, "attention")
        return cls({}, None, HostObjects()) if fields is None or artifact.gpu is None else _read(fields, artifact.gpu)

    def chosen(self, layers: Sequence[int], artifact: Artifact) -> dict[int, AttentionLayer]:
        """Those of some layers. Raises RuntimeDiagnostic for one that the CPU has no code for."""
        for layer in layers:
            if layer not in self.layers:
                raise RuntimeDiagnostic(
                    f"the CPU has no attention for layer {layer} of this artifact", where=str(artifact.path),
                    expected=_NO_CODE, hint=REBUILD_HINT,
                )  # fmt: skip
        return {layer: self.layers[layer] for layer in sorted(layers)}

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
    return AttentionProgram(layers, kv, HostObjects.read(fields))


class AttentionCode:
    """Code of an artifact, with `threads` threads of its own."""

    def __init__(self, artifact: Artifact, file: str, functions: Sequence[str], threads: int) -> None:
        self._team = HostTeam(artifact, file, functions, threads)
        self.threads = self._team.threads

    def run(self, function: str, words: Sequence[int]) -> None:
        """One layer of a step; `words` are the function's arguments behind its team. Raises RuntimeDiagnostic where a
        thread did not come to a barrier in time."""
        if not self._team.run(function, words):
            raise RuntimeDiagnostic(
                "the CPU's threads did not finish attention in time", where=self._team.where,
                hint="leave the CPU some cores, or allow more device memory, so that the KV cache lies on the GPU",
            )  # fmt: skip

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()


def open_attention(
    artifact: Artifact, program: AttentionProgram, chosen: Sequence[AttentionLayer], threads: int | None = None
) -> AttentionCode:
    """The code for this CPU with `threads` threads (one for each core where nothing is said: whoever drives the GPU
    waits). Raises RuntimeDiagnostic where the artifact has none."""
    file = program.code.file_here()
    if not file:
        raise RuntimeDiagnostic(
            f"the artifact has no attention for this CPU ({host.host_architecture()})", where=str(artifact.path),
            expected=_NO_CODE,
        )  # fmt: skip
    functions = [place.function for layer in chosen for place in layer.places.values()]
    count = host.available_cores().default_threads if threads is None else threads
    return AttentionCode(artifact, file, functions, count)
