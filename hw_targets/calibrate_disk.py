"""What a drive of this machine really reads: sustained rates by block size and requests in flight, measured and kept.

`calibrate_disk(directory)` writes a scratch file there (2 GiB, without a name, gone afterwards), reads it past the page
cache for about a minute and keeps the result under the cache directory, by machine, drive and kernel. It is done only
when asked; `cached(directory)` and `stored()` give what was measured before, `as_storage` what a `Target` holds of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hw_targets import disk_reads
from hw_targets.cache_dir import cache_root
from hw_targets.calibrate import machine_identity
from hw_targets.disk_reads import ScratchFile
from hw_targets.memory import Storage, StoragePoint
from hw_targets.quantities import format_bytes
from ir.diagnostics import DiagnosticError

VERSION = 2
FILE_BYTES = 2 << 30
MIN_BYTES, MAX_BYTES = 64 << 20, 64 << 30
# Large blocks first: they use up what is left of a burst.
BLOCKS = (16 << 20, 4 << 20, 1 << 20, 256 << 10, 64 << 10, 16 << 10, 4 << 10)
THREADS = (1, 2, 4, 8)
_LARGE = 4 << 20
_SECONDS, _LIMIT = 0.6, 4.0  # of one point
_REST_SECONDS, _BURST_SECONDS = 2.0, 12.0
_SYS_BLOCK = Path("/sys/dev/block")
Tell = Callable[[str, float, float, str], None]


@dataclass(frozen=True)
class DiskCalibration:
    """Rates of one drive in bytes/s. `points` holds (block bytes, threads, sustained rate) of random aligned reads.

    `sustained_bandwidth` is the second half of a long run of large blocks. No point is above it, unless half of the
    points of large blocks are: what is read faster for a moment is not kept up.

    `spread` is the median over the points of (best - worst) / best within one; above 0.2 machine or drive were busy.
    `burst_bandwidth` and `burst_bytes` are None where the drive does not begin faster than it goes on.
    """

    device: str
    model: str
    directory: str
    kernel: str
    file_bytes: int
    capacity_bytes: int | None
    points: tuple[tuple[int, int, float], ...]
    write_bandwidth: float
    sustained_bandwidth: float
    burst_bandwidth: float | None = None
    burst_bytes: int | None = None
    spread: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def as_storage(self, tier: str = "dram") -> Storage:
        """The drive as a target holds it. Writes are those of blocks of 4 MiB, one in flight."""
        points = []
        for block, threads, rate in self.points:
            writes = self.write_bandwidth if (block, threads) == (_LARGE, 1) else None
            points.append(StoragePoint(block, threads, rate, writes))
        disturbed = f", spread {self.spread:.0%}" if self.spread > 0.2 else ""
        return Storage(
            name=self.device,
            capacity_bytes=self.capacity_bytes,
            points=tuple(points),
            source=f"measured on this machine in {self.directory}, direct reads, sustained{disturbed}",
            tier=tier,
            burst_bandwidth=self.burst_bandwidth,
            burst_bytes=self.burst_bytes,
        )


def calibrate_disk(
    directory: str | os.PathLike[str],
    *,
    nbytes: int = FILE_BYTES,
    refresh: bool = True,
    seconds: float = _SECONDS,
    tell: Tell | None = None,
) -> DiskCalibration:
    """Measures the drive that `directory` lies on; takes a kept result instead when `refresh` is false.

    `nbytes` is the size of the scratch file, `seconds` the least time of one point; other than default seconds are for
    tests and not kept. Raises DiagnosticError for a directory that cannot be used, has no room or takes no direct
    reads.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise DiagnosticError("not a directory", where=str(path), expected="a directory on the drive to measure")
    if not MIN_BYTES <= nbytes <= MAX_BYTES and seconds == _SECONDS:
        raise DiagnosticError(
            f"a scratch file of {format_bytes(nbytes)}",
            where=str(path),
            expected=f"{MIN_BYTES >> 20} MiB to {MAX_BYTES >> 30} GiB",
        )
    found = None if refresh else cached(path)
    if found is not None:
        return found
    result = _measure(path, nbytes, seconds, tell or (lambda stage, done, total, unit: None))
    if seconds == _SECONDS:
        _store(result)
    return result


def cached(directory: str | os.PathLike[str]) -> DiskCalibration | None:
    """What was measured of the drive that a directory lies on, under this kernel; None when nothing was."""
    try:
        device, _, _ = device_of(Path(directory).expanduser())
    except OSError:
        return None
    return _load(_path(device))


