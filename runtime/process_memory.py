"""What this process takes of the memory it may use, as those count who limit it.

A control group with a limit (a container) counts the pages of files that its processes brought in, those included that
no process has mapped: a library that is read ahead whole counts whole, unless somebody else was first and is charged
for it. There `resident_bytes` counts them, at most as many as the group is charged for, and `give_back_read_ahead`
drops those that are of no use. Elsewhere nothing is dropped and the resident set counts.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

PAGE_BYTES = mmap.PAGESIZE
_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self")


def resident_bytes() -> int:
    """What this process has in memory now, in bytes."""
    pages = [int(word) for word in (_OWN / "statm").read_text().split()]
    resident, shared = pages[1] * PAGE_BYTES, pages[2] * PAGE_BYTES
    if memory_limit() is None:
        return resident
    cached = 0
    for descriptor, nbytes in _files():
        cached += cached_bytes(descriptor, nbytes)
        os.close(descriptor)
    charged = charged_cache()
    return resident - shared + max(shared, cached if charged is None else min(cached, charged))


def peak_resident_bytes() -> int:
    """The most it has had in memory since it began, in bytes. getrusage counts the process that started it, too."""
    words = (_OWN / "status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) << 10  # in kB


def give_back_read_ahead() -> None:
    """Drops what was read of this process's libraries and modules and nobody has mapped, where it counts."""
    if memory_limit() is not None:
        for descriptor, _ in _files():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _memory_groups(own: Path) -> Iterator[tuple[str, bool]]:
    """The control groups that count this process's memory, as `own` lists them: (path, whether of version 1)."""
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        first = "memory" in controllers.split(",")
        if first or not controllers:
            yield path, first


def memory_limit(own: Path = _OWN / "cgroup", root: Path = _ROOT) -> int | None:
    """The limit of the control groups this process is in, of version 1 or 2; None where there is none."""
    limits: list[int] = []
    with suppress(OSError):
        for path, first in _memory_groups(own):
            folder, name = (root / "memory", "memory.limit_in_bytes") if first else (root, "memory.max")
            group = Path(path.lstrip("/"))
            for part in (group, *group.parents):
                with suppress(OSError, ValueError):
                    limits.append(int((folder / part / name).read_text()))
    physical = os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES
    return min((limit for limit in limits if limit < physical), default=None)


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What this process may still take: free memory with what the page cache would give up, within its limit."""
    free = os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES
    with suppress(OSError, ValueError):
        words = meminfo.read_text().split()
        free = int(words[words.index("MemAvailable:") + 1]) << 10  # in kB
    limit = memory_limit()
    return free if limit is None else max(0, min(free, limit - resident_bytes()))


def charged_cache(own: Path = _OWN / "cgroup", root: Path = _ROOT) -> int | None:
    """Bytes of cached files that the control group of this process is charged for; None where nobody says."""
    with suppress(OSError):
        for path, first in _memory_groups(own):
            group, name = (root / "memory", "total_cache") if first else (root, "file")
            with suppress(OSError, ValueError):
                lines = (group / path.lstrip("/") / "memory.stat").read_text().splitlines()
                counts = {words[0]: words[1] for line in lines if len(words := line.split()) == 2}
                return int(counts.get(name, ""))
    return None


def cached_bytes(descriptor: int, nbytes: int) -> int:
    """How much of an open file is in the page cache. All of it where the system does not tell strangers."""
    if nbytes <= 0:
        return 0
    with mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        pages = np.zeros(-(-nbytes // PAGE_BYTES), np.uint8)
        asked = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), ctypes.c_void_p(pages.ctypes.data)
        )
        del view
    return nbytes if asked else int(np.count_nonzero(pages & 1)) * PAGE_BYTES


def _files() -> Iterator[tuple[int, int]]:
    """(descriptor, bytes) of the files this process has mapped and of the modules it has read."""
    lines = (_OWN / "maps").read_text().splitlines()
    mapped = [fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6 and fields[5].startswith("/")]
    modules = [getattr(module, "__cached__", None) for module in list(sys.modules.values())]
    for path in dict.fromkeys([*mapped, *(name for name in modules if isinstance(name, str))]):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if Path(path).is_file():
                yield descriptor, os.fstat(descriptor).st_size
            else:
                os.close(descriptor)
