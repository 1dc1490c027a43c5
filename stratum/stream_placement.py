"""A placement -> what the runtime executes: which pieces of an artifact stay, what is streamed, the expert cache.

    made = stream_of_placement(manifest, placement, budget, baseline=resident_bytes(), where="plan.json")
    made.stream, made.context                 # runtime.stream_plan.StreamPlan, positions of the KV cache

A piece of the weights file belongs to the part of the plan that most of its bytes belong to: `resident` parts stay,
`streamed` ones are read at each use with as many pieces ahead as the plan has buffers (`depth`). The slots of `cached`
experts are one cache over all layers, or with the scope "layer" equal shares; with the scope "global" resident experts
are slots, too. The table of embeddings stays where the plan keeps it in memory, else its rows are read. Of keys and
values as many layers stay as the plan has in memory; which, the runtime chooses, so that the others lie evenly between.

Takes plans for this machine: one computing unit, everything at home in its memory or on a drive. Refuses, naming the
part, what the runtime does not do (parts on other units, split experts, micro-batches), plans of other models and
formats, and plans that do not fit the budget byte by byte (`DoesNotFit`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ir.diagnostics import DiagnosticError
from passes.place.placement import Placed, Placement, layer_numbers
from runtime.eviction import POLICIES
from runtime.manifest import Manifest
from runtime.stream_plan import DEFAULT_POLICY, StreamPlan, least_expert_bytes, live_bytes
from stratum.kv_plan import KVOnDisk, kv_limit, waits_for_kv
from stratum.memory_plan import AHEAD_BYTES, Accounts, DoesNotFit, MemoryPlan, mib
from stratum.process_account import baseline_bytes, budget_of_room

MEMORY = "dram"  # what the target `host` calls its memory; every other tier or storage is a place to read from
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Stays:
    """What a plan says of an artifact's pieces: dense ones and tables that stay, and how experts are kept."""

    resident: tuple[int, ...]
    expert_bytes: int
    scope: str
    policy: str


def read_placement(path: Path) -> Placement:
    """The plan of a file. DiagnosticError for what cannot be read or is none."""
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise DiagnosticError(f"the plan cannot be read: {fault.strerror}", where=str(path)) from None
    return Placement.from_json(data, str(path))


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
    num_slots: int = 1,
) -> MemoryPlan:
    """The plan of a file, for this artifact and process. Given options win over what the file says."""
    from runtime.artifact import open_artifact

    manifest, placement = open_artifact(artifact).manifest, read_placement(plan)
    if context is not None:
        placement = replace(placement, session=replace(placement.session, context=context))
    budget = budget_of(placement) if budget is None else budget
    made = stream_of_placement(
        manifest, placement, budget, baseline=baseline_bytes(manifest), where=str(plan), num_slots=num_slots
    )
    return made if policy is None else replace(made, stream=replace(made.stream, policy=policy))


def stream_of_placement(
    manifest: Manifest, placement: Placement, budget: int, *, baseline: int, where: str = "plan", num_slots: int = 1
) -> MemoryPlan:
    """The executable part of `placement` for this artifact in a process that has `baseline` bytes already.

    `num_slots`: sequences that the KV cache has room for.
    """
    check_placement(manifest, placement, where)
    stays = stays_of(manifest, placement, where)
    kept, context = frozenset(stays.resident), placement.session.context
    if not 0 < context <= manifest.max_context:
        raise DiagnosticError(
            f"the plan has a context of {context}", where=where, expected=f"1 to {manifest.max_context}, the model's"
        )
    accounts, limit = Accounts(manifest, budget, baseline, num_slots), None
    away = kv_away(manifest, placement, where)
    if away:
        accounts = KVOnDisk(manifest, budget, baseline, num_slots)
        accounts.kv_limit = limit = kv_limit(manifest, context, num_slots, manifest.kv.layers - away)
    live = max(live_bytes(manifest, program, kept) for program in manifest.programs)
    sizes = [piece.bytes for n, piece in enumerate(manifest.weights.pieces) if piece.kind == "dense" and n not in kept]
    wanted = min(max(live + AHEAD_BYTES, max(sizes, default=0) * max(1, placement.session.depth)), sum(sizes))
    held = sum(manifest.weights.pieces[n].bytes for n in stays.resident)
    tokens = min(placement.session.chunk, max(program.max_tokens for program in manifest.programs))
    while True:
        other = accounts.other_bytes(context, tokens)
        rows = 0 if all(n in kept for n in accounts.tables) else accounts.rows_bytes(tokens)
        left = budget - other - rows - held - stays.expert_bytes
        if left >= live or tokens == 1:
            break
        tokens //= 2
    if left < live:
        parts = {"the process": accounts.fixed, "KV cache": accounts.kv_bytes(context), "resident weights": held,
                 "experts": stays.expert_bytes, "streamed weights": live}  # fmt: skip
        raise DoesNotFit(
            f"the plan does not fit {mib(budget)}",
            budget + live - left,
            where=where,
            hint=", ".join(f"{mib(nbytes)} are {name}" for name, nbytes in parts.items() if nbytes),
        )
    short_tokens, short_bytes = accounts.short_steps(stays.expert_bytes, tokens)
    plan = StreamPlan(
        budget, stays.resident, min(left, wanted) if sizes else 0, stays.expert_bytes, rows, stays.scope, stays.policy,
        step_tokens=tokens, other_bytes=other, guesses=accounts.guesses(stays.expert_bytes),
        short_tokens=short_tokens, short_bytes=short_bytes,
    )  # fmt: skip
    plan.check(manifest)
    return MemoryPlan(plan, context, limit)


