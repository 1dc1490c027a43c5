"""Runs compiled steps without an artifact: the step ABI by hand, for tests that look at single programs."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import llvmlite.binding as llvm
import numpy as np

from codegen.compile_step import CompiledStep
from codegen.weights import write_weights
from ir.tile_interpreter import interpret_program
from runtime.native import NativeCode
from runtime.team import WorkerTeam
from tests.codegen.models import Model

CTX, SLOTS = 64, 2


@dataclass(frozen=True)
class MachineTarget:
    """A target by its LLVM names."""

    name: str
    llvm_triple: str
    llvm_cpu: str
    llvm_features: frozenset[str]

    def feature_string(self) -> str:
        return ",".join(f"+{f}" for f in sorted(self.llvm_features))


def host_target(without: Sequence[str] = ()) -> MachineTarget:
    """This machine, some features left out."""
    llvm.initialize_native_target()
    have = {name for name, present in llvm.get_host_cpu_features().items() if present}
    features = frozenset(f for f in have if not any(f.startswith(prefix) for prefix in without))
    cpu = "x86-64" if without else llvm.get_host_cpu_name()
    return MachineTarget("host", llvm.get_process_triple(), cpu, features)


@dataclass(frozen=True)
class Batch:
    """One step: ids, positions and slots of its tokens, the rows whose logits are wanted."""

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    rows: np.ndarray

    @property
    def arrays(self) -> list[np.ndarray]:
        return [np.ascontiguousarray(a, np.int32) for a in (self.ids, self.positions, self.slots, self.rows)]


def opt_level(optimized: bool) -> int:
    """LLVM's level: that of builds, or none: a tenth of the time. `make fuzz` optimizes everything."""
    return 1 if optimized or os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 0


def aligned(size: int, fill: int = 0) -> np.ndarray:
    """Bytes that begin on a cache line."""
    raw = np.full(size + 64, fill, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def weights_image(compiled: CompiledStep, model: Model) -> np.ndarray:
    """The weights file in memory."""
    file = io.BytesIO()
    write_weights(compiled.weight_roots, model, file, bundles=compiled.file.stacks)
    image = aligned(compiled.weights_bytes)
    image[:] = np.frombuffer(file.getbuffer(), np.uint8)
    return image


class Runner:
    """A compiled step with its weights and KV cache. `native` and `interpreted` run one batch and give the logits."""

    def __init__(self, compiled: CompiledStep, model: Model, code: NativeCode | None, team: WorkerTeam | None) -> None:
        self.compiled, self.model, self.code, self.team = compiled, model, code, team
        self.weights = weights_image(compiled, model)
        self.programs = {p.name: p for p in compiled.programs}
        assert compiled.kv is not None
        per_slot = CTX * compiled.kv.bytes_per_position + compiled.kv.bytes_per_slot
        self.kv = aligned(compiled.num_layers * SLOTS * per_slot)

    def native(self, batch: Batch, program: str) -> np.ndarray:
        """Logits [rows, vocab] by the native code. Arena memory is filled with NaN patterns first."""
        assert self.code is not None and self.team is not None
        arrays = batch.arrays
        arena = aligned(self.programs[program].arena_bytes, 0xFF)
        logits = np.full((len(batch.rows), self.model.shape.vocab), np.nan, np.float32)
        pointers = [a.ctypes.data for a in (*arrays, logits, self.weights, arena, self.kv)]
        tail = [len(batch.ids), len(batch.rows), self.team.threads, self.team.address, 0, CTX, SLOTS, 0]
        arguments = (ctypes.c_int64 * 32)(*pointers, *tail)
        status = self.team.run(self.code.functions[f"stratum_step_{program}"], ctypes.addressof(arguments))
        assert status == 0
        return logits

    def interpreted(self, batch: Batch, program: str, threads: int) -> np.ndarray:
        """Logits by the meaning of plan and tile ops; races and bounds are checked on the way."""
        logits = np.full((len(batch.rows), self.model.shape.vocab), np.nan, np.float32)
        inputs = dict(zip(("ids", "positions", "slots", "rows"), batch.arrays, strict=True)) | {"logits": logits}
        chosen = self.programs[program]
        interpret_program(
            chosen.func,
            {k.sym_name: k for k in self.compiled.kernels},
            inputs=inputs,
            sizes={"tokens": len(batch.ids), "rows": len(batch.rows), "ctx": CTX, "slots": SLOTS},
            weights=self.weights,
            arena=aligned(chosen.arena_bytes, 0xFF),
            kv=self.kv,
            threads=threads,
        )
        return logits


@contextmanager
def running(compiled: CompiledStep, model: Model, threads: int) -> Iterator[Runner]:
    """A runner whose native code is loaded and whose team has that many threads."""
    code = NativeCode(compiled.object_code, [f"stratum_step_{p.name}" for p in compiled.programs], where="test")
    team = WorkerTeam(code, threads)
    try:
        yield Runner(compiled, model, code, team)
    finally:
        assert team.close()
        code.close()
