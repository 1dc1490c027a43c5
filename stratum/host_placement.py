"""What a budget keeps of a built model on this machine, as a placement: the plan that `plan` prints and `run` executes.

    placement = place_on_host(manifest, 1 << 30, baseline=foreseen_bytes(manifest), drive="nvme0n1")

The solved problem of `passes.place` for one unit, one memory and one drive, where it is exact piece by piece and at
once (`passes.place.piece_choice`): dense weights stay before experts, experts before the table of embeddings. What is
no weight comes off first (`stratum.process_account`): the interpreter and its libraries, activations, the KV cache for
the context asked for. A cache that does not fit lies on the drive in part: it gets what one of its layers takes and a
part of the next, weights are placed in what is left, and the newest positions of every layer stay in what those leave;
a weight that stays saves a read in every step, a position of the cache only when the text is as long. Predictions are
left out: `stratum.planning` computes them.

Raises DoesNotFit with the least budget, and the context that would fit where a smaller one would do.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass
from pathlib import Path

from passes.place.piece_choice import choose_pieces
from passes.place.placement import (
    Degrees,
    ExpertCache,
    Mode,
    PhasePlan,
    Placed,
    PlacedKV,
    Placement,
    SessionPlan,
    TierPlan,
    span,
)
from runtime.eviction import DEFAULT_POLICY
from runtime.kv_books import GROUP
from runtime.manifest import Manifest, PieceInfo
from runtime.stream_plan import least_expert_bytes, live_bytes
from stratum.kv_plan import KVOnDisk, kv_limit, waits_for_kv
from stratum.process_account import CONTEXT_STEP, DoesNotFit, ProcessAccount, mib
from stratum.process_room import SLACK_BYTES, room_of
from stratum.stream_placement import MEMORY, model_name, part_of, parts_of_pieces, piece_name, recipe_of

UNIT = "cores"  # what the target `host` calls what computes
DRIVE = "disk"  # where nobody measured the drive, which has no name then
GROUPS = ("embedding", "attention", "mlp", "experts", "head")  # the order of entries
DEPTH = 2  # buffers of each stream: the piece in use, and the next
PROMPT, GENERATE = 512, 128  # of the session that a plan foretells, where nothing else is asked for


@dataclass(frozen=True)
class Kept:
    """What stays: dense pieces and tables by number, bytes of experts, of every layer of the KV cache all but the
    oldest `kv_old` groups of 64 positions; with calls of at most `tokens` tokens."""

    resident: tuple[int, ...]
    expert_bytes: int
    kv_old: int
    tokens: int
    gap: float = 0.0


def drive_of(artifact: Path) -> str:
    """The drive that an artifact lies on, as `host` names it."""
    from hw_targets.calibrate_disk import cached

    found = cached(artifact)
    return found.device if found is not None else DRIVE


def place_on_host(
    manifest: Manifest,
    budget: int,
    *,
    baseline: int,
    context: int | None = None,
    batch: int = 1,
    prompt: int | None = None,
    generate: int | None = None,
    policy: str | None = None,
    drive: str = DRIVE,
    kv_on_disk: bool = True,
    where: str = "",
) -> Placement:
    """The placement for a process that may use `budget` bytes and has `baseline` of them already.

    `batch`: sequences whose KV cache has room; `context`: positions of each, by default what takes an eighth of the
    budget. `policy` of the cache of experts: one of `runtime.eviction.POLICIES`, by default what no routing makes
    useless. Of a `context` that was asked for, a part of the cache may lie on the drive (`kv_on_disk`).
    """
    account = ProcessAccount(manifest, budget, baseline, batch)
    positions = context if context is not None else default_context(account)
    on_disk = kv_on_disk and context is not None
    kept = keep(manifest, budget, baseline, positions, batch, kv_on_disk=on_disk)
    if kept is None:
        raise _too_small(account, positions, where, kv_on_disk=on_disk)
    prompt = max(1, min(PROMPT, positions // 2)) if prompt is None else prompt
    generate = max(1, min(GENERATE if generate is None else generate, positions - prompt))
    session = SessionPlan(positions, batch, prompt, generate, kept.tokens, 1, DEPTH)
    groups, cache = _groups(manifest, kept, policy or DEFAULT_POLICY, drive)
    return Placement(
        model=model_name(manifest),
        target="host",
        recipe=recipe_of(manifest),
        dtype=manifest.dtype,
        session=session,
        degrees=Degrees(),
        groups=groups,
        kv=_kv(manifest, kept, positions, account.kv_bytes(positions), drive),
        decode=PhasePlan(0.0, "", ()),
        prefill=PhasePlan(0.0, "", ()),
        tiers=(TierPlan(MEMORY, room_of(budget)),),
        expert_cache=cache,
        gap=kept.gap,
    )


def keep(
    manifest: Manifest, budget: int, baseline: int, context: int, batch: int, *, kv_on_disk: bool = True
) -> Kept | None:
    """What stays, with the longest calls that fit; None where nothing does."""
    account = ProcessAccount(manifest, budget, baseline, batch)
    found = _longest(account, context, 0)
    if found is not None or not kv_on_disk or context > manifest.max_context or not waits_for_kv(manifest):
        return found
    on_disk, layers, whole = KVOnDisk(manifest, budget, baseline, batch), manifest.kv.layers, context // GROUP
    for ahead in (True, False):
        on_disk.kv_limit = kv_limit(manifest, context, batch, [whole] * layers, ahead=ahead)
        found = _longest(on_disk, context, whole)
        if found is not None:
            break
    if found is None:
        return None
    least, most = 0, whole  # groups that go: more of the cache stays, without a weight less
    while most - least > 1:
        middle = (least + most) // 2
        on_disk.kv_limit = kv_limit(manifest, context, batch, [middle] * layers)
        more = _fitting(on_disk, context, found.tokens, middle)
        if more is not None and (more.resident, more.expert_bytes) == (found.resident, found.expert_bytes):
            found, most = more, middle
        else:
            least = middle
    return found


def _longest(account: ProcessAccount, context: int, kv_old: int) -> Kept | None:
    tokens = max(program.max_tokens for program in account.manifest.programs)
    while tokens >= 1:
        found = _fitting(account, context, tokens, kv_old)
        if found is not None:
            return found
        tokens //= 2
    return None


def _fitting(account: ProcessAccount, context: int, tokens: int, kv_old: int) -> Kept | None:
    """What stays with calls of so many tokens, or None where it does not fit."""
    manifest = account.manifest
    pieces, rows = manifest.weights.pieces, account.rows_bytes(tokens)
    room, least = account.budget - account.other_bytes(context, tokens) - rows, least_expert_bytes(manifest)
    dense = {n: piece.bytes for n, piece in enumerate(pieces) if piece.kind == "dense"}

    def live(kept: frozenset[int]) -> int:
        return max(live_bytes(manifest, program, kept) for program in manifest.programs)

    found = choose_pieces(dense, room - least, live)
    if found is None:
        return None
    if found.window:
        return Kept(found.kept, least, kv_old, tokens, found.gap)
    left = room - sum(dense.values())
    experts = min(left, account.expert_bytes)
    tables = sum(account.sizes[n] for n in account.tables)
    resident = found.kept
    if tables and tables <= left - experts + rows:
        resident = tuple(sorted((*resident, *account.tables)))
    return Kept(resident, experts, kv_old, tokens)


def default_context(account: ProcessAccount) -> int:
    """Positions where none are asked for: what takes an eighth of the budget, or else the most that fit."""
    wanted = account.default_context()
    if _all_fits(account, wanted):
        return wanted
    return _largest_context(account, wanted) or min(CONTEXT_STEP, wanted)


def _all_fits(account: ProcessAccount, context: int) -> bool:
    return _fitting(account, context, 1, 0) is not None


def _largest_context(account: ProcessAccount, below: int) -> int:
    """The most positions less than `below` that fit with all of their cache in memory, in whole steps; 0 for none."""
    less, more = 0, -(-below // CONTEXT_STEP)
    while more - less > 1:
        middle = (less + more) // 2
        less, more = (middle, more) if _all_fits(account, middle * CONTEXT_STEP) else (less, middle)
    return less * CONTEXT_STEP


def _too_small(account: ProcessAccount, context: int, where: str, *, kv_on_disk: bool) -> DoesNotFit:
    """Why nothing fits: the least budget that does, and the largest context that does in this one."""
    manifest, baseline, slots = account.manifest, account.baseline, account.num_slots

    def fits(budget: int) -> bool:
        return keep(manifest, budget, baseline, context, slots, kv_on_disk=kv_on_disk) is not None

    low, high = account.budget, account.budget + 1
    while not fits(high):
        low, high = high, high * 2
    while high - low > 1 << 20:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    minimum, less = -(-high // (1 << 20)) * (1 << 20), _largest_context(account, context)
    kept = ""
    if kv_on_disk and context <= manifest.max_context and waits_for_kv(manifest):
        least = kv_limit(manifest, context, slots, [context // GROUP] * manifest.kv.layers, ahead=False)
        kept = f", of which {mib(least)} must be there" if least < account.kv_bytes(context) else ""
    parts = [
        f"{mib(baseline + SLACK_BYTES)} are the process itself, {mib(account.kv_bytes(context))} the KV cache{kept}"
    ]
    if less:
        parts.append(f"a context of {less} would fit: --context {less}")
    message = f"{mib(account.budget)} are too small for this model with a context of {context}"
    return DoesNotFit(message, minimum, where=where, hint="; ".join(parts), context=less)


# -- the same as entries of a plan -------------------------------------------------------------------------------------


def _groups(manifest: Manifest, kept: Kept, policy: str, drive: str) -> tuple[tuple[Placed, ...], ExpertCache | None]:
    """Entries for runs of layers that are kept alike; of a layer of which only some pieces stay, one for each kind."""
    pieces, stays = manifest.weights.pieces, frozenset(kept.resident)
    slots = _slots(manifest, kept.expert_bytes)

    def state(number: int) -> tuple[str, Mode, int]:
        piece = pieces[number]
        if piece.kind == "experts" and slots[number] < piece.count:
            return drive, "cached", slots[number]
        if piece.kind == "experts" or number in stays:
            return MEMORY, "resident", 0
        return drive, "resident" if piece.kind == "rows" else "streamed", 0  # rows are looked up where they lie

    parts: dict[tuple[str, int], dict[tuple[str, Mode, int], list[int]]] = {}
    for number, part in enumerate(parts_of_pieces(manifest)):
        if pieces[number].kind != "stand_ins":
            parts.setdefault(part, {}).setdefault(state(number), []).append(number)
    found: dict[tuple[str, tuple[str, Mode, int], str, str, int], tuple[list[int], int]] = {}
    for (group, layer), states in parts.items():
        for how, numbers in states.items():
            mine = [pieces[n] for n in numbers]
            nbytes, names = sum(piece.bytes for piece in mine), ""
            if len(states) > 1 and how[1] == "streamed":  # what stays is all the rest
                names = ",".join(piece_name(piece.origin) for piece in mine)
            key = group, how, names, _format(manifest, mine), nbytes if names else 0
            layers, before = found.get(key, ([], 0))
            found[key] = [*layers, layer], before + nbytes
    entries = [
        Placed(
            group, "" if layers[0] < 0 else span(tuple(layers)), tier, mode, UNIT, stored, nbytes, count, pieces=names
        )
        for (group, (tier, mode, count), names, stored, _), (layers, nbytes) in found.items()
    ]
    for part, number in _within(manifest, frozenset(parts)).items():  # kept as the piece that they are in
        tier, mode, count = state(number)
        layers = "" if part[1] < 0 else str(part[1])
        entries.append(Placed(part[0], layers, tier, mode, UNIT, _format(manifest, [pieces[number]]), 0, count))
    if ("embedding", -1) not in parts:  # its table lies within a dense piece, the first one
        tier = MEMORY if state(0)[1] == "resident" else drive
        entries.append(Placed("embedding", "", tier, "resident", UNIT, _format(manifest, [pieces[0]]), 0))
    entries.sort(key=lambda entry: GROUPS.index(entry.group))
    return tuple(entries), _cache(manifest, slots, policy)


def _within(manifest: Manifest, owners: frozenset[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Small parts of layers that lie within pieces of others, with the piece that has most of their bytes."""
    pieces = manifest.weights.pieces
    routed = {layer for group, layer in owners if group == "experts"}
    found: dict[tuple[str, int], dict[int, int]] = {}
    for tensor in manifest.weights.tensors:
        number = bisect.bisect_right(pieces, tensor.offset, key=lambda piece: piece.offset) - 1
        part = part_of(tensor.name, pieces[number].kind, routed)
        if pieces[number].kind == "dense" and part not in owners:
            within = found.setdefault(part, {})
            within[number] = within.get(number, 0) + tensor.bytes
    return {part: max(within, key=lambda n: within[n]) for part, within in found.items()}


