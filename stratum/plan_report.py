"""A plan as text: what lies where, how long phases take and why, what would help.

`plan_text(planned)` gives lines for people; programs read `Placement.to_json`. Every figure shown is one of the plan's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from passes.place.outcome import CATEGORIES
from passes.place.placement import RIGHT_GUESSES, PhasePlan, Placed, PlacedKV, Placement, layer_numbers, span
from passes.quantize.expert_ranges import read_ranges
from stratum.plan_kv import kv_lines
from stratum.planned import Planned
from stratum.progress import format_bytes, format_count

_SHOWN_RESOURCES = 6
_SHOWN_GAINS = 6


def plan_text(planned: Planned) -> str:
    """The report of a plan."""
    plan = planned.placement
    lines = [*_head(planned), *_quality(plan), *kv_lines(plan), "", *_phases(plan), "", *_tiers(plan), ""]
    lines += [*_groups(plan), *_schedule(plan), *_chunks(planned), *_threshold(plan)]
    if plan.expert_cache is not None:
        lines += ["", *_cache(planned)]
    lines += _stand_ins(plan)
    if planned.gains:
        lines += ["", *_gains(planned)]
    lines += [f"warning: {text}" for text in planned.warnings]
    return "\n".join(lines)


def _chunks(planned: Planned) -> list[str]:
    """How many tokens of a prompt pass at once, and what others would take, where several were simulated."""
    if not planned.chunks:
        return []
    tried = ", ".join(
        f"{chunk}: {seconds_text(prompt)}, {seconds_text(step)} a step" for chunk, prompt, step in planned.chunks
    )
    return [f"prompts pass in chunks of {planned.placement.session.chunk} tokens (simulated with {tried})"]


def _schedule(plan: Placement) -> list[str]:
    """How far ahead weights and experts are brought, how many micro-batches share a piece, and what else was tried."""
    session = plan.session
    lines = []
    if session.ahead:
        lines.append(
            f"of a layer's missing experts up to {session.ahead} are asked for before, by its router on the input of "
            f"the layer in front ({RIGHT_GUESSES:.0%} of such guesses come true: assumed, as measured on olmoe-1b-7b)"
        )
    if not plan.schedules:
        return lines
    turns = f", each for {session.micro_batches} micro-batches in turn" if session.micro_batches > 1 else ""
    many = len({tried.micro_batches for tried in plan.schedules}) > 1
    guessed = any(tried.ahead for tried in plan.schedules)
    others = []
    for tried in plan.schedules:
        what = f"{tried.depth}" + (f" x {tried.micro_batches}" if many else "")
        what += f" + {tried.ahead}" if guessed else ""
        prompt = f"{seconds_text(tried.prompt_seconds)}, " if tried.prompt_seconds is not None else ""
        others.append(f"{what}: {prompt}{seconds_text(tried.step_seconds)} a step")
    kinds = " pieces" + (" x micro-batches" if many else "") + (" + experts guessed" if guessed else "")
    simulated = f" (simulated with{kinds if many or guessed else ''} {', '.join(others)})" if len(others) > 1 else ""
    pieces = f"streams keep {session.depth} pieces in memory, {session.depth - 1} of them on their way"
    return [f"{pieces}{turns}{simulated}", *lines]


def _threshold(plan: Placement) -> list[str]:
    """From how many tokens on prompts are passed by the faster unit, as simulated and in closed form."""
    tokens, bound = plan.prefill_threshold, plan.prefill_threshold_bound
    if tokens is None and bound is None:
        return []
    if tokens is None:
        return [
            f"moving weights to the faster unit pays for no prompt that was simulated (closed form: {bound} tokens)"
        ]
    told = f" (closed form: {bound})" if bound is not None else ""
    return [f"prompts of {tokens} tokens or more{told} move weights to the faster unit to pass there"]


def _head(planned: Planned) -> list[str]:
    plan, shape = planned.placement, planned.shape
    parameters, active = shape.parameters(), shape.active_parameters()
    size = format_count(parameters)
    if shape.moe_layers:
        size += f" parameters, {format_count(active)} active"
    else:
        size += " parameters"
    weights = sum(g.nbytes for g in plan.groups)
    bits = 8 * weights / parameters
    formats = f"recipe {plan.recipe}" if plan.recipe else plan.dtype
    session = plan.session
    lines = [
        f"{plan.model}: {size}, {format_bytes(weights)} in {formats} ({bits:.2f} bits a weight)",
        f"{plan.target}: context {session.context}, batch {session.batch}, prompts of {session.prompt} tokens",
    ]
    degrees = plan.degrees
    if degrees.devices > 1:
        experts = f", experts on {degrees.expert}" if degrees.expert > 1 else ""
        lines.append(
            f"{degrees.devices} devices: products cut {_counted(degrees.tensor, 'way')}, "
            f"{_counted(degrees.pipeline, 'stage')}, {_counted(degrees.data, 'copy')}{experts}, vocabulary cut "
            f"{_counted(degrees.vocabulary, 'way')}"
        )
    elif session.micro_batches > 1:
        lines.append(f"{session.micro_batches} micro-batches take turns")
    return lines


def _counted(count: int, what: str) -> str:
    """`1 way`, `8 ways`, `2 copies`."""
    many = what.removesuffix("y") + "ies" if what.endswith("py") else f"{what}s"
    return f"{count} {what if count == 1 else many}"


def _quality(plan: Placement) -> list[str]:
    """What formats were chosen among, and what that costs."""
    found = plan.quality
    if found is None:
        return []
    bound = [f"at most {found.most_loss:.4g}"] if found.most_loss is not None else []
    bound += [f"at least {found.least_bits:g} bits"] if found.least_bits is not None else []
    names = ", ".join(name or plan.dtype for name in found.formats)
    return [
        f"formats chosen among {names}: loss {found.loss:.4g} ({found.source}; {found.formats[0] or plan.dtype} "
        f"throughout {found.asked:.4g}), {found.bits:.3g} bits a weight of products"
        + (f"; {' and '.join(bound)}" if bound else ""),
        *_expert_formats(plan),
    ]


def _expert_formats(plan: Placement) -> list[str]:
    """How many experts of how many layers differ from the others of their layer."""
    layers: dict[str, list[int]] = {}
    for entry in plan.expert_formats:
        counts = layers.setdefault(entry.recipe or plan.dtype, [])
        count = sum(last - first + 1 for first, last in read_ranges(entry.experts) or ())
        counts += [count] * len(layer_numbers(entry.layers))
    return [
        f"experts by how often they are picked ({plan.quality.uses}): {_between(counts)} of a layer in {recipe}, "
        f"in {_counted(len(counts), 'layer')}"
        for recipe, counts in layers.items()
        if plan.quality is not None
    ]


def _between(counts: Sequence[int]) -> str:
    """`4 to 32`, or `8` where all are alike."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _phases(plan: Placement) -> list[str]:
    session = plan.session
    rate = f"{plan.tokens_per_second:.4g} tok/s"
    energy = f", {plan.joules_per_token:.3g} J a token" if plan.joules_per_token is not None else ""
    lines = [
        f"decode   {_both(plan.decode, plan.simulated_step)} a step = {rate}, bound by {plan.decode.bound}{energy}",
        f"prefill  {_both(plan.prefill, plan.simulated_prefill)} for {session.prompt} tokens, "
        f"bound by {plan.simulated_prefill_bound or plan.prefill.bound}",
        "",
    ]
    rows: list[Sequence[str]] = [("time by resource", "decode", "prefill")]
    decode, prefill = _by_name(plan.decode), _by_name(plan.prefill)
    names = sorted(
        dict.fromkeys((*decode, *prefill)),
        key=lambda n: -max(_share(decode, n, plan.decode), _share(prefill, n, plan.prefill)),
    )
    for name in names[:_SHOWN_RESOURCES]:
        rows.append(
            (name, *(_busy(found, name, phase) for found, phase in ((decode, plan.decode), (prefill, plan.prefill))))
        )
    return lines + table(rows)


