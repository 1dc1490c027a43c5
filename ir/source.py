"""Source text with fast look-up of lines, and the diagnostics that point into it."""

from __future__ import annotations

import bisect
from typing import Any

from ir.diagnostics import Diagnostic, DiagnosticError
from ir.location import Location


class Source:
    """A text and the name of its file."""

    def __init__(self, text: str, file: str = "") -> None:
        self.text = text
        self.file = file
        self.lines = text.split("\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)

    def location(self, start: int, end: int, origin: str = "") -> Location:
        """The span [start, end) of the text; a span over several lines is cut at the end of the first."""
        start = min(start, len(self.text))
        line = min(bisect.bisect_right(self.starts, start), len(self.lines)) - 1
        column = start - self.starts[line]
        length = max(1, min(end, self.starts[line + 1] - 1) - start)
        shown = self.lines[line].replace("\t", " ").rstrip("\r")  # a tab would move the carets
        return Location(origin, self.file, line + 1, column + 1, length, shown)

    def of(self, token: Any, origin: str = "") -> Location:
        """The span of a token."""
        return self.location(token.start_pos, token.end_pos, origin)

    def error(self, message: str, start: int, end: int, *notes: Diagnostic) -> DiagnosticError:
        """An error at a span."""
        return DiagnosticError.of(Diagnostic("error", message, self.location(start, end), notes))

    def error_at(self, token: Any, message: str, *notes: Diagnostic) -> DiagnosticError:
        """An error at a token."""
        return self.error(message, token.start_pos, token.end_pos, *notes)
