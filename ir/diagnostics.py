"""Diagnostics: what users and pass authors are told when something is wrong.

A `Diagnostic` is data (severity, message, location, notes). A `DiagnosticSink` collects several of them, so that
one run of the verifier reports every fault it finds. A `DiagnosticError` ends the work: the CLI prints it and exits
with code 2. Broken invariants of ours are plain exceptions instead (`AssertionError`, `TypeError`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ir.location import NOWHERE, Location


@dataclass(frozen=True)
class Diagnostic:
    """One message. `notes` are printed below it, each with its own location when it has one."""

    severity: str  # "error" | "warning" | "note"
    message: str
    location: Location = NOWHERE
    notes: tuple[Diagnostic, ...] = ()

    def render(self) -> str:
        """`file:line:col: error: message`, then the source line and carets when known, then the notes."""
        prefix = self.location.prefix()
        lines = [f"{prefix}: {self.severity}: {self.message}" if prefix else f"{self.severity}: {self.message}"]
        lines += self.location.caret_lines()
        lines += [note.render() for note in self.notes]
        return "\n".join(lines)


@dataclass
class DiagnosticSink:
    """Collects diagnostics in the order they are found."""

    diagnostics: list[Diagnostic] = field(default_factory=list)

    def error(self, location: Location, message: str, *notes: Diagnostic) -> None:
        self.diagnostics.append(Diagnostic("error", message, location, notes))

    def warning(self, location: Location, message: str, *notes: Diagnostic) -> None:
        self.diagnostics.append(Diagnostic("warning", message, location, notes))

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self.diagnostics)

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        return tuple(d for d in self.diagnostics if d.severity == "error")

    def raise_if_errors(self) -> None:
        """Raises DiagnosticError holding every error collected so far, if there is one."""
        if self.errors:
            raise DiagnosticError.of(*self.errors)


class DiagnosticError(Exception):
    """A fault that a user can mend. `str()` is the full text to print: what, where, what was expected, what would work.

    `where` is free text (a path, a tensor name); IR diagnostics carry a `Location` instead, see `DiagnosticError.of`.
    """

    def __init__(self, message: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        self.diagnostics: tuple[Diagnostic, ...]
        notes = []
        if expected:
            notes.append(Diagnostic("expected", expected))
        if hint:
            notes.append(Diagnostic("hint", hint))
        self.diagnostics = (Diagnostic("error", message, Location(file=where), tuple(notes)),)
        super().__init__(message)

    @classmethod
    def of(cls, *diagnostics: Diagnostic) -> DiagnosticError:
        """An error that carries ready-made diagnostics."""
        error = cls(diagnostics[0].message)
        error.diagnostics = diagnostics
        return error

    def __str__(self) -> str:
        return "\n".join(d.render() for d in self.diagnostics)
