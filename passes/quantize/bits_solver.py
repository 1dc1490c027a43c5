"""Which format each group of weights gets, so that the whole loses least within a number of bytes.

    solution = solve([Group("layers.0.qkv", (Choice("q4_sym<...>", 2304, 0.02), Choice("bf16", 8192, 0.0))), ...], 9000)

Takes groups that each get exactly one of their choices (bytes, loss >= 0); losses add. This is the multiple-choice
knapsack problem. Its linear relaxation is solved exactly on the lower convex hulls of the groups, which gives a lower
bound of any loss that is possible and a price per byte; what that price proves cannot be in an optimum is removed, and
HiGHS solves the rest as a mixed-integer program. Deterministic: one thread, a fixed seed, a limit on nodes instead of
time. Refuses a budget below the smallest size that exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ir.diagnostics import DiagnosticError

MAX_NODES = 100_000  # of HiGHS' search; the bound tells what is left when it is reached
_OPTIONS = {
    "threads": 1,
    "random_seed": 0,
    "mip_rel_gap": 0.0,
    "mip_abs_gap": 1e-12,
    "mip_feasibility_tolerance": 1e-9,
    "primal_feasibility_tolerance": 1e-9,
}
_SLACK = 1e-12  # of losses, relative: what sums in another order may differ by


@dataclass(frozen=True)
class Choice:
    """One way to store a group. `loss` is what it adds to the loss of the model, finite and >= 0."""

    format: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Group:
    """Weights that share one format, and the formats that they may have, in order of preference when equal."""

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError(f"{self.name} has no choice")
        for choice in self.choices:
            if not (math.isfinite(choice.loss) and choice.loss >= 0 and choice.nbytes >= 0):
                raise ValueError(f"{self.name}: expected a finite loss >= 0 and bytes >= 0, got {choice}")


@dataclass(frozen=True)
class Solution:
    """`picks[i]` is the index of the choice of group i. No assignment within the budget loses less than `bound`."""

    picks: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the loss may be above the least possible one, as a fraction of it; 0 when it is proven least."""
        if self.loss <= self.bound * (1 + _SLACK):
            return 0.0
        return (self.loss - self.bound) / self.bound if self.bound > 0 else math.inf

    def formats(self, groups: Sequence[Group]) -> dict[str, str]:
        """The chosen format of every group by name."""
        return {g.name: g.choices[p].format for g, p in zip(groups, self.picks, strict=True)}


def assess(groups: Sequence[Group], picks: Sequence[int], bound: float = 0.0) -> Solution:
    """The solution that takes these choices, with its bytes and loss."""
    taken = [g.choices[p] for g, p in zip(groups, picks, strict=True)]
    return Solution(tuple(picks), sum(c.nbytes for c in taken), math.fsum(c.loss for c in taken), bound)


def smallest_bytes(groups: Sequence[Group]) -> int:
    """The size below which there is no assignment."""
    return sum(min(c.nbytes for c in g.choices) for g in groups)


def uniform_solutions(groups: Sequence[Group]) -> dict[str, Solution]:
    """The assignments that give one format to every group that has it, by format; others keep their least loss.

    A format that no group can have is not among them.
    """
    names = dict.fromkeys(c.format for g in groups for c in g.choices)
    found = {}
    for name in names:
        picks = []
        for group in groups:
            same = [i for i, c in enumerate(group.choices) if c.format == name]
            picks.append(same[0] if same else min(range(len(group.choices)), key=lambda i: group.choices[i].loss))
        found[name] = assess(groups, picks)
    return found


