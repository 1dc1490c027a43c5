"""A placement -> what the runtime executes: which pieces of an artifact stay, what is streamed, the expert cache.

    made = stream_of_placement(manifest, placement, budget, baseline=baseline_bytes(manifest), where="plan.json")
    made.stream, made.context                 # runtime.stream_plan.StreamPlan, positions of the KV cache

A piece of the weights file belongs to the part of the plan that most of its bytes belong to, and to the entry that
names it, where one does: `resident` parts stay, `streamed` ones are read at each use with as many pieces ahead as the
plan has buffers (`depth`). The slots of `cached` experts are one cache over all layers, or with the scope "layer" equal
shares; with the scope "global" resident experts are slots, too. The table of embeddings stays where the plan keeps it
in memory, else its rows are read. Of keys and values as many positions stay as the plan has in memory, over all layers;
which, the runtime chooses (`runtime.kv_books`).

Takes plans for this machine: one computing unit, everything at home in its memory or on a drive. Refuses, naming the
part, what the runtime does not do (parts on other units, split experts, micro-batches), plans of other models and
formats, and plans that do not fit the budget byte by byte (`DoesNotFit`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ir.diagnostics import DiagnosticError
from passes.place.kv_formats import kv_mixed
from passes.place.piece_choice import AHEAD_BYTES
from passes.place.placement import Placed, Placement, layer_numbers
from runtime.eviction import DEFAULT_POLICY, POLICIES
from runtime.kv_books import GROUP
from runtime.manifest import Manifest, PieceInfo
from runtime.stream_plan import StreamPlan, least_expert_bytes, live_bytes
from stratum.kv_plan import KVOnDisk, kv_block_bytes, kv_limit, waits_for_kv
from stratum.plan_request import read_placement
from stratum.process_account import DoesNotFit, ProcessAccount, baseline_bytes, mib
from stratum.process_room import budget_of_room

MEMORY = "dram"  # what the target `host` calls its memory; every other tier or storage is a place to read from
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class MemoryPlan:
    """The stream plan, and the context that it has room for.

    `kv_bytes`: what the KV cache may take in memory, None for all of it. `placement` is the plan that it executes.
    """

    stream: StreamPlan
    context: int
    kv_bytes: int | None = None
    placement: Placement | None = None


@dataclass(frozen=True)
class Stays:
    """What a plan says of an artifact's pieces: dense ones and tables that stay, and how experts are kept."""

    resident: tuple[int, ...]
    expert_bytes: int
    scope: str
    policy: str
    pinned: tuple[tuple[int, int], ...] = ()


def budget_of(placement: Placement) -> int:
    """The budget of the whole process that a plan for this machine was made for: its memory and the process itself."""
    room = next((tier.capacity for tier in placement.tiers if tier.name == MEMORY), 0)
    return budget_of_room(room)


def stream_for(
    artifact: Path,
    plan: Path,
    budget: int | None = None,
    context: int | None = None,
    policy: str | None = None,
    num_slots: int | None = None,
) -> MemoryPlan:
    """The plan of a file, for this artifact and process. Given options win over what the file says; `num_slots` are
    sequences that the KV cache has room for, by default as many as the plan has."""
    from runtime.artifact import open_artifact

    manifest, placement = open_artifact(artifact).manifest, read_placement(plan)
    if context is not None:
        placement = replace(placement, session=replace(placement.session, context=context))
    budget = budget_of(placement) if budget is None else budget
    made = stream_of_placement(
        manifest, placement, budget, baseline=baseline_bytes(manifest), where=str(plan), num_slots=num_slots
    )
    return with_options(made, artifact, policy)


def with_options(made: MemoryPlan, artifact: Path, policy: str | None) -> MemoryPlan:
    """The plan with the policy that was asked for, and what the artifact's drive was measured to give."""
    stream = replace(made.stream, policy=policy or made.stream.policy, disk_bytes_per_s=disk_rate(artifact))
    return replace(made, stream=stream)


def disk_rate(artifact: Path) -> int:
    """Bytes a second that the artifact's drive keeps up, as it was measured; 0 where it never was."""
    from hw_targets.calibrate_disk import cached

    found = cached(artifact)
    return int(found.sustained_bandwidth) if found is not None else 0


