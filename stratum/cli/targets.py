"""`compile-model targets`: machines that code can be made and plans drawn for, and what this one is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hw_targets import Target
    from hw_targets.calibrate import Calibration
    from hw_targets.calibrate_disk import DiskCalibration


@click.group(invoke_without_command=True)
@click.pass_context
def targets(ctx: click.Context) -> None:
    """List, show, detect and measure hardware targets."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_targets)


@targets.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def list_targets(as_json: bool = False) -> None:
    """The names that --target takes; '*' marks those whose code this machine can run."""
    import hw_targets

    host = hw_targets.load("host")
    known = [(name, hw_targets.load(name)) for name in hw_targets.names()]
    if as_json:
        entries = [
            {"name": n, "description": t.description, "machine": t.is_machine, "runs_here": host.can_run(t)}
            for n, t in known
        ]
        click.echo(json.dumps({"targets": entries}, indent=1))
        return
    for title, machines in (("Instruction sets:", False), ("Machines:", True)):
        click.echo(title)
        for name, target in known:
            if target.is_machine == machines:
                click.echo(f"{'*' if host.can_run(target) else ' '} {name:<16} {target.description}")


@targets.command("show")
@click.argument("name", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--sources", is_flag=True, help="Where each figure comes from.")
def show_target(name: str, as_json: bool, sources: bool) -> None:
    """What is known of one target; NAME may carry overrides, x{dram=8GiB}."""
    import hw_targets

    _print(hw_targets.load(name), as_json, sources)


@targets.command("detect")
@click.option("--calibrate", is_flag=True, help="Measure bandwidth and arithmetic peaks again (a few seconds).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--sources", is_flag=True, help="Where each figure comes from.")
def detect_target(calibrate: bool, as_json: bool, sources: bool) -> None:
    """This machine, with figures measured on it."""
    import hw_targets
    from hw_targets.calibrate import calibrate as measure

    measure(refresh=calibrate)
    _print(hw_targets.load("host"), as_json, sources)


@targets.command("calibrate")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads instead of all usable cores.")
@click.option("--disk", type=click.Path(), metavar="DIR", help="Measure the drive of this directory instead.")
@click.option(
    "--size", default="2GiB", show_default=True, metavar="BYTES", help="Scratch file of --disk, removed after."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def calibrate_target(threads: int | None, disk: str | None, size: str, as_json: bool) -> None:
    """Measure this machine anew: memory, arithmetic and barriers, or a drive. Results are kept and used by plans."""
    from hw_targets.calibrate import calibrate as measure

    if disk is None:
        result = measure(threads, refresh=True)
        lines = _calibration_lines(result)
    else:
        from hw_targets.calibrate_disk import calibrate_disk, lies_in_memory
        from hw_targets.quantities import parse_quantity
        from ir.diagnostics import DiagnosticError
        from stratum.progress import make_reporter

        nbytes = int(parse_quantity(size, "bytes", where="--size"))
        if lies_in_memory(disk):
            raise DiagnosticError(
                "files lie in memory here", where=disk, expected="a directory on the drive to measure"
            )
        with make_reporter(quiet=as_json) as reporter:
            result = calibrate_disk(disk, nbytes=nbytes, tell=reporter)
        lines = _disk_lines(result)
    click.echo(json.dumps(result.as_dict(), indent=1) if as_json else "\n".join(lines))


def _print(target: Target, as_json: bool, sources: bool) -> None:
    if as_json:
        import dataclasses

        fields = dataclasses.asdict(target)
        click.echo(json.dumps(fields, default=sorted, indent=1))
        return
    from hw_targets.describe import describe

    for line in describe(target, sources=sources):
        click.echo(line)


def _calibration_lines(result: Calibration) -> list[str]:
    peaks: dict[str, Any] = {"f32": result.f32_peak, "bf16": result.bf16_peak, "i8": result.i8_peak}
    curve = ", ".join(f"{rate / 1e9:.1f} GB/s with {threads}" for threads, rate in result.read_by_threads)
    lines = [
        f"{result.cpu}, {result.threads} threads",
        f"  read        {curve}",
        "  products    " + ", ".join(f"{e} {rate / 1e9:.0f} GFLOP/s" for e, rate in peaks.items() if rate),
    ]
    if result.barrier_seconds is not None:
        lines.append(f"  barrier     {result.barrier_seconds * 1e6:.2f} us")
    if result.page_fault_seconds is not None:
        lines.append(f"  page fault  {result.page_fault_seconds * 1e6:.2f} us (4 KiB)")
    return [*lines, _spread_line(result.spread, 0.1)]


def _disk_lines(result: DiskCalibration) -> list[str]:
    depths = sorted({threads for _, threads, _ in result.points})
    table = {(block, threads): rate for block, threads, rate in result.points}
    lines = [
        f"{result.device}{f' ({result.model})' if result.model else ''}, {result.directory}",
        "  sustained direct reads of random blocks, MB/s, by requests in flight:",
        "  block     " + "".join(f"{n:>9}" for n in depths),
    ]
    for block in sorted({block for block, _, _ in result.points}):
        size = f"{block >> 20} MiB" if block >= 1 << 20 else f"{block >> 10} KiB"
        lines.append(f"  {size:<10}" + "".join(f"{table[block, n] / 1e6:>9.0f}" for n in depths))
    lines.append(f"  long run    {result.sustained_bandwidth / 1e6:.0f} MB/s of large blocks")
    lines.append(f"  write       {result.write_bandwidth / 1e6:.0f} MB/s")
    if result.burst_bandwidth is not None and result.burst_bytes is not None:
        size = f"{result.burst_bytes / 1e9:.1f} GB"
        lines.append(f"  burst       {result.burst_bandwidth / 1e6:.0f} MB/s for {size}, not planned with")
    return [*lines, _spread_line(result.spread, 0.2)]


def _spread_line(spread: float, limit: float) -> str:
    return f"  spread      {spread:.0%}" + (": the machine was busy, measure again" if spread > limit else "")
