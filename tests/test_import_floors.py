"""The floors of the house: a package imports only from the floors below it, no two files import each other, and heavy
libraries stay where they belong.

`ir` <- `hw_targets`, `frontends` <- `passes` <- `codegen` <- `stratum`, and `runtime` <- `stratum`. The walk is by
syntax tree, so imports inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Container, Iterator, Mapping
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


def module_of(path: Path) -> str:
    """`passes.place.milp` of passes/place/milp.py; a folder's `__init__` is the folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(source: str, known: Container[str]) -> set[str]:
    """Which of the `known` modules a source names in imports, wherever they stand: in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in named if name in known} or {node.module}
    return {name for name in found if name in known}


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first again at the end; empty where there are none."""
    finished: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for name in sorted(imports[path[-1]] - finished - {path[-1]}):
            found = [*path[path.index(name) :], name] if name in path else walk([*path, name])
            if found:
                return found
        finished.add(path[-1])
        return []

    for start in sorted(imports):
        found = walk([start]) if start not in finished else []
        if found:
            return found
    return []


def test_no_files_import_each_other() -> None:
    """Not in a circle of any length: each file can be read with nothing in mind but what it imports."""
    files = [path for folder in (*FLOORS, "bench", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = {module_of(path): path for path in files}
    imports = {name: imported_modules(path.read_text(encoding="utf-8"), modules) for name, path in modules.items()}
    found = circle(imports)
    assert not found, "imports in a circle: " + " -> ".join(found)


def test_a_circle_is_found() -> None:
    source = "from a import b\nimport c.d\ndef f():\n    from e import g\n"
    assert imported_modules(source, {"a", "c.d", "e.g", "e"}) == {"a", "c.d", "e.g"}
    assert circle({"a": {"b", "c"}, "b": set(), "c": {"b"}}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]