def stream_of_placement(
    manifest: Manifest,
    placement: Placement,
    budget: int,
    *,
    baseline: int,
    where: str = "plan",
    num_slots: int | None = None,
) -> MemoryPlan:
    """The executable part of `placement` for this artifact in a process that has `baseline` bytes already.

    `num_slots`: sequences that the KV cache has room for; by default those of the plan.
    """
    check_placement(manifest, placement, where)
    stays = stays_of(manifest, placement, where)
    kept, context = frozenset(stays.resident), placement.session.context
    slots = placement.session.batch if num_slots is None else num_slots
    if not 0 < context <= manifest.max_context:
        raise DiagnosticError(
            f"the plan has a context of {context}", where=where, expected=f"1 to {manifest.max_context}, the model's"
        )
    account = ProcessAccount(manifest, budget, baseline, slots)
    old = kv_old(manifest, placement, where)
    on_disk = KVOnDisk(manifest, budget, baseline, slots) if any(old) else None
    if on_disk is not None:
        account = on_disk
        on_disk.kv_limit = kv_limit(manifest, context, slots, old)
    live = max(live_bytes(manifest, program, kept) for program in manifest.programs)
    sizes = [piece.bytes for n, piece in enumerate(manifest.weights.pieces) if piece.kind == "dense" and n not in kept]
    wanted = min(max(live + AHEAD_BYTES, max(sizes, default=0) * max(1, placement.session.depth)), sum(sizes))
    held = sum(manifest.weights.pieces[n].bytes for n in stays.resident)
    tokens = min(placement.session.chunk, max(program.max_tokens for program in manifest.programs))

    def left_by(tokens: int) -> int:
        rows = 0 if all(n in kept for n in account.tables) else account.rows_bytes(tokens)
        return budget - account.other_bytes(context, tokens) - rows - held - stays.expert_bytes

    if on_disk is not None and left_by(1) < live:
        on_disk.kv_limit = kv_limit(manifest, context, slots, old, ahead=False)
    while left_by(tokens) < live and tokens > 1:
        tokens //= 2
    left = left_by(tokens)
    if left < live:
        parts = {"the process": account.fixed, "KV cache": account.kv_bytes(context), "resident weights": held,
                 "experts": stays.expert_bytes, "streamed weights": live}  # fmt: skip
        raise DoesNotFit(
            f"the plan does not fit {mib(budget)}",
            budget + live - left,
            where=where,
            hint=", ".join(f"{mib(nbytes)} are {name}" for name, nbytes in parts.items() if nbytes),
        )
    window = min(left, wanted)
    if on_disk is not None:  # less than a block of every layer, which the plan does not count
        on_disk.kv_limit += min(left - window, kv_block_bytes(manifest, slots) - 1)
    experts = stays.expert_bytes
    if (
        experts < account.expert_bytes and stays.scope == "global"
    ):  # a part of one more: short steps have the rest of it
        experts += max(0, min(left - window, max(p.unit for p in manifest.weights.pieces if p.kind == "experts") - 1))
    short_tokens, short_bytes = account.short_steps(experts, tokens)
    plan = StreamPlan(
        budget, stays.resident, window, experts, account.rows_bytes(tokens), stays.scope, stays.policy,
        step_tokens=tokens, other_bytes=account.other_bytes(context, tokens),
        guesses=account.guesses(experts), short_tokens=short_tokens, short_bytes=short_bytes,
        kv_bytes=account.lent_kv_bytes(context) if experts < account.expert_bytes else 0, pinned=stays.pinned,
    )  # fmt: skip
    plan.check(manifest)
    placement = replace(placement, session=replace(placement.session, ahead=plan.guesses))
    return MemoryPlan(plan, context, on_disk.kv_limit if on_disk is not None else None, placement)


