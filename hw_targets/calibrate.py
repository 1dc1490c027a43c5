"""What this machine really does: read bandwidth, arithmetic peaks and what a barrier costs, measured once and kept.

`calibrate(threads)` runs the kernels of `calibrate_kernels` in a child process (about three seconds) and keeps the
result under the cache directory, keyed by machine, CPU, features, versions and threads; `refresh=True` measures
again. Each figure is the best of many short runs, because everything that disturbs a run only makes it slower; the
median is kept too, so that a disturbed measurement can be told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hw_targets import host
from hw_targets.cache_dir import cache_root
from hw_targets.calibrate_kernels import barrier_kernel, kernels
from ir.diagnostics import DiagnosticError

CALIBRATION_VERSION = 3
_BYTES = 1 << 30
_SECONDS = 0.03
_REPEATS = 15
_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Calibration:
    """Rates of all `threads` together: bytes/s, FLOP/s, integer operations/s. None: the CPU has no such instruction.

    `spread` is the largest (best - median) / best of bandwidths and peaks: above 0.1 the machine was busy meanwhile.
    `read_by_threads` is ((threads, bytes/s of all of them), ...) in rising order, up to `threads`. `barrier_seconds` is
    one meeting of all threads, spinning; None with one thread. `page_fault_seconds` is the first touch of 4096 bytes
    of memory; None where it could not be told from noise.
    """

    threads: int
    read_bandwidth: float
    f32_peak: float
    bf16_peak: float | None = None
    i8_peak: float | None = None
    spread: float = 0.0
    cpu: str = ""
    read_by_threads: tuple[tuple[int, float], ...] = ()
    barrier_seconds: float | None = None
    page_fault_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def peaks_of_one_thread(self) -> tuple[tuple[str, float], ...]:
        """(element, FLOP/s) pairs as `ComputeUnit.peak` holds them."""
        peaks = {"bf16": self.bf16_peak, "f32": self.f32_peak, "i8": self.i8_peak}
        return tuple((element, rate / self.threads) for element, rate in peaks.items() if rate is not None)

    def source(self) -> str:
        """What a target file would say about where these figures come from."""
        disturbed = f", spread {self.spread:.0%}" if self.spread > 0.1 else ""
        return f"measured on this machine with {self.threads} threads{disturbed}"


def calibrate(
    threads: int | None = None,
    *,
    refresh: bool = False,
    nbytes: int = _BYTES,
    seconds: float = _SECONDS,
    repeats: int = _REPEATS,
) -> Calibration:
    """The calibration of this machine with `threads` threads (default: all usable cores).

    Takes it from the cache unless `refresh`. `nbytes` is the memory read, `seconds` the length of one peak run; a
    calibration with other than the default values is not kept. Raises DiagnosticError when it cannot be measured.
    """
    count = threads if threads is not None else host.usable_cores()
    if count < 1:
        raise DiagnosticError(f"{count} threads cannot be calibrated", expected="1 or more")
    default = (nbytes, seconds, repeats) == (_BYTES, _SECONDS, _REPEATS)
    found = cached(count) if default and not refresh else None
    if found is not None:
        return found
    result = _measure(count, nbytes, seconds, repeats)
    if default:
        _store(count, result)
    return result


def cached(threads: int) -> Calibration | None:
    """The calibration kept for this machine and so many threads; None when there is none that can be read."""
    try:
        stored = json.loads(_path(threads).read_bytes())
        fields = dict(stored["calibration"])
        fields["read_by_threads"] = tuple((int(n), float(rate)) for n, rate in fields["read_by_threads"])
        found = Calibration(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    numbers = [found.read_bandwidth, found.f32_peak, found.bf16_peak, found.i8_peak, found.spread]
    numbers += [found.barrier_seconds, found.page_fault_seconds, *(rate for _, rate in found.read_by_threads)]
    sane = all(n is None or (isinstance(n, int | float) and 0 <= n < 1e18) for n in numbers)
    return found if sane and found.threads == threads and found.read_bandwidth and found.f32_peak else None


def machine_key(threads: int) -> str:
    """Names this machine, its CPU as this process sees it, and the versions that a measurement depends on."""
    triple, cpu, features, _ = host.host_isa()
    parts = [
        machine_identity(),
        host.cpu_model(),
        triple,
        cpu,
        ",".join(sorted(features)),
        str(os.cpu_count()),
        str(host.usable_memory()),
        importlib.metadata.version("llvmlite"),
        str(CALIBRATION_VERSION),
        str(threads),
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def machine_identity() -> str:
    """What tells this machine from others: the system's identity, else its name."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip() or platform.node()
    return platform.node()