def stored() -> list[DiskCalibration]:
    """All drives of this machine that were measured under this kernel, by name."""
    folder = cache_root() / "calibration"
    found = [_load(path) for path in sorted(folder.glob("disk-*.json"))]
    kept = [c for c in found if c is not None and _path(c.device).is_file() and c.kernel == platform.release()]
    unique = {c.device: c for c in kept if _load(_path(c.device)) == c}
    return [unique[name] for name in sorted(unique)]


def lies_in_memory(directory: str | os.PathLike[str], mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether files of this directory are kept in memory (tmpfs); False where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        number = os.stat(directory).st_dev
        for line in mounts.read_text().splitlines():
            device, kind = line.split()[2], line.partition(" - ")[2].split()[0]
            if device == f"{os.major(number)}:{os.minor(number)}":
                return kind in ("tmpfs", "ramfs")
    return False


def device_of(directory: Path, sys_block: Path = _SYS_BLOCK) -> tuple[str, str, int | None]:
    """(name, model, bytes) of the drive a directory lies on; of a partition the whole drive.

    Where the file system hides its drive (overlays, network), the name is made of the number the system gives it.
    """
    number = os.stat(directory).st_dev
    fallback = f"dev-{os.major(number)}-{os.minor(number)}"
    entry = sys_block / f"{os.major(number)}:{os.minor(number)}"
    if not entry.exists():
        return fallback, "", None
    place = entry.resolve()
    if (place / "partition").exists():
        place = place.parent
    model, size = "", None
    with contextlib.suppress(OSError):
        model = (place / "device" / "model").read_text(errors="replace").strip()
    with contextlib.suppress(OSError, ValueError):
        size = int((place / "size").read_text()) * 512
    name = re.sub(r"[^A-Za-z0-9._-]", "-", place.name)
    return name or fallback, model, size


def _measure(directory: Path, nbytes: int, seconds: float, tell: Tell) -> DiskCalibration:
    device, model, capacity = device_of(directory)
    quick = seconds < _SECONDS
    with ScratchFile(directory, nbytes, lambda done, total: tell("write", done, total, "bytes")) as file:
        tell("burst", 0, 0, "")
        time.sleep(0.0 if quick else _REST_SECONDS)
        limit = seconds if quick else _BURST_SECONDS
        start = disk_reads.read_blocks(file, min(_LARGE, file.nbytes), max(THREADS) // 2, limit, limit)
        fast, settled = disk_reads.burst(start), disk_reads.sustained(start)
        points, spreads = [], []
        cells = [(block, threads) for block in BLOCKS if block <= file.nbytes for threads in THREADS]
        for i, (block, threads) in enumerate(cells):
            tell("read", i, len(cells), "points")
            samples = disk_reads.read_blocks(
                file, block, threads, seconds, _LIMIT if not quick else 20 * seconds, settled
            )
            points.append((block, threads, disk_reads.sustained(samples)))
            spreads.append(disk_reads.spread(samples))
        tell("read", len(cells), len(cells), "points")
        ceiling = max(settled, median(rate for block, _, rate in points if block >= min(_LARGE, file.nbytes)))
        return DiskCalibration(
            device=device,
            model=model,
            directory=str(directory),
            kernel=platform.release(),
            file_bytes=file.nbytes,
            capacity_bytes=capacity,
            points=tuple(sorted((block, threads, min(rate, ceiling)) for block, threads, rate in points)),
            write_bandwidth=file.nbytes / file.write_seconds,
            sustained_bandwidth=ceiling,
            burst_bandwidth=fast[0] if fast else None,
            burst_bytes=fast[1] if fast else None,
            spread=round(median(spreads), 4),
        )


def _path(device: str) -> Path:
    parts = [machine_identity(), device, platform.release(), str(VERSION)]
    key = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
    return cache_root() / "calibration" / f"disk-{key}.json"


def _load(path: Path) -> DiskCalibration | None:
    """A kept result; None when it is missing, damaged or absurd."""
    try:
        fields = dict(json.loads(path.read_bytes())["disk"])
        fields["points"] = tuple((int(block), int(threads), float(rate)) for block, threads, rate in fields["points"])
        found = DiskCalibration(**fields)
        sizes = [n for block, threads, _ in found.points for n in (block, threads)]
        rates = [rate for _, _, rate in found.points] + [found.write_bandwidth, found.sustained_bandwidth]
        rates.append(found.burst_bandwidth or 1.0)
        texts = (found.device, found.model, found.directory, found.kernel)
        sane = all(0 < n < 1e15 for n in (*sizes, *rates)) and all(isinstance(text, str) for text in texts)
        return found if sane and found.points and 0 <= found.spread <= 1 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _store(result: DiskCalibration) -> None:
    """Keeps a result; a cache that cannot be written only means that it is not there the next time."""
    path = _path(result.device)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"disk": result.as_dict()}, sort_keys=True, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
