"""`compile-model quantize`: a Hugging Face directory becomes a quantized one, calibrated with text if asked."""

from __future__ import annotations

from pathlib import Path

import click

from stratum.cli.options import output_options

SEQUENCE = 512  # tokens of a piece of calibration text


@click.command()
@click.argument("model", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The directory to make."
)
@click.option(
    "--recipe",
    required=True,
    metavar="NAME[,NAME...]|FILE",
    help="Formats of the weights: names of 'compile-model recipes' and paths of files, by commas.",
)
@click.option(
    "--method",
    type=click.Choice(("rtn", "gptq", "awq")),
    default=None,
    help="rtn: nearest with least squared error; gptq: second-order rounding; awq: activation-aware scaling.  "
    "[default: gptq with --calibration, else rtn]",
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text like what the model will see."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    metavar="N",
    help="So many tokens of the text are used, in pieces of 512 spread over it.",
)
@output_options
def quantize(
    model: Path,
    output: Path,
    recipe: str,
    method: str | None,
    calibration: Path | None,
    tokens: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Round the weights of the checkpoint in DIR and write OUT, a compressed-tensors checkpoint.

    OUT is a Hugging Face directory that 'build' and 'run' take, and other programs too. An interrupted run goes on
    where it was when the same command is given again.
    """
    import time

    from frontends.huggingface import import_model
    from ir.diagnostics import DiagnosticError
    from passes.quantize.calibrate.quantize_checkpoint import check_output, quantize_checkpoint
    from passes.quantize.recipe import load_recipe
    from stratum.calibration_tokens import tokens_of_text
    from stratum.progress import format_bytes, make_reporter

    chosen = method or ("rtn" if calibration is None else "gptq")
    if (calibration is None) != (chosen == "rtn"):
        raise DiagnosticError(
            f"--method {chosen} {'needs' if calibration is None else 'uses no'} calibration text",
            expected="--calibration FILE with gptq and awq, and none with rtn",
        )
    started = time.monotonic()
    with make_reporter(quiet=quiet, as_json=as_json) as reporter:
        reporter("import", 0, 0)
        asked = load_recipe(recipe)
        check_output(output, model)
        imported = import_model(model)
        with imported.checkpoint:
            for message in imported.warnings:
                _remark(message, reporter=reporter, as_json=as_json, kind="warning")
            sequences = None
            if calibration is not None:
                length = min(SEQUENCE, imported.config.max_context, tokens)
                vocab = imported.config.vocab_size
                sequences = tokens_of_text(
                    model, calibration, vocab_size=vocab, sequences=max(1, tokens // length), length=length
                )
            result = quantize_checkpoint(imported, asked, chosen, output, sequences=sequences, tell=reporter)
    size = sum(path.stat().st_size for path in result.path.iterdir())
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        from dataclasses import asdict

        facts = {"path": str(result.path), "bytes": size, "seconds": seconds, "reused": result.reused}
        reporter.event("done", **facts, report=asdict(result.report))
    elif not quiet:
        for line in summary_lines(result.report):
            click.echo(line, err=True)
        again = f", {result.reused} tensors of an earlier run" if result.reused else ""
        click.echo(f"{result.path}: {format_bytes(size)} in {seconds:.1f} s{again}", err=True)


def summary_lines(report: object) -> list[str]:
    """What was done, for people."""
    from passes.quantize.calibrate.quantize_checkpoint import Report

    assert isinstance(report, Report)
    formats = ", ".join(f"{count} in {name}" for name, count in report.formats.items())
    with_text = f", {report.tokens} tokens of calibration" if report.tokens else ""
    lines = [f"{report.method}: weights {formats}; {report.bits_per_weight:.4g} bits each{with_text}"]
    if report.experts:
        lines.append("experts by " + ", ".join(f"{text}: {count}" for text, count in report.experts.items()))
    if report.awq:
        lines.append("awq: " + ", ".join(f"{text}: {count}" for text, count in report.awq.items()))
    return lines + [f"note: {note}" for note in report.notes]


def _remark(message: str, *, reporter: object, as_json: bool, kind: str) -> None:
    from stratum.progress import Reporter

    assert isinstance(reporter, Reporter)
    if as_json:
        reporter.event(kind, message=message)
    else:
        click.echo(f"{kind}: {message}", err=True)
