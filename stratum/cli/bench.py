"""`compile-model bench`: llama-bench's rows for a model, and how close they come to this machine's limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stratum.cli.bench_formats import bench_formats, formats_options, refuse_without_formats
from stratum.cli.options import NumberList, missed_experts_option
from stratum.cli.run_options import Limits, directory_options, memory_options
from stratum.device_choice import DEVICES, check_missed_experts, choose_device

if TYPE_CHECKING:
    from hw_targets.calibrate import Calibration
    from runtime.cuda.session import CudaSession
    from runtime.manifest import Manifest
    from runtime.session import Session
    from stratum.benchmark import BenchTest, Result

DISTURBED = 0.1  # spread of a calibration above which the machine was busy meanwhile


@click.command(context_settings={"show_default": True})
@click.argument("model", metavar="DIR|OUT", type=click.Path(path_type=Path))
@click.option("-p", "--n-prompt", type=NumberList(), default="512", help="Prompt lengths (pp); 0 for none.")
@click.option("-n", "--n-gen", type=NumberList(), default="128", help="Numbers of generated tokens (tg); 0 for none.")
@click.option("-d", "--n-depth", type=NumberList(), default="0", help="Positions filled before each test.")
@click.option(
    "-r", "--repetitions", type=click.IntRange(min=1), default=5, help="Runs of each test, after one to warm up."
)
@click.option("-t", "--threads", type=NumberList(1), help="Thread counts. Default: one a physical core.")
@memory_options
@click.option("--device", type=click.Choice(DEVICES), default="cpu", help="auto: a GPU where one can run the model.")
@click.option("--device-memory", metavar="SIZE", help="With --device cuda or auto: use no more of the GPU's memory.")
@missed_experts_option
@click.option("-o", "--output", type=click.Choice(["md", "jsonl"]), default="md", help="Format on stdout.")
@click.option("--jsonl", type=click.Path(path_type=Path), metavar="FILE", help="Append JSONL records to FILE as well.")
@click.option("--no-calibration", is_flag=True, help="Do not measure the machine's bandwidth and peak.")
@directory_options
@formats_options
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def bench(
    model: Path,
    n_prompt: tuple[int, ...],
    n_gen: tuple[int, ...],
    n_depth: tuple[int, ...],
    repetitions: int,
    threads: tuple[int, ...] | None,
    limits: Limits,
    device: str,
    device_memory: str | None,
    missed_experts: str | None,
    output: str,
    jsonl: Path | None,
    no_calibration: bool,
    dtype: str | None,
    recipe: str | None,
    target: str | None,
    formats: bool,
    recipes: str | None,
    text: Path | None,
    chunks: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure prompt processing and token generation. Lists are given by commas: -p 128,512 -d 0,4096."""
    from runtime.artifact import open_artifact
    from runtime.cuda.missed_experts import AUTO
    from stratum import api, benchmark
    from stratum.cli.run import refuse_build_options

    table = {"recipes": recipes, "text": text, "chunks": chunks, "as_json": as_json}
    if formats:
        if recipe is not None or output != "md" or jsonl is not None or no_calibration or device != "cpu":
            raise click.UsageError(
                "--formats goes with none of --recipe, --output, --jsonl, --no-calibration, --device"
            )
        bench_formats(
            model,
            n_prompt=n_prompt,
            n_gen=n_gen,
            n_depth=n_depth,
            threads=threads,
            repetitions=repetitions,
            dtype=dtype,
            target=target,
            quiet=quiet,
            **table,
        )
        return
    refuse_without_formats(table)
    refuse_build_options(model, dtype=dtype, target=target, recipe=recipe)
    device_bytes = api.memory_bytes(device_memory, "--device-memory")
    check_missed_experts(missed_experts, device)
    choice = choose_device(
        model,
        device,
        device_memory=device_bytes,
        dtype=dtype or "bf16",
        recipe=recipe,
        target=target,
        plan=limits.plan,
        kv_dir=limits.kv_dir,
        expert_policy=limits.expert_policy,
        no_mmap=None if limits.mmap else True,
    )
    if choice.why and not quiet:
        click.echo(f"device: {choice.device}, since {choice.why}", err=True)
    on_gpu = choice.device == "cuda"
    path = _built(model, dtype, recipe, target or (choice.target if on_gpu else "host"), quiet)
    manifest = open_artifact(path).manifest
    tests = benchmark.plan_tests(n_prompt, n_gen, n_depth)
    if not tests:
        raise click.UsageError("nothing to measure: -p and -n are both 0")
    context = benchmark.check_context(tests, manifest.max_context, str(path))
    opener = _Opener(path, context, limits, on_gpu, device_bytes, missed_experts or AUTO)
    results: list[Result] = []
    calibrations: dict[int, Calibration | None] = {}
    for count in threads or (None,):
        with opener.open(count) as session:
            measured = _measure(session, tests, repetitions, quiet)
            calibration = _gpu_calibration(session) if on_gpu and not no_calibration else None
        used = measured[0].threads
        if not on_gpu and not no_calibration:
            calibration = _cpu_calibration(used)
        calibrations[used] = calibration
        results += measured
        _emit_records(manifest, measured, calibration, output, jsonl)
    if output == "md":
        for used, calibration in calibrations.items():
            rows = [result for result in results if result.threads == used]
            click.echo(benchmark.markdown(manifest, rows, calibration))
            if calibration is not None:
                click.echo("\n" + _limits_text(calibration))