def _slots(manifest: Manifest, expert_bytes: int) -> dict[int, int]:
    """Experts of each layer (by its piece) that so many bytes hold together, as evenly as can be."""
    layers = {n: piece for n, piece in enumerate(manifest.weights.pieces) if piece.kind == "experts"}
    if expert_bytes >= sum(piece.bytes for piece in layers.values()):
        return {n: piece.count for n, piece in layers.items()}
    slots, left = dict.fromkeys(layers, 0), expert_bytes
    fewest = [(0, n) for n in layers]
    while fewest:
        count, n = heapq.heappop(fewest)
        nbytes = layers[n].largest(count + 1) - layers[n].largest(count)  # where formats differ, largest first
        if count < layers[n].count and nbytes <= left:
            slots[n], left = count + 1, left - nbytes
            heapq.heappush(fewest, (count + 1, n))
    if expert_bytes - left < least_expert_bytes(manifest):  # one token's, in the layer where they are largest
        largest = max(layers, key=lambda n: layers[n].largest(manifest.experts_per_token))
        slots = dict.fromkeys(layers, 0) | {largest: min(layers[largest].count, manifest.experts_per_token)}
    return slots


def _cache(manifest: Manifest, slots: dict[int, int], policy: str) -> ExpertCache | None:
    pieces = manifest.weights.pieces
    if all(slots[n] == pieces[n].count for n in slots):
        return None
    nbytes = sum(pieces[n].largest(count) for n, count in slots.items())
    return ExpertCache(MEMORY, sum(slots.values()), nbytes, "global", policy, 0.0, "")


def _kv(manifest: Manifest, kept: Kept, context: int, nbytes: int, drive: str) -> tuple[PlacedKV, ...]:
    layers, whole = manifest.kv.layers, context // GROUP
    if not layers:
        return ()
    old = kept.kv_old * GROUP
    every = span(tuple(range(layers)))
    if kept.kv_old in (0, whole):
        tier = MEMORY if not kept.kv_old else drive
        return (PlacedKV(every, tier, UNIT, manifest.kv.format, nbytes),)
    there = nbytes * (context - old) // context
    return (
        PlacedKV(every, MEMORY, UNIT, manifest.kv.format, there, context - old),
        PlacedKV(every, drive, UNIT, manifest.kv.format, nbytes - there, old),
    )


def _format(manifest: Manifest, pieces: list[PieceInfo]) -> str:
    """The number format of the largest tensor of these pieces."""
    ends = [(piece.offset, piece.offset + piece.bytes) for piece in pieces]
    inside = [t for t in manifest.weights.tensors if any(a <= t.offset < b for a, b in ends)]
    return max(inside, key=lambda t: t.bytes).format if inside else manifest.dtype
