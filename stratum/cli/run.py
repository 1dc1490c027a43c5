"""`compile-model run`: text from a model, streamed to stdout; everything else goes to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ir.diagnostics import DiagnosticError
from stratum.cli.bit_options import BitRequest, bit_options
from stratum.cli.options import missed_experts_option, output_options
from stratum.cli.run_options import Limits, directory_options, generation_options, memory_options
from stratum.cli.run_report import kept, kv_kept, tell_prompt_cache, tell_stand_ins, tell_streaming
from stratum.device_choice import DEVICES, choose_device

if TYPE_CHECKING:
    from runtime.cuda.session import CudaSession
    from runtime.manifest import Manifest
    from runtime.sampling import SamplingParams
    from runtime.session import Session
    from stratum.model import Generation, Model
    from stratum.progress import Reporter
    from stratum.routing_recorder import RoutingRecorder

    AnySession = Session | CudaSession

MAX_PROMPT_BYTES = 64 << 20


@click.command(context_settings={"show_default": True})
@click.argument("model", metavar="DIR|OUT", type=click.Path(path_type=Path))
@click.argument("prompt_argument", metavar="[PROMPT]", required=False)
@click.option("--prompt", metavar="TEXT", help="What to go on from; '-' reads stdin.")
@generation_options
@directory_options
@bit_options
@click.option("-p", "--pipeline", metavar="PIPELINE", help="For a directory: graph passes instead of the default ones.")
@memory_options
@click.option("--device", type=click.Choice(DEVICES), default="cpu", help="auto: a GPU where one can run the model.")
@click.option("--device-memory", metavar="SIZE", help="With --device cuda or auto: use no more of the GPU's memory.")
@missed_experts_option
@click.option(
    "--stand-ins",
    type=float,
    metavar="SHARE",
    help="With --memory or --plan: missing experts of less than SHARE of a token's weight are computed from copies in "
    "fewer bits, which 'build --stand-ins' made. Changes the output.",
)
@click.option("--prompt-cache", type=click.Path(path_type=Path), metavar="FILE", help="Keep the prompt's KV there.")
@click.option("--record-routing", type=click.Path(path_type=Path), metavar="FILE", help="Write the experts chosen.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Write a trace for ui.perfetto.dev.")
@click.option("--profile", is_flag=True, help="Show where the time went, by part of the model.")
@click.option("--verify", is_flag=True, help="Check the hash of the weights, whatever their size.")
@click.option("--token-ids", is_flag=True, help="Show the token ids of prompt and text.")
@output_options
def run(
    model: Path,
    prompt_argument: str | None,
    prompt: str | None,
    max_tokens: int,
    chat: bool,
    threads: int | None,
    context: int | None,
    dtype: str | None,
    target: str | None,
    recipe: str | None,
    pipeline: str | None,
    budget: BitRequest,
    limits: Limits,
    device: str,
    device_memory: str | None,
    missed_experts: str | None,
    stand_ins: float | None,
    prompt_cache: Path | None,
    record_routing: Path | None,
    trace: Path | None,
    profile: bool,
    verify: bool,
    token_ids: bool,
    quiet: bool,
    as_json: bool,
    stop: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Generate text. A Hugging Face directory is compiled into a cache first, once.

    Sampling follows the model's generation_config.json as transformers does; without one it is greedy. Options
    override single values, and --temperature 0 is always greedy.
    """
    from stratum import api
    from stratum.progress import make_reporter
    from stratum.routing_recorder import RoutingRecorder

    text = _prompt(prompt_argument, prompt)
    refuse_build_options(model, dtype=dtype, target=target, recipe=recipe, pipeline=pipeline, **budget.given)
    reporter = make_reporter(quiet=quiet, as_json=as_json)
    with reporter:
        options: dict[str, Any] = {"dtype": dtype or "bf16", "target": target or "host", "pipeline": pipeline}
        shown = {"reporter": reporter, "as_json": as_json, "quiet": quiet}
        recorder = RoutingRecorder() if record_routing is not None else None
        options |= {"recipe": budget.recipe(model, recipe=recipe, **options, **shown)}
        options["target"] = target
        chosen = device
        if prompt_cache is not None and device != "cpu":
            chosen = choose_device(model, device, prompt_cache=prompt_cache)
        loaded = api.load(
            model,
            threads=threads,
            max_context=context,
            verify=verify,
            progress=reporter,
            warn=lambda message: click.echo(f"warning: {message}", err=True),
            routing=recorder,
            **vars(limits),
            device=chosen,
            device_memory=device_memory,
            missed_experts=missed_experts,
            stand_ins=stand_ins,
            **options,
        )
    with loaded, contextlib.ExitStack() as stack:
        if record_routing is not None and not loaded.manifest.experts_per_token:
            raise DiagnosticError("the model has no experts, so there is no routing", where=str(record_routing))
        if loaded.session.streamer is not None:
            loaded.session.streamer.tell = lambda message: click.echo(f"warning: {message}", err=True)
        generation = loaded.generate(
            text, max_tokens=max_tokens, stop=stop, chat=chat, prompt_cache=prompt_cache, **sampling
        )
        if not quiet:
            _tell_choices(reporter, loaded, loaded.sampling(**sampling), as_json)
        record = stack.enter_context(loaded.profile()) if trace or profile else None
        _stream(generation, reporter, as_json)
        stack.close()
        if token_ids and not as_json:
            click.echo(f"prompt ids: {list(generation.prompt_ids)}\ntext ids: {generation.token_ids}", err=True)
        _tell_end(generation, reporter, quiet, as_json)
        tell_prompt_cache(generation, reporter, quiet, as_json)
        tell_streaming(loaded.session, reporter, quiet, as_json)
        tell_stand_ins(loaded, generation, reporter, quiet, as_json)
        if recorder is not None and record_routing is not None:
            _write_routing(recorder, loaded.manifest, record_routing)
        if record is not None and profile:
            click.echo(record.table(), err=True)
        if record is not None and trace:
            record.write_trace(trace)


