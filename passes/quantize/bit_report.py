"""The bits solver's choice explained: what was chosen, what it loses, how sure that is, what more would buy.

    text, facts = report_of(choice, "held_out.txt", file_bytes)

`text` is for people, at most a few lines for every kind of weights; `facts` is plain data for programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passes.quantize.bit_choice import BitChoice
from passes.quantize.bits_solver import Solution


def report_of(choice: BitChoice, source: str, file_bytes: int) -> tuple[str, dict[str, Any]]:
    """(text, facts). `source`: what sensitivities were measured with; `file_bytes`: the size of the weights file."""
    rows = _rows(choice)
    taken = choice.winner.solution
    facts: dict[str, Any] = {
        "bits_per_weight": choice.problem.bits(taken),
        "weights": choice.problem.count,
        "bytes": taken.nbytes,
        "budget_bytes": choice.budget,
        "file_bytes": file_bytes,
        "modelled_loss": taken.loss,
        "bound": choice.solved.bound,
        "gap": choice.solved.gap,
        "taken": choice.winner.name,
        "measured_with": source,
        "compared": [
            {"name": c.name, "bytes": c.solution.nbytes, "modelled_loss": c.solution.loss, "measured_loss": c.measured}
            for c in choice.checked
        ],
        "more": {"bytes": choice.more.nbytes, "modelled_loss": choice.more.loss} if choice.more else None,
        "rows": rows,
    }
    lines = _table(rows)
    lines.append(
        f"{facts['bits_per_weight']:.3f} bits per weight over the {choice.problem.count} weights of products "
        f"({taken.nbytes} bytes); weights file {file_bytes} bytes"
    )
    lines += _loss_lines(choice, source)
    return "\n".join(lines), facts


def _rows(choice: BitChoice) -> list[dict[str, Any]]:
    """A row for every kind of weights and format, in the order of the model."""
    problem, taken = choice.problem, choice.winner.solution
    assignment = choice.assignment
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for group, options, pick in zip(problem.groups, problem.problem, taken.picks, strict=True):
        used = options.choices[pick]
        first, *others = group.parts
        role = first + "".join("+" + part.rpartition(".")[2] for part in others)
        candidate = assignment[group.name]
        empty = {"role": role, "format": str(candidate.weights), "activations": str(candidate.activations),
                 "layers": [], "tensors": 0, "weights": 0, "bytes": 0, "loss": 0.0}  # fmt: skip
        row = merged.setdefault((role, str(candidate)), empty)
        row["layers"] += [] if group.layer is None or group.layer in row["layers"] else [group.layer]
        row["tensors"] += len(group.tensors)
        row["weights"] += group.count
        row["bytes"] += used.nbytes
        row["loss"] += used.loss
    order = list(dict.fromkeys(role for role, _ in merged))
    return sorted(merged.values(), key=lambda r: (order.index(r["role"]), -r["bytes"] / r["weights"]))


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in columns."""
    total = sum(row["loss"] for row in rows) or 1.0
    cells = [("weights", "format", "layers", "tensors", "bits", "loss")]
    for row in rows:
        bits = 8 * row["bytes"] / row["weights"]
        share = f"{100 * row['loss'] / total:.1f} %"
        cells.append((row["role"], row["format"], _ranges(row["layers"]), str(row["tensors"]), f"{bits:.3f}", share))
    widths = [max(len(line[i]) for line in cells) for i in range(6)]
    made = []
    for line in cells:
        left = [text.ljust(width) for text, width in zip(line[:3], widths[:3], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[3:], widths[3:], strict=True)]
        made.append("  ".join([*left, *right]).rstrip())
    return made


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7`; `-` for none."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts) or "-"


def _loss_lines(choice: BitChoice, source: str) -> list[str]:
    """The loss, its bound, what was compared, and what a tenth more would buy."""
    solved, winner = choice.solved, choice.winner
    lines = [f"sensitivities: {source}"]
    if len(choice.checked) == 1 and winner.solution.picks == solved.picks and choice.more is None and not solved.bound:
        lines.append("the budget is enough for bf16 everywhere")
        return lines
    lines.append(
        f"modelled loss {solved.loss:.4g} nats per token; no choice of these formats in {choice.budget} bytes has less "
        f"than {solved.bound:.4g} (gap {100 * solved.gap:.2g} %)"
    )
    if winner.measured is not None:
        lines.append("compared over text that no sensitivity was measured with (nats per token, bytes):")
        names = [_short(choice, c.name) for c in choice.checked]
        width = max(map(len, names))
        for number, (name, entry) in enumerate(zip(names, choice.checked, strict=True)):
            mark = "taken" if number == 0 else ""
            lines.append(f"  {name:<{width}}  {entry.measured:<8.4g}  {entry.solution.nbytes}  {mark}".rstrip())
    elif len(choice.checked) > 1:
        second = choice.checked[1]
        lines.append(
            f"best uniform choice by the same model: {_short(choice, second.name)}, {second.solution.loss:.4g}"
        )
    lines.append(_more_line(solved, choice.more))
    return lines


def _short(choice: BitChoice, name: str) -> str:
    """A name without activations, where the format of the weights tells candidates apart."""
    weights = [str(c.weights) for c in choice.problem.candidates]
    if len(set(weights)) == len(weights):
        for candidate in choice.problem.candidates:
            name = name.replace(str(candidate), str(candidate.weights))
    return name


def _more_line(solved: Solution, more: Solution | None) -> str:
    if more is None or more.loss >= solved.loss:
        return "10 % more bytes would buy nothing: every group has its best format"
    less = 100 * (1 - more.loss / solved.loss)
    return f"10 % more bytes would buy a modelled loss of {more.loss:.4g}, {less:.0f} % less"
