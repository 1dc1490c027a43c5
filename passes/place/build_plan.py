"""From a choice of options to a plan with numbered layers, and from a plan back to a choice.

    placement = to_placement(problem, choice, outcome)
    choice = from_placement(problem, placement)        # also of a plan that a user edited

Equal layers are interchangeable to the solver. Here the first ones go to the first unit, so that activations cross
between units as seldom as possible, and those whose weights are streamed stand evenly among those that stay, so that
there is always something to compute while the next one arrives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from hw_targets.energy import energy
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.expert_entries import expert_entries, said_of, stored_as
from passes.place.expert_options import option_with
from passes.place.format_menu import quality_of, uniform_quality
from passes.place.kv_division import divided, is_near
from passes.place.kv_losses import kv_quality, kv_text
from passes.place.kv_parts import kv_parts
from passes.place.machine import machine_of
from passes.place.option import CACHED, RESIDENT, SPLIT, THERE, Option, blended
from passes.place.options import options_of
from passes.place.outcome import Choice, Outcome, PhaseOutcome, by_part
from passes.place.parallel import Spread
from passes.place.parts import Part, parts_of
from passes.place.placement import (
    Degrees,
    ExpertCache,
    Mode,
    PhasePlan,
    Placed,
    PlacedExperts,
    PlacedKV,
    Placement,
    QualityPlan,
    Resource,
    SessionPlan,
    TierPlan,
    layer_numbers,
    span,
)
from passes.place.problem import Problem, Session


def to_placement(
    problem: Problem, choice: Choice, outcome: Outcome, *, degrees: Degrees | None = None, threshold: bool = True
) -> Placement:
    """The plan of a choice; without its `threshold` of prompts where it is one of many and may not be taken."""
    groups, experts = groups_of(problem, choice), experts_of(problem, choice)
    kv: list[PlacedKV] = []
    for found in by_part(choice).values():
        for option, layers in numbered(problem, found):
            for part in reversed(kv_parts(problem, option)) if option.kv_home else ():
                held = problem.session.batch * part.positions * part.row_bytes * len(layers)
                at = part.positions if option.kv_old else 0
                kv.append(PlacedKV(span(layers), part.home, part.unit, part.format, held, at))
    return Placement(
        model=problem.shape.name,
        target=problem.machine.target.name,
        recipe=problem.formats.name,
        dtype=problem.formats.float_format,
        session=session_plan(problem.session),
        degrees=degrees or Degrees(),
        groups=groups,
        kv=tuple(kv),
        decode=phase_plan(outcome.decode),
        prefill=phase_plan(outcome.prefill),
        tiers=tuple(TierPlan(t.name, t.room, **dict(t.used)) for t in outcome.tiers),
        expert_cache=expert_cache_of(choice),
        prefill_threshold=prefill_threshold(problem, choice) if threshold else None,
        joules_per_token=joules(problem, choice, outcome.decode),
        quality=quality_plan(problem, groups, experts),
        expert_formats=experts,
        kv_quality=kv_quality(problem, choice),
    )


def groups_of(problem: Problem, choice: Choice) -> tuple[Placed, ...]:
    """The entries of a choice, with numbered layers."""
    groups: list[Placed] = []
    for found in by_part(choice).values():
        for option, layers in numbered(problem, found):
            part, count = option.part, len(layers) or 1
            nbytes = sum(n for _, category, n in option.holds if category == "weights") * count
            at_prefill = option.prefill_unit if option.prefill_unit != option.unit else ""
            groups.append(
                Placed(
                    part.group, span(layers), option.home, _mode(option), option.unit, part.format, nbytes,
                    option.slots, option.helper, at_prefill, part.recipe, option.missed,
                )
            )  # fmt: skip
    return tuple(groups)


def experts_of(problem: Problem, choice: Choice) -> tuple[PlacedExperts, ...]:
    """The formats of single experts of a choice."""
    stored = [way for found in by_part(choice).values() for way in numbered(problem, found)]
    return expert_entries([(option.part, layers) for option, layers in stored])


def quality_plan(
    problem: Problem, groups: tuple[Placed, ...], experts: tuple[PlacedExperts, ...] = ()
) -> QualityPlan | None:
    """What the formats of a plan lose, and what bounds that; None where nothing was chosen."""
    menu = problem.menu
    if menu is None:
        return None
    taken, said = [], said_of(problem, experts)
    for ways in problem.variants():
        for entry in groups:
            layers = tuple(i for i in layer_numbers(entry.layers) if i in ways[0].layers)
            if entry.group == ways[0].group and (layers or not ways[0].layers):
                taken += stored_as(problem, ways, entry, layers, said)
    found = quality_of(taken)
    asked = uniform_quality(menu, problem.shape, menu.names[0])
    return QualityPlan(
        menu.names, found.loss, found.bits, asked.loss, menu.losses.source, menu.most_loss, menu.least_bits,
        menu.uses_source,
    )  # fmt: skip


def numbered(problem: Problem, found: list[tuple[Option, int]]) -> list[tuple[Option, tuple[int, ...]]]:
    """Which layers of a part take which of its options."""
    part = found[0][0].part
    if not part.layers:
        return [(option, ()) for option, _ in found]
    order = {unit.name: i for i, unit in enumerate(problem.machine.units)}
    by_unit: dict[str, list[tuple[Option, int]]] = {}
    for option, count in sorted(found, key=lambda item: order.get(item[0].unit, 0)):
        by_unit.setdefault(option.unit, []).append((option, count))
    layers = iter(part.layers)
    taken: dict[int, list[int]] = {}
    for options in by_unit.values():
        for at in _even([count for _, count in options]):
            taken.setdefault(id(options[at][0]), []).append(next(layers))
    spread = [(option, tuple(taken[id(option)])) for options in by_unit.values() for option, _ in options]
    return sensitive_first(spread)


def sensitive_first(spread: list[tuple[Option, tuple[int, ...]]]) -> list[tuple[Option, tuple[int, ...]]]:
    """Layers exchanged between options that differ in format alone: the widest for those that lose most."""
    alike: dict[str, list[int]] = {}
    for at, (option, _) in enumerate(spread):
        alike.setdefault(option.label, []).append(at)
    found = list(spread)
    for group in alike.values():
        if len(group) < 2 or not spread[group[0]][0].part.losses:
            continue
        wide_first = sorted(group, key=lambda at: -spread[at][0].part.nbytes)
        narrow = spread[wide_first[-1]][0].part
        loses = dict(zip(narrow.layers, narrow.losses, strict=True))
        left = sorted((i for at in group for i in spread[at][1]), key=lambda i: (-loses[i], i))
        if len({loses[i] for i in left}) == 1:
            continue  # alike in that, too: they stay spread evenly
        for at in wide_first:
            count = len(spread[at][1])
            found[at] = (spread[at][0], tuple(sorted(left[:count])))
            left = left[count:]
    return found


def _even(counts: list[int]) -> Iterable[int]:
    """Indices such that i comes counts[i] times, each spread evenly over the whole."""
    total, credit = sum(counts), [0.0] * len(counts)
    left = list(counts)
    for _ in range(total):
        credit = [c + n / total for c, n in zip(credit, counts, strict=True)]
        at = max((i for i in range(len(counts)) if left[i]), key=lambda i: credit[i])
        credit[at] -= 1.0
        left[at] -= 1
        yield at


def from_placement(problem: Problem, placement: Placement) -> Choice:
    """The choice that the entries of a plan describe; DiagnosticError for what this machine or model cannot do."""
    found: list[tuple[Option, int]] = []
    said = said_of(problem, placement.expert_formats)
    places: dict[int, tuple[PlacedKV, ...]] = {}
    for entry in placement.kv:
        for layer in layer_numbers(entry.layers):
            places[layer] = (*places.get(layer, ()), entry)
    for ways in problem.variants():
        part = ways[0]
        named = _entries(placement, part)
        runs: dict[tuple[tuple[int, ...], tuple[_KVPlace, ...]], list[int]] = {}
        for layer in (*part.layers,) or (-1,):
            mine = places.get(layer, ()) if part.group == "attention" else ()
            kv = tuple((e.tier, e.unit, e.positions, kv_text(problem, e.format)) for e in mine)
            if layer in named:
                alike = tuple(id(entry) for entry, _ in named[layer])
                runs.setdefault((alike, kv), []).append(layer)
        for (_, kv), layers in runs.items():
            numbers = layers if part.layers else []
            entries = [(stored_as(problem, ways, e, numbers, said), e, share) for e, share in named[layers[0]]]
            if len(entries) > 1:
                options = [(_option(problem, stored[0][0], entry, kv), share) for stored, entry, share in entries]
                found.append((blended(options), len(layers)))
            else:
                stored, entry, _ = entries[0]
                found += [(_option(problem, way, entry, kv), len(mine) or 1) for way, mine in stored]
        missing = tuple(layer for layer in (*part.layers,) or (-1,) if layer not in named)
        if missing and (part.nbytes or part.group != "embedding"):
            raise DiagnosticError(f"the plan says nothing of {part.group} {span(missing)}".replace(" -1", ""))
    return tuple(found)


def _entries(placement: Placement, part: Part) -> dict[int, list[tuple[Placed, float]]]:
    """Of each layer of a part (-1 where it has none) the entries that name it, with the shares of its bytes that they
    have: those of single pieces, and the first one for all others."""
    found: dict[int, list[tuple[Placed, float]]] = {}
    rest: dict[int, Placed] = {}
    for entry in placement.groups:
        layers = layer_numbers(entry.layers) if part.layers else [-1]
        for layer in layers if entry.group == part.group else ():
            mine = found.setdefault(layer, [])
            left = 1.0 - sum(share for _, share in mine)
            if not entry.pieces:
                rest.setdefault(layer, entry)
            elif all(entry.pieces != other.pieces for other, _ in mine):
                mine.append((entry, min(left, entry.nbytes / len(layers) / max(1, part.nbytes))))
    for layer, entry in rest.items():
        left = 1.0 - sum(share for _, share in found[layer])
        if left > 0 or not found[layer]:
            found[layer].append((entry, left))
    return {layer: mine for layer, mine in found.items() if mine}


_KVPlace = tuple[str, str, int, str]  # tier, unit, positions (0: all), format ("": that of the recipe)


def _option(problem: Problem, part: Part, entry: Placed, kv: tuple[_KVPlace, ...]) -> Option:
    if entry.mode in (CACHED, SPLIT):
        option = option_with(
            problem, part, entry.mode, entry.unit, entry.tier, max(1, entry.slots), entry.rest_unit, entry.missed
        )
        if option is not None:
            return option
    ways = options_of(problem, part)
    wanted = [(tier, at, format) for tier, at, _, format in kv] or [("", "", "")]
    found: list[Option] = []
    for option in ways:
        same = (option.home, option.mode, option.unit) == (entry.tier, entry.mode, entry.unit)
        if part.group == "embedding":
            same = option.home == entry.tier
        else:
            same = same and option.prefill_unit == (entry.prefill_unit or entry.unit)
        if same and option.cache in wanted and not option.slots:
            found.append(option)
    if len(kv) > 1 and any(positions for _, _, positions, _ in kv):
        option = _divided(problem, part, entry, kv, found)
        if option is not None:
            return option
    elif found:
        return found[-1] if len(found) == 1 else next(o for o in found if o.cache == wanted[-1])
    tail = "".join(f", its cache at {tier} attended to by {unit}" for tier, unit, *_ in kv)
    raise DiagnosticError(
        f"the plan puts {entry.group} {entry.layers} at {entry.tier}, {entry.mode}, computed by {entry.unit}{tail}: "
        f"target {problem.machine.target.name} has no such way",
        expected="one of: " + "; ".join(dict.fromkeys(o.label for o in ways[:12])),
    )


def _divided(
    problem: Problem, part: Part, entry: Placed, kv: tuple[_KVPlace, ...], found: list[Option]
) -> Option | None:
    """The way with a divided cache; None where the newest positions do not lie where attention is computed. Of a layer
    with a window, whose older positions nothing reads, the two places may have the whole context."""
    assert part.layer is not None
    context = problem.session.context
    whole, said = part.layer.kv_tokens(context), {place[:2]: place[2] for place in kv}
    positions = " and ".join(str(place[2]) for place in kv)
    if len(kv) != 2 or len(said) != 2 or sum(said.values()) not in (whole, context) or min(said.values()) <= 0:
        raise DiagnosticError(
            f"the plan divides the cache of layers {entry.layers}: {positions} positions",
            expected=f"two places with {whole} positions together, what the context of the plan takes",
        )
    near = next((o for o in found if is_near(problem, o)), None)
    away = next((o for o in found if o is not near), None)
    if near is None or away is None or away.kv_home == near.kv_home:
        return None
    old = whole - said[near.kv_home, near.kv_unit]
    return divided(problem, near, away, old) if old > 0 else near


def spread_placement(problem: Problem, spread: Spread, target: Target, unit_name: str, tier: str) -> Placement:
    """The plan of devices that keep everything in their own memory; bytes of the groups are of all devices together."""
    groups, kv = [], []
    session = problem.session
    for part in parts_of(problem.shape, problem.formats):
        layers = span(part.layers)
        groups.append(Placed(part.group, layers, tier, RESIDENT, unit_name, part.format, part.nbytes * part.count))
        if part.layer is not None and part.kv_bytes_per_token:
            held = spread.batch * part.layer.kv_tokens(session.context) * part.kv_bytes_per_token * part.count
            kv.append(PlacedKV(layers, tier, unit_name, problem.formats.kv_name, held))
    tiers = (TierPlan(tier, spread.room, **dict(spread.holds)),)
    plan = SessionPlan(
        session.context, spread.batch, session.prompt, session.generate, session.chunk,
        min(spread.degrees.pipeline, math.ceil(spread.batch / spread.degrees.data)), session.depth,
    )  # fmt: skip
    return Placement(
        model=problem.shape.name, target=target.name, recipe=problem.formats.name, dtype=problem.formats.float_format,
        session=plan, degrees=spread.degrees, groups=tuple(groups), kv=tuple(kv), decode=phase_plan(spread.decode),
        prefill=phase_plan(spread.prefill), tiers=tiers,
        joules_per_token=_joules_of_devices(target, unit_name, spread),
    )  # fmt: skip


def session_plan(session: Session) -> SessionPlan:
    return SessionPlan(
        session.context, session.batch, session.prompt, session.generate, session.chunk, session.micro_batches,
        session.depth, session.ahead,
    )  # fmt: skip


def phase_plan(phase: PhaseOutcome) -> PhasePlan:
    return PhasePlan(phase.seconds, phase.bound, tuple(Resource(name, s) for name, s in phase.busy))


def joules(problem: Problem, choice: Choice, decode: PhaseOutcome, seconds: float | None = None) -> float | None:
    """Energy of a token where the target states power; `seconds`: of a step, where not those of the closed form."""
    taking_part = {
        unit
        for option, count in choice
        if count and option.part.group != "embedding"
        for unit in (option.unit, option.kv_unit, option.old_unit, option.helper)
    }
    node = dataclasses.replace(problem.machine.target, nodes=1)  # plans of tiers are of one node
    step = decode.seconds if seconds is None else seconds
    found = energy(node, step, dict(decode.busy), taking_part)
    return None if found is None else found / problem.session.batch


def _joules_of_devices(target: Target, unit: str, spread: Spread) -> float | None:
    """Energy of a token where all devices of all nodes work."""
    one = machine_of(target, tensor=1).target
    found = energy(one, spread.decode.seconds, dict(spread.decode.busy), [unit])
    devices = 1 if target.power_watts is not None else spread.degrees.devices
    return None if found is None else found * devices / spread.batch


def _mode(option: Option) -> Mode:
    assert option.mode in ("resident", "streamed", "cached", "split")
    return option.mode


def expert_cache_of(choice: Choice) -> ExpertCache | None:
    """The slots of all layers, with the hits expected of them; None where nothing is cached."""
    cached = [(o, n) for o, n in choice if o.mode == CACHED]
    if not cached:
        return None
    slots = sum(o.slots * n for o, n in cached)
    layers = sum(n for _, n in cached)
    tiers = dict.fromkeys(t for o, _ in cached for t, category, _ in o.holds if category == "cache")
    nbytes = sum(n * b for o, n in cached for _, category, b in o.holds if category == "cache")
    rate = sum(o.hit * n for o, n in cached) / layers
    return ExpertCache("+".join(tiers), slots, nbytes, "layer", "lru", rate, "synthetic session, Zipf 1.4")


def prefill_threshold(problem: Problem, choice: Choice) -> int | None:
    """Tokens of a prompt from which it is faster to move the experts (or MLP) of slow units than to compute there: of
    those that lie by such a unit, and of those that a cache lacks and a helper may compute."""
    for option in (o for o, _ in choice if o.part.group in ("mlp", "experts") and o.part.layers):
        tokens = 1
        while tokens <= 1 << 16:
            session = dataclasses.replace(problem.session, prompt=tokens, chunk=tokens)
            ways = prompt_ways(dataclasses.replace(problem, session=session, pins=()), option)
            if ways is None:
                break
            stays, moved = (max(o.prefill.waited, max(o.prefill.streams.values(), default=0.0)) for o in ways)
            if moved < stays:
                return tokens
            tokens *= 2
    return None


def prompt_ways(problem: Problem, option: Option) -> tuple[Option, Option] | None:
    """Computed where it lies and moved for a prompt, the placement being the same; None where there is no choice."""
    part = option.part
    if option.mode == CACHED and option.helper:
        given = problem, part, CACHED, option.unit, option.home, option.slots
        there, moved = option_with(*given, option.helper, THERE), option_with(*given)
        return (there, moved) if there is not None and moved is not None else None
    if option.mode != RESIDENT:
        return None
    alike = [
        o for o in options_of(problem, part) if (o.unit, o.home, o.mode) == (option.unit, option.home, option.mode)
    ]
    if len(alike) < 2:
        return None
    return alike[0], min(alike[1:], key=lambda o: max(o.prefill.waited, max(o.prefill.streams.values(), default=0.0)))