def solve(groups: Sequence[Group], budget: int, *, max_nodes: int = MAX_NODES) -> Solution:
    """The assignment of least loss that takes at most `budget` bytes; of equal ones, as small a one as is seen.

    Raises DiagnosticError when every assignment takes more, naming the smallest size.
    """
    smallest = smallest_bytes(groups)
    if smallest > budget:
        raise DiagnosticError(
            f"the weights cannot be stored in {budget} bytes",
            expected=f"{smallest} bytes or more, what the smallest of the given formats take",
            hint="allow formats of fewer bits, or a larger size",
        )
    useful = [_undominated(g) for g in groups]
    relaxed = _relax(groups, useful, budget)
    best = assess(groups, relaxed.picks, relaxed.bound)
    kept = _price_out(groups, useful, relaxed, best.loss, budget)
    if all(len(k) == 1 for k in kept):
        only = assess(groups, [k[0] for k in kept])
        best = only if only.nbytes <= budget and only.loss < best.loss else best
        return assess(groups, best.picks, best.loss)  # nothing else is as good
    picks, bound = _search(groups, kept, budget, max_nodes)
    bound = max(bound, relaxed.bound)
    if picks is not None:
        found = assess(groups, picks)
        if found.nbytes <= budget and (found.loss, found.nbytes) < (best.loss, best.nbytes):
            best = found
    return assess(groups, best.picks, min(bound, best.loss))


# -- the linear relaxation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Relaxation:
    bound: float
    price: float  # of a byte, in loss
    picks: tuple[int, ...]  # a feasible assignment near it


def _undominated(group: Group) -> list[int]:
    """Choices to which no other is at least as good in both, by growing bytes (and so falling loss)."""
    order = sorted(range(len(group.choices)), key=lambda i: (group.choices[i].nbytes, group.choices[i].loss, i))
    kept: list[int] = []
    for index in order:
        if not kept or group.choices[index].loss < group.choices[kept[-1]].loss:
            kept.append(index)
    return kept


def _hull(group: Group, useful: list[int]) -> list[int]:
    """The choices on the lower convex hull of (bytes, loss)."""
    hull: list[int] = []
    for index in useful:
        while len(hull) > 1 and _slope(group, hull[-2], hull[-1]) <= _slope(group, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(group: Group, first: int, second: int) -> float:
    """Loss saved per byte by going from one choice to a larger one."""
    a, b = group.choices[first], group.choices[second]
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)


def _relax(groups: Sequence[Group], useful: list[list[int]], budget: int) -> _Relaxation:
    """Steps along the hulls, best first, until the budget is spent; the step that no longer fits is taken in part."""
    hulls = [_hull(g, u) for g, u in zip(groups, useful, strict=True)]
    picks = [h[0] for h in hulls]
    room = budget - sum(g.choices[p].nbytes for g, p in zip(groups, picks, strict=True))
    steps = []
    for at, (group, hull) in enumerate(zip(groups, hulls, strict=True)):
        for level in range(1, len(hull)):
            steps.append((-_slope(group, hull[level - 1], hull[level]), at, level))
    steps.sort()
    price, bound = 0.0, math.nan
    stopped = [False] * len(groups)
    for negative_slope, at, level in steps:
        if stopped[at]:
            continue
        group, index = groups[at], hulls[at][level]
        cost = group.choices[index].nbytes - group.choices[picks[at]].nbytes
        if cost <= room:
            room -= cost
            picks[at] = index
            continue
        if math.isnan(bound):  # here the relaxation ends; later steps may still fit a real assignment
            price = -negative_slope
            bound = max(0.0, assess(groups, picks).loss - price * room) * (1 - _SLACK)
        stopped[at] = True
    return _Relaxation(assess(groups, picks).loss if math.isnan(bound) else bound, price, tuple(picks))


