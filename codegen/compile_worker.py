"""LLVM IR text -> object code, in child processes that LLVM may end without harm.

`compile_llvm` compiles one module, `compile_many` several in parallel; both ask an `ObjectCache` first. IR is checked
against the intrinsic tables before LLVM sees it. Each child (`codegen/compile_child.py`) serves many modules, starts
in tens of milliseconds because it imports only llvmlite, and is bounded in memory and time. A child that aborts,
crashes, runs out of memory or time becomes a `DiagnosticError` that names the function and quotes the end of LLVM's
own words.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from codegen.intrinsics import check_intrinsics, functions
from codegen.object_cache import ObjectCache, content_key
from hw_targets.cpu_features import cpu_baseline, parse_feature_string
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.location import Location

CODEGEN_VERSION = 8  # in keys of compiled text (LLVM IR, PTX); raise it when the same text should give other code
DEFAULT_TIMEOUT_SECONDS = 120.0
DEFAULT_MEMORY_BYTES = 4 << 30
_STDERR_LINES = 6


@dataclass(frozen=True)
class CompileRequest:
    """One module to compile. `features` is LLVM's form, `+avx2,+fma`; `name` is for messages only.

    `emit` is "object" (ELF, position independent), "assembly" or "llvm" (the optimised IR). Kernels spell out their
    vectors and unrolling, so LLVM's own vectorisers and unroller are off unless asked for.
    """

    ir_text: str
    triple: str
    cpu: str
    features: str = ""
    opt_level: int = 3
    name: str = ""
    emit: str = "object"
    loop_vectorize: bool = False
    slp_vectorize: bool = False
    unroll: bool = False

    def header(self) -> dict[str, object]:
        """Everything but the text and the name, as the child reads it."""
        return {
            "triple": self.triple,
            "cpu": self.cpu,
            "features": self.features,
            "opt_level": self.opt_level,
            "emit": self.emit,
            "loop_vectorize": self.loop_vectorize,
            "slp_vectorize": self.slp_vectorize,
            "unroll": self.unroll,
        }

    def cache_key(self) -> str:
        """Content hash of text, options, llvmlite's version (which fixes LLVM's) and this generator's version."""
        options = json.dumps(self.header(), sort_keys=True)
        return content_key([self.ir_text, options, importlib.metadata.version("llvmlite"), str(CODEGEN_VERSION)])

    def check(self) -> None:
        """Raises DiagnosticError for intrinsics that this request's features do not cover."""
        enabled, disabled = parse_feature_string(self.features)
        available = (enabled | cpu_baseline(self.triple, self.cpu)) - disabled
        check_intrinsics(self.ir_text, available, triple=self.triple)

    def described(self) -> str:
        """`module decode: @a, @b, @c and 4 more`."""
        names = [f"@{f.name}" for f in functions(self.ir_text)]
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"module {self.name}: {listed}" if self.name else listed


