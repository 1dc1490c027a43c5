"""What is known of how much a model loses by a format: entries by group of weights and candidate, kept in a file.

    table = SensitivityTable(path)       # lines of JSON: a killed run goes on
    table.get(group, Candidate(format))  # None, or an Entry: relative error, loss, how it was found

`passes.quantize.sensitivity` finds the entries, and says what a loss is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ir.diagnostics import DiagnosticError
from ir.formats import BF16
from passes.quantize.quantize import SMALLER_GROUPS
from passes.quantize.weight_groups import WeightGroup


@dataclass(frozen=True)
class Candidate:
    """A format of weights, and what the activation in front of the product is rounded to."""

    weights: Any
    activations: Any = BF16
    rounding: str = "mse"

    def __str__(self) -> str:
        return f"{self.weights} x {self.activations}" + ("" if self.rounding == "mse" else f" ({self.rounding})")

    def fits(self, group: WeightGroup) -> bool:
        """Whether the format of the weights can hold rows of the group."""
        try:
            self.weights.nbytes(group.shape)
        except DiagnosticError:
            return False
        return True

    def activations_for(self, k: int) -> Any:
        """The format of rows of k activations: smaller groups where its own do not fill them, as a build has it."""
        group = getattr(self.activations, "group", 0)
        if not group or k % group == 0:
            return self.activations
        fitting = [g for g in SMALLER_GROUPS if g < group and k % g == 0]
        return replace(self.activations, group=fitting[0] if fitting else 0)


@dataclass(frozen=True)
class Entry:
    """`error`: relative, of the product's output; `loss`: nats per token; `how`: measured, scaled or estimated.

    Of a stack of experts, `experts` are the squared errors of a row of each, in any unit, and `uses` how many rows each
    had; both are empty otherwise.
    """

    group: str
    candidate: str
    error: float
    loss: float
    how: str
    experts: tuple[float, ...] = ()
    uses: tuple[float, ...] = ()


class SensitivityTable:
    """Entries by (group, candidate), kept in a file of JSON lines when one is given.

    Lines that are cut short (a killed run) or of another kind are passed over and measured again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.entries: dict[tuple[str, str], Entry] = {}
        self._begin = ""  # ends a line that was cut short
        if path is not None and path.is_file():
            text = path.read_text(errors="replace")
            self._begin = "" if text.endswith("\n") else "\n"
            for line in text.splitlines():
                entry = _read_entry(line)
                if entry is not None:
                    self.entries[entry.group, entry.candidate] = entry

    def get(self, group: WeightGroup, candidate: Candidate) -> Entry | None:
        """The entry of a pair, if it is known."""
        return self.entries.get((group.name, str(candidate)))

    def add(self, entries: Sequence[Entry]) -> None:
        """Remembers entries, and writes them to the file at once. Raises DiagnosticError when that fails."""
        self.entries.update({(e.group, e.candidate): e for e in entries})
        if self.path is None or not entries:
            return
        text = "".join(json.dumps(asdict(e)) + "\n" for e in entries)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(self._begin + text)
            self._begin = ""
        except OSError as error:
            raise DiagnosticError(
                f"the measured sensitivities cannot be kept: {error.strerror}",
                where=str(self.path),
                hint="set STRATUM_CACHE to a directory with room",
            ) from None


def _read_entry(line: str) -> Entry | None:
    try:
        found = json.loads(line)
        entry = Entry(**found)
        experts, uses = tuple(map(float, entry.experts)), tuple(map(float, entry.uses))
        numbers = (float(entry.error), float(entry.loss), *experts, *uses)
    except (ValueError, TypeError):
        return None
    fits = len(experts) == len(uses) and all(math.isfinite(n) and n >= 0 for n in numbers)
    return replace(entry, experts=experts, uses=uses) if fits else None
