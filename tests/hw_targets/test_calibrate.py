"""Calibration: kernels compile for every target, figures are sane here, results are kept and checked."""

import json
import subprocess

import pytest

import hw_targets
from codegen.compile_worker import CompileRequest, compile_many, shutdown
from hw_targets import calibrate, calibrate_kernels, host
from hw_targets.calibrate import Calibration
from ir.diagnostics import DiagnosticError

QUICK = {"nbytes": 64 << 20, "seconds": 0.01, "repeats": 2}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path))
    return tmp_path / "calibration"


def test_quick_calibration_of_this_machine(cache):
    found = calibrate.calibrate(1, **QUICK)
    assert 1e8 < found.read_bandwidth < 1e13
    assert 1e8 < found.f32_peak < 1e13
    assert 0 <= found.spread < 1
    assert found.read_by_threads == ((1, found.read_bandwidth),) and found.barrier_seconds is None
    assert found.page_fault_seconds is None or 1e-9 < found.page_fault_seconds < 1e-2
    host = hw_targets.load("host")
    assert (found.bf16_peak is not None) == (host.has("avx512bf16") or (host.arch == "aarch64" and host.has("bf16")))
    if found.bf16_peak is not None and host.has("avx512bf16"):
        assert found.bf16_peak > found.f32_peak
    assert not cache.exists()  # a quick measurement is not kept


@pytest.mark.parametrize("extra", ["", "+avxvnni"])
def test_kernels_compile_without_spills_for_every_target(extra):
    requests = []
    for name in ("aarch64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"):
        if extra and name != "x86-64-v3":
            continue
        target = hw_targets.load(f"{name}{{features={extra}}}" if extra else name)
        barrier = calibrate_kernels.barrier_kernel(target.arch)
        for kernel in (*calibrate_kernels.kernels(target.arch, target.llvm_features), barrier):
            requests.append(
                CompileRequest(
                    kernel.ir_text,
                    target.llvm_triple,
                    target.llvm_cpu,
                    target.feature_string(),
                    opt_level=2,
                    emit="assembly",
                    name=f"{name} {kernel.name}",
                )
            )
    for request, assembly in zip(requests, compile_many(requests, workers=1), strict=True):
        loop = assembly.split(b".LBB0_1")[1]  # from the label to the jump back
        assert b"rsp" not in loop and b"[sp" not in loop, request.name
    shutdown()


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("x86-64-v2", ["read", "f32"]),
        ("x86-64-v4", ["read", "f32"]),
        ("x86-64-v4-bf16", ["read", "f32", "bf16", "i8"]),
        ("aarch64", ["read", "f32"]),
        ("aarch64{features=+bf16+dotprod}", ["read", "f32", "bf16", "i8"]),
    ],
)
def test_which_kernels_a_target_has(target, names):
    found = hw_targets.load(target)
    assert [k.name for k in calibrate_kernels.kernels(found.arch, found.llvm_features)] == names


def test_kept_and_refreshed(cache, monkeypatch):
    runs = []

    def child(request):
        runs.append(request["threads"])
        return {"read": [1e10, 2e10, 2e10], "f32": [1e11, 1e11, 1e11 + len(runs)]}

    monkeypatch.setattr(calibrate, "_run_child", child)
    first = calibrate.calibrate(1)
    assert first == Calibration(1, 2e10, 1e11 + 1, None, None, 0.0, first.cpu, ((1, 2e10),))
    assert calibrate.calibrate(1) == first and runs == [1]
    assert calibrate.calibrate(1, refresh=True).f32_peak == 1e11 + 2
    assert calibrate.calibrate(2).threads == 2 and runs == [1, 1, 2]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.skipif(host.usable_cores() < 2, reason="two threads that spin on one core take turns of milliseconds")
def test_threads_and_barriers_of_this_machine(cache):
    found = calibrate.calibrate(2, **QUICK)
    assert [threads for threads, _ in found.read_by_threads] == [1, 2]
    assert all(1e8 < rate < 1e13 for _, rate in found.read_by_threads)
    assert found.read_by_threads[-1][1] == found.read_bandwidth
    assert found.barrier_seconds is not None and 1e-9 < found.barrier_seconds < 1


def test_host_shows_what_was_measured(cache, monkeypatch):
    threads = 2
    monkeypatch.setattr(host, "usable_cores", lambda: threads)
    answers = {"read": [4e10], "f32": [1e11], "read@1": [3e10], "barrier": [4e6], "fault": [4e6]}
    monkeypatch.setattr(calibrate, "_run_child", lambda request: answers)
    calibrate.calibrate(threads)
    target = hw_targets.load("host")
    unit, tier = target.unit(), target.tier()
    assert unit is not None and tier is not None
    assert unit.barrier_seconds == 2.5e-7 and tier.read_by_threads == ((1, 3e10), (threads, 4e10))
    assert tier.page_fault_seconds == 2.5e-7
    assert tier.read_rate(1) == 3e10 and tier.read_rate() == 4e10
    assert calibrate.cached(threads) == calibrate.calibrate(threads)


def test_spread_tells_a_disturbed_measurement(cache, monkeypatch):
    monkeypatch.setattr(calibrate, "_run_child", lambda request: {"read": [1e10, 1e10, 2e10], "f32": [1e11]})
    assert calibrate.calibrate(1, refresh=True).spread == 0.5


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"calibration": {"threads": 1}}', '{"calibration": {"threads": 1, "evil": 2}}', "BAD"]
)
def test_damaged_result_is_measured_again(cache, monkeypatch, content):
    monkeypatch.setattr(calibrate, "_run_child", lambda request: {"read": [1e10], "f32": [1e11]})
    calibrate.calibrate(1)
    (path,) = cache.iterdir()
    if content == "BAD":
        stored = json.loads(path.read_text())
        stored["calibration"]["f32_peak"] = "fast"
        content = json.dumps(stored)
    path.write_text(content)
    assert calibrate.cached(1) is None
    assert calibrate.calibrate(1).f32_peak == 1e11
    assert calibrate.cached(1) is not None


def test_other_machine_or_version_is_measured_again(monkeypatch):
    key = calibrate.machine_key(1)
    assert calibrate.machine_key(2) != key
    monkeypatch.setattr(calibrate, "CALIBRATION_VERSION", calibrate.CALIBRATION_VERSION + 1)
    assert calibrate.machine_key(1) != key


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "_run_child", lambda request: {"read": [1e10], "f32": [1e11]})
    assert calibrate.calibrate(1).read_bandwidth == 1e10


def test_child_that_dies(monkeypatch, cache):
    monkeypatch.setattr(calibrate_kernels, "_read_kernel", lambda features: "not IR")
    with pytest.raises(DiagnosticError, match=r"the calibration failed \(exit status 1\): .*") as caught:
        calibrate.calibrate(1, **QUICK)
    assert "host{dram.read=" in str(caught.value)


def test_child_that_hangs(monkeypatch, cache):
    def run(*arguments, **options):
        raise subprocess.TimeoutExpired("child", 1)

    monkeypatch.setattr(calibrate.subprocess, "run", run)
    with pytest.raises(DiagnosticError, match="did not end within 120 s"):
        calibrate.calibrate(1, **QUICK)


def test_no_threads_is_refused():
    with pytest.raises(DiagnosticError, match="0 threads cannot be calibrated"):
        calibrate.calibrate(0)
