"""Profiles: time from cycles, the table by semantic name, the trace file; and diagnostics' text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import Profile, RuntimeDiagnostic, Session
from runtime.manifest import LaunchInfo, ProgramInfo
from runtime.trace import StepRecord

CYCLES_PER_S = 2e9
PROGRAM = ProgramInfo(
    "decode",
    "stratum_step_decode",
    16,
    0,
    (
        LaunchInfo("gemm_strips", "layers.0.mlp.down_proj", 4e6, 2e6),
        LaunchInfo("gemm_strips", "layers.1.mlp.down_proj", 4e6, 2e6),
        LaunchInfo("attention", "layers.1.self_attn", 0.0, 0.0),
    ),
)


class Clock:
    """A cycle counter that runs with perf_counter at a known rate."""

    def __call__(self) -> int:
        return int(time.perf_counter() * CYCLES_PER_S)


def made_profile(stamps_s: list[list[tuple[float, float]]], tokens: int = 2) -> Profile:
    """A profile of one step; `stamps_s` [launch][thread] = (start, end) in seconds after the step's start."""
    profile = Profile(len(stamps_s[0]), Clock())
    start_s = time.perf_counter()
    buffer = profile.buffer(PROGRAM)
    buffer[:] = np.round((np.array(stamps_s) + start_s) * CYCLES_PER_S).astype(np.int64)
    profile.add(StepRecord(PROGRAM, tokens, 1, buffer, start_s, start_s + 0.008))
    time.sleep(0.01)
    profile.finish()
    return profile


@pytest.fixture
def profile() -> Iterator[Profile]:
    yield made_profile(
        [[(0.0005, 0.001), (0.000, 0.002)], [(0.002, 0.004), (0.002, 0.003)], [(0.004, 0.006), (0.004, 0.005)]]
    )


def test_rows(profile: Profile) -> None:
    """Launches last from the first thread in to the last one out; layers fold together; rates use the manifest."""
    gemm, attention = profile.rows()
    assert (gemm.origin, gemm.kernel, gemm.calls) == ("layers.*.mlp.down_proj", "gemm_strips", 2)
    assert gemm.seconds == pytest.approx(0.004, rel=1e-2)
    assert gemm.fraction == pytest.approx(0.5, rel=1e-2)
    assert gemm.gigabytes_per_s == pytest.approx(2.0, rel=1e-2)  # 8 MB in 4 ms
    assert gemm.gigaflops == pytest.approx(2.0, rel=1e-2)  # 2 launches * 2 tokens * 2 MFLOP in 4 ms
    assert (attention.origin, attention.gigabytes_per_s, attention.gigaflops) == ("layers.*.self_attn", 0.0, 0.0)
    by_layer = profile.rows(by_layer=True)
    assert sorted(row.origin for row in by_layer) == [
        "layers.0.mlp.down_proj",
        "layers.1.mlp.down_proj",
        "layers.1.self_attn",
    ]


def test_table(profile: Profile) -> None:
    lines = profile.table().splitlines()
    assert lines[0].split() == ["origin", "kernel", "time", "%", "calls", "GB/s", "GFLOP/s"]
    assert lines[1].split()[:2] == ["layers.*.mlp.down_proj", "gemm_strips"]
    assert lines[-1].startswith("1 native steps, 8.000 ms on 2 threads; ")
    assert len({len(line) for line in lines[:-1]}) == 1  # columns line up
    short = profile.table(limit=1).splitlines()
    assert short[2].startswith("... 1 more rows, ")


def test_events(profile: Profile) -> None:
    events = list(profile.events())
    names = {(e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert names == {(0, "steps"), (1, "thread 0"), (2, "thread 1")}
    complete = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], e["tid"], e["dur"]) for e in complete[:1]] == [("decode", 0, 8000.0)]
    assert len(complete) == 1 + 3 * 2
    last = complete[-1]
    assert (last["name"], last["tid"], last["args"]) == ("layers.1.self_attn", 2, {"kernel": "attention", "launch": 2})
    assert last["ts"] == pytest.approx(4000, rel=1e-2) and last["dur"] == pytest.approx(1000, rel=2e-2)


def test_a_session_is_profiled(artifact_path: Path, tmp_path: Path) -> None:
    with Session(artifact_path, threads=2) as session:
        session.step([1], [0], [0], [0])
        with session.profile() as profile:
            session.step(list(range(20)), range(1, 21), [0] * 20, [19])
        session.step([1], [21], [0], [0])
    assert [(step.program.name, step.tokens, step.rows) for step in profile.steps] == [
        ("prefill", 16, 0),
        ("decode", 4, 1),
    ]
    for step in profile.steps:
        assert np.all(step.cycles[:, :, 1] >= step.cycles[:, :, 0]) and np.all(step.cycles > 0)
        # calibrated: kernels lie inside the call that ran them, to a fraction of a millisecond
        seconds = profile.seconds(step.cycles)
        assert seconds.min() > step.started_s - 1e-3 and seconds.max() < step.ended_s + 1e-3
    path = tmp_path / "trace.json"
    profile.write_trace(path)
    trace = json.loads(path.read_text())
    assert {e["name"] for e in trace["traceEvents"] if e["ph"] == "X"} == {
        "prefill",
        "decode",
        "layers.0.self_attn",
        "layers.1.mlp",
    }
    assert all(e["dur"] >= 0 and e["pid"] == trace["traceEvents"][0]["pid"] for e in trace["traceEvents"] if "dur" in e)
    assert "layers.*.mlp" in profile.table()


def test_empty_profile(tmp_path: Path) -> None:
    profile = Profile(1, Clock())
    profile.finish()
    assert profile.rows() == []
    assert profile.table().endswith("0 native steps, 0.000 ms on 1 threads; 0.000 ms outside kernels")
    profile.write_trace(tmp_path / "t.json")
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) == 3


def test_unwritable_trace(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(RuntimeDiagnostic, match=r"no/t\.json: error: cannot write the trace"):
        profile.write_trace(tmp_path / "no" / "t.json")


def test_a_counter_that_stands_still() -> None:
    profile = Profile(1, lambda: 5)
    with pytest.raises(RuntimeDiagnostic, match="the cycle counter of this CPU does not run"):
        profile.seconds(np.array([5]))


def test_diagnostic_text() -> None:
    assert str(RuntimeDiagnostic("what")) == "error: what"
    full = RuntimeDiagnostic("what", where="file", expected="this", hint="do that")
    assert str(full) == "file: error: what\nexpected: this\nhint: do that"
