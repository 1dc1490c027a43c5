"""What `compile-model run` says of memory: how weights and keys and values are held, what was read, what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from runtime.cuda.session import CudaSession
    from runtime.session import Session
    from stratum.model import Generation, Model
    from stratum.progress import Reporter

    AnySession = Session | CudaSession


def kept(session: AnySession) -> str:
    """How the weights are held, in a few words."""
    from stratum.progress import format_bytes

    if session.streamer is None:
        if not session.device_name:
            return "mapped"
        whole, there = session.manifest.weights.bytes, session.memory().weights
        return "on the GPU" if there >= whole else f"on the GPU of {format_bytes(whole)}, which pass through"
    plan, report = session.streamer.plan, session.streamer.report()
    parts = [f"{format_bytes(report.resident_bytes)} of them stay"]
    if plan.window_bytes:
        parts.append(f"{format_bytes(plan.window_bytes)} for those that are streamed")
    if plan.expert_bytes:
        parts.append(f"{format_bytes(plan.expert_bytes)} for experts ({plan.policy})")
    return f"under {format_bytes(plan.budget_bytes)}: {', '.join(parts)}"


def kv_kept(session: AnySession) -> str:
    """What of the KV cache stays in memory, where that is not all."""
    from stratum.progress import format_bytes

    if session.kv_stream is None:
        return ""
    return f"({format_bytes(session.kv_stream.options.limit_bytes)} of it in memory) "


def tell_streaming(session: AnySession, reporter: Reporter, quiet: bool, as_json: bool) -> None:
    """What was read, and what it cost."""
    if link := getattr(session, "hybrid", None):
        if as_json:
            reporter.event("streaming", **vars(link), same_bits=link.same_bits)
        elif not quiet:
            click.echo(link.summary(), err=True)
    if attended := getattr(session, "host_kv", None):
        if as_json:
            reporter.event("host_kv", **vars(attended), link_bytes=attended.link_bytes)
        elif not quiet:
            click.echo(attended.summary(), err=True)
    if session.streamer is None:
        return
    from runtime.process_memory import peak_resident_bytes

    report = session.streamer.report()
    peak = peak_resident_bytes()
    if as_json:
        rates = {"gigabytes_per_s": report.gigabytes_per_s, "hit_rate": report.hit_rate, "peak_resident_bytes": peak}
        reporter.event("streaming", **vars(report), **rates, full_model=report.full_model)
    elif not quiet:
        click.echo(f"{report}; at most {peak / (1 << 20):.0f} MiB in memory", err=True)
    if session.kv_stream is not None:
        kv = session.kv_stream.report()
        if as_json:
            reporter.event("kv_streaming", **vars(kv))
        elif not quiet:
            click.echo(str(kv), err=True)


def tell_stand_ins(model: Model, generation: Generation, reporter: Reporter, quiet: bool, as_json: bool) -> None:
    """How many experts were computed from copies, beside what a plan would have foretold."""
    streamer = model.session.streamer
    if streamer is None or not streamer.plan.stand_ins:
        return
    from stratum.stand_in_prediction import foretold

    report, steps = streamer.report(), len(generation.token_ids) - 1
    expected = foretold(model.manifest, streamer.plan, len(generation.prompt_ids), max(0, steps))
    if expected is None:
        return
    if as_json:
        reporter.event("stand_ins", foretold=vars(expected), lookups=report.expert_lookups, used=report.stand_ins)
    elif not quiet:
        share = 100 * report.stand_ins / max(1, report.expert_lookups)
        click.echo(
            f"stand-ins: {expected.stand_ins} of {expected.lookups} experts foretold "
            f"({100 * expected.stand_ins / max(1, expected.lookups):.1f} %), "
            f"{report.stand_ins} of {report.expert_lookups} measured ({share:.1f} %)",
            err=True,
        )


def tell_prompt_cache(generation: Generation, reporter: Reporter, quiet: bool, as_json: bool) -> None:
    """What came from the file, and why it could not be written."""
    cached = generation.cached
    if cached is None or cached.reused is None:
        return
    if as_json:
        reporter.event("prompt_cache", **vars(cached.reused))
    elif not quiet:
        click.echo(str(cached.reused), err=True)
    if cached.fault is not None:
        click.echo(f"warning: {cached.fault.message} ({cached.fault.where})", err=True)