def _price_out(
    groups: Sequence[Group], useful: list[list[int]], relaxed: _Relaxation, best: float, budget: int
) -> list[list[int]]:
    """The choices that may be in an assignment that loses less than `best`, at least one a group.

    With a price on bytes, any assignment loses at least the sum of what each group pays least, minus the price of the
    budget; taking another choice raises that by what it pays more.
    """
    price = relaxed.price
    paid = [[g.choices[i].loss + price * g.choices[i].nbytes for i in u] for g, u in zip(groups, useful, strict=True)]
    floor = math.fsum(min(p) for p in paid) - price * budget
    slack = _SLACK * (abs(floor) + best + price * budget)
    kept = []
    for pick, indices, prices in zip(relaxed.picks, useful, paid, strict=True):
        least = min(prices)
        fit = [i for i, p in zip(indices, prices, strict=True) if floor + (p - least) <= best + slack or i == pick]
        kept.append(fit)
    return kept


# -- the search ------------------------------------------------------------------------------------------------------


def _search(
    groups: Sequence[Group], kept: list[list[int]], budget: int, max_nodes: int
) -> tuple[list[int] | None, float]:
    """(the best assignment that HiGHS finds among the choices `kept`, its bound of the loss)."""
    choices = [[g.choices[i] for i in k] for g, k in zip(groups, kept, strict=True)]
    base = [min(c.nbytes for c in row) for row in choices]
    least = [min(c.loss for c in row) for row in choices]
    # Small whole numbers of a common unit, and losses up to 1: what HiGHS' tolerances are made for.
    unit = math.gcd(*(c.nbytes - b for row, b in zip(choices, base, strict=True) for c in row)) or 1
    weights = [[(c.nbytes - b) // unit for c in row] for row, b in zip(choices, base, strict=True)]
    scale = max(c.loss - low for row, low in zip(choices, least, strict=True) for c in row) or 1.0
    costs = [[(c.loss - low) / scale for c in row] for row, low in zip(choices, least, strict=True)]
    room, bound = (budget - sum(base)) // unit, 0.0
    limit = room
    for _ in range(4):  # once, unless rounding let HiGHS go beyond the limit
        found, dual = _run_highs(costs, weights, limit, max_nodes)
        if limit == room and math.isfinite(dual):
            bound = math.fsum(least) + max(0.0, dual) * scale * (1 - _SLACK)
        if found is None:
            break
        used = sum(row[at] for row, at in zip(weights, found, strict=True))
        if used <= room:
            return [row[at] for row, at in zip(kept, found, strict=True)], bound
        limit -= used - room
    return None, bound


def _run_highs(
    costs: list[list[float]], weights: list[list[int]], limit: int, max_nodes: int
) -> tuple[list[int] | None, float]:
    """(position of the choice taken in each row, bound of the summed costs); None when HiGHS found no assignment."""
    import highspy
    import numpy as np

    count, rows = sum(map(len, costs)), len(costs)
    owners = [at for at, row in enumerate(costs) for _ in row]
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = count, rows + 1
    lp.col_cost_ = np.array([c for row in costs for c in row])
    lp.col_lower_, lp.col_upper_ = np.zeros(count), np.ones(count)
    lp.row_lower_ = np.array([1.0] * rows + [-highspy.kHighsInf])
    lp.row_upper_ = np.array([1.0] * rows + [float(limit)])
    lp.integrality_ = [highspy.HighsVarType.kInteger] * count
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * count + 1, 2)
    lp.a_matrix_.index_ = np.array([index for at in owners for index in (at, rows)])
    lp.a_matrix_.value_ = np.array([value for row in weights for w in row for value in (1.0, float(w))])
    model = highspy.Highs()
    model.silent()
    for option, value in _OPTIONS.items():
        model.setOptionValue(option, value)
    model.setOptionValue("mip_max_nodes", max_nodes)
    model.passModel(lp)
    model.run()
    info = model.getInfo()
    values = list(model.getSolution().col_value)
    if len(values) != count or not math.isfinite(info.objective_function_value):
        return None, info.mip_dual_bound
    picks, start = [], 0
    for row in costs:
        picks.append(max(range(len(row)), key=lambda i, start=start: (values[start + i], -i)))
        start += len(row)
    return picks, info.mip_dual_bound
