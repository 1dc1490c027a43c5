"""What a step of a GPU program needs beside weights and cache: the places of its inputs, and bytes on both sides."""

from __future__ import annotations

import numpy as np

from runtime.cuda.device import host_view
from runtime.cuda.program import ALIGNMENT, PIECE_WORDS, GpuStep

MOST_LOGIT_BYTES = 64 << 20
LEAST_ROWS = 64  # of logits at once, whatever a row takes
INPUTS = ("ids", "positions", "slots", "rows", "pieces")


class StepInputs:
    """The arrays of one program's steps, one behind the other: in pinned memory, and at a fixed place on the device."""

    def __init__(self, host: int, device: int, max_tokens: int) -> None:
        self.host, self.device = host, device
        self.offsets: dict[str, int] = {}
        self.counts = {name: max_tokens * (PIECE_WORDS if name == "pieces" else 1) for name in INPUTS}
        end = 0
        for name in INPUTS:
            self.offsets[name] = end
            end += -(-4 * self.counts[name] // 16) * 16
        self.nbytes = end
        whole = host_view(host, end).view(np.int32) if host else np.empty(0, np.int32)
        self._views = {name: whole[at // 4 : at // 4 + self.counts[name]] for name, at in self.offsets.items()}

    def write(self, name: str, values: np.ndarray) -> None:
        """Into the pinned memory; no copy of it may be under way."""
        self._views[name][: values.size] = values.reshape(-1)

    @staticmethod
    def bytes_for(max_tokens: int) -> int:
        """Of one program, on the next multiple of `ALIGNMENT`."""
        return -(-StepInputs(0, 0, max_tokens).nbytes // ALIGNMENT) * ALIGNMENT


def most_rows(step: GpuStep, vocab_size: int) -> int:
    """Rows of logits that there is room for at once."""
    return min(step.programs[-1].max_tokens, max(LEAST_ROWS, MOST_LOGIT_BYTES // (4 * vocab_size)))


def scratch_bytes(step: GpuStep, vocab_size: int) -> int:
    """What a step needs on the device beside weights and cache."""
    inputs = sum(StepInputs.bytes_for(program.max_tokens) for program in step.programs)
    return max(p.arena_bytes for p in step.programs) + inputs + 4 * vocab_size * most_rows(step, vocab_size)


def pinned_bytes(step: GpuStep, vocab_size: int) -> int:
    """What a step needs of pinned host memory: its inputs, and the logits that come back."""
    return sum(StepInputs.bytes_for(program.max_tokens) for program in step.programs) + 4 * vocab_size * most_rows(
        step, vocab_size
    )
