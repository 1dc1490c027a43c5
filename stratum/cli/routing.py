"""`compile-model routing`: what a recorded routing trace says of caches of experts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratum.progress import format_bytes

if TYPE_CHECKING:
    from hw_targets.expert_cache import PolicyChoice, ReplayResult, RouterFit
    from hw_targets.routing import Locality, RoutingTrace

SCHEMA = "stratum.routing/1"
_MULTIPLES = (0.5, 0.9, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of what one token uses
# Columns of the table: (title, policy, scope)
_COLUMNS = (
    ("lru", "lru", "global"),
    ("lfu", "lfu", "global"),
    ("lrfu", "lrfu", "global"),
    ("score", "score", "global"),
    ("stale", "least_stale", "global"),
    ("lru/layer", "lru", "layer"),
    ("lrfu/layer", "lrfu", "layer"),
    ("belady", "belady", "global"),
)


@click.command("routing")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--capacity", "capacities", multiple=True, metavar="SIZE", help="A cache size, 2GiB; may be repeated.")
@click.option("--fit", is_flag=True, help="Also fit a synthetic router to the trace (some seconds).")
@click.option("--layers", is_flag=True, help="Also one line for each layer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def routing(file: Path, capacities: tuple[str, ...], fit: bool, layers: bool, as_json: bool) -> None:
    """Measure a routing trace: locality, hit rates of cache policies by size, the best policy beside Belady's bound.

    FILE is what 'run --record-routing' writes, or a published trace of the same format, plain or gzip.
    """
    from hw_targets.expert_cache import choose_policy, fit_router, hit_curve, knee
    from hw_targets.quantities import parse_quantity
    from hw_targets.routing import locality, read_trace

    trace = read_trace(file)
    sizes = sorted({int(parse_quantity(text, "bytes", where="--capacity")) for text in capacities})
    everything = trace.all_expert_bytes
    grid = sizes or [int(m * trace.cycle_bytes) for m in _MULTIPLES if m * trace.cycle_bytes < everything]
    measured = locality(trace)
    table = {title: hit_curve(trace, grid, policy=policy, scope=scope) for title, policy, scope in _COLUMNS}
    bend = knee(table["belady"]).capacity_bytes if len(grid) > 2 else None
    choices = [choose_policy(trace, size) for size in (sizes or [bend or grid[-1]])]
    fitted = fit_router(trace) if fit else None
    if as_json:
        click.echo(json.dumps(_as_json(trace, measured, table, bend, choices, fitted), indent=1))
        return
    _print_trace(trace, measured, layers)
    _print_table(trace, table, grid)
    if bend is not None:
        click.echo(f"knee       {format_bytes(bend)}: beyond it Belady's hit rate rises less than on average")
    for choice in choices:
        _print_choice(choice)
    if fitted is not None:
        _print_fit(fitted)


def _print_trace(trace: RoutingTrace, measured: Locality, layers: bool) -> None:
    click.echo(
        f"model      {Path(trace.model).name or 'not named'}, {trace.layer_count} layers with "
        f"{trace.expert_count} experts, {trace.top_k} for each token"
    )
    click.echo(
        f"trace      {trace.tokens - trace.decode_tokens} prompt tokens, {trace.decode_tokens} decoded; "
        f"{100 * measured.distinct_share:.0f} % of all experts used"
    )
    click.echo(f"experts    {format_bytes(trace.all_expert_bytes)}; one token uses {format_bytes(trace.cycle_bytes)}")
    lags = ", ".join(f"{100 * rate:.0f} % at lag {lag}" for lag, rate in measured.overlap.items())
    click.echo(f"overlap    {lags or 'too few tokens'} (chance {100 * measured.chance_overlap:.1f} %)")
    click.echo(
        f"reuse      after {measured.reuse_median:.0f} tokens (median), "
        f"{100 * measured.reuse_within_8:.0f} % of uses again within 8 tokens"
    )
    for length, srp in measured.srp.items():
        hits = ", ".join(
            f"{100 * rate:.1f} % with {multiple:g}x" for (n, multiple), rate in measured.sch.items() if n == length
        )
        click.echo(f"segments   of {length} tokens: SRP {100 * srp:.1f} %, SCH {hits} the experts of a token")
    if layers:
        click.echo("layer  distinct  top quarter  overlap     SRP     SCH")
        for one in measured.layers:
            click.echo(
                f"{one.layer:5}  {one.distinct:8}  {100 * one.top_quarter_share:9.1f} %  {100 * one.overlap:5.1f} %"
                f"  {100 * one.srp:4.1f} %  {100 * one.sch:4.1f} %"
            )


def _print_table(trace: RoutingTrace, table: dict[str, tuple[ReplayResult, ...]], grid: list[int]) -> None:
    """A dash stands where a layer's share is less than one token's experts, which would stay beyond the budget."""
    from hw_targets.expert_cache import cache_warnings

    click.echo("hits of decoded tokens in %, by size of the cache:")
    click.echo("  size      " + "".join(f"{title:>11}" for title in table))
    for index, size in enumerate(grid):
        beyond = bool(cache_warnings(trace.expert_bytes, trace.expert_count, trace.top_k, size, scope="layer"))
        cells = [
            "-" if beyond and results[index].scope == "layer" else f"{100 * results[index].decode_hit_rate:.1f}"
            for results in table.values()
        ]
        click.echo(f"  {format_bytes(size):<10}" + "".join(f"{cell:>11}" for cell in cells))


def _print_choice(choice: PolicyChoice) -> None:
    best = choice.best
    name = _name(best, bool(choice.pinned))
    click.echo(
        f"best       at {format_bytes(best.capacity_bytes)}: {name}, {100 * best.decode_hit_rate:.1f} % of the second "
        f"half's lookups hit (Belady {100 * choice.bound.decode_hit_rate:.1f} %), "
        f"{format_bytes(best.read_bytes_per_token)} read for each token"
    )
    for warning in choice.warnings:
        click.echo(f"warning    {warning.text}")


def _name(result: ReplayResult, pins: bool) -> str:
    return (
        f"half pinned, {result.policy}" if pins else result.policy + (", by layer" if result.scope == "layer" else "")
    )


def _print_fit(fitted: RouterFit) -> None:
    router = fitted.router
    click.echo(
        f"router     Zipf exponent {router.exponent:g}, stickiness {router.stickiness:g}: LRU hit rates within "
        f"{100 * fitted.mean_error:.1f} points on average"
    )


def _as_json(
    trace: RoutingTrace,
    measured: Locality,
    table: dict[str, tuple[ReplayResult, ...]],
    bend: int | None,
    choices: list[PolicyChoice],
    fitted: RouterFit | None,
) -> dict[str, Any]:
    local = dataclasses.asdict(measured)
    local["sch"] = [{"length": n, "multiple": m, "rate": rate} for (n, m), rate in measured.sch.items()]
    return {
        "schema": SCHEMA,
        "model": trace.model,
        "layers": trace.layer_count,
        "experts": trace.expert_count,
        "top_k": trace.top_k,
        "tokens": trace.tokens,
        "decode_tokens": trace.decode_tokens,
        "expert_bytes": trace.all_expert_bytes,
        "token_bytes": trace.cycle_bytes,
        "locality": local,
        "curves": [_result(result) for results in table.values() for result in results],
        "knee_bytes": bend,
        "choices": [
            {
                "capacity_bytes": choice.best.capacity_bytes,
                "best": _result(choice.best),
                "pinned": [list(entry) for entry in choice.pinned],
                "candidates": [{"name": name, **_result(result)} for name, result in choice.candidates],
                "bound": _result(choice.bound),
                "warnings": [dataclasses.asdict(warning) for warning in choice.warnings],
            }
            for choice in choices
        ],
        "router": None if fitted is None else dataclasses.asdict(fitted),
    }


def _result(result: ReplayResult) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "scope": result.scope,
        "capacity_bytes": result.capacity_bytes,
        "hit_rate": result.hit_rate,
        "decode_hit_rate": result.decode_hit_rate,
        "read_bytes": result.read_bytes,
        "read_bytes_per_token": result.read_bytes_per_token,
        "peak_bytes": result.peak_bytes,
    }
