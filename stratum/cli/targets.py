"""`compile-model targets`: which machines code can be made for, and what this one is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from stratum.progress import format_bytes

if TYPE_CHECKING:
    from hw_targets import Target


@click.group(invoke_without_command=True)
@click.pass_context
def targets(ctx: click.Context) -> None:
    """List and show hardware targets."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_targets)


@targets.command("list")
def list_targets() -> None:
    """The names that --target takes; '*' marks those this machine can run."""
    import hw_targets

    host = hw_targets.load("host")
    for name in hw_targets.names():
        target = hw_targets.load(name)
        mark = "*" if host.can_run(target) else " "
        click.echo(f"{mark} {name:<16} {target.description}")


@targets.command("show")
@click.argument("name", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show_target(name: str, as_json: bool) -> None:
    """What is known of one target: instructions, units, memory; NAME may carry overrides, x{dram=8GiB}."""
    import hw_targets

    _print(hw_targets.load(name), as_json)


@targets.command("detect")
@click.option("--calibrate", is_flag=True, help="Measure bandwidth and arithmetic peaks again (a few seconds).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def detect_target(calibrate: bool, as_json: bool) -> None:
    """This machine, with figures measured on it."""
    import hw_targets
    from hw_targets.calibrate import calibrate as measure

    measure(refresh=calibrate)
    _print(hw_targets.load("host"), as_json)


def _print(target: Target, as_json: bool) -> None:
    if as_json:
        import dataclasses

        fields = dataclasses.asdict(target)
        click.echo(json.dumps(fields, default=sorted, indent=1))
        return
    click.echo(f"{target.name}: {target.description}")
    click.echo(f"  triple      {target.llvm_triple}, cpu {target.llvm_cpu}, vectors of {target.vector_bits} bits")
    click.echo(f"  features    {' '.join(target.required_features()) or '(the baseline)'}")
    for unit in target.units:
        peaks = ", ".join(f"{element} {rate / 1e9:.0f} GFLOP/s a core" for element, rate in unit.peak)
        cores = f"{unit.cores} cores" if unit.cores else "cores not stated"
        click.echo(f"  {unit.name:<11} {cores}, {peaks or 'peak not known'}{_source(unit.source)}")
    for cache in target.caches:
        click.echo(f"  L{cache.level} {cache.kind:<8} {format_bytes(cache.nbytes)}, shared by {cache.shared_by}")
    for tier in target.tiers:
        size = format_bytes(tier.capacity_bytes) if tier.capacity_bytes else "size not stated"
        read = f"read {tier.read_bandwidth / 1e9:.1f} GB/s" if tier.read_bandwidth else "bandwidth not known"
        click.echo(f"  {tier.name:<11} {size}, {read}{_source(tier.source)}")


def _source(source: str) -> str:
    return f" ({source})" if source else ""
