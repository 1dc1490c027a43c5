"""Runs a whole GPU program by the meaning of its kernels: launches in order on one flat memory, every access checked.

What a runtime does is done by hand here: weights, arena, cache and inputs are parts of one array of bytes, a launch's
arguments are slices of it, sizes are counted from the step. The program is what the manifest would say, read back.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from codegen.nvptx.lower_to_grid import LoweredGridStep
from codegen.nvptx.program_entry import gpu_entry
from codegen.weights import write_weights
from ir.grid_interpreter import interpret_grid
from runtime.cuda.program import (
    ALIGNMENT,
    ArenaArgument,
    GpuLaunch,
    GpuProgram,
    InputArgument,
    KVArgument,
    SizeArgument,
    WeightArgument,
    prompt_pieces,
)
from runtime.cuda.program_reader import read_step
from tests.codegen.harness import Batch
from tests.codegen.models import Model

NO_CODE = [{"architecture": "sm_90", "ptx": "code/sm_90.ptx", "cubin": ""}]


def stored_weights(lowered: LoweredGridStep, source: Any) -> bytes:
    """The weights file."""
    file = io.BytesIO()
    write_weights(lowered.file.roots, source, file, bundles=lowered.file.stacks)
    return file.getvalue() + lowered.tables


class GridMachine:
    """A device with the program of one model, its weights and a cache of `slots` sequences of `ctx` positions."""

    def __init__(self, lowered: LoweredGridStep, model: Model, *, ctx: int, slots: int) -> None:
        entry = json.loads(json.dumps(gpu_entry(lowered, NO_CODE)))
        weights = stored_weights(lowered, model)
        assert len(weights) == lowered.file.nbytes
        self.step = read_step(entry, "test", len(weights), len(lowered.file.pieces))
        self.kernels = {kernel.name: kernel for kernel in lowered.kernels}
        self.vocab, self.ctx, self.slots = model.shape.vocab, ctx, slots
        kv_bytes = self.step.kv.nbytes(slots, ctx)
        arena = max(program.arena_bytes for program in self.step.programs)
        self.starts = {"weights": 0, "kv": _up(len(weights)), "arena": _up(len(weights)) + _up(kv_bytes)}
        memory = np.zeros(self.starts["arena"] + _up(arena) + ALIGNMENT, np.uint8)
        self.memory = memory[-memory.ctypes.data % ALIGNMENT :]
        self.memory[: len(weights)] = np.frombuffer(weights, np.uint8)
        self.launches = 0

    def run(self, batch: Batch, program: str = "") -> np.ndarray:
        """Logits [rows, vocab] of a step. The arena holds NaN patterns first."""
        ids, positions, slots, rows = batch.arrays
        chosen = next((p for p in self.step.programs if p.name == program), None) or self.step.program(len(ids))
        assert len(ids) <= chosen.max_tokens and int(positions.max()) < self.ctx and int(slots.max()) < self.slots
        logits = np.full((len(rows), self.vocab), np.nan, np.float32)
        pieces = (
            prompt_pieces(positions, slots, chosen.piece_tokens) if chosen.piece_tokens else np.zeros((0, 4), np.int32)
        )
        inputs = {"ids": ids, "positions": positions, "slots": slots, "rows": rows, "pieces": pieces, "logits": logits}
        sizes = {"tokens": len(ids), "rows": len(rows), "ctx": self.ctx, "slots": self.slots, "pieces": len(pieces)}
        self.memory[self.starts["arena"] :] = 0xFF
        for launch in chosen.launches:
            self._launch(chosen, launch, inputs, sizes)
        return logits

    def _launch(
        self, program: GpuProgram, launch: GpuLaunch, inputs: dict[str, np.ndarray], sizes: dict[str, int]
    ) -> None:
        kernel, info = self.kernels[launch.kernel], self.step.kernel(launch.kernel)
        assert info.threads == kernel.threads
        arguments = [self._argument(argument, inputs, sizes) for argument in launch.arguments]
        blocks = launch.blocks(sizes)
        if blocks:
            interpret_grid(kernel.func, arguments, blocks=blocks, threads=kernel.threads)
        self.launches += 1

    def _argument(self, argument: Any, inputs: dict[str, np.ndarray], sizes: dict[str, int]) -> np.ndarray | int:
        match argument:
            case ArenaArgument(offset, nbytes):
                return self._bytes("arena", offset, nbytes)
            case WeightArgument(offset, nbytes):
                return self._bytes("weights", offset, nbytes)
            case KVArgument(layer, plane):
                start = self.step.kv.offset(layer, plane, self.slots, self.ctx)
                return self._bytes("kv", start, self.step.kv.plane_bytes(plane, self.slots, self.ctx))
            case InputArgument(which):
                return inputs[which]
            case SizeArgument(size):
                return size.evaluate(sizes)
        raise TypeError(argument)

    def _bytes(self, memory: str, offset: int, nbytes: int) -> np.ndarray:
        start = self.starts[memory] + offset
        return self.memory[start : start + nbytes]


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
