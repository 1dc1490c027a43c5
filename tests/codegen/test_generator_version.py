"""Cached code belongs to the compiler that made it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from codegen import generator_version as module
from codegen.code_bundle import bundle_key
from hw_targets import load


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler of two files in place of this one."""
    for name in ("ir/core.py", "codegen/build.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "codegen" / "generator_version.py"))
    module.generator_version.cache_clear()
    yield tmp_path
    module.generator_version.cache_clear()


def key() -> str:
    module.generator_version.cache_clear()
    return bundle_key("graph", "pipeline", load("x86-64-v3"))


def test_any_changed_source_makes_another_key(sources: Path) -> None:
    before = key()
    assert key() == before
    (sources / "ir" / "core.py").write_text("# ir/core.py \n")
    changed = key()
    (sources / "ir" / "core.py").rename(sources / "ir" / "other.py")
    assert len({before, changed, key()}) == 3


def test_files_that_are_no_sources_do_not_count(sources: Path) -> None:
    before = key()
    (sources / "ir" / "__pycache__").mkdir()
    (sources / "ir" / "__pycache__" / "core.cpython-311.pyc").write_bytes(b"1")
    assert key() == before