def _built(model: Path, dtype: str | None, recipe: str | None, target: str, quiet: bool) -> Path:
    """The artifact of `model`: itself, or what the cache holds or now gets."""
    from stratum import api
    from stratum.progress import make_reporter

    with make_reporter(quiet=quiet) as reporter:
        return api.ensure_built(
            model,
            dtype=dtype or "bf16",
            target=target,
            recipe=recipe,
            progress=reporter,
            warn=lambda message: click.echo(message, err=True),
        )


def _limits_text(calibration: Calibration) -> str:
    """What 100 % means in the table."""
    if not calibration.f32_peak:
        rate = f"{calibration.read_bandwidth / 1e9:.1f} GB/s read and written"
        return f"100 % of bandwidth is what a copy within {calibration.cpu} was measured to do: {rate}"
    element, peak = ("bf16", calibration.bf16_peak) if calibration.bf16_peak else ("f32", calibration.f32_peak)
    text = (
        f"100 % is what this machine was measured to do with {calibration.threads} threads: "
        f"read {calibration.read_bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s {element}"
    )
    if calibration.spread > DISTURBED:
        text += "; it was busy meanwhile, measure again with 'compile-model targets detect --calibrate'"
    return text


@dataclass(frozen=True)
class _Opener:
    """Opens what is measured: the same artifact under the same limits, by number of threads."""

    path: Path
    context: int
    limits: Limits
    on_gpu: bool
    device_bytes: int | None
    missed_experts: str

    def open(self, threads: int | None) -> Session | CudaSession:
        if self.on_gpu:
            return self._on_gpu(threads)
        return open_on_cpu(self.path, threads, self.context, self.limits)

    def _on_gpu(self, threads: int | None) -> CudaSession:
        from stratum import api
        from stratum.gpu_session import open_on_gpu

        return open_on_gpu(
            self.path,
            memory=api.memory_bytes(self.limits.memory),
            device_memory=self.device_bytes,
            max_context=self.context,
            missed_experts=self.missed_experts,
            threads=threads,
        )


def open_on_cpu(path: Path, threads: int | None, context: int, limits: Limits) -> Session:
    """A session with what a budget or a plan leaves in memory."""
    from runtime.kv_stream import KVStreamOptions
    from runtime.session import Session
    from stratum import api
    from stratum.memory_plan import plan_for
    from stratum.stream_placement import stream_for

    plan, kv_stream, memory = None, None, api.memory_bytes(limits.memory)
    if limits.plan is not None:
        plan = stream_for(path, limits.plan, memory, context, limits.expert_policy, num_slots=1)
    elif memory is not None:
        plan = plan_for(path, memory, context, limits.expert_policy)
    if plan is not None and plan.kv_bytes is not None:
        kv_stream = KVStreamOptions(plan.kv_bytes, str(limits.kv_dir) if limits.kv_dir is not None else None)
    stream = plan.stream if plan is not None else None
    return Session(path, threads=threads, max_context=context, stream=stream, kv_stream=kv_stream, mmap=limits.mmap)


def _measure(session: Session | CudaSession, tests: list[BenchTest], repetitions: int, quiet: bool) -> list[Result]:
    from stratum import benchmark

    results = []
    where = session.device_name or f"{session.threads} threads"
    for test in tests:
        if not quiet:
            click.echo(f"{test.name}, {where}", err=True)
        before = session.streamer.report() if session.streamer else None
        results.append(benchmark.measure(session, test, repetitions))
        if session.streamer is not None and before is not None and not quiet:
            click.echo(str(session.streamer.report().since(before)), err=True)
        if session.kv_stream is not None and not quiet:
            click.echo(str(session.kv_stream.report()), err=True)
    return results


def _cpu_calibration(threads: int) -> Calibration:
    from hw_targets.calibrate import calibrate

    return calibrate(threads)


def _gpu_calibration(session: Session | CudaSession) -> Calibration:
    """How fast the GPU copies within its memory; its other limits are not measured."""
    from hw_targets.calibrate import Calibration
    from runtime.cuda.session import CudaSession

    assert isinstance(session, CudaSession)
    return Calibration(1, session.copy_bandwidth(), 0.0, cpu=session.device_name)


def _emit_records(
    manifest: Manifest, results: list[Result], calibration: Calibration | None, output: str, jsonl: Path | None
) -> None:
    import json
    from datetime import UTC, datetime

    from stratum import benchmark

    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [json.dumps(benchmark.json_fields(manifest, r, calibration, when)) for r in results]
    if output == "jsonl":
        for line in lines:
            click.echo(line)
    if jsonl is not None:
        with jsonl.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
