"""Same inputs, same bytes: builds in two directories, with two hash seeds and empty caches, are one artifact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.goldens import GOLDENS

ROOT = Path(__file__).resolve().parents[1]


def build(model: Path, out: Path, seed: str, cache: Path) -> dict[str, bytes]:
    """Every file of a fresh build in a process of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "STRATUM_CACHE": str(cache)}
    command = [sys.executable, "-m", "stratum.cli", "build", str(model), "-o", str(out), "--quiet"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_builds_are_byte_identical(name: str, tmp_path: Path) -> None:
    first = build(GOLDENS / name, tmp_path / "a" / "out", "1", tmp_path / "cache-a")
    second = build(GOLDENS / name, tmp_path / "elsewhere" / "b" / "out", "2", tmp_path / "cache-b")
    assert list(first) == list(second) and "weights/weights.bin" in first and "code/step.o" in first
    different = [path for path in first if first[path] != second[path]]
    assert not different