def _both(phase: PhasePlan, simulated: float | None) -> str:
    """The simulated seconds, and the bound where the two differ."""
    bound = seconds_text(phase.seconds)
    if simulated is None or abs(simulated - phase.seconds) <= 0.005 * phase.seconds:
        return bound
    return f"{seconds_text(simulated)} (simulated; in closed form {bound})"


def _by_name(phase: PhasePlan) -> dict[str, float]:
    return {r.name: r.seconds for r in phase.resources}


def _share(found: dict[str, float], name: str, phase: PhasePlan) -> float:
    return found.get(name, 0.0) / phase.seconds if phase.seconds else 0.0


def _busy(found: dict[str, float], name: str, phase: PhasePlan) -> str:
    if name not in found:
        return "-"
    return f"{seconds_text(found[name])} ({_share(found, name, phase):.0%})"


def _tiers(plan: Placement) -> list[str]:
    each = " of each device" if plan.degrees.devices > 1 else ""
    rows: list[Sequence[str]] = [(f"memory{each}", *CATEGORIES, "peak", "of")]
    for tier in plan.tiers:
        cells = [format_bytes(getattr(tier, c)) if getattr(tier, c) else "-" for c in CATEGORIES]
        capacity = format_bytes(tier.capacity) if tier.capacity < 1 << 59 else "no limit"
        rows.append((tier.name, *cells, format_bytes(tier.peak), capacity))
    return table(rows)


def _groups(plan: Placement) -> list[str]:
    rows = [("what", "layers", "where", "computed by", "bytes", "format")]
    merged: dict[tuple[str, str, str, str], list[Placed]] = {}
    for group in plan.groups:
        if group.nbytes:
            merged.setdefault((_what(group), _where(group), _by(group), group.format), []).append(group)
    for (name, where, by, format), found in merged.items():
        size = format_bytes(sum(g.nbytes for g in found))
        rows.append((name, shortened(_joined(g.layers for g in found)), where, by, size, format))
    kv: dict[tuple[str, str, str, int], list[PlacedKV]] = {}
    for entry in plan.kv:
        kv.setdefault((entry.tier, entry.unit, entry.format, entry.positions), []).append(entry)
    for (tier, unit, format, positions), entries in kv.items():
        size = format_bytes(sum(e.nbytes for e in entries))
        where = f"{tier}, {positions} positions" if positions else tier
        rows.append(("kv", shortened(_joined(e.layers for e in entries)), where, unit, size, format))
    return [*table(rows), *_kv_shares(plan)]


