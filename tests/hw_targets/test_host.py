"""The host: what the system's files say, and that its code runs here."""

import os
from pathlib import Path

import hw_targets
from hw_targets import calibrate, host
from hw_targets.target import Cache


def fake_cache(root: Path, index: int, **files: str) -> None:
    folder = root / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_detected_host(tmp_path, monkeypatch):
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path))
    target = hw_targets.load("host")
    assert target.arch == os.uname().machine
    assert target.can_run(target)
    assert target.unit().cores == len(os.sched_getaffinity(0))
    assert target.tier("dram").capacity_bytes > 1 << 28
    assert target.tier("dram").read_bandwidth is None and target.unit().peak == ()  # nothing was measured yet
    assert not target.llvm_features & target.llvm_disabled


def test_host_runs_the_base_level_of_its_architecture():
    base = {"x86_64": "x86-64-v2", "aarch64": "aarch64"}[os.uname().machine]
    assert hw_targets.load("host").can_run(hw_targets.load(base))


def test_calibration_reaches_the_target(tmp_path, monkeypatch):
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path))
    cores = host.usable_cores()
    measured = calibrate.Calibration(cores, 50e9, 0.1e12 * cores, 0.2e12 * cores, None, 0.01, "cpu")
    calibrate._store(cores, measured)
    target = hw_targets.load("host")
    assert target.tier("dram").read_bandwidth == 50e9
    assert dict(target.unit().peak) == {"f32": 0.1e12, "bf16": 0.2e12}
    assert "measured" in target.unit().source


def test_caches_of_a_system(tmp_path):
    line = {"coherency_line_size": "64"}
    fake_cache(tmp_path, 0, type="Data", level="1", size="32K", shared_cpu_list="0,64", **line)
    fake_cache(tmp_path, 1, type="Instruction", level="1", size="32K", shared_cpu_list="0,64", **line)
    fake_cache(tmp_path, 3, type="Unified", level="3", size="256M", shared_cpu_list="0-7,64-71", **line)
    fake_cache(tmp_path, 2, type="Unified", level="2", size="1024K", shared_cpu_list="0,64", **line)
    fake_cache(tmp_path, 4, type="Unified", level="4")  # the rest is hidden
    assert host.caches(tmp_path) == (
        Cache(1, "data", 32 << 10, 64, 2),
        Cache(2, "unified", 1 << 20, 64, 2),
        Cache(3, "unified", 256 << 20, 64, 16),
    )
    assert host.caches(tmp_path / "nothing") == ()


def test_memory_limit_of_a_control_group(tmp_path):
    whole = host.usable_memory(tmp_path)
    assert whole is not None and whole > 1 << 28
    (tmp_path / "memory.max").write_text("max\n")
    assert host.usable_memory(tmp_path) == whole
    (tmp_path / "memory.max").write_text("268435456\n")
    assert host.usable_memory(tmp_path) == 1 << 28


def test_cpu_model(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3.0: fast\n")
    assert host.cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 3.0: fast"
    assert host.cpu_model(tmp_path / "nothing")
