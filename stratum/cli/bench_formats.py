"""`compile-model bench --formats`: one model in several number formats, as a table to choose from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from stratum.format_benchmark import FormatRow

F = TypeVar("F", bound=Callable[..., Any])
_ONLY_WITH_FORMATS = {"recipes": "--recipes", "text": "--text", "chunks": "--chunks", "as_json": "--json"}


def formats_options(function: F) -> F:
    """--formats and what goes with it. The function gets them as `formats`, `recipes`, `text`, `chunks`, `as_json`."""
    for option in reversed(
        (
            click.option(
                "--formats", is_flag=True, help="For a directory: build it in several formats, and compare them."
            ),
            click.option(
                "--recipes",
                metavar="'NAME NAME[,NAME]...'",
                help="With --formats: recipes by blanks; 'float' is none. Default: every shipped one for weights.",
            ),
            click.option(
                "--text",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="With --formats: text for the divergence of each from the model's f32 build.",
            ),
            click.option(
                "--chunks", type=click.IntRange(min=1), metavar="N", help="With --text: only its first N windows."
            ),
            click.option("--json", "as_json", is_flag=True, help="With --formats: one JSON object on stdout."),
        )
    ):
        function = option(function)
    return function


def refuse_without_formats(given: dict[str, Any]) -> None:
    """Options of the table mean nothing without it."""
    for key, option in _ONLY_WITH_FORMATS.items():
        if given[key]:
            raise click.UsageError(f"{option} goes with --formats")


def bench_formats(
    model: Path,
    *,
    recipes: str | None,
    text: Path | None,
    chunks: int | None,
    as_json: bool,
    n_prompt: tuple[int, ...],
    n_gen: tuple[int, ...],
    n_depth: tuple[int, ...],
    threads: tuple[int, ...] | None,
    repetitions: int,
    dtype: str | None,
    target: str | None,
    quiet: bool,
) -> None:
    """Measures and prints. Raises UsageError for lists where one value is needed."""
    import json

    from stratum.format_benchmark import FormatPlan, default_recipes, format_table, measure_formats, split_recipes
    from stratum.progress import make_reporter

    for name, values in (("-p", n_prompt), ("-n", n_gen), ("-d", n_depth), ("-t", threads or (1,))):
        if len(values) != 1:
            raise click.UsageError(f"--formats takes one value for {name}, not {len(values)}")
    plan = FormatPlan(
        n_prompt[0], n_gen[0], n_depth[0], repetitions, threads[0] if threads else None,
        target or "host", dtype or "bf16", text, windows=chunks,
    )  # fmt: skip
    chosen = split_recipes(recipes) if recipes is not None else default_recipes()

    def tell(row: FormatRow) -> None:
        if not quiet:
            click.echo(f"{row.recipe}: {row.fault or 'measured'}", err=True)

    with make_reporter(quiet=quiet) as reporter:
        rows = measure_formats(model, chosen, plan, progress=reporter, tell=tell)
    if as_json:
        tests = {"n_prompt": plan.num_prompt, "n_gen": plan.num_generate, "n_depth": plan.depth}
        click.echo(json.dumps({"model": str(model), **tests, "rows": [row.as_dict() for row in rows]}))
        return
    click.echo(
        format_table(rows, num_prompt=plan.num_prompt, num_generate=plan.num_generate, depth=plan.depth)
        + "\n\n* no other row is at least as good in speed, size"
        + (" and divergence" if text is not None else "")
        + ", and better in one of them"
    )