def _kv_shares(plan: Placement) -> list[str]:
    """How much of the keys and values lies where, where that is more than one place."""
    places: dict[str, int] = {}
    for entry in plan.kv:
        places[entry.tier] = places.get(entry.tier, 0) + entry.nbytes
    total = sum(places.values())
    if len(places) < 2 or not total:
        return []
    shares = ", ".join(f"{100 * nbytes / total:.0f} % {tier}" for tier, nbytes in places.items())
    if plan.decode_at_context is None:
        return [f"KV {shares}"]
    filled = f"a step with {plan.session.context} in use takes at least {seconds_text(plan.decode_at_context)}"
    return [f"KV {shares}; of divided layers the newest positions lie where attention is computed; {filled}"]


def _stand_ins(plan: Placement) -> list[str]:
    """What copies of experts in fewer bits would buy."""
    use = plan.stand_ins
    if use is None:
        return []
    now = plan.simulated_step or plan.decode.seconds
    return [
        "",
        f"stand-ins for missing experts of less than {use.share:g} of a token's weight ({use.source}):",
        f"  {use.used:.1%} of the experts asked for; a step {seconds_text(use.step_seconds)} instead of "
        f"{seconds_text(now)}, {use.read_bytes / 1e6:.1f} MB read instead of {use.read_bytes_without / 1e6:.1f} MB; "
        "the output is not that of the full model",
    ]


def _what(group: Placed) -> str:
    """Its name, with the pieces of a built model where it is not all of them."""
    pieces = ", ".join(piece.rpartition(".")[2] for piece in group.pieces.split(","))
    return f"{group.group}: {pieces}" if pieces else group.group


def _where(group: Placed) -> str:
    if group.mode == "cached":
        missed = ", missing there" if group.missed == "there" else ""
        return f"{group.tier}, {group.slots} slots a layer{missed}"
    if group.mode == "split":
        return f"{group.slots} by {group.unit}, others {group.tier}"
    return f"{group.tier}, {group.mode}"


def _by(group: Placed) -> str:
    both = f"{group.unit} and {group.rest_unit}" if group.rest_unit else group.unit
    return f"{both}; prompts {group.prefill_unit}" if group.prefill_unit else both


def _joined(layers: Iterable[str]) -> str:
    """`0-60` of `0-2` and `3-60`, in order."""
    return span(tuple(sorted(number for text in layers for number in layer_numbers(text))))


def shortened(layers: str, width: int = 28) -> str:
    """Numbers of layers, cut to `width` characters with how many there are."""
    if len(layers) <= width:
        return layers
    count = 0
    for run in layers.split(","):
        first, _, last = run.partition("-")
        count += int(last or first) - int(first) + 1
    return f"{layers[: width - 12].rpartition(',')[0]},… ({count})"


def _cache(planned: Planned) -> list[str]:
    cache, judged = planned.placement.expert_cache, planned.judged
    assert cache is not None
    lines = [
        f"expert cache: {cache.slots} slots of all layers, {format_bytes(cache.nbytes)} in {cache.tier}, "
        f"policy {cache.policy}; {cache.hit_rate:.1%} of look-ups hit ({cache.source})"
    ]
    if cache.pinned:
        lines.append(f"  {len(cache.pinned)} experts are pinned: read before the first token, they never leave")
    if judged is not None:
        rates = ", ".join(f"{policy} {rate:.1%}" for policy, rate in judged.rates)
        lines.append(f"  replayed in these slots: {rates}; no policy can pass {judged.belady:.1%} (Belady)")
    return lines


def _gains(planned: Planned) -> list[str]:
    plan = planned.placement
    chosen = any(gain.batch is not None for gain in planned.gains)  # the batch, for most tokens a second
    saved = "a token takes less by" if chosen else "a session is shorter by"
    rows: list[tuple[str, ...]] = [
        ("what would help", "decode at least", "prefill", *(["batch"] if chosen else []), saved)
    ]
    if planned.gains_from is not None:  # in closed form too, and that may be of another plan than the one above
        decode, prefill = map(seconds_text, planned.gains_from)
        rows.append(("(as it is)", decode, prefill, *([str(plan.session.batch)] if chosen else []), ""))
    for gain in planned.gains[:_SHOWN_GAINS]:
        batch = [str(gain.batch)] if chosen else []
        rows.append((gain.what, seconds_text(gain.decode), seconds_text(gain.prefill), *batch, f"{gain.saved:.1%}"))
    if all(gain.saved < 1e-3 for gain in planned.gains):
        rows.append((f"(nothing tried helps: bound by {plan.decode.bound})", *[""] * (len(rows[0]) - 1)))
    return table(rows)


def seconds_text(seconds: float) -> str:
    """`3.69 ms`: three significant digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [_line(row, widths) for row in rows]


def _line(row: Iterable[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
