"""A step function that went through the passes -> plan IR, tile IR and object code.

`compile_step` is the whole of code generation for one target; `codegen.build` puts an artifact round it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from codegen.compile_worker import CompileRequest, compile_many
from codegen.kernels.call import EmitContext
from codegen.kernels.kv_layout import KVLayout
from codegen.kernels.micro import TileShape
from codegen.llvm.instructions import InstructionSet
from codegen.llvm.step import module_text
from codegen.lower_to_plan import lower_program
from codegen.lowering import Lowering
from codegen.object_cache import ObjectCache
from codegen.programs import Program, ProgramSpec, WeightsFile
from codegen.weights import StoredTensor
from ir.core import Value
from ir.ops.builtin import FuncOp, ModuleOp
from passes.schedule.check_awaits import check_awaits
from passes.schedule.check_launches import check_launches
from passes.schedule.check_plan import check_plan

PREFILL_TOKENS = 512
DECODE_TOKENS = 16


class CodegenTarget(Protocol):
    """What code generation asks of a target (`hw_targets.Target` gives it)."""

    @property
    def llvm_triple(self) -> str: ...
    @property
    def llvm_cpu(self) -> str: ...
    @property
    def llvm_features(self) -> frozenset[str]: ...
    def feature_string(self) -> str: ...


@dataclass(frozen=True)
class LoweredStep:
    """A step below the graph level: programs (plan IR inside), kernels (tile IR), the weights file, KV cache."""

    programs: tuple[Program, ...]
    kernels: tuple[FuncOp, ...]
    file: WeightsFile
    kv: KVLayout | None
    num_layers: int

    @property
    def weight_roots(self) -> tuple[tuple[str, Value], ...]:
        """The weights by name, in the order of the file."""
        return self.file.roots

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Where each lies."""
        return self.file.tensors

    @property
    def weights_bytes(self) -> int:
        """The size of the file."""
        return self.file.nbytes

    def plan_module(self) -> ModuleOp:
        """The programs as one printable module."""
        return ModuleOp.create(*(p.func for p in self.programs))

    def tile_module(self) -> ModuleOp:
        """The kernels as one printable module."""
        return ModuleOp.create(*self.kernels)


@dataclass(frozen=True)
class CompiledStep(LoweredStep):
    """A lowered step with its LLVM text and object code."""

    llvm_text: str
    object_code: bytes


def program_specs(features: frozenset[str]) -> tuple[ProgramSpec, ...]:
    """The two specialisations of a step for a CPU: register tiles fill its vector registers.

    With 32 registers of 512 bits: 6 rows x 4 accumulators, 4 weights and a broadcast. With 16 of 256 bits a 16-lane
    accumulator takes two registers: 4 rows x 1.
    """
    wide = "avx512f" in features
    prefill = TileShape(rows=6, vectors=4, unroll=2) if wide else TileShape(rows=4, vectors=1, unroll=2)
    decode = TileShape(rows=prefill.rows, vectors=prefill.vectors, unroll=1)
    return (
        ProgramSpec("decode", DECODE_TOKENS, EmitContext(decode, "decode")),
        ProgramSpec("prefill", PREFILL_TOKENS, EmitContext(prefill, "prefill")),
    )


def lower_step(step: FuncOp, features: frozenset[str], *, programs: Sequence[ProgramSpec] | None = None) -> LoweredStep:
    """Lowers a step to plan and tile level and proves the plans sound.

    Raises DiagnosticError for ops without a kernel.
    """
    lowering = Lowering(step)
    file = lowering.weights_file()
    places = [(piece.kind, piece.offset, piece.nbytes) for piece in file.pieces]
    lowered = tuple(lower_program(lowering, spec, file) for spec in programs or program_specs(features))
    for program in lowered:
        check_plan(program.func, program.arena_bytes).raise_if_errors()
        check_awaits(program.func, places).raise_if_errors()
    kernels = tuple(lowering.kernels.values())
    check_launches([program.func for program in lowered], kernels).raise_if_errors()
    return LoweredStep(lowered, kernels, file, lowering.kv, len(lowering.layers))


def compile_step(
    step: FuncOp,
    target: CodegenTarget,
    *,
    programs: Sequence[ProgramSpec] | None = None,
    cache: ObjectCache | None = None,
    opt_level: int = 1,
) -> CompiledStep:
    """Lowers and compiles. Raises DiagnosticError for ops without a kernel and for what LLVM refuses."""
    lowered = lower_step(step, frozenset(target.llvm_features), programs=programs)
    return compile_lowered(lowered, target, cache=cache, opt_level=opt_level)


def compile_lowered(
    lowered: LoweredStep, target: CodegenTarget, *, cache: ObjectCache | None = None, opt_level: int = 1
) -> CompiledStep:
    """The object code of a lowered step. Raises DiagnosticError for what LLVM refuses."""
    features = frozenset(target.llvm_features)
    width = '"prefer-vector-width"="512" ' if "avx512f" in features else ""
    attributes = f'nounwind {width}"target-cpu"="{target.llvm_cpu}" "target-features"="{target.feature_string()}"'
    text = module_text(lowered.programs, lowered.kernels, InstructionSet(features), target.llvm_triple, attributes)
    request = CompileRequest(text, target.llvm_triple, target.llvm_cpu, target.feature_string(), opt_level, "step")
    (code,) = compile_many([request], cache=cache)
    parts = {field.name: getattr(lowered, field.name) for field in fields(lowered)}
    return CompiledStep(**parts, llvm_text=text, object_code=code)
