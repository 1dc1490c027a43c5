"""--bits-per-weight and --size, for the verbs that build: a budget in place of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ir.diagnostics import DiagnosticError

if TYPE_CHECKING:
    from stratum.progress import Reporter

F = TypeVar("F", bound=Callable[..., Any])


def bit_options(function: F) -> F:
    """The options of a budget: --bits-per-weight, --size and how it is spent. The function gets them as `budget`, a
    `BitRequest`."""
    import functools

    @functools.wraps(function)
    def with_budget(
        *args: Any,
        bits_per_weight: float | None,
        size: str | None,
        calibration: str | None,
        save_recipe: Path | None,
        by_expert: bool,
        expert_trace: Path | None,
        **others: Any,
    ) -> Any:
        asked = BitRequest(bits_per_weight, size, calibration, save_recipe, by_expert, expert_trace)
        return function(*args, budget=asked, **others)

    made: Any = with_budget
    for option in (
        click.option(
            "--expert-trace",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="With --by-expert: a routing trace that says how often each expert is picked.",
        ),
        click.option("--by-expert", is_flag=True, help="Let the experts of a layer have several formats."),
        click.option(
            "--save-recipe",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write the recipe that was found: --recipe FILE builds the same again.",
        ),
        click.option(
            "--calibration",
            metavar="FILE",
            help="Text that --bits-per-weight and --size measure with; 'self': the model's own (the default); 'none'.",
        ),
        click.option(
            "--size", metavar="BYTES", help="Choose formats so that the weights file is not larger: 2GiB, 600MB."
        ),
        click.option(
            "--bits-per-weight",
            "--bpw",
            type=float,
            metavar="BITS",
            help="Choose formats that lose least in so many bits on average: 4.25. --recipe then names the candidates.",
        ),
    ):
        made = option(made)
    return made


class BitRequest:
    """What was asked for on the command line."""

    def __init__(
        self,
        bits_per_weight: float | None,
        size: str | None,
        calibration: str | None,
        save_recipe: Path | None,
        by_expert: bool = False,
        expert_trace: Path | None = None,
    ) -> None:
        self.bits_per_weight = bits_per_weight
        self.size = size
        self.calibration = calibration
        self.save_recipe = save_recipe
        self.by_expert, self.expert_trace = by_expert, expert_trace

    @property
    def given(self) -> dict[str, object]:
        """The options that were given, by name."""
        named = {
            "bits-per-weight": self.bits_per_weight,
            "size": self.size,
            "calibration": self.calibration,
            "save-recipe": self.save_recipe,
            "by-expert": self.by_expert or None,
            "expert-trace": self.expert_trace,
        }
        return {name: value for name, value in named.items() if value is not None}

    def recipe(
        self,
        model: Path,
        *,
        recipe: str | None,
        pipeline: str | None,
        dtype: str,
        target: str,
        reporter: Reporter,
        as_json: bool,
        quiet: bool,
    ) -> str | None:
        """What to build with: `recipe` when no budget is given, else the file of the recipe found, explained on stderr.

        Raises DiagnosticError for options that contradict each other and budgets that are too small.
        """
        if self.bits_per_weight is None and self.size is None:
            if self.given:
                raise DiagnosticError(
                    f"--{next(iter(self.given))} says how a budget is spent, and none is given",
                    expected="--bits-per-weight or --size",
                )
            return recipe
        if self.bits_per_weight is not None and self.size is not None:
            raise DiagnosticError("--bits-per-weight and --size are both given", expected="one of them")
        if pipeline is not None:
            raise DiagnosticError(
                "a budget and a pipeline are given, and each decides the formats", expected="one of them"
            )
        from hw_targets.quantities import parse_quantity
        from stratum.bit_budget import SELF, BitBudget, find_recipe

        size = int(parse_quantity(self.size, "bytes", where="--size")) if self.size is not None else None
        if self.expert_trace is not None and not self.by_expert:
            raise DiagnosticError("--expert-trace is for formats of single experts", expected="--by-expert as well")
        budget = BitBudget(
            self.bits_per_weight, size, recipe, self.calibration or SELF, self.by_expert, self.expert_trace
        )
        found = find_recipe(model, budget, target=target, dtype=dtype, progress=reporter)
        reporter.close()
        if self.save_recipe is not None:
            _save(self.save_recipe, found.recipe.to_toml())
        if as_json:
            reporter.event("recipe", **{key: value for key, value in found.facts.items() if key != "report"})
        elif not quiet:
            click.echo(found.report, err=True)
        return str(found.path)


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiagnosticError(f"the recipe cannot be written: {error.strerror}", where=str(path)) from error
