"""`compile-model targets`: list, show, detect, calibrate; as text and as JSON, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hw_targets import calibrate, calibrate_disk
from hw_targets.calibrate import Calibration
from hw_targets.calibrate_disk import DiskCalibration
from stratum.cli import main

MEASURED = Calibration(2, 6e10, 5.4e11, 1.08e12, 2.1e12, 0.02, "znver9", ((1, 4e10), (2, 6e10)), 2.5e-7, 1.5e-7)
DRIVE = DiskCalibration(
    device="vdx",
    model="a drive",
    directory="somewhere",
    kernel="6.0",
    file_bytes=2 << 30,
    capacity_bytes=None,
    points=((4096, 1, 5e7), (4096, 2, 9e7), (1 << 20, 1, 1.2e9), (1 << 20, 2, 1.3e9)),
    write_bandwidth=9e8,
    sustained_bandwidth=1.3e9,
    burst_bandwidth=2.9e9,
    burst_bytes=4 * 10**9,
    spread=0.3,
)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["targets", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_list_keeps_instruction_sets_and_machines_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "list")
    sets, _, machines = text.partition("Machines:")
    assert "x86-64-v3" in sets and "rtx-4090" not in sets and "rtx-4090" in machines and "* host" in machines
    entries = json.loads(said(capsys, "list", "--json"))["targets"]
    assert {e["name"] for e in entries if not e["machine"]} == {
        "aarch64",
        "cuda",
        "cuda-sm90a",
        "x86-64-v2",
        "x86-64-v3",
        "x86-64-v4",
        "x86-64-v4-bf16",
    }
    assert next(e for e in entries if e["name"] == "host")["runs_here"]


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", "8xh100{hbm=94GB nodes=2}")
    assert "2 nodes" in text and "8 x hbm     94 GB" in text and "nvlink" in text and "8 x nvme" in text
    assert "sparsity" not in text and "sparsity" in said(capsys, "show", "8xh100", "--sources")
    facts: dict[str, Any] = json.loads(said(capsys, "show", "8xh100", "--json"))
    assert facts["units"][0]["count"] == 8 and facts["fabrics"][0]["scope"] == "node" and facts["nodes"] == 1
    assert "did you mean 8xh100?" in said(capsys, "show", "8xh10", code=2)
    assert "0 is not a count" in said(capsys, "show", "8xh100{gpu.count=0}", code=2)


def test_calibrate_measures_anew(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[int | None, bool]] = []

    def measure(threads: int | None = None, *, refresh: bool = False) -> Calibration:
        asked.append((threads, refresh))
        return MEASURED

    monkeypatch.setattr(calibrate, "calibrate", measure)
    text = said(capsys, "calibrate")
    assert "znver9, 2 threads" in text and "read        40.0 GB/s with 1, 60.0 GB/s with 2" in text
    assert "i8 2100 GFLOP/s" in text and "barrier     0.25 us" in text and "page fault  0.15 us" in text
    assert text.endswith("spread      2%\n")
    facts = json.loads(said(capsys, "calibrate", "--threads", "2", "--json"))
    assert facts["read_by_threads"] == [[1, 4e10], [2, 6e10]] and facts["barrier_seconds"] == 2.5e-7
    assert asked == [(None, True), (2, True)]
    said(capsys, "calibrate", "--threads", "0", code=2)


def test_calibrate_a_drive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int]] = []

    def measure(directory: str, *, nbytes: int, tell: Any) -> DiskCalibration:
        asked.append((directory, nbytes))
        tell("read", 1, 2, "points")
        return DRIVE

    monkeypatch.setattr(calibrate_disk, "calibrate_disk", measure)
    text = said(capsys, "calibrate", "--disk", "somewhere", "--size", "1GiB")
    lines = [line.split() for line in text.splitlines()]
    assert ["4", "KiB", "50", "90"] in lines and ["1", "MiB", "1200", "1300"] in lines
    assert "vdx (a drive), somewhere" in text and "burst       2900 MB/s for 4.0 GB, not planned with" in text
    assert "long run    1300 MB/s" in text
    assert "spread      30%: the machine was busy, measure again" in text
    assert json.loads(said(capsys, "calibrate", "--disk", "somewhere", "--json"))["device"] == "vdx"
    assert asked == [("somewhere", 1 << 30), ("somewhere", 2 << 30)]


def test_calibrate_a_drive_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_disk, "lies_in_memory", lambda _: True)
    assert "files lie in memory here" in said(capsys, "calibrate", "--disk", str(tmp_path), code=2)
    monkeypatch.setattr(calibrate_disk, "lies_in_memory", lambda _: False)
    assert "not a directory" in said(capsys, "calibrate", "--disk", str(tmp_path / "nothing"), code=2)
    assert "'lots' is not a number" in said(capsys, "calibrate", "--disk", str(tmp_path), "--size", "lots", code=2)
    assert "64 MiB to 64 GiB" in said(capsys, "calibrate", "--disk", str(tmp_path), "--size", "1MiB", code=2)
