"""A GPU measured: every kernel against numpy and beside a copy and torch, decode steps, a hybrid run. One table.

    python -m bench.gpu                   # all of it; --check: kernels are only compared; --only NAME: rows of a name
    python -m bench.gpu -o FOLDER         # rows.jsonl there as they come, table.md at the end
    python -m bench.gpu --limit 540       # seconds: ends by itself before that, with what there is

Rows with a bar come first, in the table and in time: products and attention beside torch's, experts beside a dense
product, then decode steps of a dense model of 8 billion weights (all zero: `bench.gpu_models`) in bf16 and W4A16, what
launching takes of them, and a hybrid run with half of the weights on the device beside its simulation; then all other
kernels. Bytes and operations are what a kernel must move and compute. Kernels and models run in child processes: one
that faults, hangs or finds no memory gives a row that says so, and the others go on. Needs no network; without torch,
or with one that has no CUDA, rows say so. 0 when everything is right, 1 when a result is wrong or something could not
be measured, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from bench import gpu_models
from bench.gpu_attention_cases import real_attention
from bench.gpu_cases import GpuCase, real_cases
from bench.gpu_dense_cases import real_dense
from bench.gpu_device import MeasuringDevice
from bench.gpu_hybrid import MOST_ERROR, hybrid_rows
from bench.gpu_kernels import architecture_of, kernel_rows
from bench.gpu_models import LLAMA_8B, ModelSize
from bench.gpu_moe_cases import real_experts
from bench.gpu_product_cases import real_fp8, real_products, real_wgmma
from bench.gpu_rows import BARS, DENSE_OF, Row, rows_table
from bench.measure import ROOT, machine
from codegen.nvptx.compile import runs_on
from ir.diagnostics import DiagnosticError
from runtime.cuda.device import CudaDevice, open_device
from runtime.cuda.driver import DeviceFault, NoDevice
from runtime.cuda.measure import COPY_BYTES, copy_bandwidth
from runtime.errors import RuntimeDiagnostic

LIMIT_S = 540.0
QUIET_S = 240.0  # without a word of a child: it hangs
MODELS = {"decode_8b_bf16": "", "decode_8b_w4a16": "w4a16-g32", "hybrid_8b_w4a16": "w4a16-g32"}
DeviceOf = Callable[[], CudaDevice]


@dataclass(frozen=True)
class Asked:
    """What a child is to do: rows by name, with what was measured before."""

    names: tuple[str, ...]
    timed: bool
    copy: float


def all_cases() -> list[GpuCase]:
    """Every kernel at sizes of a real model."""
    return [*real_cases(), *real_products(), *real_wgmma(), *real_fp8(), *real_attention(), *real_experts(),
            *real_dense()]  # fmt: skip


def ordered(cases: Sequence[GpuCase]) -> list[GpuCase]:
    """Those with a bar first, each behind what it is compared with."""
    first = [name for bar in BARS for name in (DENSE_OF.get(bar, bar), bar)]
    place = {name: number for number, name in enumerate(dict.fromkeys(first))}
    return sorted(cases, key=lambda case: place.get(case.name, len(place)))


def measure(
    asked: Asked, cases: Callable[[], list[GpuCase]], device_of: DeviceOf, tell: Callable[[str, Row | None], None],
    size: ModelSize = LLAMA_8B,
) -> None:  # fmt: skip
    """Rows in the order of their names; `tell` gets each name before, and each row when it is there."""
    kernels = [name for name in asked.names if name not in MODELS]
    if kernels:
        known = {case.name: case for case in cases()}
        device = MeasuringDevice(device_of())
        chosen = [known[name] for name in kernels]
        rows = kernel_rows(device, chosen, timed=asked.timed, copy=asked.copy, begin=lambda name: tell(name, None))
        try:
            for row in rows:
                tell(row.name, row)
        finally:
            if not device.device.lost:
                device.close()
    for name in asked.names:
        if name in MODELS:
            tell(name, None)
            for row in _model_rows(name, asked.copy, device_of, size):
                tell(row.name, row)


def _model_rows(name: str, copy: float, device_of: DeviceOf, size: ModelSize) -> list[Row]:
    device = device_of()
    target = gpu_models.gpu_target(device.architecture)
    device.close()
    try:
        with tempfile.TemporaryDirectory(prefix="stratum-bench-") as folder:
            path = gpu_models.write_model(Path(folder), size, MODELS[name], target)
            if name.startswith("decode"):
                return gpu_models.decode_rows(name, path, device_of, copy)
            (found,) = hybrid_rows(path, device_of, None, budget=None, steps=16, context=64)
            step = found.rows[0]
            said = f"{found.error:+.1%}: {step.predicted * 1e3:.1f} ms foretold, bound by {found.predicted.bound}"
            said += {True: "", False: "; TOKENS DIFFER", None: "; tokens not compared"}[found.same]
            return [
                Row(name, step.measured, abs(found.error), MOST_ERROR, "the time off its simulation", said=said,
                    nbytes=found.rows[1].measured * 1e6, error=2.0 if found.same is False else None, most=True)
            ]  # fmt: skip
    except (DiagnosticError, RuntimeDiagnostic, MemoryError, OSError) as fault:
        return [Row(name, fault=" ".join(str(fault).removeprefix("error: ").split())[:200])]


# -- the children ------------------------------------------------------------------------------------------------------


def child(text: str) -> int:
    """Prints a line when a row begins and one when it is there."""
    asked = Asked(**json.loads(text))
    asked = Asked(tuple(asked.names), asked.timed, asked.copy)

    def tell(name: str, row: Row | None) -> None:
        print(json.dumps({"begin": name}) if row is None else row.to_json(), flush=True)

    measure(asked, all_cases, open_device, tell)
    return 0


def child_command(words: str) -> list[str]:
    """A child that is to do what `words` say."""
    return [sys.executable, "-m", "bench.gpu", "--child", words]


def in_children(asked: Asked, until: float) -> Iterator[Row]:
    """The rows, from as many children as it takes: what ends a child is the fault of the row it was at."""
    left = list(asked.names)
    while left and time.monotonic() < until:
        words = json.dumps({"names": left, "timed": asked.timed, "copy": asked.copy})
        at, fault = "", ""
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(child_command(words), cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=errors) as process,
        ):  # fmt: skip
            watch = _Watch(process, until)
            assert process.stdout is not None
            for line in process.stdout:
                watch.heard()
                with contextlib.suppress(json.JSONDecodeError, TypeError):  # what a library prints is no row
                    found = json.loads(line)
                    if "begin" in found:
                        left = left[left.index(found["begin"]) :] if found["begin"] in left else left
                        at = found["begin"]
                        continue
                    row = Row.from_json(line)
                    if row.name == at:
                        left = [name for name in left if name != at]
                    yield row
            watch.end()
            process.wait()
            errors.seek(0)
            words_of_end = [line for line in errors.read().splitlines() if line.strip()]
            fault = watch.why or (words_of_end[-1][:200] if words_of_end else f"ended with {process.returncode}")
        if process.returncode == 0:
            return
        if not at:  # before it began with anything
            yield from (Row(name, fault=fault) for name in left)
            return
        if at in left:
            left.remove(at)
            yield Row(at, fault=fault)
    yield from (Row(name, fault="no time was left (--limit)") for name in left)


class _Watch:
    """Kills a child that says nothing for too long, or when time is up."""

    def __init__(self, process: subprocess.Popen[str], until: float) -> None:
        self._process, self._until, self._last = process, until, time.monotonic()
        self._ended = threading.Event()
        self.why = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            now = time.monotonic()
            if now - self._last > QUIET_S or now > self._until:
                self.why = "no time was left (--limit)" if now > self._until else f"hung for {QUIET_S:.0f} s"
                self._process.kill()
                return

    def heard(self) -> None:
        self._last = time.monotonic()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


# -- the command -------------------------------------------------------------------------------------------------------


def main(
    arguments: Sequence[str] | None = None,
    cases: Callable[[], list[GpuCase]] = all_cases,
    device_of: DeviceOf = open_device,
    *,
    apart: bool = True,
    size: ModelSize = LLAMA_8B,
) -> int:
    """Not `apart`: everything in this process, on the device that is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare kernels only, measure nothing")
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose name begins so")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="rows.jsonl and table.md go there")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help=f"end before that; default {LIMIT_S:.0f}"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return child(options.child)
    try:
        until = time.monotonic() + options.limit
        device = MeasuringDevice(device_of())
    except NoDevice as refusal:
        print(f"bench.gpu: {refusal}", file=sys.stderr)
        return 2
    architecture = architecture_of(device)
    names = [c.name for c in ordered(cases()) if runs_on(c.kernel, architecture)]
    barred = [name for name in names if name in BARS or name in DENSE_OF.values()]
    others = [name for name in names if name not in barred]
    order = [*barred, *(() if options.check else MODELS), *others]
    chosen = [name for name in order if name.startswith(options.only)]
    if not chosen:
        device.close()
        print(f"bench.gpu: no row begins with {options.only!r}", file=sys.stderr)
        return 2
    try:
        copy = float("nan") if options.check else _copy_speed(device.device)
        said = f"{device.name}, PTX for {architecture}; a copy: {copy / 1e9:.0f} GB/s; {machine()}"
        device.close()
    except DeviceFault as fault:
        print(f"bench.gpu: {fault}", file=sys.stderr)
        return 2
    print(said, file=sys.stderr, flush=True)
    asked, rows = Asked(tuple(chosen), not options.check, copy), list[Row]()
    with _Output(options.output, said) as output:
        if apart:
            for part in (barred, list(MODELS), others):
                found = Asked(tuple(n for n in part if n in chosen), asked.timed, copy)
                for row in in_children(found, until):
                    rows.append(row)
                    output.add(row)
        else:
            made: list[Row] = []
            measure(asked, cases, device_of, lambda name, row: made.append(row) if row is not None else None, size)
            for row in made:
                rows.append(row)
                output.add(row)
        text = f"{said}\n\n{rows_table(rows)}"
        output.table(text)
    print(text)
    return 1 if any(row.wrong or row.fault for row in rows) else 0


def _copy_speed(device: CudaDevice) -> float:
    """Within a quarter of what is free, where others use the GPU too."""
    return copy_bandwidth(device, max(1 << 20, min(COPY_BYTES, device.free_bytes() // 4)))


class _Output:
    """The folder of results; nothing without one. What is there when time runs out stays."""

    def __init__(self, folder: Path | None, said: str) -> None:
        self._folder, self._said = folder, said
        self._lines: TextIO | None = None

    def __enter__(self) -> _Output:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lines = open(self._folder / "rows.jsonl", "w", encoding="utf-8")
        return self

    def add(self, row: Row) -> None:
        print(f"  {row.name}: {row.verdict or 'done'}", file=sys.stderr, flush=True)
        if self._lines is not None:
            self._lines.write(json.dumps({"machine": self._said, **json.loads(row.to_json())}) + "\n")
            self._lines.flush()

    def table(self, text: str) -> None:
        if self._folder is not None:
            (self._folder / "table.md").write_text(text + "\n", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()


if __name__ == "__main__":
    sys.exit(main())