def kv_old(manifest: Manifest, placement: Placement, where: str) -> list[int]:
    """By layer, the groups of 64 positions, the oldest, whose keys and values lie on a drive by the plan.

    Of a divided layer as many positions stay as the plan says, also where its context is another. DiagnosticError where
    none can be elsewhere.
    """
    there = [entry for entry in placement.kv if entry.tier != MEMORY]
    if there and not waits_for_kv(manifest):
        raise DiagnosticError(
            f"the plan keeps kv {there[0].layers} on {there[0].tier}", where=where, expected=f"kv in {MEMORY}",
            hint="the programs of this artifact do not wait for their cache: build it again",
        )  # fmt: skip
    whole, old = placement.session.context // GROUP, [0] * manifest.kv.layers
    for entry in there:
        for layer in layer_numbers(entry.layers):
            if layer < len(old):
                old[layer] = min(whole, -(-entry.positions // GROUP)) if entry.positions else whole
    for entry in placement.kv:
        for layer in layer_numbers(entry.layers) if entry.tier == MEMORY and entry.positions else ():
            if layer < len(old) and old[layer]:
                old[layer] = max(0, whole - entry.positions // GROUP)
    return old


def check_placement(manifest: Manifest, placement: Placement, where: str) -> None:
    """Raises DiagnosticError where the plan is for something else, or asks for what the runtime does not do."""
    name = model_name(manifest)
    if placement.model != name:
        raise DiagnosticError(
            f"the plan is for {placement.model}, the artifact is of {name}", where=where, expected="its own model"
        )
    if placement.target != "host":
        raise DiagnosticError(
            f"the plan is for {placement.target}, not for this machine", where=where, expected="--target host"
        )
    if kv_mixed(placement):
        raise DiagnosticError(
            "the plan keeps caches in several formats", where=where, expected="one format: a model is built with one"
        )
    recipe = recipe_of(manifest)
    if (placement.recipe, placement.dtype) != (recipe, manifest.dtype):
        raise DiagnosticError(
            f"the plan is for {placement.recipe or placement.dtype}, "
            f"the artifact was built with {recipe or manifest.dtype}",
            where=where, expected="a build with the plan's --recipe and --dtype",
        )  # fmt: skip
    for what, value in (("micro-batches", placement.session.micro_batches), ("devices", placement.degrees.devices)):
        if value != 1:
            raise DiagnosticError(f"the plan has {value} {what}", where=where, expected="1: this machine has one unit")
    units = dict.fromkeys([g.unit for g in placement.groups] + [g.prefill_unit or g.unit for g in placement.groups])
    for group in placement.groups:
        if group.mode == "split" or group.rest_unit or len(units) > 1:
            raise DiagnosticError(
                f"the plan has {_named(group)} computed by {_by(group)}",
                where=where, expected="one unit that computes everything",
            )  # fmt: skip
        if group.mode == "resident" and group.tier != MEMORY and group.group != "embedding":
            raise DiagnosticError(
                f"the plan keeps {_named(group)} resident on {group.tier}",
                where=where, expected=f"resident in {MEMORY}, or streamed from {group.tier}",
            )  # fmt: skip


def stays_of(manifest: Manifest, placement: Placement, where: str = "plan") -> Stays:
    """What stays of the artifact's pieces. DiagnosticError naming the part that the plan forgets or cannot have so."""
    placed = _by_part(placement)
    _check_pieces(manifest, placement, where)
    resident: list[int] = []
    cached: list[tuple[Placed, PieceInfo]] = []  # how a layer's experts are kept
    for number, part in enumerate(parts_of_pieces(manifest)):
        piece = manifest.weights.pieces[number]
        if piece.kind == "stand_ins":
            continue  # copies of experts: read when they are asked for, or never
        entry = placed.get((*part, piece_name(piece.origin))) or placed.get((*part, ""))
        if entry is None:
            group, layer = part
            raise DiagnosticError(
                f"the plan says nothing of {group} {layer if layer >= 0 else ''}".rstrip(), where=where
            )
        if piece.kind == "experts":
            cached.append((entry, piece))
        elif entry.mode == "resident" and entry.tier == MEMORY and (piece.kind != "rows" or entry.nbytes):
            resident.append(number)
    cache = placement.expert_cache
    scope, policy = (cache.scope, cache.policy) if cache is not None else ("global", DEFAULT_POLICY)
    if policy not in POLICIES:
        raise DiagnosticError(f"the plan's expert cache has the policy {policy!r}", where=where,
                              expected=", ".join(POLICIES))  # fmt: skip
    if scope == "layer" and len({(slots_of(entry, piece.count), piece.unit) for entry, piece in cached}) > 1:
        raise DiagnosticError(
            f"the plan gives {' and '.join(dict.fromkeys(_named(entry) for entry, _ in cached))} different slots",
            where=where, expected='equal slots in every layer, or the scope "global" of the expert cache',
        )  # fmt: skip
    expert_bytes = sum(piece.largest(slots_of(entry, piece.count)) for entry, piece in cached)
    if cached and any(entry.mode == "streamed" for entry, _ in cached):
        expert_bytes = max(expert_bytes, least_expert_bytes(manifest) * placement.session.depth)
    least = least_expert_bytes(manifest) * (len(cached) if scope == "layer" else 1)
    if expert_bytes < least:
        raise DiagnosticError(
            f"the plan has {expert_bytes} bytes for {_named(cached[0][0])}", where=where,
            expected=f"at least {least}: slots for the experts of one token",
        )  # fmt: skip
    return Stays(tuple(resident), expert_bytes, scope, policy, cache.pinned if cache is not None else ())


def slots_of(entry: Placed, count: int) -> int:
    """Experts of a layer that its entry keeps in memory, of `count`."""
    return count if entry.mode == "resident" else min(entry.slots, count) if entry.mode == "cached" else 0


def parts_of_pieces(manifest: Manifest) -> tuple[tuple[str, int], ...]:
    """(group, layer) of every piece: what most of its bytes are; -1 for the embedding and the head."""
    routed = {
        found[0] for piece in manifest.weights.pieces if piece.kind == "experts" and (found := _layer(piece.origin))
    }
    tensors = sorted(manifest.weights.tensors, key=lambda t: t.offset)
    found = []
    at = 0
    for piece in manifest.weights.pieces:
        shares: dict[tuple[str, int], int] = {part_of(piece.origin, piece.kind, routed): 0}
        while at < len(tensors) and tensors[at].offset < piece.offset + piece.bytes:
            if piece.kind == "dense":
                part = part_of(tensors[at].name, piece.kind, routed)
                shares[part] = shares.get(part, 0) + tensors[at].bytes
            at += 1
        found.append(max(shares, key=lambda part: shares[part]))
    return tuple(found)


def part_of(name: str, kind: str, routed: set[int]) -> tuple[str, int]:
    """(group, layer) of a tensor. `routed`: layers with experts, where routers go with the attention."""
    if kind == "rows":
        return "embedding", -1
    layer = _layer(name)
    if layer is None:
        return "head", -1
    number, rest = layer
    if kind in ("experts", "stand_ins"):
        return "experts", number
    attention = "attn" in rest or rest.startswith("input_layernorm") or number in routed
    return ("attention" if attention else "mlp"), number


def model_name(manifest: Manifest) -> str:
    """The name of a build's model, "" where it has none."""
    name = manifest.model.get("name")
    return name if isinstance(name, str) else ""


def recipe_of(manifest: Manifest) -> str:
    """The recipe of a build as plans name it: "" for floats throughout."""
    recipe = manifest.raw.get("recipe")
    return recipe if isinstance(recipe, str) and recipe != "none" else ""


def _layer(name: str) -> tuple[int, str] | None:
    match = _LAYER.search(name)
    return (int(match[1]), match[2]) if match is not None else None


def piece_name(origin: str) -> str:
    """What entries of a plan call a piece of their layer: `mlp.down_proj`."""
    layer = _layer(origin)
    return layer[1] if layer is not None else origin


def _by_part(placement: Placement) -> dict[tuple[str, int, str], Placed]:
    """The entry of every part, and of every piece that one names ("": all others); of two that name the same the first,
    as the planner reads them."""
    found: dict[tuple[str, int, str], Placed] = {}
    for group in placement.groups:
        for layer in layer_numbers(group.layers) if group.group not in ("embedding", "head") else (-1,):
            for piece in group.pieces.split(","):
                found.setdefault((group.group, layer, piece), group)
    return found


def _check_pieces(manifest: Manifest, placement: Placement, where: str) -> None:
    """Raises DiagnosticError for an entry that names a piece which its layers do not have."""
    if not any(entry.pieces for entry in placement.groups):
        return
    known: dict[tuple[str, int], list[str]] = {}
    for piece, part in zip(manifest.weights.pieces, parts_of_pieces(manifest), strict=True):
        known.setdefault(part, []).append(piece_name(piece.origin))
    for group, layer, name in _by_part(placement):
        if name and name not in known.get((group, layer), ()):
            raise DiagnosticError(
                f"the plan names {name!r} of {group} {layer if layer >= 0 else ''}".rstrip(), where=where,
                expected=f"pieces of the artifact: {', '.join(known.get((group, layer), ())) or 'there are none'}",
            )  # fmt: skip


def _named(group: Placed) -> str:
    return f"{group.group} {group.layers} {group.pieces}".rstrip()


def _by(group: Placed) -> str:
    return " and ".join(dict.fromkeys(u for u in (group.unit, group.rest_unit, group.prefill_unit) if u))
