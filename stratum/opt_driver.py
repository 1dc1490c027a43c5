"""IR text in, IR text out: what `compile-model opt` does, without the command line.

`split_input` cuts a file at `// -----` lines; `pipeline_of` reads the pipeline a reproducer or text test names in its
`// RUN:` line; `optimize` parses, verifies, runs the passes; `check_expected` compares the diagnostics of a piece with
its `// expected-error @+1 {{part of the message}}` comments, which stand where the fault is:

    // expected-error @+1 {{unknown op}}        the next line (`@-1`: the one before, none: this line)
    // expected-error @? {{...}}                any line, or none: faults without a place in the text
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ir.diagnostics import Diagnostic, DiagnosticError

if TYPE_CHECKING:
    from passes.pass_manager import PipelineReport

SPLIT_LINE = re.compile(r"^// -----+\s*$")
RUN_LINE = re.compile(r"^//\s*RUN:\s*compile-model\s+opt\s+(?P<arguments>.*)$", re.MULTILINE)
EXPECTATION = re.compile(
    r"//\s*expected-(?P<severity>error|warning|note)\s*(?:@(?P<where>[+-]\d+|\?))?\s*\{\{(?P<text>.*?)\}\}"
)


@dataclass(frozen=True)
class Optimized:
    """One piece that went through: the text of the IR after the last pass, and what happened on the way."""

    text: str
    report: PipelineReport


def split_input(text: str) -> Iterator[str]:
    """The pieces between `// -----` lines. Each keeps its line numbers: the lines before it are empty ones."""
    lines = text.splitlines(keepends=True)
    start = 0
    for number, line in enumerate([*lines, "// -----\n"]):
        if SPLIT_LINE.match(line):
            yield "\n" * start + "".join(lines[start:number])
            start = number + 1


def pipeline_of(text: str) -> str | None:
    """The pipeline that the first `// RUN: compile-model opt ...` line gives with -p; None when there is none."""
    match = RUN_LINE.search(text)
    if match is None:
        return None
    try:
        words = shlex.split(match["arguments"].partition("|")[0])
    except ValueError:  # quotes that do not close: a comment, not a command
        return None
    for index, word in enumerate(words):
        if word in ("-p", "--pipeline") and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--pipeline="):
            return word.removeprefix("--pipeline=")
    return None


def optimize(
    text: str,
    pipeline: str,
    *,
    file: str = "",
    dump_dir: Path | None = None,
    stop_after: str | None = None,
) -> Optimized:
    """Runs `pipeline` (text form, or the name of one in `passes.pipelines`) over the module `text`.

    Raises DiagnosticError for text that does not parse or verify, unknown passes, and failing passes.
    """
    import ir
    from passes.pass_manager import PassManager

    module = ir.parse(text, file)
    ir.verify(module)
    manager = PassManager(resolve_pipeline(pipeline), dump_dir=dump_dir, stop_after=stop_after)
    report = manager.run(module)
    return Optimized(ir.print_module(module), report)


def resolve_pipeline(pipeline: str) -> str:
    """Pipeline text; a name of `passes.pipelines.PIPELINES` stands for its passes unless a pass has that name."""
    from passes.pass_base import registered_passes
    from passes.pipeline_text import print_pipeline
    from passes.pipelines import PIPELINES

    if pipeline in PIPELINES and pipeline not in registered_passes():
        return print_pipeline(PIPELINES[pipeline]())
    return pipeline


def check_expected(text: str, diagnostics: tuple[Diagnostic, ...], file: str = "") -> list[str]:
    """What differs between the expectations written in `text` and `diagnostics`; an empty list when nothing does."""
    wanted = list(_expectations(text))
    unexpected = []
    for found in _flatten(diagnostics):
        for index, (severity, line, part) in enumerate(wanted):
            if severity == found.severity and line in (None, found.location.line) and part in found.message:
                del wanted[index]
                break
        else:
            # Notes explain the error they hang on; a test names those it is about.
            if found.severity in ("error", "warning"):
                unexpected.append(found)
    problems = [f"unexpected diagnostic: {d.render()}" for d in unexpected]
    for severity, line, part in wanted:
        place = f"{file or '<text>'}:{line}" if line is not None else file or "<text>"
        problems.append(f"{place}: expected {severity} was not reported: {part}")
    return problems


def diagnostics_of(text: str, pipeline: str, *, file: str = "") -> tuple[Diagnostic, ...]:
    """The diagnostics that optimizing `text` ends with; empty when it goes through."""
    try:
        optimize(text, pipeline, file=file)
    except DiagnosticError as error:
        return error.diagnostics
    return ()


def _expectations(text: str) -> Iterator[tuple[str, int | None, str]]:
    """(severity, line or None for anywhere, part of the message) of every `expected-...` comment."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in EXPECTATION.finditer(line):
            where = match["where"]
            at = None if where == "?" else number + int(where or 0)
            yield match["severity"], at, match["text"]


def _flatten(diagnostics: tuple[Diagnostic, ...]) -> Iterator[Diagnostic]:
    for diagnostic in diagnostics:
        yield diagnostic
        yield from _flatten(diagnostic.notes)
