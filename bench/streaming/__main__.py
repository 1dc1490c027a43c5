"""Decoding and prompts under a limit of memory, page cache counted, from a cold cache: this compiler and llama.cpp.

    python -m bench.streaming --work DIR --cap 2048 --cap 1024 [--peers VENV/bin/python] [--device vda]

Every row is a process of its own in a control group of its own (needs root). llama.cpp maps the file and does not
repack its weights, which would have to fit; it is measured at the system's read-ahead and, with `--device vda`, at
128 KiB, which suits it best. What the disk gives is measured in the same run, so that a row can say which part of it
was used. Models are those of `bench.peers`.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.peers.child import Engine, EngineError
from bench.peers.models import Models
from bench.streaming.memory_group import MemoryGroup

REQUEST_BYTES = 1 << 20
DISK_SECONDS = 3.0
BEST_READ_AHEAD_KIB = 128


def disk_gigabytes_per_s(path: Path, threads: int = 2) -> float:
    """What O_DIRECT reads of 1 MiB one after the other get out of the file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(descriptor).st_size // REQUEST_BYTES
    done = [0] * threads
    stop = time.perf_counter() + DISK_SECONDS

    def work(thread: int) -> None:
        buffer = mmap.mmap(-1, REQUEST_BYTES)
        at = thread
        while time.perf_counter() < stop:
            done[thread] += os.preadv(descriptor, [memoryview(buffer)], at % size * REQUEST_BYTES)
            at += threads

    start = time.perf_counter()
    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(descriptor)
    return sum(done) / (time.perf_counter() - start) / 1e9


def forget(path: Path) -> None:
    """Drops the file from the page cache: cached pages would not be charged to the group."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def read_ahead(device: str, kib: int | None) -> Iterator[None]:
    """The block device's read-ahead meanwhile; None leaves it."""
    setting = Path(f"/sys/block/{device}/queue/read_ahead_kb")
    if kib is None:
        yield
        return
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def measured(name: str, command: Sequence[str], file: Path, cap: int, request: dict[str, object]) -> dict[str, float]:
    """One request to a fresh process under the cap: its answer, and what the group saw."""
    forget(file)
    with MemoryGroup(cap) as group:
        engine = Engine(name, group.command(command))
        try:
            answer = engine.ask(request)
        finally:
            engine.close()
        return {**answer, **group.facts()}


def row(label: str, tokens: int, answer: dict[str, float], disk: float) -> str:
    """A line of the table."""
    seconds = answer["seconds"]
    cells = [label, f"{tokens / seconds:.2f}", f"{answer['peak'] / (1 << 20):.0f}", f"{answer['hits']:.0f}"]
    if "read_bytes" in answer:
        bound = answer["read_bytes"] / disk / 1e9
        cells += [
            f"{answer['read_bytes'] / 1e9:.2f}",
            f"{answer['hit_rate'] * 100:.1f} %",
            f"{bound / seconds * 100:.0f} %",
        ]
    else:
        cells += ["", "", ""]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--preset", default="olmoe-1b-7b")
    parser.add_argument("--recipe", default="w4a8-g32", help="bf16: floats")
    parser.add_argument("--artifact", type=Path, help="instead of a build of the preset")
    parser.add_argument("--cap", type=int, action="append", required=True, help="MiB")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=0, help="measure a prompt of so many tokens instead")
    parser.add_argument("--peers", type=Path, help="python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", default="q4_0")
    parser.add_argument("--device", help="block device of the work directory, to set its read-ahead")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the device's setting and the group are put back
    models = Models(options.work, options.peers, lambda line: print(line, file=sys.stderr))
    artifact = options.artifact or models.artifact(options.preset, options.recipe)
    weights = artifact / "weights" / "weights.bin"
    count = options.prompt or options.tokens
    request: dict[str, object] = {"do": "prefill" if options.prompt else "decode", "tokens": count}
    request |= {"depth": 0, "warm": 0}
    disk = disk_gigabytes_per_s(weights)
    print(f"disk: {disk:.2f} GB/s (O_DIRECT, 1 MiB, 2 threads); {count} tokens, {request['do']}\n")
    print("| | tok/s | peak MiB | limit hits | read GB | experts there | of the disk |\n|---|---|---|---|---|---|---|")
    context = str(max(128, count))
    for cap in options.cap:
        # The group also counts what the kernel keeps for the process.
        words = ["bench.streaming.stratum_child", str(artifact), "--memory", str(cap << 20), "--context", context]
        answer = measured("stratum", [sys.executable, "-m", *words], weights, cap << 20, request)
        print(row(f"{cap} MiB, stratum", count, answer, disk), flush=True)
        if options.peers is None:
            continue
        gguf = models.gguf(options.preset, options.gguf)
        words = ["bench.peers.llama_cpp_child", str(gguf), "--context", context, "--mapped"]
        for kib in (BEST_READ_AHEAD_KIB, None) if options.device else (None,):
            label = f"{cap} MiB, llama.cpp, read-ahead {'of the system' if kib is None else f'{kib} KiB'}"
            try:
                with read_ahead(options.device or "", kib):
                    answer = measured("llama.cpp", [str(options.peers), "-m", *words], gguf, cap << 20, request)
            except EngineError as fault:
                print(f"| {label} | {fault} | | | | | |", flush=True)
                continue
            print(row(label, count, answer, disk), flush=True)


if __name__ == "__main__":
    main()
