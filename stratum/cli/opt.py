"""`compile-model opt`: IR text through passes, for people who write passes.

Reads a file or stdin, runs a pipeline, prints the IR. A reproducer runs as it is: its `// RUN:` line names the
pipeline. Explanations and times go to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ir.diagnostics import Diagnostic, DiagnosticError

MAX_INPUT_BYTES = 256 << 20


@click.command()
@click.argument("file", metavar="FILE")
@click.option(
    "-p", "--pipeline", metavar="PIPELINE", help="Passes, e.g. 'canonicalize,cse,fuse-qkv', or a named pipeline."
)
@click.option("--split-input", is_flag=True, help="Treat the pieces between '// -----' lines one by one.")
@click.option("--verify-diagnostics", is_flag=True, help="Compare faults with the '// expected-error' comments.")
@click.option("--explain", is_flag=True, help="Say why patterns did not apply.")
@click.option("--time", "show_times", is_flag=True, help="Say how long each pass took.")
@click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the IR after every pass.")
@click.option("--stop-after", metavar="NAME|N", help="End after this pass.")
@click.option(
    "--list-passes",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, value: _list_passes(ctx) if value else None,
    help="List passes, their options and the named pipelines, and exit.",
)
def opt(
    file: str,
    pipeline: str | None,
    split_input: bool,
    verify_diagnostics: bool,
    explain: bool,
    show_times: bool,
    dump_ir: Path | None,
    stop_after: str | None,
) -> int:
    """Run passes over IR text; FILE '-' is stdin."""
    from stratum import opt_driver

    text, name = _read(file)
    pieces = list(opt_driver.split_input(text)) if split_input else [text]
    chosen = pipeline if pipeline is not None else opt_driver.pipeline_of(text) or ""
    if verify_diagnostics:
        problems = []
        for piece in pieces:
            problems += opt_driver.check_expected(piece, opt_driver.diagnostics_of(piece, chosen, file=name), name)
        if problems:
            raise DiagnosticError.of(*(Diagnostic("error", problem) for problem in problems))
        return 0
    for number, piece in enumerate(pieces):
        dump = dump_ir / f"{number}" if dump_ir is not None and len(pieces) > 1 else dump_ir
        result = opt_driver.optimize(piece, chosen, file=name, dump_dir=dump, stop_after=stop_after)
        if number:
            click.echo("// -----")
        click.echo(result.text, nl=not result.text.endswith("\n"))
        if explain:
            click.echo(result.report.explain() or "every pattern applied wherever it was tried", err=True)
        if show_times:
            click.echo(result.report.timings(), err=True)
    return 0


def _read(file: str) -> tuple[str, str]:
    """(text, name for messages). Refuses what is not UTF-8 and what no one would write as text."""
    name = "<stdin>" if file == "-" else file
    if file == "-":
        data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    else:
        with open(file, "rb") as stream:
            data = stream.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise DiagnosticError(f"input is larger than {MAX_INPUT_BYTES >> 20} MiB", where=name)
    try:
        return data.decode("utf-8"), name
    except UnicodeDecodeError as error:
        raise DiagnosticError(f"input is not UTF-8 text (byte {error.start})", where=name) from error


def _list_passes(ctx: click.Context) -> None:
    import dataclasses

    from passes.pass_base import registered_passes
    from passes.pipeline_text import print_pipeline
    from passes.pipelines import PIPELINES

    for name, cls in registered_passes().items():
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        options = " ".join(f.name.replace("_", "-") for f in dataclasses.fields(cls))
        click.echo(f"{name + (' {' + options + '}' if options else '')}\n    {summary}")
    for name, make in PIPELINES.items():
        click.echo(f"pipeline {name}\n    {print_pipeline(make())}")
    ctx.exit()
