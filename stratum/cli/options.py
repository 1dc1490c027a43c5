"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from runtime.cuda.missed_experts import MODES

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("bf16", "f32")


def compile_options(function: F) -> F:
    """--target, --dtype, --recipe, --pipeline: what decides the code that is made."""
    for option in (
        click.option("-p", "--pipeline", metavar="PIPELINE", help="Graph passes instead of the default ones."),
        recipe_option(),
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True, help="What is no low-bit number."
        ),
        click.option(
            "--target", default="host", show_default=True, metavar="NAME", help="See 'compile-model targets'."
        ),
    ):
        function = option(function)
    return function


def recipe_option(prefix: str = "") -> Callable[[F], F]:
    """--recipe: names and paths by commas."""
    text = "Number formats: names of 'compile-model recipes' and paths of files, by commas."
    return click.option("--recipe", metavar="NAME[,NAME...]|FILE", help=prefix + text)


def missed_experts_option(function: F) -> F:
    """--missed-experts: the modes of `runtime.cuda.missed_experts`."""
    return click.option(
        "--missed-experts",
        type=click.Choice(MODES),
        help="With --device cuda or auto: experts that the GPU's memory lacks are brought there or computed by the "
        "CPU, whichever is sooner (auto, the default); fetch: always brought, for the same output to the last bit; "
        "cpu.",
    )(function)


def output_options(function: F) -> F:
    """--quiet and --json."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="JSON events, one a line, on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no summary; only results and faults."),
    ):
        function = option(function)
    return function


class NumberList(click.ParamType):
    """Whole numbers by commas, as llama-bench takes them: `512` or `128,512,2048`."""

    name = "N[,N...]"

    def __init__(self, smallest: int = 0) -> None:
        self.smallest = smallest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = []
        for part in str(value).split(","):
            if not part.strip().isdigit() or len(part) > 12 or int(part) < self.smallest:
                self.fail(f"expected whole numbers >= {self.smallest} by commas, got {value!r}", param, ctx)
            numbers.append(int(part))
        return tuple(numbers)
