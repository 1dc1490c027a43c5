"""`compile-model batch`: many prompts of a file, several at once; one JSON object a prompt on stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ir.diagnostics import DiagnosticError
from stratum.cli.run_options import Limits, directory_options, generation_options, memory_options

if TYPE_CHECKING:
    from stratum.batch_lines import BadLine, Line
    from stratum.model import Model

MAX_FILE_BYTES = 1 << 30
EXIT_SOME_FAILED = 2


@click.command(
    context_settings={"show_default": True}, epilog="Exit codes: 0 all prompts ended, 2 some did not, or a fault."
)
@click.argument("model", metavar="DIR|OUT", type=click.Path(path_type=Path))
@click.argument("prompts", metavar="FILE.jsonl", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-b", "--batch", "together", type=click.IntRange(1, 4096), default=8, help="Prompts at once.")
@generation_options
@memory_options
@click.option(
    "--kv-spill",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Conversations that wait for a turn may go there.",
)
@click.option("--kv-memory", metavar="SIZE", help="With --kv-spill: what the KV cache may take. Default: as --memory.")
@directory_options
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Results, instead of stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary; only results and faults.")
def batch(
    model: Path,
    prompts: Path,
    together: int,
    max_tokens: int,
    chat: bool,
    stop: tuple[str, ...],
    threads: int | None,
    context: int | None,
    limits: Limits,
    kv_spill: Path | None,
    kv_memory: str | None,
    dtype: str | None,
    recipe: str | None,
    target: str | None,
    output: Path | None,
    quiet: bool,
    **sampling: Any,
) -> int:
    """Generate text after every line of a file, several at once; results come as prompts end.

    A line is a text or an object: prompt, prompt_ids or messages; maybe id, session (its lines are turns of one
    conversation), max_tokens, stop, seed and other fields of sampling. A line that fails has an error as its result,
    and the others go on. Texts are the same whatever else runs beside them.
    """
    from runtime.kv_spill import SpillOptions
    from stratum import api
    from stratum.batch_lines import read_lines
    from stratum.batch_run import run_batch, slots_needed
    from stratum.cli.run import refuse_build_options
    from stratum.model import Slots
    from stratum.progress import make_reporter

    if kv_memory is not None and kv_spill is None:
        raise click.UsageError("--kv-memory is for --kv-spill DIR, where the rest goes")
    if limits.kv_dir is not None and kv_spill is not None:
        raise click.UsageError("--kv-spill moves whole conversations, --kv-dir parts of layers: give one of them")
    lines = list(read_lines(_read(prompts)))
    if not lines:
        raise DiagnosticError("no prompts", where=str(prompts), expected='lines such as {"prompt": "Once upon a time"}')
    refuse_build_options(model, dtype=dtype, target=target, recipe=recipe)
    slots, at_once = slots_needed(lines, together), min(together, len(lines))
    spill = None
    if kv_spill is not None:
        spill = SpillOptions(api.memory_bytes(kv_memory, "--kv-memory"), str(kv_spill))
    with make_reporter(quiet=quiet) as reporter:
        loaded = api.load(
            model, dtype=dtype or "bf16", recipe=recipe, target=target, threads=threads, max_context=context,
            slots=Slots(slots, at_once, spill), progress=reporter, warn=lambda text: click.echo(text, err=True),
            **vars(limits),
        )  # fmt: skip
    failed = 0
    given = {name: value for name, value in sampling.items() if value is not None}
    with loaded, click.open_file(str(output) if output is not None else "-", "w", encoding="utf-8") as out:
        for result in run_batch(loaded, lines, together=together, chat=chat, max_tokens=max_tokens, stop=stop, **given):
            failed += "error" in result
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            out.flush()
        if not quiet:
            _summary(loaded, lines, failed)
    return EXIT_SOME_FAILED if failed else 0


def _read(path: Path) -> bytes:
    """The file's bytes, or those of stdin."""
    with click.open_file(str(path), "rb") if str(path) != "-" else sys.stdin.buffer as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise DiagnosticError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB", where=str(path))
    return data


def _summary(model: Model, lines: list[Line | BadLine], failed: int) -> None:
    click.echo(f"{len(lines)} prompts, {failed} failed", err=True)
    session = model.session
    for part in (session.streamer, session.kv_spill, session.kv_stream):
        if part is not None:
            click.echo(str(part.report()), err=True)
