"""What a process takes that runs a model under a byte budget: the one account that plans and runs share.

Its own part is foreseen (`stratum.process_room`), so that a plan is the same before the process is there and in it. A
process that takes more (part of a larger program) is measured (`baseline_bytes`), and has as much less for the model.
`ProcessAccount` adds what depends on the model: page tables, the KV cache of a context, activations, rows of
embeddings. A budget that is too small for all of it raises DoesNotFit.
"""

from __future__ import annotations

from ir.diagnostics import DiagnosticError
from runtime.manifest import Manifest
from runtime.memory import PAGE_BYTES
from runtime.process_memory import give_back_read_ahead, resident_bytes
from stratum.process_room import FORESEEN_BYTES, ROWS_BYTES, SLACK_BYTES, TABLES_SHARE

TOKENIZER_BYTES, TOKENIZER_SHARE = 8 << 20, 30  # and of each byte of its file, as measured of 2000 to 150 000 words
DEFAULT_CONTEXT = 256  # positions that a budget without a context must hold
CONTEXT_SHARE = 8  # of the budget, at most, goes to the KV cache when no context is asked for
CONTEXT_STEP = 64
GUESSES = 2  # the likeliest are nearly always right; further ones cost more in vain than they save
EXIT_DOES_NOT_FIT = 3


def foreseen_bytes(manifest: Manifest) -> int:
    """What a process is foreseen to take that runs this model, and has nothing of it yet: with its tokenizer."""
    file = manifest.files.get("tokenizer.json")
    tokenizer = TOKENIZER_BYTES + TOKENIZER_SHARE * file.bytes if file is not None else 0
    return FORESEEN_BYTES + tokenizer + _code_bytes(manifest)


def baseline_bytes(manifest: Manifest) -> int:
    """What this process takes without a model, all that running one loads being there: as foreseen, if not more."""
    from runtime.native import load_libraries

    load_libraries()
    give_back_read_ahead()
    return max(foreseen_bytes(manifest), resident_bytes() + _code_bytes(manifest))


def _code_bytes(manifest: Manifest) -> int:
    return sum(info.bytes for name, info in manifest.files.items() if name.endswith(".o"))


def pinned_room(budget: int) -> int:
    """What a budget leaves for pinned memory in this process, where a GPU's driver is loaded already; may be < 0."""
    return budget - resident_bytes() - SLACK_BYTES - budget // TABLES_SHARE


class DoesNotFit(DiagnosticError):
    """The budget is too small; `minimum` bytes would do. `context` is the largest that fits, 0 where none does."""

    exit_code = EXIT_DOES_NOT_FIT

    def __init__(self, message: str, minimum: int, *, where: str, hint: str, context: int = 0) -> None:
        super().__init__(message, where=where, expected=f"at least {mib(minimum)}", hint=hint)
        self.minimum, self.context = minimum, context


def mib(nbytes: int) -> str:
    """A size in whole MiB, rounded up."""
    return f"{-(-nbytes // (1 << 20))} MiB"


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
        self.expert_bytes = sum(piece.bytes for piece in pieces if piece.kind == "experts")

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

    def lent_kv_bytes(self, context: int) -> int:
        """Of the KV cache, what experts may have until sequences need it."""
        return self.kv_bytes(context)

    def short_steps(self, experts: int, tokens: int) -> tuple[int, int]:
        """(tokens of short steps, what they leave of the activations for longer ones), where `experts` bytes of experts
        are in memory and others can use it."""
        short, longest, whole = self.manifest.programs[0], self.arena_bytes(tokens), self.expert_bytes
        left = longest - short.arena_bytes - 4 * PAGE_BYTES * (len(short.launches) + 1)
        if short.max_tokens >= tokens or experts >= whole or left <= 0:
            return 0, 0
        return short.max_tokens, min(left, whole - experts)

    def guesses(self, experts: int) -> int:
        """Experts to read on a guess: as many as the disk reads while a layer is computed, where some are missing."""
        return GUESSES if experts < self.expert_bytes else 0
