"""Disk calibration: bursts are told from what lasts, nothing stays behind, results are kept, checked and used."""

import errno
import json
import os
import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_targets
from hw_targets import calibrate_disk, disk_reads
from hw_targets.calibrate_disk import DiskCalibration
from hw_targets.disk_reads import ScratchFile
from ir.diagnostics import DiagnosticError

QUICK = {"nbytes": 16 << 20, "seconds": 0.01}
SOME = DiskCalibration(
    device="vdx",
    model="a drive",
    directory="somewhere",
    kernel=platform.release(),
    file_bytes=2 << 30,
    capacity_bytes=10**12,
    points=((4096, 1, 5e7), (4096, 8, 2e8), (4 << 20, 1, 1.2e9), (4 << 20, 8, 1.3e9)),
    write_bandwidth=9e8,
    sustained_bandwidth=1.3e9,
    burst_bandwidth=2.9e9,
    burst_bytes=4 * 10**9,
    spread=0.05,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture
def drive(tmp_path):
    """A directory whose file system takes direct reads."""
    folder = tmp_path / "drive"
    folder.mkdir()
    try:
        ScratchFile(folder, 4 << 20).__exit__()
    except DiagnosticError as fault:
        if "direct reads" not in str(fault):
            raise
        pytest.skip("the file system of the tests takes no direct reads")
    return folder


def samples_of(rate, seconds=4.0, step=0.02):
    """What a drive with this rate(t) would give."""
    samples, total = [(0.0, 0)], 0.0
    for i in range(1, int(seconds / step) + 1):
        total += rate(i * step) * step
        samples.append((i * step, int(total)))
    return samples


def test_small_measurement_of_a_real_drive(cache, drive):
    stages = []
    found = calibrate_disk.calibrate_disk(drive, tell=lambda stage, *rest: stages.append(stage), **QUICK)
    assert [(b, t) for b, t, _ in found.points] == sorted((b, t) for b in calibrate_disk.BLOCKS for t in (1, 2, 4, 8))
    assert all(1e4 < rate < 1e12 for _, _, rate in found.points) and 1e4 < found.write_bandwidth < 1e12
    assert max(rate for _, _, rate in found.points) <= found.sustained_bandwidth
    assert found.file_bytes == 16 << 20 and 0 <= found.spread <= 1
    assert list(dict.fromkeys(stages)) == ["write", "burst", "read"]
    assert list(drive.iterdir()) == [] and not cache.exists()  # no file left, and nothing of a quick run kept


def test_scratch_file_has_no_name_and_random_bytes(drive):
    with ScratchFile(drive, 9 << 20) as file:
        assert file.nbytes == 8 << 20 and list(drive.iterdir()) == []
        assert os.fstat(file.descriptor).st_nlink == 0 and os.fstat(file.descriptor).st_size == 8 << 20
        samples = disk_reads.read_blocks(file, 1 << 20, 2, 0.02)
        assert samples[-1][1] > 0 and samples[-1][1] % (1 << 20) == 0
        descriptor = file.descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_read_error_is_one_message(drive, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with ScratchFile(drive, 4 << 20) as file:
        monkeypatch.setattr(disk_reads.os, "preadv", fail)
        with pytest.raises(DiagnosticError, match="reading the scratch file failed: Input/output error"):
            disk_reads.read_blocks(file, 4096, 2, 0.02)


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_writing_that_stops_leaves_nothing(drive, monkeypatch, fault):
    def fail(*arguments):
        raise fault

    monkeypatch.setattr(disk_reads.os, "pwrite", fail)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises((DiagnosticError, KeyboardInterrupt)) as caught:
        ScratchFile(drive, 4 << 20)
    if isinstance(fault, OSError):
        assert "cannot write a scratch file: No space left" in str(caught.value)
    assert list(drive.iterdir()) == []
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_full_drive_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    class Room:
        f_bavail, f_frsize, f_blocks = 1000, 1 << 20, 100_000

    monkeypatch.setattr(disk_reads.os, "statvfs", lambda path: Room)
    with pytest.raises(DiagnosticError, match="no room for a scratch file of 2048 MiB: 1000 MiB are free") as caught:
        calibrate_disk.calibrate_disk(tmp_path)
    assert "expected: 4048 MiB, so that 2000 MiB stay free" in str(caught.value)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(DiagnosticError, match="not a directory"):
        calibrate_disk.calibrate_disk(tmp_path / "nothing")
    with pytest.raises(DiagnosticError, match="64 MiB to 64 GiB"):
        calibrate_disk.calibrate_disk(tmp_path, nbytes=1 << 20)
    with pytest.raises(DiagnosticError, match="64 MiB to 64 GiB"):
        calibrate_disk.calibrate_disk(tmp_path, nbytes=1 << 50)

    def refuse(*arguments, **options):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(disk_reads.os, "open", refuse)
    monkeypatch.setattr(disk_reads.tempfile, "mkstemp", refuse)
    with pytest.raises(DiagnosticError, match="takes no direct reads"):
        ScratchFile(tmp_path, 4 << 20)
    monkeypatch.delattr(disk_reads.os, "O_DIRECT", raising=False)
    with pytest.raises(DiagnosticError, match="this system has no direct reads"):
        ScratchFile(tmp_path, 4 << 20)


def test_burst_is_told_from_what_lasts():
    samples = samples_of(lambda t: 2.9e9 if t <= 1.0 else 1.3e9)
    assert disk_reads.sustained(samples) == pytest.approx(1.3e9, rel=0.01)
    found = disk_reads.burst(samples)
    assert found is not None
    assert found[0] == pytest.approx(2.9e9, rel=0.02) and found[1] == pytest.approx(2.9e9, rel=0.06)
    assert disk_reads.burst(samples_of(lambda t: 1.3e9)) is None
    assert disk_reads.burst(samples_of(lambda t: 0.0)) is None
    late = samples_of(lambda t: 2.9e9 if t <= 2.9 else 1.3e9)  # it fell just before the end
    assert not disk_reads.is_steady(late) and disk_reads.sustained(late) < 1.5e9
    assert disk_reads.spread(samples) == pytest.approx(0, abs=1e-6) and disk_reads.spread(late) > 0.5


@given(st.floats(1e6, 1e10), st.floats(1.0, 4.0), st.floats(0.1, 1.8))
def test_sustained_rate_is_never_that_of_a_burst(rate, factor, until):
    samples = samples_of(lambda t: rate * factor if t <= until else rate)
    assert disk_reads.sustained(samples) == pytest.approx(rate, rel=0.02)
    found = disk_reads.burst(samples)
    assert found is None or (found[0] > rate and found[1] <= samples[-1][1])


def test_reading_goes_on_until_a_burst_is_over(drive, monkeypatch):
    """The clock and the samples are made up: 3 GB/s for one second, then 1 GB/s."""
    with ScratchFile(drive, 4 << 20) as file:
        clock = iter([i * 0.1 for i in range(1000)])
        monkeypatch.setattr(disk_reads.time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(disk_reads.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(disk_reads.os, "preadv", lambda *arguments: 1 << 20)
        real = disk_reads.rate_between

        def made_up(samples, start, end):
            shaped = [(t, int(3e9 * t if t < 1 else 3e9 + 1e9 * (t - 1))) for t, _ in samples]
            return real(shaped, start, end)

        monkeypatch.setattr(disk_reads, "rate_between", made_up)
        short = disk_reads.read_blocks(file, 4096, 1, 0.5, 4.0)
        long = disk_reads.read_blocks(file, 4096, 1, 0.5, 4.0, ceiling=1.0e9)
        stubborn = disk_reads.read_blocks(file, 4096, 1, 0.5, 1.0, ceiling=0.5e9)
    assert short[-1][0] < 0.8 and 1.0 < long[-1][0] < 2.5 and 1.0 <= stubborn[-1][0] < 1.3


def test_point_that_is_faster_than_what_lasts_is_not_believed(drive, monkeypatch):
    """The long run keeps up 1 GB/s; one of the large points met a fresh burst."""

    def read_blocks(file, block, threads, *rest):
        rate = 3e9 if (block, threads) == (16 << 20, 8) else 2e7 if block == 4096 else 1e9
        return samples_of(lambda t: rate)

    monkeypatch.setattr(disk_reads, "read_blocks", read_blocks)
    found = calibrate_disk.calibrate_disk(drive, **QUICK)
    rates = {(block, threads): rate for block, threads, rate in found.points}
    assert rates[16 << 20, 8] == rates[4 << 20, 1] == pytest.approx(1e9) and rates[4096, 1] == pytest.approx(2e7)
    assert found.sustained_bandwidth == pytest.approx(1e9) and found.burst_bandwidth is None


def test_kept_and_used(cache, drive, monkeypatch):
    runs = []

    def measure(directory, nbytes, seconds, tell):
        runs.append(nbytes)
        device, model, size = calibrate_disk.device_of(directory)
        return DiskCalibration(**{**SOME.as_dict(), "device": device, "model": model, "capacity_bytes": size})

    monkeypatch.setattr(calibrate_disk, "_measure", measure)
    assert calibrate_disk.cached(drive) is None and calibrate_disk.stored() == []
    first = calibrate_disk.calibrate_disk(drive)
    assert calibrate_disk.cached(drive) == first and calibrate_disk.stored() == [first]
    assert calibrate_disk.calibrate_disk(drive, refresh=False) == first and len(runs) == 1
    calibrate_disk.calibrate_disk(drive)
    assert len(runs) == 2
    host = hw_targets.load("host")
    disk = host.store()
    assert disk is not None and disk.name == first.device and disk.tier == "dram"
    assert disk.read_rate(4096, 1) == 5e7 and disk.read_rate() == 1.3e9 and disk.write_rate() == 9e8
    assert (disk.burst_bandwidth, disk.burst_bytes) == (2.9e9, 4 * 10**9)
    assert "measured on this machine in somewhere" in disk.source
    slower = hw_targets.load(f"host{{{first.device}.read=650MB/s}}").store()
    assert slower is not None and slower.read_rate(4096, 1) == pytest.approx(2.5e7)
    monkeypatch.setattr(calibrate_disk.platform, "release", lambda: "another kernel")
    assert calibrate_disk.cached(drive) is None and calibrate_disk.stored() == []


@pytest.mark.parametrize(
    "change",
    [
        {"points": []},
        {"points": [[4096, 1, -1.0]]},
        {"points": [[4096, 1]]},
        {"points": [["x", 1, 1.0]]},
        {"spread": 7.0},
        {"device": 3},
        {"write_bandwidth": "fast"},
        {"evil": 1},
    ],
)
def test_damaged_result_is_not_used(cache, drive, monkeypatch, change):
    monkeypatch.setattr(calibrate_disk, "_measure", lambda directory, *rest: SOME)
    monkeypatch.setattr(calibrate_disk, "device_of", lambda directory: ("vdx", "", None))
    calibrate_disk.calibrate_disk(drive)
    assert calibrate_disk.cached(drive) == SOME
    (path,) = cache.iterdir()
    path.write_text(json.dumps({"disk": json.loads(path.read_text())["disk"] | change}))
    assert calibrate_disk.cached(drive) is None and calibrate_disk.stored() == []
    path.write_text("[")
    assert calibrate_disk.cached(drive) is None


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, drive):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate_disk, "_measure", lambda directory, *rest: SOME)
    assert calibrate_disk.calibrate_disk(drive) == SOME


def test_memory_is_no_drive(tmp_path):
    number = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    for kind, found in (("tmpfs", True), ("ext4", False)):
        device = f"{os.major(number)}:{os.minor(number)}"
        mounts.write_text(f"22 1 0:7 / /x rw - tmpfs none rw\n23 1 {device} / /y rw shared:1 - {kind} dev rw\n")
        assert calibrate_disk.lies_in_memory(tmp_path, mounts) is found
    assert not calibrate_disk.lies_in_memory(tmp_path, tmp_path / "nothing")


def test_drive_of_a_partition(tmp_path):
    number = os.stat(tmp_path).st_dev
    disk = tmp_path / "devices" / "nvme0n1"
    (disk / "nvme0n1p2").mkdir(parents=True)
    (disk / "device").mkdir()
    (disk / "device" / "model").write_text("Fast Drive  \n")
    (disk / "size").write_text("1000\n")
    (disk / "nvme0n1p2" / "partition").write_text("2\n")
    links = tmp_path / "block"
    links.mkdir()
    (links / f"{os.major(number)}:{os.minor(number)}").symlink_to(disk / "nvme0n1p2")
    assert calibrate_disk.device_of(tmp_path, links) == ("nvme0n1", "Fast Drive", 512_000)
    unknown = calibrate_disk.device_of(tmp_path, tmp_path / "nothing")
    assert unknown == (f"dev-{os.major(number)}-{os.minor(number)}", "", None)
