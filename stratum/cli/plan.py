"""`compile-model plan`: will it fit, how fast, what bounds it, what would help; before anything is loaded."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stratum.cli.options import DTYPES

if TYPE_CHECKING:
    from passes.place.solve import NoFit
    from stratum.plan_request import PlanRequest
    from stratum.planning import Planned

EXIT_NO_FIT = 3


@click.command(epilog="Exit codes: 0 a plan, 2 a fault that you can mend, 3 nothing fits.")
@click.argument("model", metavar="DIR|OUT|CONFIG|NAME")
@click.option("--target", default="host", show_default=True, metavar="NAME", help="See 'compile-model targets'.")
@click.option(
    "-c", "--ctx", "--context", "context", type=click.IntRange(min=1), help="Tokens to reserve. Default 4096."
)
@click.option("--batch", default="1", show_default=True, metavar="N|auto", help="Sequences at once.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), help="Tokens of a prompt. Default: 512, at most half of ctx."
)
@click.option("--generate", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens after the prompt.")
@click.option("--memory", metavar="SIZE", help="What may be used of the host's memory: 2GiB.")
@click.option("--disk", metavar="SIZE", help="What may be used of the first drive.")
@click.option("--budget", multiple=True, metavar="TIER=SIZE", help="What may be used of any tier or drive.")
@click.option(
    "--slo", metavar="ttft=T,tpot=T", help="Bounds of the first token and of each further one: ttft=2s,tpot=50ms."
)
@click.option("--pin", "pins", multiple=True, metavar="GROUP=WHERE", help="A decision taken: experts=disk, kv=dram.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="A recorded routing of experts.")
@click.option("--recipe", "--format", "recipe", metavar="NAME[,NAME...]|FILE", help="Number formats, as for build.")
@click.option("--formats", metavar="NAME[,NAME...]", help="Recipes to choose among, for each part of each layer.")
@click.option(
    "--kv-formats", metavar="NAME[,NAME...]", help="Formats that parts of the cache may have: several need --max-loss."
)
@click.option("--by-expert", is_flag=True, help="With --formats: experts of a layer may differ, by --trace.")
@click.option("--max-loss", type=click.FloatRange(min=0.0), help="What chosen formats may lose. Default: as --recipe.")
@click.option("--bits-per-weight", type=click.FloatRange(min=0.1), help="Bits that weights keep on average, at least.")
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Losses that build --bits-per-weight measured.",
)
@click.option("--save-recipe", type=click.Path(path_type=Path), metavar="FILE", help="Write the formats for build.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True, help="What is no low-bit number."
)
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help="A plan to judge, maybe edited."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan as JSON.")
@click.option("--compare-run", is_flag=True, help="Run it too, on this machine, and show both: phases and parts.")
@click.option(
    "--stand-ins",
    type=float,
    metavar="SHARE",
    help="Of a built model with --memory: what 'run --stand-ins SHARE' would buy.",
)
@click.option("--quick", is_flag=True, help="Do not try what would help.")
@click.option("--json", "as_json", is_flag=True, help="The plan (or the comparison) as one JSON object on stdout.")
def plan(
    model: str,
    target: str,
    context: int | None,
    batch: str,
    prompt_tokens: int | None,
    generate: int,
    memory: str | None,
    disk: str | None,
    budget: tuple[str, ...],
    slo: str | None,
    pins: tuple[str, ...],
    trace: Path | None,
    recipe: str | None,
    formats: str | None,
    kv_formats: str | None,
    by_expert: bool,
    max_loss: float | None,
    bits_per_weight: float | None,
    sensitivity: Path | None,
    save_recipe: Path | None,
    dtype: str,
    plan_file: Path | None,
    output: Path | None,
    compare_run: bool,
    stand_ins: float | None,
    quick: bool,
    as_json: bool,
) -> int:
    """Place a model on a machine: a checkpoint directory, a config.json, or a name like Qwen3-30B-A3B.

    Reads headers only, never weights. Says what lies where, what bounds each phase and what would help; when nothing
    fits, the least that would, and the largest context and batch that do.
    """
    from passes.place.solve import NoFit
    from stratum.planning import PlanRequest, make_plan

    sizes = [("memory", memory), ("disk", disk), *(_named(text) for text in budget)]
    request = PlanRequest(
        model, target, recipe, dtype, context, _batch(batch), prompt_tokens, generate,
        tuple((name, size) for name, size in sizes if size is not None), pins, slo, trace, plan_file,
        _names(formats, "--formats"), _number(max_loss, "--max-loss"), _number(bits_per_weight, "--bits-per-weight"),
        sensitivity, not quick, by_expert=by_expert, kv_formats=_names(kv_formats, "--kv-formats"), stand_ins=stand_ins,
    )  # fmt: skip
    try:
        planned = make_plan(request, tell=lambda text: click.echo(text, err=True))
    except NoFit as fault:
        return _refused(fault, as_json)
    if compare_run:
        from stratum.compare_run import check

        check(request, planned)
    text = planned.placement.to_json()
    if output is not None:
        _write(output, text)
    if save_recipe is not None:
        from passes.place.plan_recipe import recipe_of_plan

        _write(save_recipe, recipe_of_plan(planned.placement).to_toml())
    if not as_json:
        from stratum.plan_report import plan_text

        click.echo(plan_text(planned))
        _tell_device_run(request, planned)
    if compare_run:
        from stratum.compare_run import compare, compared_json, compared_text, measured_what

        steps = planned.placement.session.generate
        click.echo(f"measuring: {measured_what(planned).split(': ')[1]}, {steps} of them, several times", err=True)
        rows = compare(request, planned)
        click.echo(compared_json(planned, rows) if as_json else "\n" + compared_text(rows, measured_what(planned)))
    elif as_json:
        click.echo(text, nl=False)
    return 0


def _tell_device_run(request: PlanRequest, planned: Planned) -> None:
    """Of an artifact for GPUs: what `run` on such a machine says, where weights pass through the GPU's memory."""
    from runtime.artifact_path import is_artifact

    if planned.target.name == "host" or not is_artifact(request.model):
        return
    from runtime.errors import RuntimeDiagnostic
    from stratum.device_forecast import forecast_of_plan
    from stratum.plan_request import budgets_of

    budgets = budgets_of(request, planned.target)
    try:
        found = forecast_of_plan(Path(request.model), planned.target, budgets, planned.placement.session.context)
    except RuntimeDiagnostic as refused:
        click.echo(f"run --device cuda: {refused.message}")
        return
    if found is not None:
        click.echo(f"run --device cuda, {found.line()}")


