"""What a GPU runs, as data: kernels, the launches of each program in order, memory. Frozen.

Made by `codegen.nvptx.program_entry`, stored in the manifest under `gpu`, read by `runtime.cuda.program_reader`.
Launches run in the order they are listed, each after all before it: one stream is enough. Everything that changes
between two steps of equal sizes (ids, positions, slots, rows) is in device memory, so that a captured step can be
replayed.

A launch's arguments are pointers and 64-bit numbers, in the order of the kernel's parameters:

    {"arena": offset, "bytes": n}                     memory of this step
    {"weight": offset, "bytes": n, "piece": number}   offset in the weights file; `piece` of the manifest's pieces
    {"kv": layer, "plane": number}                    one plane of one layer's cache, see `KVPlan`
    {"input": name}                                   ids, positions, slots, rows, pieces (i32) or logits (f32)
    {"size": text}                                    a number: see `runtime.cuda.sizes`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.cuda.sizes import SizeExpr
from runtime.errors import RuntimeDiagnostic

INPUTS = ("ids", "positions", "slots", "rows", "pieces", "logits")
PIECE_WORDS = 4  # of a piece of a prompt: first token, tokens, slot, position of the first token
ALIGNMENT = 256  # of the arena, the weights and each plane in device memory; of every place in them 16 at least


@dataclass(frozen=True)
class KernelInfo:
    """A kernel of the module: threads of a block, shared bytes that belong to it, and those asked for at the launch."""

    name: str
    threads: int
    static_bytes: int = 0
    dynamic_bytes: int = 0


@dataclass(frozen=True)
class ArenaArgument:
    """Bytes [offset, offset + bytes) of the step's memory; `bytes` is what a step of the most tokens takes."""

    offset: int
    bytes: int


@dataclass(frozen=True)
class WeightArgument:
    """Bytes [offset, offset + bytes) of the weights file, of which `piece` has the first."""

    offset: int
    bytes: int
    piece: int


@dataclass(frozen=True)
class KVArgument:
    """The plane `plane` of the cache of one layer."""

    layer: int
    plane: int


@dataclass(frozen=True)
class InputArgument:
    """An array of the caller: see `INPUTS`."""

    which: str


@dataclass(frozen=True)
class SizeArgument:
    """A 64-bit number."""

    size: SizeExpr


Argument = ArenaArgument | WeightArgument | KVArgument | InputArgument | SizeArgument


@dataclass(frozen=True)
class Wait:
    """What has to be there before a launch: a piece of the weights, and pieces that nobody reads any more from here on.

    For a piece of experts, `ids` is where their numbers lie in the arena (i32), `pairs` how many there are.
    """

    piece: int
    done: tuple[int, ...] = ()
    ids: int = -1
    pairs: SizeExpr | None = None


@dataclass(frozen=True)
class GpuLaunch:
    """One launch of `grid` blocks. `writes` numbers the arguments that are written; the other buffers are read.

    It is left out where the grid is 0, and where it works on the rows of logits (its grid or a number names `rows`) and
    none is wanted.

    `waits` come before it where weights are streamed. `origin` is the place in the model, for reports.
    """

    kernel: str
    grid: SizeExpr
    arguments: tuple[Argument, ...]
    writes: tuple[int, ...]
    origin: str = ""
    waits: tuple[Wait, ...] = ()

    def blocks(self, sizes: Mapping[str, int]) -> int:
        """How many blocks a step of these sizes launches; 0 for none."""
        numbers = [self.grid, *(a.size for a in self.arguments if isinstance(a, SizeArgument))]
        if not sizes["rows"] and any("rows" in number.names() for number in numbers):
            return 0
        return self.grid.evaluate(sizes)


@dataclass(frozen=True)
class GpuProgram:
    """One specialisation of the step, for 1 .. max_tokens tokens. `piece_tokens` is the most tokens of a piece of a
    prompt, 0 where pieces are not asked for. A program that `replays` has only sizes that stay while it is replayed."""

    name: str
    max_tokens: int
    arena_bytes: int
    launches: tuple[GpuLaunch, ...]
    piece_tokens: int = 0
    replays: bool = False


@dataclass(frozen=True)
class KVPlane:
    """One plane of a layer's cache: [slots, heads, ctx] places of `bytes` each; a ring has `positions`, not ctx."""

    name: str
    heads: int
    bytes: int
    positions: int = 0


@dataclass(frozen=True)
class KVPlan:
    """The cache of a layer is its planes one after another; ctx is a multiple of `block` positions."""

    layers: int
    planes: tuple[KVPlane, ...]
    block: int = 16

    @property
    def bytes_per_position(self) -> int:
        """Of one slot, all layers."""
        return self.layers * sum(plane.heads * plane.bytes for plane in self.planes if not plane.positions)

    @property
    def bytes_per_slot(self) -> int:
        """What does not grow with the positions, all layers."""
        return self.layers * sum(plane.heads * plane.bytes * plane.positions for plane in self.planes)

    def plane_bytes(self, plane: int, slots: int, ctx: int) -> int:
        """Of one plane of one layer."""
        found = self.planes[plane]
        return slots * found.heads * (found.positions or ctx) * found.bytes

    def offset(self, layer: int, plane: int, slots: int, ctx: int) -> int:
        """Where a plane begins when layers lie one after another, each plane on a multiple of `ALIGNMENT`."""
        sizes = [-(-self.plane_bytes(i, slots, ctx) // ALIGNMENT) * ALIGNMENT for i in range(len(self.planes))]
        return layer * sum(sizes) + sum(sizes[:plane])

    def nbytes(self, slots: int, ctx: int) -> int:
        """Of all layers."""
        return self.offset(self.layers, 0, slots, ctx)


@dataclass(frozen=True)
class CodeFiles:
    """The code for one architecture: PTX, and machine code where it was assembled (else "")."""

    architecture: str
    ptx: str
    cubin: str = ""


@dataclass(frozen=True)
class GpuStep:
    """All that a GPU needs beside the weights."""

    code: tuple[CodeFiles, ...]
    kernels: tuple[KernelInfo, ...]
    programs: tuple[GpuProgram, ...]  # ascending max_tokens
    kv: KVPlan

    def kernel(self, name: str) -> KernelInfo:
        """By its name. KeyError for none."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        raise KeyError(name)

    def program(self, tokens: int) -> GpuProgram:
        """The program for a step of so many tokens: the smallest that takes them. Raises RuntimeDiagnostic."""
        for program in self.programs:
            if tokens <= program.max_tokens:
                return program
        most = self.programs[-1].max_tokens
        raise RuntimeDiagnostic(f"a step of {tokens} tokens", expected=f"at most {most}")


def prompt_pieces(positions: np.ndarray, slots: np.ndarray, piece_tokens: int) -> np.ndarray:
    """i32 [n, 4]: the tokens of a step cut into pieces of one slot at consecutive positions, `piece_tokens` at most."""
    found: list[list[int]] = []
    for token, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        if found:
            _, count, of_slot, start = found[-1]
            if slot == of_slot and position == start + count and count < piece_tokens:
                found[-1][1] += 1
                continue
        found.append([token, 1, slot, position])
    return np.array(found, np.int32).reshape(-1, PIECE_WORDS)
