"""The measuring of models under a limit of memory: rows, their table and forecasts, the disk, the group's command."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.prediction.machine import Moment
from bench.streaming import turns
from bench.streaming.disk import disk_bytes_per_s, forget, read_ahead, read_by
from bench.streaming.forecast import Forecast, trace_of
from bench.streaming.memory_group import MemoryGroup
from bench.streaming.report import HEAD, Result, table
from bench.streaming.rows import ROWS, chosen
from runtime.manifest import KVInfo, Manifest, PieceInfo, TargetInfo, WeightsInfo

ROW = next(row for row in ROWS if row.name == "uniform-1g")
ANSWER = {"seconds": 10.0, "tokens": 50, "peak": 1 << 30, "hits": 0, "read_bytes": 9e9, "disk_s": 6.0, "hit_rate": 0.25}


def test_rows_are_chosen_by_parts_of_their_names() -> None:
    assert chosen("") == ROWS
    assert [row.name for row in chosen("2g,dense")] == ["uniform-2g", "dense-1g"]
    with pytest.raises(ValueError, match="there are uniform-none, uniform-2g"):
        chosen("other")


def test_a_row_says_which_part_of_the_disk_was_used_and_what_was_foretold() -> None:
    ours = Result(ROW, "stratum", ANSWER, (1.1e9, 0.9e9), "host", Forecast(0.22, 0.24, 0.25, 63.9))
    peer = Result(ROW, "llama.cpp, read-ahead 128 KiB", {**ANSWER, "seconds": 25.0, "hits": 77}, (1e9, 1e9))
    broken = Result(ROW, "llama.cpp, read-ahead of the system", {}, fault="ended with 1")
    lines = table([ours, peer, broken]).splitlines()
    assert lines[0] == HEAD and len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| near uniform, 1 GiB | stratum | 5.00 | 2.50x | 1024 of 1024 | 0 | 9.00 | 1.50 | 1.10 / 0.90 | 90%, 60% | "
        "63.9 | 25.0% / 25.0% / 24.0% | 4.55 (-9%) |"
    )
    assert lines[3].startswith("| near uniform, 1 GiB | llama.cpp, read-ahead 128 KiB | 2.00 |  | 1024 of 1024 | 77 |")
    assert "| ended with 1 |" in lines[4]


def test_a_row_of_a_prompt() -> None:
    row = replace(ROW, prompt=512)
    answer = {**ANSWER, "tokens": 512, "seconds": 4.8, "again_seconds": 4.0, "bytes": 4e9}
    line = table([Result(row, "stratum", answer, (1e9, 1e9), "host", Forecast(4.2, 0.2, 0.25, 64.0))]).splitlines()[2]
    assert "| first token 4.80 s, 1.20x reading the model once |" in line
    assert line.endswith("| 25.0% / 25.0% | 4.20 s for the next prompt (+5%) |")


def test_recorded_choices_as_a_trace() -> None:
    pieces = tuple(PieceInfo("experts", n * 8192, 8192, 4096, f"layers.{n}.experts") for n in range(3))
    weights = WeightsInfo("weights/weights.bin", 3 * 8192, (), pieces)
    kv, target = KVInfo(3, 1, 4, "bf16", 24, 16), TargetInfo("host", "", "", ())
    manifest = Manifest("", {}, 10, 64, "bf16", target, (), kv, weights, {}, {}, 1)
    routing = [[[0], [1], [1]], [[1], [1], [0]]]
    trace = trace_of(manifest, routing, together=False)
    assert (trace.expert_count, trace.top_k, trace.expert_bytes) == (2, 1, (4096,) * 3)
    assert [batch.experts for batch in trace.batches()] == [(0,), (1,), (1,), (1,), (1,), (0,)]
    prompt = trace_of(manifest, routing, together=True)
    assert [batch.experts for batch in prompt.batches()] == [(0, 1), (1,), (1, 0)] and not prompt.decode.any()


def test_a_file_is_read_and_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4 << 20))
    forget(file)
    assert read_by(os.getpid()) >= 0
    try:
        assert all(disk_bytes_per_s(file, scattered=way, seconds=0.05) > 0 for way in (False, True))
    except OSError:
        pytest.skip("this file system refuses O_DIRECT")


def test_read_ahead_is_left_alone_unless_asked_for() -> None:
    with read_ahead("no-such-device", None):
        pass
    with pytest.raises(FileNotFoundError), read_ahead("no-such-device", 128):
        pass


@pytest.mark.parametrize("limit", [256 << 20, 0])
def test_a_process_in_a_group(limit: int) -> None:
    """What the process takes is counted, and the group is gone afterwards."""
    try:
        with MemoryGroup(limit) as group:
            done = subprocess.run(
                group.command([sys.executable, "-c", "print(len(bytes(20 << 20)))"]), capture_output=True
            )
            facts, path = group.facts(), group.path
    except OSError as fault:
        pytest.skip(f"no group can be made here: {fault.strerror}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(20 << 20).encode()
    assert facts["peak"] <= (limit or 256 << 20) and facts["hits"] >= 0 and not path.exists()


class _Steady:
    """A machine that gives the same at all times."""

    def __init__(self, threads: int) -> None:
        self.asked = 0

    def now(self) -> Moment:
        self.asked += 1
        return Moment(read=30e9, f32=100e9)

    def __enter__(self) -> _Steady:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.asked == 2 * turns.ROUNDS


def test_without_a_limit_engines_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers a turn more slowly than the one before; the first request is not a turn."""
    child = (
        "import sys; from bench.peers.child import serve; count = iter(range(99))\n"
        "serve({'about': lambda r: {'bytes': 1}, 'decode': lambda r: {'seconds': float(sys.argv[1]) * next(count)}})"
    )
    monkeypatch.setattr(turns, "Machine", _Steady)
    row = next(row for row in ROWS if not row.cap)
    commands = {name: [sys.executable, "-c", child, factor] for name, factor in (("stratum", "1"), ("llama.cpp", "2"))}
    try:
        ours, peer = turns.in_turns(row, commands, tokens=10)
    except OSError as fault:
        pytest.skip(f"no group can be made here: {fault.strerror}")
    assert ours.answer["turns"] == [float(n) for n in range(1, turns.ROUNDS + 1)]
    assert (ours.rate, peer.rate) == (10 / 5.0, 10 / 10.0)
    assert ours.target.startswith("host{dram.read=30.000GB/s") and not peer.target
    assert "| 2.00x |" in table([replace(ours, forecast=Forecast(0.5)), peer])
