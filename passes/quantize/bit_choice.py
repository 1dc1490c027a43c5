"""From sensitivities and a budget to the format of every group of weights, checked against uniform formats.

    problem = BitProblem.of(groups, candidates, table)
    choice = choose(problem, budget_bytes, measure=lambda formats: ...)   # or measure=None: by the modelled loss alone
    choice.assignment                                                     # group name -> Candidate

The solver's optimum is that of the model of the loss (a sum over groups). What is built must not be worse than a
uniform format of the same size, so the optimum and the uniform assignments within the budget are compared by what
`measure` says of the whole model, and the best one wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ir.diagnostics import DiagnosticError
from ir.formats import BF16
from passes.quantize.bits_solver import Choice, Group, Solution, assess, solve, uniform_solutions
from passes.quantize.sensitivity_table import Candidate, SensitivityTable
from passes.quantize.weight_groups import WeightGroup

Assignment = Mapping[str, Candidate]
MAX_UNIFORM, MAX_WITH_HEAD = 3, 2  # assignments whose loss is measured beside the solver's


@dataclass(frozen=True)
class BitProblem:
    """The groups of a model, what each may be stored in, and what that costs. `problem[i]` belongs to `groups[i]`."""

    groups: tuple[WeightGroup, ...]
    candidates: tuple[Candidate, ...]
    problem: tuple[Group, ...]

    @classmethod
    def of(cls, groups: Sequence[WeightGroup], candidates: Sequence[Candidate], table: SensitivityTable) -> BitProblem:
        """Raises DiagnosticError for a group that no candidate fits."""
        problem = []
        for group in groups:
            choices = []
            for candidate in candidates:
                entry = table.get(group, candidate)
                if entry is not None and candidate.fits(group):
                    choices.append(Choice(str(candidate), candidate.weights.nbytes(group.shape), entry.loss))
            if not choices:
                raise DiagnosticError(
                    f"none of the formats fits rows of {group.shape[-1]} weights",
                    where=group.name,
                    expected="a format whose group divides that",
                    hint="add one, such as q4_sym<group=row, scale=f16>, or bf16, which fits everything",
                )
            problem.append(Group(group.name, tuple(choices)))
        return cls(tuple(groups), tuple(candidates), tuple(problem))

    @property
    def count(self) -> int:
        """Weights in all groups."""
        return sum(g.count for g in self.groups)

    def assignment(self, solution: Solution) -> dict[str, Candidate]:
        """The candidate of every group, by its name."""
        by_text = {str(c): c for c in self.candidates}
        return {name: by_text[text] for name, text in solution.formats(self.problem).items()}

    def smallest(self) -> BitChoice:
        """The choice that takes the fewest bytes."""
        picks = [
            min(range(len(g.choices)), key=lambda i, g=g: (g.choices[i].nbytes, g.choices[i].loss))
            for g in self.problem
        ]
        solution = assess(self.problem, picks)
        return BitChoice(self, solution.nbytes, solution, None, (Checked("smallest", solution, None),))

    def bits(self, solution: Solution) -> float:
        """Bits per weight, scales included."""
        return 8 * solution.nbytes / max(1, self.count)


@dataclass(frozen=True)
class Checked:
    """One assignment that was compared: `measured` is None where nothing could be measured."""

    name: str
    solution: Solution
    measured: float | None

    @property
    def rank(self) -> tuple[float, float, int]:
        """Lower is better: measured loss before modelled loss before bytes."""
        return self.solution.loss if self.measured is None else self.measured, self.solution.loss, self.solution.nbytes


@dataclass(frozen=True)
class BitChoice:
    """What was chosen. `solved` is the solver's own optimum, `more` that of a budget 10 % larger, None if it is none.

    `checked` are the assignments compared, the winner first.
    """

    problem: BitProblem
    budget: int
    solved: Solution
    more: Solution | None
    checked: tuple[Checked, ...]

    @property
    def winner(self) -> Checked:
        return self.checked[0]

    @property
    def assignment(self) -> dict[str, Candidate]:
        """The candidate of every group, by its name."""
        return self.problem.assignment(self.winner.solution)


def choose(problem: BitProblem, budget: int, measure: Callable[[Assignment], float] | None = None) -> BitChoice:
    """The best assignment within `budget` bytes. Raises DiagnosticError when there is none.

    With room for bf16 everywhere, that is what everything gets, if it is among the candidates.
    """
    plain = uniform_solutions(problem.problem)
    for candidate in problem.candidates:
        widest = plain.get(str(candidate))
        if candidate.weights == BF16 and widest is not None and widest.nbytes <= budget:
            return BitChoice(problem, budget, widest, None, (Checked(str(candidate), widest, None),))
    solved = solve(problem.problem, budget)
    more = solve(problem.problem, budget + budget // 10)
    compared = [("solver", solved), *_rivals(problem, plain, solved, budget)]
    checked = [Checked(name, s, measure(problem.assignment(s)) if measure else None) for name, s in compared]
    checked.sort(key=lambda c: c.rank)
    return BitChoice(problem, budget, solved, more if more.nbytes > solved.nbytes else None, tuple(checked))


def _rivals(
    problem: BitProblem, plain: Mapping[str, Solution], solved: Solution, budget: int
) -> list[tuple[str, Solution]]:
    """Uniform assignments within the budget: the most promising ones by the modelled loss, and the largest."""
    fitting = {n: s for n, s in plain.items() if s.nbytes <= budget and s.picks != solved.picks}
    with_heads = {
        n: s for n, s in _other_heads(problem, plain).items() if s.nbytes <= budget and s.picks != solved.picks
    }
    names = sorted(fitting, key=lambda n: (fitting[n].loss, fitting[n].nbytes, n))[:MAX_UNIFORM]
    names += sorted(fitting, key=lambda n: (-fitting[n].nbytes, fitting[n].loss, n))[:1]
    names += sorted(with_heads, key=lambda n: (with_heads[n].loss, with_heads[n].nbytes, n))[:MAX_WITH_HEAD]
    return [(n, (fitting | with_heads)[n]) for n in dict.fromkeys(names)]


def _other_heads(problem: BitProblem, plain: Mapping[str, Solution]) -> dict[str, Solution]:
    """Uniform assignments but for the head, which has another format, as recipes commonly have it."""
    found = {}
    heads = [i for i, g in enumerate(problem.groups) if g.role == "head"]
    for name, solution in plain.items():
        for text in map(str, problem.candidates):
            picks = list(solution.picks)
            for at in heads:
                texts = [c.format for c in problem.problem[at].choices]
                picks[at] = texts.index(text) if text in texts else picks[at]
            if tuple(picks) != solution.picks:
                found[f"{name}, head {text}"] = assess(problem.problem, picks)
    return found
