"""The measuring of models under a limit of memory: rows, the page cache, the group's command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.streaming.__main__ import disk_gigabytes_per_s, forget, read_ahead, row
from bench.streaming.memory_group import MemoryGroup


def test_a_row_says_which_part_of_the_disk_was_used() -> None:
    answer = {"seconds": 10.0, "peak": 1 << 30, "hits": 0, "read_bytes": 9e9, "hit_rate": 0.25}
    assert row("a", 50, answer, 1.0) == "| a | 5.00 | 1024 | 0 | 9.00 | 25.0 % | 90 % |"
    assert row("b", 50, {"seconds": 10.0, "peak": 0, "hits": 3}, 1.0) == "| b | 5.00 | 0 | 3 |  |  |  |"


def test_a_file_is_read_and_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4 << 20))
    forget(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.streaming.__main__.DISK_SECONDS", 0.05)
        try:
            assert disk_gigabytes_per_s(file) > 0
        except OSError:
            pytest.skip("this file system refuses O_DIRECT")


def test_read_ahead_is_left_alone_unless_asked_for() -> None:
    with read_ahead("no-such-device", None):
        pass
    with pytest.raises(FileNotFoundError), read_ahead("no-such-device", 128):
        pass


def test_a_process_in_a_group() -> None:
    """What the process takes is counted, and the group is gone afterwards."""
    try:
        with MemoryGroup(256 << 20) as group:
            done = subprocess.run(
                group.command([sys.executable, "-c", "print(len(bytes(20 << 20)))"]), capture_output=True
            )
            facts, path = group.facts(), group.path
    except OSError as fault:
        pytest.skip(f"no group can be made here: {fault.strerror}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(20 << 20).encode()
    assert facts["peak"] <= 256 << 20 and facts["hits"] >= 0 and not path.exists()
