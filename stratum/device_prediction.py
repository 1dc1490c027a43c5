"""How long a decode step on a GPU takes whose weights partly pass through its memory, played by the simulator.

    predicted = predict_device(DeviceCase(step, pieces, plan, target, context=512, hit=0.8, missed="auto"))
    predicted.seconds, predicted.link_bytes, predicted.computed, predicted.bound

The plan is that of `stratum.device_plan`. Which experts are missing is drawn from the shares that are found, a few
times; what is done about them is decided by the runtime's own rule (`runtime.cuda.missed_experts`), draw by draw. Two
steps are played, one behind the other: the second counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from hw_targets.expert_outcomes import from_hit_rates, simulate_steps
from hw_targets.simulator import Simulator
from runtime.cuda.missed_experts import CPU, SpareLink, divide
from stratum.device_case import DeviceCase
from stratum.device_experts import Counts
from stratum.device_plan import DeviceWriter, decode_program

__all__ = ["DeviceCase", "DevicePrediction", "decode_program", "predict_device"]

_SAMPLES = 8  # draws of missing experts


@dataclass(frozen=True)
class DevicePrediction:
    """Of a decode step: its seconds, bytes that come over the link and from the drive, what most of the critical path
    goes to; kernels and graphs that the host launches, and the seconds of the GPU that their dispatch takes; experts
    that the CPU computes, and how many of these are brought all the same, for later."""

    seconds: float
    link_bytes: float
    bound: str
    read_bytes: float = 0.0
    launches: int = 0
    graphs: int = 0
    dispatch_seconds: float = 0.0
    computed: float = 0.0
    later: float = 0.0


def predict_device(case: DeviceCase) -> DevicePrediction:
    """The second of two steps, as simulated. Raises DiagnosticError for targets that cannot run it."""
    times: list[float] = []
    bound, before = "", (0.0, 0.0)
    drawn: list[dict[int, Counts]] = []
    writer = DeviceWriter(case)
    for steps in (1, 2):
        writer = DeviceWriter(case)
        simulator = Simulator(writer.run(steps), case.machine)
        pieces = list(dict.fromkeys(writer.experts.pieces))
        if pieces:
            drawn = drawn or _drawn(case, writer, pieces)
            times.append(simulate_steps(simulator, [_caches(counts) for counts in drawn]).mean)
            timeline = simulator.run(_caches(_usual(case, writer, pieces)))
        else:
            timeline = simulator.run()
            times.append(timeline.seconds)
        bound, now = timeline.bound, (writer.streamed_bytes, writer.read_bytes)
        link, read = now[0] - before[0], now[1] - before[1]
        before = now
    computed = later = 0.0
    for piece in dict.fromkeys(writer.experts.pieces):
        unit, missing = case.pieces[piece].unit, writer.experts.most(piece) * (1 - case.hit)
        share = _shares([counts[piece] for counts in drawn])
        link += missing * unit * (1.0 - share.computed + share.later)
        read += missing * unit * (1 - case.host_hit) if piece in writer.experts.cached else 0.0
        computed, later = computed + missing * share.computed, later + missing * share.later
    per_step = writer.dispatches / 2 * (case.gpu.launch_seconds or 0.0)
    return DevicePrediction(
        times[1] - times[0], link, bound, read, writer.single // 2, writer.graphs // 2, per_step, computed, later
    )


@dataclass(frozen=True)
class _Shares:
    """Of missing experts."""

    computed: float
    later: float


def _shares(counts: list[Counts]) -> _Shares:
    computed = sum(c.computed + c.read_and_computed for c in counts)
    later, missing = sum(c.later for c in counts), computed + sum(c.brought + c.read for c in counts)
    return _Shares(computed / missing, later / missing) if missing else _Shares(0.0, 0.0)


def _caches(counts: dict[int, Counts]) -> dict[str, int]:
    found: dict[str, int] = {}
    for piece, of in counts.items():
        found |= of.caches(piece)
    return found


def _drawn(case: DeviceCase, writer: DeviceWriter, pieces: list[int]) -> list[dict[int, Counts]]:
    """What becomes of the experts that are missing in some draws, by piece."""
    lacking = {p: from_hit_rates([case.hit], writer.experts.most(p), _SAMPLES, n)[:, 0] for n, p in enumerate(pieces)}
    on_disk = {
        p: np.random.default_rng(_SAMPLES + n).binomial(lacking[p], 1 - case.host_hit)
        for n, p in enumerate(pieces) if p in writer.experts.cached
    }  # fmt: skip
    spare = SpareLink()  # of one session: its draws are steps that follow each other
    return [
        {p: _counts(case, writer, p, int(lacking[p][n]), int(on_disk[p][n]) if p in on_disk else 0, spare)
         for p in pieces} for n in range(_SAMPLES)
    ]  # fmt: skip


def _usual(case: DeviceCase, writer: DeviceWriter, pieces: list[int]) -> dict[int, Counts]:
    """The same without chance."""
    found, spare = {}, SpareLink()
    for piece in pieces:
        lacking = round(writer.experts.most(piece) * (1 - case.hit))
        read = round(lacking * (1 - case.host_hit)) if piece in writer.experts.cached else 0
        found[piece] = _counts(case, writer, piece, lacking, read, spare)
    return found


def _counts(case: DeviceCase, writer: DeviceWriter, piece: int, lacking: int, read: int, spare: SpareLink) -> Counts:
    """What becomes of so many missing experts, `read` of them on the drive, by the rule of
    `runtime.cuda.hybrid_experts`; each has its share of the tokens."""
    layer, most = case.computes(piece), case.host.slots if case.host is not None else 0
    if layer is None or not 0 < lacking <= (most or lacking):
        return Counts(lacking - read, read)
    prices, unit, needed = case.price, case.pieces[piece].unit, case.needed(piece)
    loads = [max(1, round(case.tokens * layer.choices / max(1.0, needed)))] * lacking
    late = list(range(lacking - read, lacking))
    brought, there = ([], list(range(lacking))) if case.missed == CPU else divide(loads, prices, unit, late)
    hits = round(needed) - lacking
    room = 0 if case.plan.streamed else max(0, dict(case.plan.slots)[piece] - hits - len(brought))
    later = spare.count(prices, unit, [loads[i] for i in there], len(brought), room)
    far = sum(i in late for i in there)
    counts = Counts(len(brought) - (read - far), read - far, len(there) - far, far, later)
    assert all(getattr(counts, of.name) >= 0 for of in fields(counts))
    return counts
