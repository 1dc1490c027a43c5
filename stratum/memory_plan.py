"""A byte budget for a whole process -> what stays in memory and what is streamed (`runtime.stream_plan.StreamPlan`).

The rule, in the order of what a byte is worth: dense weights stay, because every token reads them; then experts, as
many as fit; then the table of embeddings. Dense weights that do not fit are streamed, large ones kept first, since the
window must hold the largest that are streamed and what is read meanwhile, the rest spread evenly over the program. What
is no weight comes off first (`stratum.process_account`): the interpreter and its libraries as measured, activations,
the KV cache for the context asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ir.diagnostics import DiagnosticError
from runtime.manifest import Manifest
from runtime.memory import PAGE_BYTES
from runtime.stream_plan import StreamPlan, least_expert_bytes, live_bytes
from stratum.process_account import CONTEXT_STEP, SLACK_BYTES, ProcessAccount, baseline_bytes

AHEAD_BYTES = 8 << 20  # read while a piece is used: some milliseconds of a fast disk
GUESSES = 2  # the likeliest are nearly always right; further ones cost more in vain than they save
DISK_SHARE = 20  # times that memory is read faster than the disk
EXIT_DOES_NOT_FIT = 3


class DoesNotFit(DiagnosticError):
    """The budget is too small; `minimum` bytes would do."""

    exit_code = EXIT_DOES_NOT_FIT

    def __init__(self, message: str, minimum: int, *, where: str, hint: str) -> None:
        super().__init__(message, where=where, expected=f"at least {mib(minimum)}", hint=hint)
        self.minimum = minimum


@dataclass(frozen=True)
class MemoryPlan:
    """The stream plan, and the context that it has room for.

    `kv_bytes`: what the KV cache may take in memory, None for all of it.
    """

    stream: StreamPlan
    context: int
    kv_bytes: int | None = None


def plan_memory(
    manifest: Manifest,
    budget: int,
    *,
    baseline: int,
    context: int | None = None,
    num_slots: int = 1,
    policy: str | None = None,
    where: str = "",
) -> MemoryPlan:
    """What to keep of `manifest`'s weights in `budget` bytes, of which the process has `baseline` already.

    `policy` of the cache of experts: one of `runtime.eviction.POLICIES`; by default what no routing makes useless.

    Raises DoesNotFit with the least budget, and the context that would fit where a smaller one would do.
    """
    rule = Accounts(manifest, budget, baseline, num_slots)
    chosen = context if context is not None else rule.default_context()
    tokens = max(program.max_tokens for program in manifest.programs)
    while tokens >= 1:
        plan = rule.plan(chosen, tokens)
        if plan is not None:
            return MemoryPlan(replace(plan, policy=policy or plan.policy), chosen)
        tokens //= 2
    minimum = rule.minimum(chosen)
    message = f"{mib(budget)} are too small for this model with a context of {chosen}"
    fits = rule.largest_context(chosen)
    parts = [f"{mib(baseline + SLACK_BYTES)} are the process itself, {mib(rule.kv_bytes(chosen))} the KV cache"]
    if fits:
        parts.append(f"a context of {fits} would fit: --context {fits}")
    raise DoesNotFit(message, minimum, where=where, hint="; ".join(parts))


def plan_for(artifact: Path, budget: int, context: int | None, policy: str | None = None) -> MemoryPlan:
    """`plan_memory` for this process, with what running takes loaded already."""
    from runtime.artifact import open_artifact

    manifest = open_artifact(artifact).manifest
    rate, baseline = disk_rate(artifact), baseline_bytes(manifest)
    made = plan_memory(manifest, budget, baseline=baseline, context=context, policy=policy, where=str(artifact))
    return replace(made, stream=replace(made.stream, disk_bytes_per_s=rate))


def disk_rate(artifact: Path) -> int:
    """Bytes a second that the artifact's drive keeps up, as it was measured; 0 where it never was."""
    from hw_targets.calibrate_disk import cached

    found = cached(artifact)
    return int(found.sustained_bandwidth) if found is not None else 0


