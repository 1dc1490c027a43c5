"""Graph level -> programs for a GPU: every op becomes launches of kernels with grids, every value a buffer.

What is as on a CPU is taken from `codegen.lower_to_plan`: one arena whose offsets are assigned once, weights in the
order they are read, waits for pieces of them, barriers where a launch touches what another writes. What differs: an op
may be several launches, a launch has blocks, the cache of a layer is planes, and a program brings tables along.

    lowered = lower_grid_step(step)          # programs `decode` (8 tokens), `decode_16`, `prefill`
    lowered.plan_module(), lowered.kernels   # plan IR that the checks of CPU plans passed; tile IR with grids
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import codegen.nvptx.emitters.fused  # noqa: F401 - all register emitters
from codegen.kernels.kv_layout import MAX_STEP_TOKENS
from codegen.lowering import Lowering
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.emitters.attention import PIECE_TOKENS
from codegen.nvptx.emitters.rows import merged
from codegen.nvptx.host.attention import HostAttention, host_attention
from codegen.nvptx.host.experts import HostStep, host_experts
from codegen.nvptx.kv_planes import KvPlanes
from codegen.nvptx.launches import (
    GRID_EMITTERS,
    Count,
    GridContext,
    GridLaunch,
    GridOptions,
    Pieces,
    Plane,
    Table,
    Temporary,
    WeightPart,
)
from codegen.program_builder import Call, ProgramBuilder
from codegen.programs import Launch, Program, WeightsFile
from codegen.weight_pieces import WeightPiece
from codegen.weights import PAGE_BYTES, StoredTensor
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F64, I32, U8, PlainFormat
from ir.ops import plan, plan_grid
from ir.ops.builtin import FuncOp, ModuleOp
from ir.ops.kv_cache import KVStateOp
from ir.sizes import num_bytes
from ir.spelling import did_you_mean
from ir.types import BufferType, KVCacheType, TensorType
from passes.schedule.check_awaits import check_awaits
from passes.schedule.check_launches import check_launches
from passes.schedule.check_plan import check_plan

TABLES = "tables"  # the name of what programs bring along, in the weights file
ALIGNMENT = 16  # of a table in it
DECODE_TOKENS = (8, 16)  # rows that a product of a few rows is built for
SHORT_TOKENS = 64  # of a short prompt, where the architecture has large tiles for long ones


@dataclass(frozen=True)
class GridSpec:
    """One specialisation of the step: `few` as in `GridContext`."""

    name: str
    max_tokens: int
    few: int


@dataclass
class GridProgram(Program):
    """A lowered program, the tokens of a piece of a prompt (0: it takes none), whether it may be replayed."""

    piece_tokens: int = 0
    replays: bool = False


@dataclass(frozen=True)
class LoweredGridStep:
    """A step for GPUs: programs, kernels, the weights file with its tables, the planes of the cache; `host` are
    experts, `attention` layers that the CPU beside one can compute."""

    programs: tuple[GridProgram, ...]
    kernels: tuple[GridKernel, ...]
    file: WeightsFile
    tables: bytes
    kv: KvPlanes
    kv_format: str
    num_layers: int
    host: HostStep
    attention: HostAttention

    def plan_module(self) -> ModuleOp:
        """The programs as one printable module."""
        return ModuleOp.create(*(p.func for p in self.programs))

    def tile_module(self) -> ModuleOp:
        """The kernels as one printable module."""
        return ModuleOp.create(*(k.func for k in self.kernels))


@dataclass
class GridLowering(Lowering):
    """Shared between the programs of one model for GPUs."""

    options: GridOptions = field(default_factory=GridOptions)
    grid_kernels: dict[Any, GridKernel] = field(default_factory=dict)
    tables: dict[Table, int] = field(default_factory=dict)  # where each begins
    kv_format: str = ""

    def kv_layout(self, cache: KVCacheType, op: Op) -> KvPlanes:
        """The planes. Raises DiagnosticError for formats that GPUs have no kernels for."""
        self.kv_format = cache.format_text
        try:
            return KvPlanes.of(cache)
        except DiagnosticError as fault:
            found = fault.diagnostics[0]
            raise DiagnosticError.of(replace(found, location=op.location)) from None

    def grid_kernel(self, launch: GridLaunch) -> GridKernel:
        """The kernel of a launch, built when it is new."""
        kernel = self.grid_kernels.get(launch.key)
        if kernel is None:
            kernel = self.grid_kernels[launch.key] = launch.build(self._unique(launch.stem).replace(".", "_"))
        return kernel

    def table(self, table: Table) -> int:
        """Where a table begins among all."""
        if table not in self.tables:
            sizes = [-(-8 * len(t.numbers) // ALIGNMENT) * ALIGNMENT for t in self.tables]
            self.tables[table] = sum(sizes)
        return self.tables[table]

    def table_bytes(self) -> bytes:
        """All tables, whole pages."""
        out = b""
        for table, start in self.tables.items():
            out = out.ljust(start, b"\0") + np.array(table.numbers, np.float64).tobytes()
        return out.ljust(-(-len(out) // PAGE_BYTES) * PAGE_BYTES, b"\0")

    def emit(self, spec: GridSpec) -> _GridBuilder:
        """The launches of a program. Raises DiagnosticError for ops that GPUs have no kernels for."""
        builder = _GridBuilder(self, spec)
        for op in self.step.block.ops[:-1]:
            builder.lower(op)
        builder.name_kernels()
        return builder


def lower_grid_step(
    step: FuncOp, options: GridOptions | None = None, *, programs: Sequence[GridSpec] | None = None
) -> LoweredGridStep:
    """Lowers a step for GPUs and proves the plans sound. Raises DiagnosticError for ops without a kernel."""
    lowering = GridLowering(step, options=options or GridOptions())
    if lowering.kv is None:
        raise DiagnosticError("a step without a KV cache has no program for GPUs")
    lowering.options.check()
    specs = programs or program_specs(lowering.options)
    check_ring(lowering.kv, lowering.kv_format, specs)
    builders = [lowering.emit(spec) for spec in specs]
    tables = lowering.table_bytes()  # of all programs
    file = with_tables(lowering.weights_file(), len(tables))
    lowered = tuple(builder.finish(file) for builder in builders)
    places = [(piece.kind, piece.offset, piece.nbytes) for piece in file.pieces]
    for program in lowered:
        check_plan(program.func, program.arena_bytes).raise_if_errors()
        check_awaits(program.func, places).raise_if_errors()
    kernels = tuple(lowering.grid_kernels.values())
    check_launches([p.func for p in lowered], [k.func for k in kernels]).raise_if_errors()
    host = host_experts([call.spec for call in builders[0].calls], file, lowering.weights.get)
    first = builders[0]
    calls = [(builder.grid_spec.name, builder.grid_spec.few, builder.calls) for builder in builders]
    attention = host_attention(calls, first.layer_of, first.as_its_type)
    layers = len(lowering.layers)
    return LoweredGridStep(lowered, kernels, file, tables, lowering.kv, lowering.kv_format, layers, host, attention)


def program_specs(options: GridOptions) -> tuple[GridSpec, ...]:
    """The specialisations of a step: few rows fill one or two factors of the matrix unit, many fill tiles. Products of
    warpgroups have tiles of many rows, so that short prompts and large batches have a program of their own."""
    few, more = DECODE_TOKENS
    short = options.hopper and options.prefill_tokens > SHORT_TOKENS
    return (
        GridSpec("decode", few, few),
        GridSpec("decode_16", more, more),
        *((GridSpec(f"prefill_{SHORT_TOKENS}", SHORT_TOKENS, 0),) if short else ()),
        GridSpec("prefill", options.prefill_tokens, 0),
    )


def check_ring(kv: KvPlanes, format: str, specs: Sequence[GridSpec]) -> None:
    """Raises DiagnosticError for programs of more tokens than a ring of the newest positions holds at once."""
    for spec in specs:
        if kv.ring and spec.max_tokens > MAX_STEP_TOKENS:
            raise DiagnosticError(
                f"steps of {spec.max_tokens} tokens (program {spec.name!r}) with a KV cache of {format}, whose newest"
                " positions lie in a ring",
                expected=f"at most {MAX_STEP_TOKENS} tokens",
                hint="longer prompts are passed in several steps",
            )


def with_tables(file: WeightsFile, nbytes: int) -> WeightsFile:
    """The file with whole pages of tables behind the weights, as a dense piece of their own."""
    if not nbytes:
        return file
    tensor = StoredTensor(TABLES, file.nbytes, nbytes, "f64", (nbytes // 8,), None)
    piece = WeightPiece("dense", file.nbytes, nbytes, TABLES)
    return replace(
        file,
        tensors=(*file.tensors, tensor),
        nbytes=file.nbytes + nbytes,
        pieces=(*file.pieces, piece),
        piece_of={**file.piece_of, TABLES: len(file.pieces)},
    )


class _GridBuilder(ProgramBuilder):
    """Lowers the step function for one program of a GPU."""

    lowering: GridLowering
    calls: list[Any]

    def __init__(self, lowering: GridLowering, spec: GridSpec) -> None:
        self.grid_spec = spec
        strides = {value: bundle.stride for bundle in lowering.bundles for value in bundle.weights}
        self.context = GridContext(spec.few, spec.max_tokens, lowering.options, strides=strides)
        super().__init__(lowering, spec.name, spec.max_tokens, WeightsFile.empty())

    def lower(self, op: Op) -> None:
        """Adds the launches of an op of the step."""
        self._lower(op)

    def finish(self, file: WeightsFile) -> GridProgram:
        """The program, where weights lie as `file` says."""
        self.file = file
        self.tensors = {tensor.name: tensor for tensor in file.tensors}
        self._write_logits_directly()
        self.waits = self._waits()
        arena, lifetimes = self._assign()
        func = self._emit(arena.offsets, lifetimes)
        launches = [self._launch(call) for call in self.calls]
        pieces = PIECE_TOKENS if any(isinstance(b, Pieces) for call in self.calls for b in call.buffers) else 0
        return GridProgram(
            self.grid_spec.name, self.grid_spec.max_tokens, func, max(64, arena.total_bytes), launches,
            piece_tokens=pieces, replays=not pieces,
        )  # fmt: skip

    def _launch_op(self, op: Op) -> None:
        emit = GRID_EMITTERS.get(type(op))
        if emit is None:
            names = sorted(c.name for c in GRID_EMITTERS)
            message = f"no kernel for '{op.name}' on GPUs{did_you_mean(op.name, names)}; expected {', '.join(names)}"
            raise DiagnosticError.of(Diagnostic("error", message, op.location))
        for launch in emit(op, self.context):
            before = self.calls[-1] if self.calls else None
            joint = merged(before.spec, launch, self.context) if before is not None else None
            if before is not None and joint is not None:
                of = before.op if before.spec.costs else op
                self.calls[-1] = Call(of, joint, "", list(joint.arguments))
            else:
                self.calls.append(Call(op, launch, "", list(launch.arguments)))

    def name_kernels(self) -> None:
        """Builds what is launched, and notes the tables."""
        for call in self.calls:
            call.kernel = self.lowering.grid_kernel(call.spec).name
            for table in (a for a in call.spec.arguments if isinstance(a, Table)):
                self.lowering.table(table)

    # -- what lies where

    def _key(self, buffer: Any) -> Any:
        return Plane(self.root(buffer.cache), buffer.plane) if isinstance(buffer, Plane) else super()._key(buffer)

    def _in_arena(self, key: Any) -> bool:
        if isinstance(key, Value):
            return super()._in_arena(key)
        return isinstance(key, Temporary)

    def _type(self, key: Any) -> TensorType:
        if isinstance(key, Temporary):
            return key.type
        found = self.context.types.get(key, key.type)
        assert isinstance(found, TensorType)
        return found

    def _element(self, key: Any) -> PlainFormat:
        match key:
            case WeightPart():
                return key.element
            case Table():
                return F64
            case Plane():
                return self.lowering.kv.planes[key.plane].element
            case Pieces():
                return I32
        element = self._type(key).element
        return element if isinstance(element, PlainFormat) else U8

    def _bytes(self, key: Any) -> int:
        return num_bytes(self._type(key), self.sizes) if isinstance(key, Value | Temporary) else 0

    def _weight(self, buffer: Any) -> str | None:
        if isinstance(buffer, Table):
            return TABLES
        return super()._weight(buffer.weight if isinstance(buffer, WeightPart) else buffer)

    def layer_of(self, call: Any) -> int | None:
        """The layer whose cache a call uses."""
        return self._kv_layer(call)

    def as_its_type(self, value: Value) -> bool:
        """Whether a tensor lies in memory as its type says."""
        return isinstance(value.type, TensorType) and self._element(value) == value.type.element

    def _kv_layer(self, call: Any) -> int | None:
        for buffer in call.buffers:
            if isinstance(buffer, Plane):
                return self._layer(self._key(buffer))
        return None

    def _layer(self, key: Plane) -> int:
        op = key.cache.defining_op()
        assert isinstance(op, KVStateOp)
        return self.lowering.layers[op.symbol.name]

    # -- plan IR

    def _grid(self, call: Any) -> str:
        return call.spec.grid

    def _place(self, b: Builder, key: Any, offsets: dict[Any, int], lifetimes: Any) -> Value:
        match key:
            case Count():
                return b(plan_grid.CountOp(size=key.size))
            case Pieces():
                return b(plan_grid.PiecesOp(result_types=[BufferType(I32)]), "pieces")
            case Plane():
                made = self.lowering.kv.planes[key.plane]
                grows = self.lowering.kv.heads * made.row_bytes
                sizes = {"slot_bytes": grows * made.positions} if made.positions else {"position_bytes": grows}
                where = {"layer": self._layer(key), "plane": key.plane}
                return b(plan_grid.KVPlaneOp(**where, **sizes, result_types=[BufferType(made.element)]), made.name)
            case Table():
                place = self.tensors[TABLES].offset + self.lowering.table(key)
                return self._stored(b, TABLES, place, 8 * len(key.numbers), F64)
            case WeightPart():
                tensor = self.tensors[self.lowering.weights[key.weight]]
                size = self._part_bytes(key, tensor)
                return self._stored(b, tensor.name, tensor.offset + key.offset, size, key.element)
        return super()._place(b, key, offsets, lifetimes)

    def _stored(self, b: Builder, name: str, offset: int, nbytes: int, element: PlainFormat) -> Value:
        buffer = [BufferType(element)]
        return b(plan.WeightOp(symbol=SymbolRef(name), offset=offset, bytes=nbytes, result_types=buffer))

    def _part_bytes(self, part: WeightPart, tensor: StoredTensor) -> int:
        """Up to where the next part of the same weight begins, or its end. Of a stack: all but what is before it."""
        if tensor.stride:
            return tensor.extent - part.offset
        starts = {
            b.offset
            for call in self.calls
            for b in call.buffers
            if isinstance(b, WeightPart) and b.weight is part.weight
        }
        return min((s for s in starts if s > part.offset), default=tensor.nbytes) - part.offset

    def _launch(self, call: Any) -> Launch:
        if not call.spec.costs:
            return Launch(call.kernel, call.op.location.origin, 0, 0, 0)
        return super()._launch(call)
