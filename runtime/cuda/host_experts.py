"""The CPU beside a GPU, computing experts: its native code from the artifact, run by a team of threads.

`HostProgram` is what the manifest says under `gpu.experts`: which layers' experts have code and where their matrices
lie in an expert's bytes. `HostExperts` loads the object for this CPU and runs jobs: one expert with some rows each,
from the very bytes that are copied to the GPU otherwise. `codegen.nvptx.host.experts` says how functions are called.

Refuses damaged manifests with one RuntimeDiagnostic; a CPU that no object is for has no code (`open_host` gives None).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime import host
from runtime.artifact import Artifact
from runtime.cuda.host_code import HostObjects, HostTeam, host_part
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import PieceInfo
from runtime.manifest_fields import Fields

JOB_WORDS = 10
_LARGEST = 1 << 24  # columns


@dataclass(frozen=True)
class HostLayer:
    """Experts of a piece: x has rows of `columns` numbers of `x_bytes` (2: bf16, 4: f32), of which each token has
    `choices` results; gated rows have `hidden` of `hidden_bytes`, y has `out` f32 numbers. `places`: codes, scales (-1:
    none) of gate|up and of down, from the first byte of an expert. With `rounds` x is not what the first product takes,
    but what the launch before it rounds to 8 bits."""

    piece: int
    function: str
    columns: int
    hidden: int
    out: int
    choices: int
    places: tuple[int, int, int, int]
    x_bytes: int = 2
    hidden_bytes: int = 2
    rounds: bool = False


@dataclass(frozen=True)
class HostProgram:
    """Layers by piece, and the objects that compute their experts."""

    layers: dict[int, HostLayer]
    code: HostObjects

    @classmethod
    def of(cls, artifact: Artifact) -> HostProgram:
        """What an artifact has for the CPU beside a GPU; empty where it has nothing."""
        fields = host_part(artifact, "experts")
        return _read(fields, artifact.manifest.weights.pieces) if fields is not None else cls({}, HostObjects())


def _read(fields: Fields, pieces: Sequence[PieceInfo]) -> HostProgram:
    layers: dict[int, HostLayer] = {}
    for entry in fields.children("layers", 1 << 16):
        piece = entry.integer("piece", 0, len(pieces) - 1)
        columns, hidden, out, choices = (
            entry.integer(name, 1, _LARGEST) for name in ("columns", "hidden", "out", "choices")
        )
        places = tuple(entry.integers("places", -1, max(0, pieces[piece].unit - 1)))
        if pieces[piece].kind != "experts" or len(places) != 4 or piece in layers:
            entry.fail("places", "four places in the bytes of an expert", list(places))
        a, b, c, d = places
        x_bytes, hidden_bytes = (entry.integer(name, 2, 4, 2) for name in ("x_bytes", "hidden_bytes"))
        if 3 in (x_bytes, hidden_bytes):
            entry.fail("x_bytes", "2 or 4", 3)
        rounds = bool(entry.integer("rounds", 0, 1, 0))
        layers[piece] = HostLayer(
            piece, entry.text("function"), columns, hidden, out, choices, (a, b, c, d), x_bytes, hidden_bytes, rounds
        )
    return HostProgram(layers, HostObjects.read(fields))


@dataclass(frozen=True)
class HostJob:
    """An expert with some rows. Addresses: its bytes; x, rows of tokens; the numbers of the rows of x (i32); room for
    gated rows; y, one row each."""

    weights: int
    x: int
    sources: int
    hidden: int
    y: int
    rows: int


class ExpertCode(Protocol):
    """What computes experts on the CPU."""

    threads: int

    def layer(self, piece: int) -> HostLayer | None:
        """How a piece's experts are computed; None for those that must be on the GPU."""
        ...

    def run(self, layer: HostLayer, jobs: Sequence[HostJob]) -> None:
        """Writes y of all jobs; returns when they are done."""
        ...

    def close(self) -> None: ...


class HostExperts:
    """Code of an artifact, with `threads` threads of its own."""

    def __init__(self, artifact: Artifact, program: HostProgram, file: str, threads: int) -> None:
        functions = [layer.function for layer in program.layers.values()]
        self._layers, self._team = program.layers, HostTeam(artifact, file, functions, threads)
        self.threads = self._team.threads

    def layer(self, piece: int) -> HostLayer | None:
        return self._layers.get(piece)

    def run(self, layer: HostLayer, jobs: Sequence[HostJob]) -> None:
        """Raises RuntimeDiagnostic where a thread did not come to a barrier in time."""
        words = (ctypes.c_int64 * (JOB_WORDS * len(jobs)))()
        for number, job in enumerate(jobs):
            matrices = [0 if place < 0 else job.weights + place for place in layer.places]
            words[number * JOB_WORDS : number * JOB_WORDS + 9] = [
                *matrices, job.x, job.sources, job.hidden, job.y, job.rows,
            ]  # fmt: skip
        if not self._team.run(layer.function, (ctypes.addressof(words), len(jobs))):
            raise RuntimeDiagnostic(
                "the CPU's threads did not finish some experts in time", where=self._team.where,
                hint="leave the CPU some cores, or have experts brought to the GPU (--missed-experts fetch)",
            )  # fmt: skip

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()


def host_code(artifact: Artifact) -> tuple[HostProgram, str]:
    """What an artifact has for CPUs, and the object for this one; "" for none."""
    program = HostProgram.of(artifact)
    return program, program.code.file_here() if program.layers else ""


def open_host(artifact: Artifact, threads: int | None = None) -> HostExperts | None:
    """The code for this CPU with `threads` threads (one core is left to whoever drives the GPU, where there are more
    than two); None where the artifact has none for it."""
    program, file = host_code(artifact)
    if not file:
        return None
    cores = host.available_cores().default_threads
    return HostExperts(artifact, program, file, threads or (cores - 1 if cores > 2 else cores))