class Accounts(ProcessAccount):
    """One model and budget: what each part of the process takes, and the plan that the rule makes of the rest."""

    def __init__(self, manifest: Manifest, budget: int, baseline: int, num_slots: int) -> None:
        super().__init__(manifest, budget, baseline, num_slots)
        pieces = manifest.weights.pieces
        self.dense = [n for n, piece in enumerate(pieces) if piece.kind == "dense"]
        self.experts = sum(piece.bytes for piece in pieces if piece.kind == "experts")

    def plan(self, context: int, tokens: int) -> StreamPlan | None:
        """The plan, or None where it does not fit."""
        other, rows = self.other_bytes(context, tokens), self.rows_bytes(tokens)
        room = self.budget - other - rows
        least = least_expert_bytes(self.manifest)
        dense = sum(self.sizes[n] for n in self.dense)
        if dense + least <= room:
            resident, window = tuple(self.dense), 0
            experts = min(room - dense, self.experts)
            left = room - dense - experts
            tables = sum(self.sizes[n] for n in self.tables)
            if tables and tables <= left + rows:
                resident = tuple(sorted((*resident, *self.tables)))
        else:
            found = self.spread(room - least)
            if found is None:
                return None
            (resident, window), experts = found, least
        short_tokens, short_bytes = self.short_steps(experts, tokens)
        return StreamPlan(
            self.budget, resident, window, experts, rows, step_tokens=tokens, other_bytes=other,
            guesses=self.guesses(experts), short_tokens=short_tokens, short_bytes=short_bytes,
            kv_bytes=self.lent_kv_bytes(context) if experts < self.experts else 0,
        )  # fmt: skip

    def lent_kv_bytes(self, context: int) -> int:
        """Of the KV cache, what experts may have until sequences need it."""
        return self.kv_bytes(context)

    def short_steps(self, experts: int, tokens: int) -> tuple[int, int]:
        """(tokens of short steps, what they leave of the activations for longer ones), where experts can use it."""
        short, longest = self.manifest.programs[0], self.arena_bytes(tokens)
        left = longest - short.arena_bytes - 4 * PAGE_BYTES * (len(short.launches) + 1)
        if short.max_tokens >= tokens or experts >= self.experts or left <= 0:
            return 0, 0
        return short.max_tokens, min(left, self.experts - experts)

    def guesses(self, experts: int) -> int:
        """Experts to read on a guess: as many as the disk reads while a layer is computed, where some are missing."""
        return GUESSES if experts < self.experts else 0

    def spread(self, room: int) -> tuple[tuple[int, ...], int] | None:
        """(dense pieces that stay, window): as few streamed bytes as fit, in equal parts along the program.

        Where the window has no room to read ahead, the disk waits while the processor computes, as if so much more were
        to be read.
        """
        by_size = sorted(self.dense, key=lambda n: -self.sizes[n])
        best: tuple[float, int, tuple[int, ...]] | None = None
        total, left = sum(self.sizes[n] for n in self.dense), room
        for count, largest in enumerate(by_size):
            kept = by_size[:count]
            # Of pieces of one size all are kept, or a part that is spread like the rest.
            begins = not count or self.sizes[largest] < self.sizes[kept[-1]]
            live = max(live_bytes(self.manifest, p, frozenset(kept)) for p in self.manifest.programs) if begins else 0
            if begins and left >= live:
                ahead = min(left - live, AHEAD_BYTES)
                more = self._evenly(by_size[count:], left - live - ahead)
                resident = tuple(sorted((*kept, *more)))
                streamed = total - sum(self.sizes[n] for n in resident)
                found = streamed + (1 - ahead / AHEAD_BYTES) * total / DISK_SHARE, streamed, resident
                best = min(best or found, found)
            left -= self.sizes[largest]
            if left < 0:
                break
        return (best[2], room - (total - best[1])) if best else None

    def _evenly(self, pieces: list[int], room: int) -> list[int]:
        """Pieces of at most `room` bytes in all, taken evenly along the file."""
        total = sum(self.sizes[n] for n in pieces)
        taken: list[int] = []
        seen = used = 0
        for piece in sorted(pieces):
            seen += self.sizes[piece]
            if used + self.sizes[piece] <= min(room, room * seen / total + self.sizes[piece] / 2):
                taken.append(piece)
                used += self.sizes[piece]
        for piece in sorted(set(pieces) - set(taken), key=lambda n: (-self.sizes[n], n)):
            if used + self.sizes[piece] <= room:
                taken.append(piece)
                used += self.sizes[piece]
        return taken

    def minimum(self, context: int) -> int:
        """The least budget that has a plan, found by halving."""
        low, high = self.budget, self.budget + 1
        while Accounts(self.manifest, high, self.baseline, self.num_slots).plan(context, 1) is None:
            low, high = high, high * 2
        while high - low > 1 << 20:
            middle = (low + high) // 2
            if Accounts(self.manifest, middle, self.baseline, self.num_slots).plan(context, 1) is None:
                low = middle
            else:
                high = middle
        return -(-high // (1 << 20)) * (1 << 20)

    def largest_context(self, below: int) -> int:
        """The largest context less than `below` that fits, 0 for none."""
        low, high = 0, below // CONTEXT_STEP
        while high - low > 1:
            middle = (low + high) // 2
            if self.plan(middle * CONTEXT_STEP, 1) is None:
                high = middle
            else:
                low = middle
        return low * CONTEXT_STEP


def mib(nbytes: int) -> str:
    """A size in whole MiB, rounded up."""
    return f"{-(-nbytes // (1 << 20))} MiB"
