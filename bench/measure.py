"""Helpers of the measuring scripts: child processes with their peak memory, medians, tables, the machine in words."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finished:
    """A child that ended well: seconds of wall time, peak resident bytes of it alone, what it printed."""

    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str


def run(command: Sequence[str], *, env: dict[str, str] | None = None) -> Finished:
    """Runs a command to its end. Raises SystemExit with its words when it fails."""
    # A small program in between: RUSAGE_CHILDREN of this process would keep the peak of earlier children.
    wrapper = (
        "import json,resource,subprocess,sys,time;"
        "t=time.perf_counter();p=subprocess.run(sys.argv[2:],stdout=open(sys.argv[1]+'.out','w'),stderr=open(sys.argv[1]+'.err','w'));"
        "print(json.dumps([p.returncode,resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024,"
        "time.perf_counter()-t]))"
    )
    base = Path(os.environ.get("TMPDIR", "/tmp")) / f"stratum-bench-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-c", wrapper, str(base), *command],
        capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=ROOT, check=True,
    )  # fmt: skip
    code, peak, seconds = json.loads(done.stdout)
    out, err = (base.with_name(base.name + end) for end in (".out", ".err"))
    texts = out.read_text(), err.read_text()
    out.unlink()
    err.unlink()
    if code != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{texts[1]}")
    return Finished(seconds, peak, *texts)


def seconds_to_first_byte(command: Sequence[str]) -> float:
    """Seconds from starting a command to the first byte on its stdout; then it runs to its end."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        seconds = time.perf_counter() - start
        child.stdout.read()
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: ended with {child.returncode}")
    return seconds


def cli(*arguments: str) -> list[str]:
    """The command line tool of this checkout."""
    return [sys.executable, "-m", "stratum.cli", *arguments]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, memory, versions and date in one line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{date.today()}, {model}, {os.cpu_count()} cores, {gib:.0f} GiB, Python {platform.python_version()}"
