"""`compile-model batch`: many prompts of a file, several at once; one JSON object a prompt on stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ir.diagnostics import DiagnosticError
from stratum.cli.options import DTYPES, recipe_option

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
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=128, help="Tokens to generate at most.")
@click.option("--chat", is_flag=True, help="A text is a user's message: apply the model's chat template.")
@click.option(
    "--temperature", "--temp", type=float, help="0 is greedy. Default: as generation_config.json says, else 0."
)
@click.option("--top-k", type=int, help="Keep the K most probable tokens; 0 is off.")
@click.option("--top-p", type=float, help="Keep the most probable tokens that sum to P; 1 is off.")
@click.option("--min-p", type=float, help="Drop tokens less probable than P times the best; 0 is off.")
@click.option("--repetition-penalty", type=float, help="Divide the scores of tokens seen before; 1 is off.")
@click.option("--seed", type=int, help="Of every prompt. Same seed, same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("-t", "--threads", type=int, help="Default: one a physical core this process may use.")
@click.option("-c", "--context", type=int, help="Positions of each sequence. Default: the model's.")
@click.option("-m", "--memory", metavar="SIZE", help="Use no more than this (2GiB): read weights as they are needed.")
@click.option(
    "--kv-spill",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Conversations that wait for a turn may go there.",
)
@click.option("--kv-memory", metavar="SIZE", help="With --kv-spill: what the KV cache may take. Default: as --memory.")
@click.option("--dtype", type=click.Choice(DTYPES), help="For a directory. Default: bf16.")
@recipe_option("For a directory. ")
@click.option("--target", metavar="NAME", help="For a directory. Default: host.")
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
    memory: str | None,
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

    if kv_memory is not None and kv_spill is None:
        raise click.UsageError("--kv-memory is for --kv-spill DIR, where the rest goes")
    lines = list(read_lines(_read(prompts)))
    if not lines:
        raise DiagnosticError("no prompts", where=str(prompts), expected='lines such as {"prompt": "Once upon a time"}')
    refuse_build_options(model, dtype=dtype, target=target, recipe=recipe)
    slots, at_once = slots_needed(lines, together), min(together, len(lines))
    options = {"dtype": dtype or "bf16", "recipe": recipe, "target": target or "host"}
    spill = None
    if kv_spill is not None:
        spill = SpillOptions(api.memory_bytes(kv_memory, "--kv-memory"), str(kv_spill))
    loaded = _opened(
        model, options, quiet, threads=threads, max_context=context, memory=api.memory_bytes(memory),
        slots=Slots(slots, at_once, spill),
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


def _opened(model: Path, options: dict[str, Any], quiet: bool, *, memory: int | None, **opened: Any) -> Model:
    """The model, built where it is a directory."""
    from runtime.artifact import is_artifact
    from stratum import api
    from stratum.build_apart import built_apart
    from stratum.model import Model
    from stratum.progress import make_reporter

    with make_reporter(quiet=quiet) as reporter:
        if memory is not None and not is_artifact(model):
            path = built_apart(model, {**options, "pipeline": None}, reporter, None)
        else:
            path = api.ensure_built(model, **options, progress=reporter, warn=lambda text: click.echo(text, err=True))
    return Model(path, memory=memory, **opened)


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
    for part in (session.streamer, session.kv_spill):
        if part is not None:
            click.echo(str(part.report()), err=True)