def _prompt(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise click.UsageError("the prompt is given twice, as an argument and with --prompt")
    text = option if option is not None else argument
    if text is None:
        raise click.UsageError("no prompt: give --prompt TEXT, or --prompt - to read stdin")
    if text != "-":
        return text
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise DiagnosticError(f"the prompt is larger than {MAX_PROMPT_BYTES >> 20} MiB", where="<stdin>")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DiagnosticError(f"the prompt is not UTF-8 text (byte {error.start})", where="<stdin>") from error


def refuse_build_options(model: Path, **options: object) -> None:
    """An artifact was built already; options that would have decided how are not silently ignored."""
    from runtime.artifact import is_artifact

    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given and is_artifact(model):
        raise DiagnosticError(
            f"{', '.join(given)} cannot change an artifact that is built already",
            where=str(model),
            hint="give the Hugging Face directory instead, or build another artifact; 'inspect' shows what this one is",
        )


def _tell_choices(reporter: Reporter, model: Model, sampling: SamplingParams, as_json: bool) -> None:
    """What was chosen, in two lines: the code, and the memory and sampling."""
    from stratum.progress import format_bytes, format_count

    manifest, session, choice = model.manifest, model.session, model.device_choice
    memory = session.memory()
    on_gpu = choice.device == "cuda"
    instructions = "GPU" if on_gpu else instruction_set(frozenset(manifest.target.features))
    if as_json:
        reporter.event(
            "chosen",
            path=str(model.path),
            model=manifest.model.get("name"),
            target=manifest.target.name,
            instructions=instructions,
            device=choice.device,
            device_name=session.device_name,
            device_why=choice.why,
            threads=session.threads,
            dtype=manifest.dtype,
            recipe=manifest.raw.get("recipe", ""),
            context=session.max_context,
            weights_bytes=memory.weights,
            kv_reserved_bytes=memory.kv_reserved,
            activation_bytes=memory.arena,
            sampling=vars(sampling),
            streaming=json.loads(session.streamer.plan.to_json()) if session.streamer else None,
        )
        return
    if choice.why:
        click.echo(f"device: {choice.device}, since {choice.why}", err=True)
    runs = f"{instructions} ({manifest.target.name}), {session.threads} thread{'s' if session.threads > 1 else ''}"
    if on_gpu:
        beside = f", experts also on {session.threads} threads of the CPU" if session.threads > 1 else ""
        runs = f"on {session.device_name} ({session.architecture}){beside}"
    parameters = f"{format_count(manifest.model.get('parameters') or 0)} parameters in {formats_of(manifest)}"
    click.echo(
        f"{manifest.model.get('name')}: {manifest.model.get('family')}, {parameters}; "
        f"{runs}\n"
        f"memory: weights {format_bytes(memory.weights)} {kept(session)}, "
        f"KV cache up to {format_bytes(memory.kv_reserved)} {kv_kept(session)}for "
        f"{session.max_context} positions, activations {format_bytes(memory.arena)}; {_sampling_text(sampling)}",
        err=True,
    )
    if session.device_name and getattr(session, "hybrid", None) is not None:
        _tell_forecast(cast("CudaSession", session))


def _tell_forecast(session: CudaSession) -> None:
    """What a token is to take on a GPU that has no room for all weights, as `plan` says it."""
    from stratum.device_forecast import forecast_of

    found = forecast_of(session)
    if found is not None:
        click.echo(found.line(), err=True)


def _write_routing(recorder: RoutingRecorder, manifest: Manifest, path: Path) -> None:
    from hw_targets.routing import write_trace

    write_trace(recorder.trace(manifest), path)


def formats_of(manifest: Manifest) -> str:
    """What the weights are stored in, in a few words: `bf16`, or `w4a8-g32 (4.86 bits per weight)`."""
    recipe = manifest.raw.get("recipe")
    if not isinstance(recipe, str) or recipe in ("", "none"):
        return manifest.dtype
    weights = manifest.raw.get("weights")
    bits = weights.get("bits_per_weight") if isinstance(weights, dict) else None
    return f"{recipe} ({bits:.2f} bits per weight)" if isinstance(bits, float) else recipe


def _sampling_text(sampling: SamplingParams) -> str:
    parts = [] if sampling.greedy else [f"temperature {sampling.temperature:g}"]
    if not sampling.greedy:
        parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        parts += [f"min-p {sampling.min_p:g}"] if sampling.min_p else []
    if sampling.repetition_penalty != 1:
        parts.append(f"repetition penalty {sampling.repetition_penalty:g}")
    return ", ".join(["greedy", *parts] if sampling.greedy else parts)


def instruction_set(features: frozenset[str]) -> str:
    """The instructions that matter for speed, in words: `AVX-512 with bf16 dot products`."""
    for feature, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("sve", "SVE"), ("neon", "NEON")):
        if feature in features:
            dots = "avx512bf16" in features or "bf16" in features
            return f"{name} with bf16 dot products" if dots else name
    return "baseline instructions"


