"""What the process takes, as control groups count: limits of both versions, files in the page cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from runtime import process_memory
from runtime.process_memory import PAGE_BYTES, cached_bytes, give_back_read_ahead, memory_limit, resident_bytes

MIB = 1 << 20


def group(root: Path, files: dict[str, str], own: str) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "own").write_text(own)
    return root / "own", root


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"a/memory.max": "max", "memory.max": "1048576"}, "0::/a/b\n", MIB),
        ({"a/memory.max": "2097152", "a/b/memory.max": "1048576"}, "0::/a/b\n", MIB),
        ({"memory/a/memory.limit_in_bytes": "4194304"}, "3:cpu,memory:/a\n0::/\n", 4 * MIB),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, "3:memory:/\n", None),
        ({"cpu/memory.limit_in_bytes": "1"}, "3:cpu:/\n", None),
        ({}, "0::/gone\n", None),
    ],
)
def test_limits(tmp_path: Path, files: dict[str, str], own: str, limit: int | None) -> None:
    assert memory_limit(*group(tmp_path, files, own)) == limit


def test_no_limit_can_be_read(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("files", "own", "charged"),
    [
        ({"a/b/memory.stat": "anon 7\nfile 4096\n"}, "0::/a/b\n", 4096),
        ({"memory/a/memory.stat": "cache 1\ntotal_cache 8192\n"}, "3:cpu,memory:/a\n0::/\n", 8192),
        ({"memory.stat": "file 5\n"}, "3:memory:/gone\n0::/\n", 5),
        ({"a/memory.stat": "file many\n"}, "0::/a\n", None),
        ({"a/memory.stat": "anon 1\n"}, "0::/a\n", None),
        ({}, "0::/gone\n", None),
    ],
)
def test_what_a_group_is_charged_for(tmp_path: Path, files: dict[str, str], own: str, charged: int | None) -> None:
    assert process_memory.charged_cache(*group(tmp_path, files, own)) == charged


def test_files_that_others_are_charged_for_do_not_count() -> None:
    """The resident set does, in any case."""
    with patch.object(process_memory, "memory_limit", lambda: 1 << 40):
        counted = []
        for charged in (None, 1 << 40, 0):
            with patch.object(process_memory, "charged_cache", lambda charged=charged: charged):
                counted.append(resident_bytes())
    with patch.object(process_memory, "memory_limit", lambda: None):
        plain = resident_bytes()
    assert abs(counted[0] - counted[1]) < 16 * MIB and abs(counted[2] - plain) < 16 * MIB
    assert counted[2] <= counted[0] + 16 * MIB


def test_a_group_with_a_limit_counts_cached_files() -> None:
    """Never less than the resident set; what is dropped was mapped by nobody, so this process goes on."""
    statm = Path("/proc/self/statm").read_text().split()
    with patch.object(process_memory, "memory_limit", lambda: None):
        plain = resident_bytes()
    with patch.object(process_memory, "memory_limit", lambda: 1 << 40):
        give_back_read_ahead()
        counted = resident_bytes()
    assert counted >= plain - 16 * MIB and plain >= int(statm[1]) * PAGE_BYTES - 16 * MIB


def test_the_peak_is_of_this_process_alone() -> None:
    """A child of a process of 512 MiB and more has not had them."""
    child = "from runtime.process_memory import peak_resident_bytes as p, resident_bytes as r; print(p(), r())"
    parent = (
        f"import subprocess, sys; x = bytearray(b'x' * (512 << 20)); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    peak, now = map(int, done.stdout.split())
    assert now // 2 < peak < 512 * MIB


def test_pages_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (10 * PAGE_BYTES + 1))
    descriptor = os.open(path, os.O_RDONLY)
    assert cached_bytes(descriptor, 10 * PAGE_BYTES + 1) == 11 * PAGE_BYTES
    assert cached_bytes(descriptor, 0) == 0
    os.close(descriptor)


def test_what_is_available_is_what_the_system_says_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       999 kB\nMemAvailable:       700 kB\n")
    monkeypatch.setattr(process_memory, "resident_bytes", lambda: 100 << 10)
    for limit, wanted in ((None, 700), (500 << 10, 400), (2000 << 10, 700), (50 << 10, 0)):
        monkeypatch.setattr(process_memory, "memory_limit", lambda limit=limit: limit)
        assert process_memory.available_bytes(meminfo) == wanted << 10