def kv_away(manifest: Manifest, placement: Placement, where: str) -> int:
    """Layers whose keys and values lie on a drive by the plan. DiagnosticError where they cannot."""
    there = [entry for entry in placement.kv if entry.tier != MEMORY]
    if there and not waits_for_kv(manifest):
        raise DiagnosticError(
            f"the plan keeps kv {there[0].layers} on {there[0].tier}", where=where, expected=f"kv in {MEMORY}",
            hint="the programs of this artifact do not wait for their cache: build it again",
        )  # fmt: skip
    layers = {layer for entry in there for layer in layer_numbers(entry.layers)}
    return min(len(layers), manifest.kv.layers)


def check_placement(manifest: Manifest, placement: Placement, where: str) -> None:
    """Raises DiagnosticError where the plan is for something else, or asks for what the runtime does not do."""
    name = manifest.model.get("name")
    if placement.model != name:
        raise DiagnosticError(
            f"the plan is for {placement.model}, the artifact is of {name}", where=where, expected="its own model"
        )
    if placement.target != "host":
        raise DiagnosticError(
            f"the plan is for {placement.target}, not for this machine", where=where, expected="--target host"
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
    resident: list[int] = []
    cached: list[tuple[Placed, int, int]] = []  # how a layer's experts are kept, how many there are, bytes of one
    for number, part in enumerate(parts_of_pieces(manifest)):
        piece = manifest.weights.pieces[number]
        if piece.kind == "stand_ins":
            continue  # copies of experts: read when they are asked for, or never
        entry = placed.get(part)
        if entry is None:
            group, layer = part
            raise DiagnosticError(
                f"the plan says nothing of {group} {layer if layer >= 0 else ''}".rstrip(), where=where
            )
        if piece.kind == "experts":
            cached.append((entry, piece.bytes // piece.unit, piece.unit))
        elif entry.mode == "resident" and entry.tier == MEMORY and (piece.kind != "rows" or entry.nbytes):
            resident.append(number)
    cache = placement.expert_cache
    scope, policy = (cache.scope, cache.policy) if cache is not None else ("global", DEFAULT_POLICY)
    if policy not in POLICIES:
        raise DiagnosticError(f"the plan's expert cache has the policy {policy!r}", where=where,
                              expected=", ".join(POLICIES))  # fmt: skip
    if scope == "layer" and len({(slots_of(entry, count), unit) for entry, count, unit in cached}) > 1:
        raise DiagnosticError(
            f"the plan gives {' and '.join(dict.fromkeys(_named(entry) for entry, _, _ in cached))} different slots",
            where=where, expected='equal slots in every layer, or the scope "global" of the expert cache',
        )  # fmt: skip
    expert_bytes = sum(slots_of(entry, count) * unit for entry, count, unit in cached)
    if cached and any(entry.mode == "streamed" for entry, _, _ in cached):
        expert_bytes = max(expert_bytes, least_expert_bytes(manifest) * placement.session.depth)
    least = least_expert_bytes(manifest) * (len(cached) if scope == "layer" else 1)
    if expert_bytes < least:
        raise DiagnosticError(
            f"the plan has {expert_bytes} bytes for {_named(cached[0][0])}", where=where,
            expected=f"at least {least}: slots for the experts of one token",
        )  # fmt: skip
    return Stays(tuple(resident), expert_bytes, scope, policy)


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


def recipe_of(manifest: Manifest) -> str:
    """The recipe of a build as plans name it: "" for floats throughout."""
    recipe = manifest.raw.get("recipe")
    return recipe if isinstance(recipe, str) and recipe != "none" else ""


def _layer(name: str) -> tuple[int, str] | None:
    match = _LAYER.search(name)
    return (int(match[1]), match[2]) if match is not None else None


def _by_part(placement: Placement) -> dict[tuple[str, int], Placed]:
    """The entry of every part; of two that name the same layer the first, as the planner reads them."""
    found: dict[tuple[str, int], Placed] = {}
    for group in placement.groups:
        for layer in layer_numbers(group.layers) if group.group not in ("embedding", "head") else (-1,):
            found.setdefault((group.group, layer), group)
    return found


def _named(group: Placed) -> str:
    return f"{group.group} {group.layers}".rstrip()


def _by(group: Placed) -> str:
    return " and ".join(dict.fromkeys(u for u in (group.unit, group.rest_unit, group.prefill_unit) if u))