def _names(text: str | None, option: str) -> tuple[str, ...]:
    """Recipes by commas."""
    names = tuple(text.split(",")) if text is not None else ()
    if not all(name.strip() for name in names):
        raise click.BadParameter(f"expected names of recipes by commas, got {text!r}", param_hint=option)
    return names


def _number(value: float | None, option: str) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a number, got {value}", param_hint=option)
    return value


def _batch(text: str) -> int:
    if text == "auto":
        return 0
    if not (text.isdecimal() and 1 <= int(text[:12]) <= 1 << 20):
        raise click.BadParameter(f"expected a whole number of sequences or auto, got {text!r}", param_hint="--batch")
    return int(text)


def _named(text: str) -> tuple[str, str | None]:
    name, equals, size = text.partition("=")
    if not (name and equals and size):
        raise click.BadParameter(f"expected TIER=SIZE, got {text!r}", param_hint="--budget")
    return name, size


def _refused(fault: NoFit, as_json: bool) -> int:
    """Nothing fits: what would, as text on stderr or as JSON on stdout."""
    if as_json:
        facts = {
            "schema": "stratum.plan/1",
            "error": fault.diagnostics[0].message,
            "least_bytes": dict(fault.least),
            "largest_context": fault.context,
            "largest_batch": fault.batch,
            "pins": list(fault.pins),
        }
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(fault.diagnostics[0].render(), err=True)
    return EXIT_NO_FIT


def _write(path: Path, text: str) -> None:
    """The whole file or nothing; what is no regular file (/dev/stdout) is written to and not replaced."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