def compile_llvm(
    ir_text: str,
    *,
    triple: str,
    cpu: str,
    features: str,
    opt_level: int = 3,
    cache: ObjectCache | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> bytes:
    """The ELF object of one module. Raises DiagnosticError when the IR is refused or LLVM fails on it."""
    request = CompileRequest(ir_text, triple, cpu, features, opt_level)
    return compile_many([request], cache=cache, timeout_seconds=timeout_seconds)[0]


def compile_many(
    requests: Sequence[CompileRequest],
    *,
    cache: ObjectCache | None = None,
    workers: int | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> list[bytes]:
    """The payloads of `requests`, in their order, compiled by up to `workers` processes (default: one per usable CPU).

    `timeout_seconds` bounds each module. Every module is tried; the DiagnosticError carries all that failed.
    """
    keys = [request.cache_key() for request in requests]
    done: dict[str, bytes] = {}
    missing: dict[str, CompileRequest] = {}
    for key, request in zip(keys, requests, strict=True):
        if key in done or key in missing:
            continue
        found = cache.get(key) if cache is not None else None
        if found is not None:
            done[key] = found
        else:
            request.check()
            missing[key] = request
    if missing:
        limit = workers if workers is not None else len(os.sched_getaffinity(0))
        outcomes = _pool().run(list(missing.values()), max(1, limit), timeout_seconds)
        failures = [d for o in outcomes if isinstance(o, DiagnosticError) for d in o.diagnostics]
        for key, outcome in zip(missing, outcomes, strict=True):
            if isinstance(outcome, bytes):
                done[key] = outcome
                if cache is not None:
                    cache.put(key, outcome)
        if failures:
            raise DiagnosticError.of(*failures)
    return [done[key] for key in keys]


def shutdown() -> None:
    """Ends the idle compile processes. They also end by themselves with this one."""
    _pool().close()


class _WorkerFailure(Exception):
    """The child ended or did not answer; `how` says which, in words for the user."""

    def __init__(self, how: str, stderr: str) -> None:
        super().__init__(how)
        self.how = how
        self.stderr = stderr


class _Worker:
    """One child process and the pipes to it. Used by one thread at a time."""

    def __init__(self, memory_bytes: int) -> None:
        spec = importlib.util.find_spec("llvmlite")
        if spec is None or spec.origin is None:
            raise DiagnosticError("llvmlite is not installed", hint="pip install llvmlite")
        site = str(Path(spec.origin).parent.parent)
        child = str(Path(__file__).with_name("compile_child.py"))
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child
        # -I -S: no user site, no .pth files, no environment; the child gets the one folder that it needs.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", child, site, str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            bufsize=0,
            process_group=0,  # Ctrl-C reaches only the parent, which then ends its children itself
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input = self.process.stdin.fileno()
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)

    def compile(self, request: CompileRequest, timeout_seconds: float) -> tuple[dict[str, object], bytes]:
        """(answer header, payload). Raises _WorkerFailure when the child ends or the time is over."""
        self.stderr.seek(0)
        self.stderr.truncate()
        deadline = time.monotonic() + timeout_seconds
        header = json.dumps(request.header() | {"timeout_seconds": timeout_seconds}).encode()
        text = request.ir_text.encode()
        self._write(struct.pack("<II", len(header), len(text)) + header + text, deadline)
        header_bytes, payload_bytes = struct.unpack("<II", self._read(8, deadline))
        answer = json.loads(self._read(header_bytes, deadline))
        return answer, self._read(payload_bytes, deadline)

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self.input, select.POLLOUT, deadline)
            try:
                view = view[os.write(self.input, view[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._failure() from None

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self.output, select.POLLIN, deadline)
            try:
                piece = os.read(self.output, min(size - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not piece:
                raise self._failure()
            data += piece
        return bytes(data)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(descriptor, event)
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poller.poll(remaining * 1000):
            raise _WorkerFailure("did not finish in the time allowed", self.stderr_text())

    def _failure(self) -> _WorkerFailure:
        """How the child ended. Its pipe is closed, so it ends at once."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return _WorkerFailure("closed its pipe", self.stderr_text())
        if code < 0:
            return _WorkerFailure(f"was ended by {signal.Signals(-code).name}", self.stderr_text())
        return _WorkerFailure(f"ended with exit status {code}", self.stderr_text())

    def stderr_text(self) -> str:
        """The last 64 KiB that the child printed for this request."""
        size = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, size - 65536))
        return self.stderr.read().decode(errors="replace")

    def close(self) -> None:
        """Ends the child now."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            if stream is not None:
                stream.close()


class _Pool:
    """Idle children, kept for the next call; at most as many as one call ever used at once."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self.busy: dict[_Worker, None] = {}
        self.lock = threading.Lock()

    def run(
        self, requests: list[CompileRequest], workers: int, timeout_seconds: float
    ) -> list[bytes | DiagnosticError]:
        """One outcome per request, in order."""
        threads = min(workers, len(requests))
        if threads == 1:
            return [self._run_one(request, timeout_seconds) for request in requests]
        # The largest first, so that no long module starts last.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ir_text))
        outcomes: dict[int, bytes | DiagnosticError] = {}
        with ThreadPoolExecutor(threads) as executor:
            futures = {i: executor.submit(self._run_one, requests[i], timeout_seconds) for i in order}
            try:
                for index, future in futures.items():
                    outcomes[index] = future.result()
            except BaseException:
                for future in futures.values():
                    future.cancel()
                self._kill_busy()  # the executor's exit waits for its threads, which wait for these
                raise
        return [outcomes[i] for i in range(len(requests))]

    def _run_one(self, request: CompileRequest, timeout_seconds: float) -> bytes | DiagnosticError:
        try:
            worker = self.idle.get_nowait()
        except queue.Empty:
            worker = _Worker(DEFAULT_MEMORY_BYTES)
        with self.lock:
            self.busy[worker] = None
        usable = False
        try:
            answer, payload = worker.compile(request, timeout_seconds)
            ignored = re.search(r"^(.*is not a recognized .*)$", worker.stderr_text(), re.MULTILINE)
            usable = True
        except _WorkerFailure as failure:
            return _crash_diagnostic(request, failure)
        finally:
            with self.lock:
                self.busy.pop(worker, None)
            if usable:
                self.idle.put(worker)
            else:
                worker.close()
        if not answer["ok"]:
            return _refusal_diagnostic(request, str(answer["stage"]), str(answer["message"]))
        if ignored:
            # LLVM would go on without it, and the code would be slower than asked for without a word.
            return _refusal_diagnostic(request, "target", ignored[1].strip())
        return payload

    def _kill_busy(self) -> None:
        with self.lock:
            for worker in self.busy:
                worker.process.kill()

    def close(self) -> None:
        while True:
            try:
                self.idle.get_nowait().close()
            except queue.Empty:
                return


_POOL: _Pool | None = None


def _pool() -> _Pool:
    global _POOL
    if _POOL is None or _POOL.pid != os.getpid():  # after a fork the children belong to the other process
        _POOL = _Pool()
        atexit.register(_POOL.close)
    return _POOL


def _crash_diagnostic(request: CompileRequest, failure: _WorkerFailure) -> DiagnosticError:
    named = re.search(r"(?:[Ii]n function:?|on function) '?@?\"?([\w.$-]+)", failure.stderr)
    where = f"@{named[1]}" if named else request.described()
    lines = [line for line in failure.stderr.splitlines() if line.strip()][-_STDERR_LINES:]
    notes = [Diagnostic("note", line.strip()) for line in lines]
    message = f"LLVM {failure.how} while compiling {where} for {request.cpu or request.triple}"
    return DiagnosticError.of(Diagnostic("error", message, Location(origin=request.name), tuple(notes)))


def _refusal_diagnostic(request: CompileRequest, stage: str, message: str) -> DiagnosticError:
    text = " ".join(message.split())
    notes = []
    position = re.search(r":(\d+):(\d+): error", text)
    if position:
        source = request.ir_text.splitlines()
        number = int(position[1])
        if 0 < number <= len(source):
            notes.append(Diagnostic("note", f"line {number} of the LLVM IR: {source[number - 1].strip()}"))
            holder = [f for f in functions(request.ir_text) if f.line <= number]
            if holder:
                notes.append(Diagnostic("note", f"in @{holder[-1].name}"))
    where = f" in {request.described()}"
    return DiagnosticError.of(
        Diagnostic(
            "error", f"LLVM refused the IR at {stage}{where}: {text}", Location(origin=request.name), tuple(notes)
        )
    )
