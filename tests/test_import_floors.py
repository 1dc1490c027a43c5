"""The floors of the house: a package imports only from the floors below it, and heavy libraries stay where they belong.

`ir` <- `hw_targets`, `frontends` <- `passes` <- `codegen` <- `stratum`, and `runtime` <- `stratum`. The walk is by
syntax tree, so imports inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package -> the packages of ours it may import
FLOORS: dict[str, frozenset[str]] = {
    "ir": frozenset(),
    "hw_targets": frozenset({"ir"}),
    "frontends": frozenset({"ir"}),
    "passes": frozenset({"ir", "hw_targets", "frontends"}),
    "codegen": frozenset({"ir", "hw_targets", "frontends", "passes"}),
    "runtime": frozenset(),
    "stratum": frozenset({"ir", "hw_targets", "frontends", "passes", "codegen", "runtime"}),
}
# Libraries of others, beyond the standard library. torch and transformers are references for tests, never more.
ALLOWED_LIBRARIES: dict[str, frozenset[str]] = {
    "ir": frozenset({"numpy", "ml_dtypes", "lark"}),
    "hw_targets": frozenset({"numpy", "ml_dtypes", "llvmlite", "psutil", "msgspec"}),
    "frontends": frozenset({"numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "msgspec"}),
    # numba: loops over weights, when models are built. highspy: the mixed-integer programs that spend a budget of bits
    # and place a model. msgspec: plans as JSON.
    "passes": frozenset({"numpy", "ml_dtypes", "numba", "highspy", "msgspec"}),
    "codegen": frozenset({"numpy", "ml_dtypes", "llvmlite", "numba", "psutil", "msgspec"}),
    # tokenizers and jinja2 turn text into token ids and back; everything else runs on numpy and LLVM's loader.
    "runtime": frozenset({"numpy", "ml_dtypes", "llvmlite", "tokenizers", "jinja2"}),
    # matplotlib is the extra `plot`: imported by the one function that draws, which says so when it is not there.
    "stratum": frozenset({"numpy", "click", "rich", "psutil", "msgspec", "matplotlib"}),
}


def imported_roots(source: str, filename: str) -> Iterator[tuple[str, int]]:
    """(top-level module, line) of every import statement in `source`, wherever it stands."""
    for node in ast.walk(ast.parse(source, filename)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node.lineno


def violations(package: str, source: str, filename: str) -> list[str]:
    """One line for every import that `package` may not have."""
    allowed = FLOORS[package] | ALLOWED_LIBRARIES[package] | {package} | sys.stdlib_module_names
    return [
        f"{filename}:{line}: {package} may not import {root}"
        for root, line in imported_roots(source, filename)
        if root not in allowed
    ]


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_package_imports_only_floors_below(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no sources found for {package}"
    found = []
    for path in files:
        found += violations(package, path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    assert not found, "\n".join(found)


def test_every_python_folder_at_the_top_is_a_known_floor() -> None:
    known = {*FLOORS, "tests", "examples", "bench", "tools", "docs"}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {".venv", "build", "dist"}
    assert folders <= known, f"unknown top-level folders: {sorted(folders - known)}"


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("ir", "import passes"),
        ("ir", "from frontends.config import x"),
        ("runtime", "def f():\n    from ir import types"),
        ("runtime", "import torch"),
        ("codegen", "import stratum"),
        ("frontends", "import transformers.models"),
        ("passes", "if True:\n    import codegen.build"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert len(violations(package, source, "example.py")) == 1


def test_allowed_imports_pass() -> None:
    source = "import os, numpy\nfrom ir.core import Op\nfrom . import sibling\nfrom frontends import registry"
    assert violations("passes", source, "example.py") == []