def _stream(generation: Generation, reporter: Reporter, as_json: bool) -> None:
    """Prints the pieces as they come, always as UTF-8, and ends the last line."""
    if as_json:
        for event in generation.events():
            reporter.event("token", id=event.token, text=event.text)
        return
    out = sys.stdout.buffer
    piece = ""
    for piece in generation:
        out.write(piece.encode("utf-8", "replace"))
        out.flush()
    if not piece.endswith("\n"):
        out.write(b"\n")
        out.flush()


def _tell_end(generation: Generation, reporter: Reporter, quiet: bool, as_json: bool) -> None:
    statistics = generation.statistics
    if as_json:
        reporter.event(
            "done",
            text=generation.text,
            finish_reason=generation.finish_reason,
            prompt_ids=list(generation.prompt_ids),
            token_ids=generation.token_ids,
            ttft_s=statistics.ttft_s,
            tpot_s=statistics.tpot_s,
            total_s=statistics.total_s,
            seed=statistics.seed,
        )
    elif not quiet:
        ends = {"stop": "the model ended it", "length": "-n reached", "context": "the context is full"}
        click.echo(
            f"{statistics.prompt_tokens} prompt tokens in {statistics.ttft_s * 1e3:.0f} ms "
            f"({statistics.prompt_tokens_per_s:.0f} t/s), {statistics.generated_tokens} generated "
            f"({statistics.decode_tokens_per_s:.1f} t/s); {ends[generation.finish_reason]}",
            err=True,
        )