def _path(threads: int) -> Path:
    return cache_root() / "calibration" / f"{machine_key(threads)}.json"


def _store(threads: int, result: Calibration) -> None:
    """Keeps a result; a cache that cannot be written only means that it is measured again."""
    path = _path(threads)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"calibration": result.as_dict()}, sort_keys=True, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _measure(threads: int, nbytes: int, seconds: float, repeats: int) -> Calibration:
    available = _available_memory()
    if available is not None:
        nbytes = min(nbytes, available // 2)
    request = kernel_request(threads, nbytes, seconds, repeats)
    triple, cpu, _, _ = host.host_isa()
    request["fewer"] = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < threads]
    if threads > 1:
        barrier = barrier_kernel(triple.split("-", 1)[0])
        request["ir"][barrier.name], request["kernels"][barrier.name] = barrier.ir_text, barrier.operations
    rates = _run_child(request)
    best = {name: max(values) for name, values in rates.items()}
    steady = {name: values for name, values in rates.items() if name not in ("barrier", "fault")}
    spread = max((best[name] - median(values)) / best[name] for name, values in steady.items())
    curve = [(int(name.removeprefix("read@")), rate) for name, rate in best.items() if name.startswith("read@")]
    return Calibration(
        threads=threads,
        read_bandwidth=best["read"],
        f32_peak=best["f32"],
        bf16_peak=best.get("bf16"),
        i8_peak=best.get("i8"),
        spread=round(spread, 4),
        cpu=cpu,
        read_by_threads=(*sorted(curve), (threads, best["read"])),
        barrier_seconds=1 / best["barrier"] if "barrier" in best else None,
        page_fault_seconds=1 / best["fault"] if "fault" in best else None,
    )


def kernel_request(threads: int, nbytes: int, seconds: float, repeats: int) -> dict[str, Any]:
    """What `calibrate_child` is asked: the kernels of this CPU, bytes to read, seconds of one run, runs."""
    triple, cpu, features, absent = host.host_isa()
    chosen = kernels(triple.split("-", 1)[0], features)
    return {
        "ir": {k.name: k.ir_text for k in chosen},
        "kernels": {k.name: k.operations for k in chosen},
        "cpu": cpu,
        "features": ",".join([*(f"+{f}" for f in sorted(features)), *(f"-{f}" for f in sorted(absent))]),
        "threads": threads,
        # The kernel reads whole pages, and prefetches past the end: the child reserves a huge page more.
        "bytes": max(nbytes // 4096, threads) * 4096,
        "seconds": seconds,
        "repeats": repeats,
    }


def _run_child(request: dict[str, Any]) -> dict[str, list[float]]:
    spec = importlib.util.find_spec("llvmlite")
    if spec is None or spec.origin is None:
        raise DiagnosticError("llvmlite is not installed", hint="pip install llvmlite")
    child = str(Path(__file__).with_name("calibrate_child.py"))
    command = [sys.executable, "-I", "-S", child, str(Path(spec.origin).parent.parent)]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise DiagnosticError(f"the calibration did not end within {_TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise DiagnosticError(
            f"the calibration failed (exit status {done.returncode}): {lines[-1] if lines else 'no message'}",
            hint="give the machine's figures as overrides, such as host{dram.read=40GB/s}",
        )
    return json.loads(done.stdout)


def _available_memory() -> int | None:
    """Free bytes by /proc/meminfo; None where there is none."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None
