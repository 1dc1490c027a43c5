"""Which weights that do not stay on a GPU lie in pinned host memory, and which only on the disk.

    plan = plan_host(pieces, hbm, budget_bytes)
    plan.image, plan.staged, plan.cached, plan.slots, plan.host_bytes

Dense pieces that pass through are read in every step, so they come first: those for which there is room lie in pinned
memory whole, the others are read each time, ahead of their use, into `STAGES` places in turn. What is left holds
experts: all of them, or as many slots as there is room for, shared by all layers. Without a budget everything is there.
Pure; the same plan for the same sizes. Raises PinnedMemoryTooSmall with the least budget that would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.cuda.hybrid_plan import HbmPlan, fewest_passing
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import PieceInfo

PAGE_BYTES = 4096
STAGES = 3  # places for dense pieces from the disk: one is sent to the GPU, one is read, one follows
LEAST_SLOTS = 2  # of experts: one is sent, one is read
LOAD_BYTES = 16 << 20  # through which what stays on the GPU comes


@dataclass(frozen=True)
class HostPlan:
    """Numbers of the weights file's pieces, for one block of pinned memory of `host_bytes`.

    `image` are (piece, offset in the block); `staged` are dense pieces read in each step, in the order of use, into
    `stages` places of `stage_bytes`; `cached` are pieces of experts on the disk, of which `slots` of `slot_bytes` are
    in memory. Stages begin at `stages_at`, slots at `slots_at`.
    """

    image: tuple[tuple[int, int], ...]
    staged: tuple[int, ...]
    stages: int
    stage_bytes: int
    stages_at: int
    cached: tuple[int, ...]
    slots: int
    slot_bytes: int
    slots_at: int
    host_bytes: int

    @property
    def from_disk(self) -> tuple[int, ...]:
        """Pieces of which not everything is in memory."""
        return (*self.staged, *self.cached)


class PinnedMemoryTooSmall(RuntimeDiagnostic):
    """Not even what passes through has room; `lacking` bytes more would do."""

    def __init__(self, budget: int, needed: int) -> None:
        super().__init__(
            f"{max(0, budget)} bytes of pinned host memory are too few for weights that come from the disk",
            expected=f"at least {needed} bytes beside what is no weight",
            hint="allow more memory, or more device memory, so that less passes through",
        )
        self.lacking = needed - budget


def plan_host(pieces: Sequence[PieceInfo], hbm: HbmPlan, budget: int | None = None) -> HostPlan:
    """What lies where of the pieces that `hbm` does not keep on the device, in at most `budget` bytes."""
    dense = list(hbm.streamed)
    experts = [piece for piece, slots in hbm.slots if slots < pieces[piece].bytes // pieces[piece].unit]
    whole = sum(_paged(pieces[i].bytes) for i in (*dense, *experts))
    slot_bytes = max((_paged(pieces[i].unit) for i in experts), default=0)
    if budget is None or whole <= budget:
        return _laid_out(pieces, hbm, budget, [*dense, *experts], [], 0, [], 0, 0)
    least_slots = min(LEAST_SLOTS * slot_bytes, sum(_paged(pieces[i].bytes) for i in experts))
    staged = fewest_passing(pieces, dense, budget - least_slots, STAGES, PAGE_BYTES)
    if staged is None:
        sizes = [_paged(pieces[i].bytes) for i in dense]
        needed = least_slots + min(sum(sizes), STAGES * max(sizes, default=0))
        raise PinnedMemoryTooSmall(budget, needed)
    stage_bytes = max((_paged(pieces[i].bytes) for i in staged), default=0)
    kept = [i for i in dense if i not in staged]
    left = budget - sum(_paged(pieces[i].bytes) for i in kept) - STAGES * stage_bytes * bool(staged)
    if sum(_paged(pieces[i].bytes) for i in experts) <= left:
        return _laid_out(pieces, hbm, budget, [*kept, *experts], staged, stage_bytes, [], 0, 0)
    return _laid_out(pieces, hbm, budget, kept, staged, stage_bytes, experts, left // slot_bytes, slot_bytes)


def _laid_out(
    pieces: Sequence[PieceInfo], hbm: HbmPlan, budget: int | None, image: Sequence[int],
    staged: Sequence[int], stage_bytes: int, cached: Sequence[int], slots: int, slot_bytes: int,
) -> HostPlan:  # fmt: skip
    """The parts one behind the other; never less than what loading goes through, where the budget has room for it."""
    offsets, at = [], 0
    for piece in image:
        offsets.append((piece, at))
        at += _paged(pieces[piece].bytes)
    stages = STAGES if staged else 0
    stages_at, slots_at = at, at + stages * stage_bytes
    host_bytes = slots_at + slots * slot_bytes
    stays = sum(_paged(pieces[i].bytes) for i in hbm.resident)
    through = min(LOAD_BYTES, 2 * stays, max(2 * PAGE_BYTES, LOAD_BYTES if budget is None else budget))
    host_bytes = max(host_bytes, through // PAGE_BYTES * PAGE_BYTES, 2 * PAGE_BYTES)
    return HostPlan(
        tuple(offsets), tuple(staged), stages, stage_bytes, stages_at, tuple(cached), slots, slot_bytes, slots_at,
        host_bytes,
    )  # fmt: skip


def _paged(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
