"""What a process takes that runs a model under a byte budget: the one account that plans and runs share.

Before the process is there (`plan` for this machine) its part is foreseen: `room_of` says what a budget leaves, and
`budget_of_room` which budget leaves that. In the process that runs it is measured (`baseline_bytes`). `ProcessAccount`
adds what depends on the model: page tables, the KV cache of a context, activations, rows of embeddings.
"""

from __future__ import annotations

from runtime.manifest import Manifest
from runtime.memory import PAGE_BYTES
from runtime.process_memory import give_back_read_ahead, resident_bytes

FORESEEN_BYTES = 75 << 20  # the interpreter with its libraries, as measured
SLACK_BYTES = 24 << 20  # logits, sampling, thread stacks, what a library allocates later
ROWS_BYTES = 8 << 20
PROCESS_BYTES = FORESEEN_BYTES + SLACK_BYTES + ROWS_BYTES  # of a budget, before the process is there
TABLES_SHARE = 256  # of a budget goes to page tables, one part
DEFAULT_CONTEXT = 256  # positions that a budget without a context must hold
CONTEXT_SHARE = 8  # of the budget, at most, goes to the KV cache when no context is asked for
CONTEXT_STEP = 64


def room_of(budget: int) -> int:
    """What a budget is foreseen to leave for weights, keys and values, and activations."""
    return max(0, budget - PROCESS_BYTES - budget // TABLES_SHARE)


def budget_of_room(room: int) -> int:
    """The budget that leaves so much."""
    return (room + PROCESS_BYTES) * TABLES_SHARE // (TABLES_SHARE - 1)


def baseline_bytes(manifest: Manifest) -> int:
    """What this process takes without a model: all that running one loads is loaded first."""
    from runtime.native import load_libraries

    load_libraries()
    give_back_read_ahead()
    return resident_bytes() + sum(info.bytes for name, info in manifest.files.items() if name.endswith(".o"))


class ProcessAccount:
    """One model and budget, in a process that has `baseline` bytes already: what each part takes that is no weight."""

    def __init__(self, manifest: Manifest, budget: int, baseline: int, num_slots: int) -> None:
        self.manifest, self.budget, self.baseline, self.num_slots = manifest, budget, baseline, num_slots
        # A page of page table for every 512 of what is in memory, or was: those of experts that went stay.
        self.tables_bytes = max(budget // TABLES_SHARE, manifest.weights.bytes // 512)
        self.fixed = baseline + SLACK_BYTES + self.tables_bytes
        pieces = manifest.weights.pieces
        self.tables = [n for n, piece in enumerate(pieces) if piece.kind == "rows"]
        self.sizes = {n: piece.bytes for n, piece in enumerate(pieces)}

    def kv_bytes(self, context: int) -> int:
        """The cache when every slot is full."""
        kv = self.manifest.kv
        positions = -(-context // CONTEXT_STEP) * CONTEXT_STEP
        return (kv.bytes_per_position * positions + kv.bytes_per_slot) * self.num_slots

    def default_context(self) -> int:
        """The largest whose cache takes a small part of the budget."""
        most, kv = self.manifest.max_context, self.manifest.kv
        room = self.budget // CONTEXT_SHARE // self.num_slots - kv.bytes_per_slot
        positions = room // max(1, kv.bytes_per_position) // CONTEXT_STEP * CONTEXT_STEP
        return min(most, max(DEFAULT_CONTEXT, positions))

    def arena_bytes(self, tokens: int) -> int:
        """Activations of calls of so many tokens, by program; a page more for each of its buffers."""
        return max(
            program.arena_bytes * min(tokens, program.max_tokens) // program.max_tokens
            + 4 * PAGE_BYTES * (len(program.launches) + 1)
            for program in self.manifest.programs
        )

    def rows_bytes(self, tokens: int) -> int:
        """Rows of a call, and as many more as a small cache of them takes."""
        pieces = self.manifest.weights.pieces
        needed = sum(tokens * (pieces[n].unit + 2 * PAGE_BYTES) for n in self.tables)
        return min(max(ROWS_BYTES, needed), sum(self.sizes[n] for n in self.tables))

    def other_bytes(self, context: int, tokens: int) -> int:
        """All that is no weight."""
        return self.fixed + self.kv_bytes(context) + self.arena_bytes(tokens)
