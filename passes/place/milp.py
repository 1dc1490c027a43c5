"""The choice as a mixed-integer program, solved by HiGHS: how many layers of each part take each option.

    found = solve_counts(problem, options)           # options: one list a part
    found.choice, found.gap                          # gap 0: proved best of all choices

Equal layers are one integer instead of a binary each, so that the program does not grow with depth. Where a cache may
be divided, ways of attention that differ in its place alone are whole only together. Variables: counts, the length of
both phases, layers whose parts are on different units, and pieces of streams that need buffers. The goals are time
(`best`), the fewest bytes in one tier (`least_bytes`) and any fit at all. Deterministic: bounded by nodes, and by
how often HiGHS checks its limits (at every round of cuts, every node and dive), never by time. Gives None when nothing
fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from passes.place.crossings import crossings, one_way
from passes.place.kv_division import kv_alike, rounded
from passes.place.kv_losses import kv_loss, loses_too_much
from passes.place.option import Option
from passes.place.outcome import Choice, objective, tier_use, workspaces
from passes.place.problem import Problem

MANY_NODES = 300  # of the search: for a small verified gap
FEW_NODES = 30  # enough for what is most often the same choice, when many are looked for
_REL_GAP = 2e-3
_NUDGE = 1e-6  # among equals the choice with less work altogether
_CHECKS = 1000, 30  # of limits by HiGHS, in a search and for each of its nodes: several times what searches take
_PATIENCE = 10  # times as many while no choice is found


Columns = list[tuple[Option, int]]


@dataclass(frozen=True)
class Found:
    """A choice and how far from the best it can be at most, relatively. `value`: the time of the session as the program
    has it; the choice itself takes longer where a division was rounded."""

    choice: Choice
    gap: float
    value: float = 0.0


@dataclass
class _Rows:
    """A program by rows: columns with cost and bounds, rows of (column, value) between bounds."""

    cost: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    entries: list[list[tuple[int, float]]] = field(default_factory=list)

    def column(self, cost: float = 0.0, upper: float = math.inf, whole: bool = False) -> int:
        self.cost.append(cost)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.cost) - 1

    def row(self, low: float, high: float, entries: list[tuple[int, float]]) -> None:
        merged: dict[int, float] = {}
        for at, value in entries:
            merged[at] = merged.get(at, 0.0) + value
        self.low.append(low)
        self.high.append(high)
        self.entries.append([(at, value) for at, value in merged.items() if value])


def solve_counts(
    problem: Problem,
    options: Sequence[Sequence[Option]],
    *,
    least_bytes: str = "",
    best: bool = True,
    nodes: int = MANY_NODES,
    divide: bool = False,
    within: float = _REL_GAP,
) -> Found | None:
    """The best counts; with `least_bytes` those that need least of that tier, whose room then does not count.

    `within`: the share of the best by which a choice may be longer where it was found in so many nodes. Which one that
    is depends on the version of HiGHS; 0 asks for the best itself.

    `divide`: the cache of a layer may lie in two places, so that the layers of ways that differ in that alone are whole
    only together.
    """
    shrink = 1.0
    for _ in range(4):  # once, unless tolerances of the solver let a tier go over by a few bytes
        rows, columns, alike = _program(problem, options, least_bytes, best, shrink, divide)
        values, gap = _run(rows, nodes, within)
        if values is None:
            return None
        choice = _whole(problem, columns, alike, values)
        over = [t for t in tier_use(problem, choice) if t.total > t.room and t.name != least_bytes]
        if not over and not loses_too_much(problem, choice):
            return Found(choice, gap, objective(problem, values[0], values[1]) * _time_scale(options))
        shrink *= 1 - 4e-6
    if divide:  # in whole blocks it does not fit
        return solve_counts(problem, options, least_bytes=least_bytes, best=best, nodes=nodes, within=within)
    return None


def _whole(problem: Problem, columns: Columns, alike: Sequence[Columns], values: Sequence[float]) -> Choice:
    """The counts of a solution, in the order of the columns; divided caches in whole blocks."""
    together = {mixed[0][1]: mixed for mixed in alike}
    inside = {at for mixed in alike for _, at in mixed}
    choice: list[tuple[Option, int]] = []
    for option, at in columns:
        if at in together:
            choice += rounded(problem, [(o, values[n]) for o, n in together[at]])
        elif at not in inside and round(values[at]):
            choice.append((option, round(values[at])))
    if problem.kv_menu is None:
        return tuple(choice)
    once: dict[int, tuple[Option, int]] = {}  # a way may have a part in the caches of several formats
    for option, count in choice:
        once[id(option)] = (option, once.get(id(option), (option, 0))[1] + count)
    return tuple(once.values())


def _program(
    problem: Problem, options: Sequence[Sequence[Option]], least_bytes: str, best: bool, shrink: float, divide: bool
) -> tuple[_Rows, Columns, list[Columns]]:
    rows, session = _Rows(), problem.session
    scale = _time_scale(options)
    wanted = best and not least_bytes
    t_decode = rows.column(session.generate * 1.0 if wanted else 0.0)
    t_prefill = rows.column(session.batch / session.prompts if wanted else 0.0)
    if problem.slo.tpot is not None:
        rows.upper[t_decode] = problem.slo.tpot / scale
    if problem.slo.ttft is not None:
        rows.upper[t_prefill] = problem.slo.ttft / scale
    columns: Columns = []
    alike: list[Columns] = []
    for found in options:
        groups = kv_alike(problem, found) if divide else [[option] for option in found]
        mine = []
        for together in groups:
            first = len(columns)
            for option in together:
                work = sum(sum(c.path.values()) + sum(c.streams.values()) for c in (option.decode, option.prefill))
                cost = _NUDGE * work / scale if wanted else 0.0
                at = rows.column(cost, float(option.part.count), len(together) == 1)
                columns.append((option, at))
                mine.append(at)
            if len(together) > 1:
                alike.append(columns[first:])
                whole = rows.column(0.0, float(together[0].part.count), True)
                rows.row(0.0, 0.0, [(whole, 1.0), *((at, -1.0) for _, at in alike[-1])])
        count = float(found[0].part.count)
        rows.row(count, count, [(at, 1.0) for at in mine])
    for decode, length in ((True, t_decode), (False, t_prefill)):
        crossed = _crossings(rows, problem, columns, at_prefill=not decode)
        _lengths(rows, problem, columns, crossed, length, decode, scale)
    _capacities(rows, problem, columns, least_bytes, shrink)
    _quality(rows, problem, columns)
    return rows, columns, alike


def _time_scale(options: Sequence[Sequence[Option]]) -> float:
    """Seconds that become 1 in the program: what the fastest options of all parts take together."""
    total = sum(min(o.decode.waited + o.prefill.waited for o in found) * found[0].part.count for found in options)
    return max(total, 1e-9)


def _crossings(rows: _Rows, problem: Problem, columns: list[tuple[Option, int]], at_prefill: bool) -> list[int]:
    """Columns that count how often activations go to another memory."""
    found = []
    for crossing in crossings(problem, [option for option, _ in columns], at_prefill):
        at = rows.column()
        entries = [(columns[i][1], -1.0) for i in crossing.left] + [(columns[i][1], 1.0) for i in crossing.taken]
        rows.row(-float(crossing.free), math.inf, [(at, 1.0), *entries])
        found.append(at)
    return found


def _lengths(
    rows: _Rows,
    problem: Problem,
    columns: list[tuple[Option, int]],
    crossed: list[int],
    length: int,
    decode: bool,
    scale: float,
) -> None:
    """The phase is no shorter than the path, and than every resource is busy."""
    cost = [(o.decode if decode else o.prefill, at) for o, at in columns]
    extra = problem.together_decode if decode else problem.together_prefill
    fixed = sum(seconds for _, seconds in extra) / scale
    away = one_way(problem, decode=decode)
    over = [(at, away[1] / scale) for at in crossed] if away else []
    turns = problem.session.micro_batches if decode else 1
    units = dict.fromkeys(u for c, _ in cost for u in c.unit_seconds) if turns > 1 else {"": None}
    for unit in units:
        entries = []
        for c, at in cost:
            own = c.unit_seconds.get(unit, 0.0) if turns > 1 else c.waited
            entries.append((at, -(own + (c.waited - own) / turns) / scale))
        shares = [(at, -value / turns) for at, value in over]
        rows.row(fixed / turns if turns > 1 else fixed, math.inf, [(length, 1.0), *entries, *shares])
    together = dict(extra)
    for resource in dict.fromkeys(r for c, _ in cost for r in (*c.streams, *c.path)):
        entries = [(at, -(c.path.get(resource, 0.0) + c.streams.get(resource, 0.0)) / scale) for c, at in cost]
        if away and away[0] == resource:
            entries += [(at, -value) for at, value in over]
        rows.row(together.get(resource, 0.0) / scale, math.inf, [(length, 1.0), *entries])


def _capacities(
    rows: _Rows, problem: Problem, columns: list[tuple[Option, int]], least_bytes: str, shrink: float
) -> None:
    """What lies in a tier, one buffer of the largest piece `depth` times over, and activations fit into it."""
    work = workspaces(problem)
    for tier, room in problem.machine.room:
        unit = float(max(room, 1 << 20)) if tier != least_bytes else float(1 << 30)
        entries = [
            (at, sum(n for t, _, n in option.holds if t == tier) / unit)
            for option, at in columns
            if any(t == tier for t, _, n in option.holds if n)
        ]
        sizes = sorted({n for o, _ in columns for t, n in o.buffer if t == tier and n})
        if sizes:
            current, ahead = rows.column(), rows.column()
            entries += [(current, 1.0), (ahead, float(problem.session.depth - 1))]
            for size in sizes:
                for column, once in ((current, True), (ahead, False)):
                    users = [(o, at) for o, at in columns if (tier, size) in o.buffer and (once or o.part.layers)]
                    if not users:
                        continue
                    needed = rows.column(0.0, 1.0, True)
                    most = sum(o.part.count for o, _ in users)
                    rows.row(0.0, math.inf, [(needed, float(most)), *((at, -1.0) for _, at in users)])
                    rows.row(0.0, math.inf, [(column, 1.0), (needed, -size / unit)])
        if tier == least_bytes:
            for at, value in entries:
                rows.cost[at] += value
        else:
            rows.row(-math.inf, (room * shrink - work.get(tier, 0)) / unit, entries)


def _quality(rows: _Rows, problem: Problem, columns: list[tuple[Option, int]]) -> None:
    """What formats may lose together, and the bits that weights keep on average."""
    menu = problem.menu
    if problem.kv_menu is not None and problem.kv_menu.most_loss is not None:
        most = problem.kv_menu.most_loss
        scale = most or 1e-3
        rows.row(-math.inf, most / scale, [(at, (kv_loss(problem, o) + o.part.loss) / scale) for o, at in columns])
    if menu is not None and menu.most_loss is not None:
        scale = menu.most_loss or 1.0
        rows.row(-math.inf, menu.most_loss / scale, [(at, o.part.loss / scale) for o, at in columns])
    if menu is not None and menu.least_bits is not None:
        scale = 8.0 * max(o.part.weight_bytes for o, _ in columns) or 1.0
        spare = [(at, (8 * o.part.weight_bytes - menu.least_bits * o.part.weights) / scale) for o, at in columns]
        rows.row(0.0, math.inf, spare)


def _run(rows: _Rows, nodes: int, within: float) -> tuple[list[float] | None, float]:
    """(values of the columns, relative gap); None when nothing fits."""
    import highspy
    import numpy as np

    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(rows.cost), len(rows.low)
    lp.col_cost_ = np.array(rows.cost)
    lp.col_lower_ = np.zeros(len(rows.cost))
    lp.col_upper_ = np.array(rows.upper)
    lp.row_lower_, lp.row_upper_ = np.array(rows.low), np.array(rows.high)
    kinds = highspy.HighsVarType
    lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in rows.whole]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(e) for e in rows.entries)])
    lp.a_matrix_.index_ = np.array([at for e in rows.entries for at, _ in e], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([value for e in rows.entries for _, value in e])
    model = highspy.Highs()
    model.silent()
    for option, value in (
        ("threads", 1),
        ("random_seed", 0),
        ("presolve", "off"),  # there is nothing to take out: it costs more than half of the time and cuts worse
        ("mip_max_nodes", nodes),
        ("mip_rel_gap", within if nodes >= MANY_NODES else 2.5 * within),
        ("mip_feasibility_tolerance", 1e-7),
        ("primal_feasibility_tolerance", 1e-8),
    ):
        model.setOptionValue(option, value)
    model.passModel(lp)
    asked, most = 0, _CHECKS[0] + _CHECKS[1] * nodes

    def go_on(event: highspy.HighsCallbackEvent) -> None:
        """Counts how often HiGHS checks its limits: time must not decide, and nodes count no cuts and no heuristics."""
        nonlocal asked
        asked += 1
        found = math.isfinite(event.data_out.mip_primal_bound)
        if asked > most * (1 if found else _PATIENCE):
            event.interrupt()

    model.cbMipInterrupt += go_on
    model.run()
    info = model.getInfo()
    values = list(model.getSolution().col_value)
    if len(values) != len(rows.cost) or info.primal_solution_status != 2:
        return None, math.inf
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:  # no cost is below 0, nor is the best
        return values, min(1.0, max(0.0, info.mip_gap))
    return values, max(0.0, info.mip_gap) if math.isfinite(info.mip_gap) else 0.0
