"""Numbered IR files of one pipeline run: `000_input.ir`, `001_canonicalize.ir`, ..., `012_final.ir`.

Every file parses back. A new run removes the files of an earlier one from the directory: regular files named like
these and nothing else, never through a link.
"""

from __future__ import annotations

import re
from pathlib import Path

import ir
from ir.core import Op
from ir.diagnostics import DiagnosticError

_OWN_NAME = re.compile(r"\d{3,}_[a-z0-9]+(-[a-z0-9]+)*\.ir")


class Dumper:
    """Writes into `directory`, which is made when missing. Raises DiagnosticError when that cannot be done."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.iterdir()):
                if _OWN_NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                    path.unlink()
        except OSError as error:
            raise _cannot_write(directory, error) from error

    def write(self, name: str, module: Op) -> Path:
        """Writes the next file; `name` is what stands behind the number."""
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "pass"
        path = self.directory / f"{self.count:03}_{plain}.ir"
        self.count += 1
        try:
            path.unlink(missing_ok=True)  # a link of this name is replaced, not followed
            path.write_text(ir.print_module(module), encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error
        return path


def _cannot_write(path: Path, error: OSError) -> DiagnosticError:
    return DiagnosticError(
        f"cannot write IR dumps: {error.strerror}", where=str(path), hint="choose a directory that you may write to"
    )
