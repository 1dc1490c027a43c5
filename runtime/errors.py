"""RuntimeDiagnostic: a fault at run time that a user can mend.

Takes what went wrong, where, what was expected and what would work; gives a text of the same shape as the compiler's
diagnostics (`where: error: message`, then `expected: ...` and `hint: ...` lines), so the command line prints both alike
and exits with code 2. The runtime does not import the compiler, so the class is repeated here in its smallest form.
"""

from __future__ import annotations


class RuntimeDiagnostic(Exception):
    """One fault: `message` says what, `where` a path or a name, `expected` what was wanted, `hint` what would work."""

    def __init__(self, message: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.hint = hint

    def render(self) -> str:
        """The full text, one to three lines."""
        lines = [f"{self.where}: error: {self.message}" if self.where else f"error: {self.message}"]
        if self.expected:
            lines.append(f"expected: {self.expected}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()
