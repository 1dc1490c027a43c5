"""`compile-model build`: a Hugging Face directory becomes an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from stratum.cli.bit_options import BitRequest, bit_options
from stratum.cli.options import compile_options, output_options


@click.command()
@click.argument("model", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The artifact to write."
)
@compile_options
@bit_options
@click.option("--device", type=click.Choice(["cuda"]), help="For any NVIDIA GPU: the same as --target cuda.")
@click.option(
    "--stand-ins", metavar="RECIPE", help="Keep a second copy of every expert in fewer bits, for 'run --stand-ins'."
)
@click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the IR after every pass.")
@output_options
def build(
    model: Path,
    output: Path,
    target: str,
    dtype: str,
    recipe: str | None,
    pipeline: str | None,
    budget: BitRequest,
    device: str | None,
    stand_ins: str | None,
    dump_ir: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile the checkpoint in DIR into the artifact OUT."""
    import time

    from codegen.build import BuildResult
    from codegen.format_report import bits_per_weight, format_text
    from stratum import api
    from stratum.progress import format_bytes, make_reporter

    started = time.monotonic()
    target = _for_device(target, device)
    results: list[BuildResult] = []
    with make_reporter(quiet=quiet, as_json=as_json) as reporter:
        options: dict[str, Any] = {"target": target, "dtype": dtype, "pipeline": pipeline}
        shown = {"reporter": reporter, "as_json": as_json, "quiet": quiet}
        options |= {"recipe": budget.recipe(model, recipe=recipe, **options, **shown), "dump_ir": dump_ir}
        options |= {"stand_ins": stand_ins}
        out = api.build(model, output, progress=reporter, told=results.append, **options)
    (result,) = results
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    if as_json:
        bits = round(bits_per_weight(result.formats), 4)
        formats = [asdict(use) for use in result.formats]
        facts = {"bits_per_weight": bits, "formats": formats, "notes": result.notes}
        reporter.event("done", path=str(out), bytes=size, seconds=round(seconds, 3), **facts)
    elif not quiet:
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(f"{out}: {format_bytes(size)} in {seconds:.1f} s; {format_text(result.formats)}", err=True)


def _for_device(target: str, device: str | None) -> str:
    """The target for a device; raises DiagnosticError where the two contradict each other."""
    if device is None or target == "cuda":
        return target
    if target == "host":
        return "cuda"
    from ir.diagnostics import DiagnosticError
    from stratum.device_choice import is_gpu_target

    if not is_gpu_target(target):
        raise DiagnosticError(
            f"--device {device} with --target {target}, which is no NVIDIA GPU", expected="one of them"
        )
    return target
