"""A build in a process of its own: what compiling takes in memory is gone before the model is opened.

    artifact = built_apart("model", {"dtype": "bf16", ...}, progress, warn)

The child (`python -m stratum.build_apart`) does what `stratum.building.ensure_built` does, and tells JSON lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ir.diagnostics import DiagnosticError
from stratum.progress import Progress


def built_apart(
    path: Path, options: dict[str, Any], progress: Progress | None, warn: Callable[[str], None] | None
) -> Path:
    """The artifact of the Hugging Face directory `path`. Raises DiagnosticError with what the child could not do."""
    command = [sys.executable, "-m", "stratum.build_apart", str(path), json.dumps(options)]
    root = Path(__file__).resolve().parent.parent
    artifact: Path | None = None
    fault = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment(root)) as child:
        assert child.stdout is not None
        for line in child.stdout:
            kind, *values = json.loads(line)
            if kind == "progress" and progress is not None:
                progress(*values)
            elif kind == "warning" and warn is not None:
                warn(values[0])
            elif kind == "fault":
                fault = values[0]
            elif kind == "artifact":
                artifact = Path(values[0])
    if fault or artifact is None:
        raise DiagnosticError(fault.removeprefix("error: ") or f"the build ended with {child.returncode}")
    return artifact


def child_environment(root: Path) -> dict[str, str]:
    """The child finds the same packages, installed or not."""
    import os

    found = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found)}


def main(arguments: list[str]) -> int:
    """The child: path, options as JSON."""
    from runtime.errors import RuntimeDiagnostic
    from stratum.building import ensure_built

    def tell(*message: object) -> None:
        print(json.dumps(message), flush=True)

    def progress(stage: str, done: float, total: float, unit: str = "") -> None:
        tell("progress", stage, done, total, unit)

    try:
        artifact = ensure_built(
            arguments[0], progress=progress, warn=lambda text: tell("warning", text), **json.loads(arguments[1])
        )
    except (DiagnosticError, RuntimeDiagnostic) as error:
        tell("fault", str(error))
        return 2
    except OSError as error:
        tell("fault", f"{error.filename or 'the build'}: {error.strerror or error}")
        return 2
    tell("artifact", str(artifact.resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
