"""PassManager: runs a pipeline over a module, and can say everything about how that went.

    report = PassManager("canonicalize,cse", dump_dir=Path("dump")).run(module)

After every pass that changed something the IR is verified. Each pass is timed; `dump_dir` receives numbered,
re-parsable files; `stop_after` ends the run early; `report.explain()` tells why patterns did not apply. When a pass
fails, or leaves IR that does not verify, a reproducer is written (the IR that the pass was given and the passes still
to run, for `compile-model opt`) and PassError names the pass, the passes before it and that file.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ir
from ir.core import Op
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.location import Location
from ir.rewriter import Refusal
from ir.spelling import did_you_mean
from passes.clone import clone
from passes.dump import Dumper
from passes.pass_base import Pass, PassContext, Remark
from passes.pipeline_text import parse_pipeline, print_pipeline
from passes.snapshot import snapshot


class PassError(DiagnosticError):
    """A pass failed. `reproducer` is the file that shows it again, or None when it could not be written."""

    reproducer: Path | None = None


@dataclass(frozen=True)
class PassRecord:
    """One pass of one run. `seconds` without and `verify_seconds` of the verification after it; `num_ops` then."""

    name: str
    text: str
    seconds: float
    verify_seconds: float
    changed: bool
    num_ops: int
    refusals: tuple[Refusal, ...] = ()
    remarks: tuple[Remark, ...] = ()
    dump: Path | None = None


@dataclass
class PipelineReport:
    """What happened, pass by pass. `stopped` is true when `stop_after` ended the run before the last pass."""

    records: list[PassRecord] = field(default_factory=list)
    stopped: bool = False

    @property
    def seconds(self) -> float:
        return sum(r.seconds + r.verify_seconds for r in self.records)

    def explain(self) -> str:
        """Remarks and refusals of every pass; refusals that differ only in where they happened are one line."""
        lines = []
        for number, record in enumerate(self.records, 1):
            grouped: dict[tuple[str, str, str], list[str]] = {}
            for r in record.refusals:
                grouped.setdefault((r.pattern, r.op_name, r.reason), []).append(r.origin)
            if not grouped and not record.remarks:
                continue
            lines.append(f"{number} {record.text}")
            told: dict[str, list[str]] = {}
            for remark in record.remarks:
                told.setdefault(remark.message, []).append(remark.origin)
            lines += [f"  {_places(origins)}: {m}" if any(origins) else f"  {m}" for m, origins in told.items()]
            for (pattern, op_name, reason), origins in grouped.items():
                lines.append(f"  {_places(origins)}: {pattern} left {op_name} alone: {reason}")
        return "\n".join(lines)

    def timings(self) -> str:
        """One line per pass: milliseconds of the pass and of verifying, ops afterwards."""
        lines = [f"{'ms':>8} {'verify':>8} {'ops':>6}  pass"]
        for r in self.records:
            note = "" if r.changed else "  (no change)"
            lines.append(f"{r.seconds * 1e3:8.1f} {r.verify_seconds * 1e3:8.1f} {r.num_ops:6}  {r.text}{note}")
        return "\n".join(lines)


def _places(origins: Sequence[str]) -> str:
    """`layers.0.mlp` or `layers.0.mlp and 21 more`."""
    distinct = list(dict.fromkeys(o or "(no origin)" for o in origins))
    more = f" and {len(distinct) - 1} more" if len(distinct) > 1 else ""
    return distinct[0] + more


class PassManager:
    """Runs `passes` (a sequence, or pipeline text) in order.

    `stop_after` is the number of passes to run, or the name of the pass to stop behind (its first occurrence).
    `reproducer` is where to write one (default: `reproducer.ir` in `dump_dir`, else a new temporary file).
    `on_pass` is called after every pass with its record, for progress displays.
    """

    def __init__(
        self,
        passes: str | Sequence[Pass],
        *,
        context: PassContext | None = None,
        verify: bool = True,
        dump_dir: Path | str | None = None,
        stop_after: int | str | None = None,
        reproducer: Path | str | None = None,
        on_pass: Callable[[PassRecord], None] | None = None,
    ) -> None:
        self.passes = parse_pipeline(passes) if isinstance(passes, str) else tuple(passes)
        self.context = context or PassContext()
        self.verify = verify
        self.dump_dir = Path(dump_dir) if dump_dir is not None else None
        self.count = self._count(stop_after)
        self.reproducer = Path(reproducer) if reproducer is not None else None
        self.on_pass = on_pass

    def _count(self, stop_after: int | str | None) -> int:
        """How many passes to run."""
        if stop_after is None:
            return len(self.passes)
        if isinstance(stop_after, str) and not stop_after.isdigit():
            names = [p.name for p in self.passes]
            if stop_after not in names:
                raise DiagnosticError(
                    f"cannot stop after {stop_after!r}: no such pass in the pipeline{did_you_mean(stop_after, names)}",
                    expected="one of " + ", ".join(dict.fromkeys(names)),
                )
            return names.index(stop_after) + 1
        return min(max(int(stop_after), 0), len(self.passes))

    def run(self, module: Op) -> PipelineReport:
        """Runs the pipeline on `module`, in place. Raises DiagnosticError for a module that does not verify."""
        dumper = Dumper(self.dump_dir) if self.dump_dir is not None else None
        if self.verify:
            ir.verify(module)
        if dumper:
            dumper.write("input", module)
        report = PipelineReport(stopped=self.count < len(self.passes))
        self.context.take_notes()
        self.context.drop_analyses()
        start = clone(module)  # what to begin with when a failure is to be shown again
        before = snapshot(module)
        for index, current in enumerate(self.passes[: self.count]):
            started = time.perf_counter()
            try:
                current.run_on_module(module, self.context)
            except Exception as error:  # whatever it is, the user must learn which pass it was
                raise self._failure(index, start, error) from error
            ended = time.perf_counter()
            after = snapshot(module)
            changed = after != before
            before = after
            checked = time.perf_counter()
            if changed:
                self.context.drop_analyses()
                if self.verify:
                    try:
                        ir.verify(module)
                    except DiagnosticError as error:
                        raise self._failure(index, start, error, "left IR that does not verify") from error
            verified = time.perf_counter()
            dump = dumper.write(current.name, module) if dumper and changed else None
            refusals, remarks = self.context.take_notes()
            text = str(current)
            seconds, verify_seconds = ended - started, verified - checked
            record = PassRecord(
                current.name, text, seconds, verify_seconds, changed, len(after), refusals, remarks, dump
            )
            report.records.append(record)
            if self.on_pass:
                self.on_pass(record)
        if dumper:
            dumper.write("final", module)
        return report

    def _failure(self, index: int, start: Op, error: Exception, what: str = "") -> PassError:
        current = self.passes[index]
        notes = []
        if isinstance(error, DiagnosticError):
            shown = what or "failed"
            notes += list(error.diagnostics)
        else:
            shown = f"failed with {type(error).__name__}: {error}"
        ran = ", ".join(str(p) for p in self.passes[:index]) or "none"
        notes.append(Diagnostic("note", f"passes before it: {ran}"))
        path, told = self._write_reproducer(index, start)
        notes.append(Diagnostic("note", told))
        message = f"pass {current.name!r} {shown} (pass {index + 1} of {len(self.passes)})"
        failure = PassError.of(Diagnostic("error", message, Location(), tuple(notes)))
        assert isinstance(failure, PassError)
        failure.reproducer = path
        return failure

    def _given(self, index: int, start: Op) -> tuple[Op, Sequence[Pass]]:
        """The IR that pass `index` was given, and the passes from there on.

        Passes depend on nothing but IR, target and options, so running the earlier ones again gives it; keeping a copy
        before every pass would cost each run what only failures need. Should one fail now, the input has to do.
        """
        given = clone(start)
        context = PassContext(self.context.target, dict(self.context.options))
        try:
            for earlier in self.passes[:index]:
                earlier.run_on_module(given, context)
                context.drop_analyses()
        except Exception:  # noqa: BLE001  # the failure being reported matters more than this one
            return start, self.passes[: self.count]
        return given, self.passes[index : self.count]

    def _write_reproducer(self, index: int, start: Op) -> tuple[Path | None, str]:
        """The file written, or None, and what to tell the user. Never replaces the fault by one of its own."""
        given, passes = self._given(index, start)
        rest = shlex.quote(print_pipeline(passes))
        try:
            path = self.reproducer or (self.dump_dir / "reproducer.ir" if self.dump_dir else None)
            if path is None:
                handle, name = tempfile.mkstemp(prefix="reproducer-", suffix=".ir")
                os.close(handle)
                path = Path(name)
            path.write_text(f"// RUN: compile-model opt %s -p {rest}\n{ir.print_module(given)}", encoding="utf-8")
        except OSError as error:
            return None, f"no reproducer was written: {error.filename}: {error.strerror}"
        return path, f"to see it again: compile-model opt {path} -p {rest}"
