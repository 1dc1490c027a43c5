"""Instructions that only sm_90a has, for `tests.codegen.nvptx.ptx_interpreter`: barriers that count bytes, bulk copies,
products of warpgroups with their descriptors of shared memory. All are done at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

GLOBAL_BASE = 1 << 20  # where global memory begins
_GROUP = 128  # threads of a warpgroup
FACTORS: dict[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "s8": np.dtype(np.int8),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip


class HopperInstructions:
    """Part of a machine of `threads` threads a block with `shared` memory of each block and one `memory`."""

    threads: int
    shared: np.ndarray
    memory: np.ndarray
    barriers: dict[tuple[int, int], list[int]]  # block, place -> phases, bytes that are missing, arrivals

    @abstractmethod
    def read(self, operand: str, type: str, who: np.ndarray) -> np.ndarray:
        """The values of an operand."""

    @abstractmethod
    def write(self, target: str, value: np.ndarray, who: np.ndarray) -> None:
        """Sets a register."""

    def _place(self, operand: str, who: np.ndarray) -> np.ndarray:
        """The address in brackets."""
        name = operand.strip("[]")
        return self.read(name, "u64" if name.startswith("%rd") else "u32", who).astype(np.int64)

    def _count(self, thread: int, place: int, nbytes: int, arrivals: int) -> None:
        found = self.barriers[thread // self.threads, place]
        found[1], found[2] = found[1] + nbytes, found[2] + arrivals
        if found[1:] == [0, 1]:
            found[:] = [found[0] + 1, 0, 0]

    def awake(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> np.ndarray:
        """Those of `who` that can go on: all, or where a barrier is waited for those whose phase is complete."""
        if words[:2] != ("mbarrier", "try_wait"):
            return who
        places, parities = self._place(operands[1], who), self.read(operands[2], "u32", who)
        phases = [self.barriers[t // self.threads, p][0] for t, p in zip(who.tolist(), places, strict=True)]
        return who[np.array(phases, np.int64) % 2 != parities]

    def _mbarrier(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        if words[1] == "try_wait":
            self.write("done", np.ones(len(who), bool), who)
            return
        place = operands[0 if words[1] == "init" else 1]
        for thread, at in zip(who.tolist(), self._place(place, who).tolist(), strict=True):
            assert at % 8 == 0
            if words[1] == "init":
                self.barriers[thread // self.threads, at] = [0, 0, 0]
            else:
                self._count(thread, at, int(operands[2]), 1)

    def _bulk(self, operands: Sequence[Any], who: np.ndarray) -> None:
        nbytes = int(operands[2])
        places = (self._place(operands[i], who).tolist() for i in (0, 1, 3))
        for thread, target, source, barrier in zip(who.tolist(), *places, strict=True):
            source -= GLOBAL_BASE
            assert target % 16 == source % 16 == nbytes % 16 == 0 and target + nbytes <= self.shared.shape[1]
            assert source >= 0 and source + nbytes <= len(self.memory)
            self.shared[thread // self.threads, target : target + nbytes] = self.memory[source : source + nbytes]
            self._count(thread, barrier, -nbytes, 0)

    def _fence(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        """Memory is in order here."""

    def _wgmma(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        if words[1] != "mma_async":
            return  # fence, commit_group, wait_group
        element = FACTORS[words[-1]]
        columns, each = 32 // element.itemsize, 4 // element.itemsize  # of a step, of a register
        signs = {"bf16": ("1", "1", "0"), "e4m3": ("1", "1"), "s8": ()}[words[-1]]
        assert words[4].endswith(f"k{columns}") and words[5] == ("s32" if words[-1] == "s8" else "f32")
        assert words[6] == words[7] and operands[3] in ("0", "1") and operands[4:] == signs
        lanes = len(operands[0])
        assert words[4].startswith(f"m64n{2 * lanes}k")
        kind, wide = ("s32", np.int64) if words[-1] == "s8" else ("f32", np.float64)
        sums = np.zeros((len(who), lanes), wide)
        if operands[3] == "1":
            sums += np.stack([self.read(r, kind, who) for r in operands[0]], axis=1)
        thread = np.arange(_GROUP)
        rows = thread[:, None] // 32 * 16 + thread[:, None] % 32 // 4 + np.arange(lanes) % 4 // 2 * 8
        places = np.arange(lanes) // 4 * 8 + thread[:, None] % 4 * 2 + np.arange(lanes) % 2
        held = np.stack([self.read(r, "u32", who) for r in operands[1]], axis=1).astype(np.uint32)
        factors = held.view(element).astype(np.float64)
        number = np.arange(4 * each)
        left_rows = thread[:, None] // 32 * 16 + thread[:, None] % 32 // 4 + number // each % 2 * 8
        left_columns = thread[:, None] % 4 * each + number // (2 * each) * 4 * each + number % each
        for first in range(0, len(who), _GROUP):
            descriptor = int(self.read(operands[2], "u64", who[first : first + 1])[0])
            right = self._tile(descriptor, 2 * lanes, int(who[first]) // self.threads, element)
            left = np.zeros((64, columns))
            left[left_rows, left_columns] = factors[first : first + _GROUP]
            sums[first : first + _GROUP] += (left @ right.T)[rows, places].astype(wide)
        for i, target in enumerate(operands[0]):
            self.write(target, np.ascontiguousarray(sums[:, i].astype(np.int32 if kind == "s32" else np.float32)), who)

    def _tile(self, descriptor: int, rows: int, block: int, element: np.dtype) -> np.ndarray:
        """The columns of a step of a factor, as a descriptor with the 128-byte swizzle says."""
        assert descriptor >> 62 == 1 and descriptor >> 32 & 0x3FFF == 64
        row, byte = np.arange(rows)[:, None], np.arange(32)
        at = ((descriptor & 0x3FFF) << 4) + row // 8 * 1024 + row % 8 * 128 + byte
        at ^= (at >> 7 & 7) << 4
        return self.shared[block, at].view(element).astype(np.float64)
