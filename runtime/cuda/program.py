"""What a GPU runs, as data: kernels, the launches of each program in order, memory. Frozen, and JSON both ways.

Made by `codegen.nvptx.lower_to_grid`, stored in the manifest under `gpu`, read without importing the compiler. Launches
run in the order they are listed, each after all before it: one stream is enough. Everything that changes between two
steps of equal sizes (ids, positions, slots, rows) is in device memory, so that a captured step can be replayed.

A launch's arguments are pointers and 64-bit numbers, in the order of the kernel's parameters:

    {"arena": offset, "bytes": n}                     memory of this step
    {"weight": offset, "bytes": n, "piece": number}   offset in the weights file; `piece` of the manifest's pieces
    {"kv": layer, "plane": number}                    one plane of one layer's cache, see `KVPlan`
    {"input": name}                                   ids, positions, slots, rows, pieces (i32) or logits (f32)
    {"size": text}                                    a number: see `runtime.cuda.sizes`

The JSON is hostile until proven otherwise: every field is typed and bounded, every place lies inside of its memory,
every launch names a kernel that is there. Refuses with one RuntimeDiagnostic that names the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.cuda.sizes import SizeExpr
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import Fields

INPUTS = ("ids", "positions", "slots", "rows", "pieces", "logits")
PIECE_WORDS = 4  # of a piece of a prompt: first token, tokens, slot, position of the first token
ALIGNMENT = 256  # of the arena, the weights and each plane in device memory; of every place in them 16 at least
MAX_THREADS = 1024
MAX_SHARED_BYTES = 227 << 10
MAX_LAUNCHES = 1 << 20
MAX_ARGUMENTS = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_ARCHITECTURE = re.compile(r"sm_[0-9]{2,3}a?")


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

    def to_json(self) -> dict[str, Any]:
        """The form in the manifest."""
        return {
            "code": [{"architecture": c.architecture, "ptx": c.ptx, "cubin": c.cubin} for c in self.code],
            "kernels": [
                {"name": k.name, "threads": k.threads, "static": k.static_bytes, "dynamic": k.dynamic_bytes}
                for k in self.kernels
            ],
            "programs": [_program_json(p) for p in self.programs],
            "kv": {
                "layers": self.kv.layers,
                "block": self.kv.block,
                "planes": [
                    {"name": p.name, "heads": p.heads, "bytes": p.bytes, "positions": p.positions}
                    for p in self.kv.planes
                ],
            },
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str, weights_bytes: int, pieces: int) -> GpuStep:
        """Checks and types what `to_json` gave; the file of weights has that many bytes and pieces."""
        return _Reader(Fields(values, where, "gpu"), weights_bytes, pieces).step()


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


# -- to JSON


def _program_json(program: GpuProgram) -> dict[str, Any]:
    return {
        "name": program.name,
        "max_tokens": program.max_tokens,
        "arena_bytes": program.arena_bytes,
        "piece_tokens": program.piece_tokens,
        "replays": program.replays,
        "launches": [_launch_json(launch) for launch in program.launches],
    }


def _launch_json(launch: GpuLaunch) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "kernel": launch.kernel,
        "grid": launch.grid.text,
        "arguments": [_argument_json(argument) for argument in launch.arguments],
        "writes": list(launch.writes),
        "origin": launch.origin,
    }
    return entry | ({"waits": [_wait_json(wait) for wait in launch.waits]} if launch.waits else {})


def _wait_json(wait: Wait) -> dict[str, Any]:
    entry: dict[str, Any] = {"piece": wait.piece, "done": list(wait.done)}
    return entry if wait.pairs is None else entry | {"ids": wait.ids, "pairs": wait.pairs.text}


def _argument_json(argument: Argument) -> dict[str, Any]:
    match argument:
        case ArenaArgument(offset, nbytes):
            return {"arena": offset, "bytes": nbytes}
        case WeightArgument(offset, nbytes, piece):
            return {"weight": offset, "bytes": nbytes, "piece": piece}
        case KVArgument(layer, plane):
            return {"kv": layer, "plane": plane}
        case InputArgument(which):
            return {"input": which}
        case SizeArgument(size):
            return {"size": size.text}


# -- from JSON


class _Reader:
    """Reads one `gpu` object."""

    def __init__(self, top: Fields, weights_bytes: int, pieces: int) -> None:
        self.top, self.weights_bytes, self.pieces = top, weights_bytes, pieces

    def step(self) -> GpuStep:
        code = self._code()
        self.kernels = {k.name: k for k in self._kernels()}
        self.kv = self._kv(self.top.child("kv"))
        programs = [self._program(fields) for fields in self.top.children("programs", 64)]
        if not programs:
            self.top.fail("programs", "at least one", [])
        programs.sort(key=lambda p: (p.max_tokens, p.name))
        return GpuStep(code, tuple(self.kernels.values()), tuple(programs), self.kv)

    def _code(self) -> tuple[CodeFiles, ...]:
        found = []
        for fields in self.top.children("code", 64):
            name = fields.text("architecture")
            if not _ARCHITECTURE.fullmatch(name):
                fields.fail("architecture", "a name like sm_90", name)
            found.append(CodeFiles(name, fields.text("ptx"), fields.text("cubin", "")))
        if not found:
            self.top.fail("code", "code for one architecture at least", [])
        return tuple(found)

    def _kernels(self) -> list[KernelInfo]:
        found = []
        for fields in self.top.children("kernels", 1 << 14):
            name, threads = fields.text("name"), fields.integer("threads", 32, MAX_THREADS)
            if not _NAME.fullmatch(name):
                fields.fail("name", "a C identifier", name)
            if threads % 32:
                fields.fail("threads", "whole warps of 32", threads)
            static, dynamic = (fields.integer(key, 0, MAX_SHARED_BYTES) for key in ("static", "dynamic"))
            found.append(KernelInfo(name, threads, static, dynamic))
        return found

    def _kv(self, fields: Fields) -> KVPlan:
        planes = tuple(
            KVPlane(
                plane.text("name"),
                plane.integer("heads", 1, 1 << 16),
                plane.integer("bytes", 1, 1 << 20),
                plane.integer("positions", 0, 1 << 30, 0),
            )
            for plane in fields.children("planes", 16)
        )
        return KVPlan(fields.integer("layers", 0, 1 << 16), planes, fields.integer("block", 1, 1 << 16))

    def _program(self, fields: Fields) -> GpuProgram:
        tokens, arena = fields.integer("max_tokens", 1, 1 << 20), fields.integer("arena_bytes", 0, 1 << 44)
        launches = tuple(self._launch(launch, arena) for launch in fields.children("launches", MAX_LAUNCHES))
        replays = fields.values.get("replays")
        if not isinstance(replays, bool):
            fields.fail("replays", "true or false", replays)
        name, piece_tokens = fields.text("name"), fields.integer("piece_tokens", 0, 1 << 16)
        return GpuProgram(name, tokens, arena, launches, piece_tokens, replays)

    def _launch(self, fields: Fields, arena: int) -> GpuLaunch:
        kernel = fields.text("kernel")
        if kernel not in self.kernels:
            fields.fail("kernel", "one of gpu.kernels", kernel)
        arguments = tuple(self._argument(argument, arena) for argument in fields.children("arguments", MAX_ARGUMENTS))
        writes = tuple(fields.integers("writes", 0, max(0, len(arguments) - 1)))
        if any(isinstance(arguments[i], SizeArgument | WeightArgument) for i in writes):
            fields.fail("writes", "numbers of arguments that are memory and no weights", list(writes))
        waits = tuple(self._wait(wait, arena) for wait in fields.children("waits", 1 << 10, ()))
        return GpuLaunch(kernel, _size(fields, "grid"), arguments, writes, fields.text("origin", ""), waits)

    def _wait(self, fields: Fields, arena: int) -> Wait:
        last = self.pieces - 1
        piece, done = fields.integer("piece", 0, last), tuple(fields.integers("done", 0, last))
        if "pairs" not in fields.values:
            return Wait(piece, done)
        return Wait(piece, done, fields.integer("ids", 0, arena), _size(fields, "pairs"))

    def _argument(self, fields: Fields, arena: int) -> Argument:
        values = fields.values
        if "arena" in values:
            return ArenaArgument(*self._range(fields, "arena", arena))
        if "weight" in values:
            offset, nbytes = self._range(fields, "weight", self.weights_bytes)
            return WeightArgument(offset, nbytes, fields.integer("piece", 0, self.pieces - 1))
        if "kv" in values:
            layer = fields.integer("kv", 0, self.kv.layers - 1)
            return KVArgument(layer, fields.integer("plane", 0, len(self.kv.planes) - 1))
        if "input" in values:
            if values["input"] not in INPUTS:
                fields.fail("input", f"one of {', '.join(INPUTS)}", values["input"])
            return InputArgument(str(values["input"]))
        if "size" not in values:
            fields.fail("", "an argument: arena, weight, kv, input or size", values)
        return SizeArgument(_size(fields, "size"))

    def _range(self, fields: Fields, key: str, end: int) -> tuple[int, int]:
        """(offset, bytes) inside of memory of `end` bytes."""
        offset, nbytes = fields.integer(key, 0, end), fields.integer("bytes", 0, end)
        if offset + nbytes > end or offset % 16:
            fields.fail(key, f"a multiple of 16 with {nbytes} bytes behind it below {end}", offset)
        return offset, nbytes


def _size(fields: Fields, key: str) -> SizeExpr:
    text = fields.text(key)
    try:
        return SizeExpr(text)
    except RuntimeDiagnostic as refused:
        fields.fail(key, refused.expected, text)
