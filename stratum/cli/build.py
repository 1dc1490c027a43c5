"""`compile-model build`: a Hugging Face directory becomes an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from stratum.cli.options import compile_options, output_options


@click.command()
@click.argument("model", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The artifact to write."
)
@compile_options
@click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the IR after every pass.")
@output_options
def build(
    model: Path,
    output: Path,
    target: str,
    dtype: str,
    pipeline: str | None,
    dump_ir: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile the checkpoint in DIR into the artifact OUT."""
    import time

    from stratum import api
    from stratum.progress import format_bytes, make_reporter

    started = time.monotonic()
    with make_reporter(quiet=quiet, as_json=as_json) as reporter:
        out = api.build(
            model, output, target=target, dtype=dtype, pipeline=pipeline, dump_ir=dump_ir, progress=reporter
        )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    if as_json:
        reporter.event("done", path=str(out), bytes=size, seconds=round(seconds, 3))
    elif not quiet:
        click.echo(f"{out}: {format_bytes(size)} in {seconds:.1f} s", err=True)
