"""`compile-model eval`: perplexity on a text, and how far a build is from its reference."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratum.cli.options import DTYPES, output_options, recipe_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.manifest import Manifest
    from runtime.stream_report import StreamReport
    from stratum.evaluation import Evaluation, Plan, Text
    from stratum.layer_errors import LayerError
    from stratum.model import Model
    from stratum.progress import Reporter

LAYERS_SHOWN = 80


@click.command("eval", context_settings={"show_default": True})
@click.argument("model", metavar="DIR|OUT", type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text to predict.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="DIR|OUT",
    help="Compare with this model; a directory is built in f32.",
)
@click.option("-c", "--ctx", type=int, metavar="N", help="Tokens of a window. Default: 512, or the model's context.")
@click.option("--stride", type=int, metavar="S", help="A window every S tokens, its last S scored. Default: see above.")
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Only the first N windows.")
@recipe_option("For a directory. ")
@click.option("--dtype", type=click.Choice(DTYPES), help="For a directory: weights and KV cache. Default: bf16.")
@click.option("--target", metavar="NAME", help="For a directory: see 'compile-model targets'. Default: host.")
@click.option("-p", "--pipeline", metavar="PIPELINE", help="For a directory: graph passes instead of the default ones.")
@click.option("-t", "--threads", type=int, help="Default: one a physical core this process may use.")
@click.option("-m", "--memory", metavar="SIZE", help="The model may use no more than this, as with 'run --memory'.")
@click.option(
    "--stand-ins",
    type=float,
    metavar="SHARE",
    help="With --memory: as 'run --stand-ins', the text given token by token.",
)
@click.option(
    "--layer-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens for the error of each layer; 0 for none. Default: 128 for two directories of a small model.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw divergence and layers (.png, .svg, .pdf)."
)
@output_options
def evaluate(
    model: Path,
    text: Path,
    reference: Path | None,
    ctx: int | None,
    stride: int | None,
    chunks: int | None,
    recipe: str | None,
    dtype: str | None,
    target: str | None,
    pipeline: str | None,
    threads: int | None,
    memory: str | None,
    stand_ins: float | None,
    layer_tokens: int | None,
    plot: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure perplexity on a text and, with --reference, what a build loses against it.

    Windows are those of llama-perplexity: side by side, each without memory of the ones before, its second half scored;
    with --stride they overlap and every token is scored once.
    """
    from stratum import api, evaluation
    from stratum.cli.run import refuse_build_options
    from stratum.progress import make_reporter

    refuse_build_options(model, dtype=dtype, target=target, pipeline=pipeline, recipe=recipe)
    if plot is not None:
        _check_plot(plot, reference)
    words = evaluation.read_text(text)
    build = {"dtype": dtype or "bf16", "pipeline": pipeline, "recipe": recipe}
    common = {
        "threads": threads,
        "max_context": ctx,
        "target": target or "host",
        "warn": lambda message: click.echo(f"warning: {message}", err=True),
    }
    with make_reporter(quiet=quiet, as_json=as_json) as reporter:
        common["progress"] = reporter
        with (
            api.load(model, **build, memory=memory, stand_ins=stand_ins, **common) as ours,
            api.load(reference, dtype="f32", **common) if reference is not None else nullcontext() as theirs,
        ):
            encoded = _encode(words, ours, theirs, text)
            most = min(m.session.max_context for m in (ours, theirs) if m is not None)
            window = ctx or min(evaluation.DEFAULT_CONTEXT, most)
            plan = evaluation.plan_windows(len(encoded.ids), window, stride=stride, limit=chunks)
            (result,) = evaluation.evaluate(
                [evaluation.OneByOne(ours.session) if stand_ins else ours.session],
                encoded,
                plan,
                reference=theirs.session if theirs is not None else None,
                tell=lambda done, total: reporter("evaluate", done, total, "tokens"),
            )
            facts = _facts(ours, theirs, encoded, plan, result)
            if stand_ins and ours.session.streamer is not None:
                facts["stand_ins"] = _stand_in_facts(stand_ins, ours.session.streamer.report())
        layers = _layers(model, reference, encoded, layer_tokens, reporter, **build)
    if layers:
        facts["layers"] = [{"name": layer.name, "error": layer.error} for layer in layers]
    if plot is not None:
        from stratum.quality_plot import draw

        draw(plot, result.scores.divergence, layers, title=_title(facts))
    if as_json:
        reporter.event("done", **facts)
    else:
        click.echo(_report(facts))


def _check_plot(plot: Path, reference: Path | None) -> None:
    """Refuses before anything is measured what could not be drawn after it."""
    if reference is None:
        raise click.UsageError("--plot draws the divergence from a reference: give --reference")
    from stratum.quality_plot import check_plot

    check_plot(plot)


def _stand_in_facts(share: float, report: StreamReport) -> dict[str, Any]:
    return {
        "share": share,
        "used": report.stand_ins,
        "experts": report.expert_lookups,
        "full_model": report.full_model,
        "said": report.about_stand_ins(),
    }


def _encode(words: str, ours: Model, theirs: Model | None, path: Path) -> Text:
    """The text's tokens; both models must see the same."""
    import numpy as np

    from ir.diagnostics import DiagnosticError
    from runtime.artifact import open_artifact
    from stratum.evaluation import encode_text

    text = encode_text(words, ours.tokenizer, str(path))
    if theirs is not None and open_artifact(theirs.path).has_file("tokenizer.json"):
        other = encode_text(words, theirs.tokenizer, str(path))
        if other.bos != text.bos or not np.array_equal(other.ids, text.ids):
            raise DiagnosticError(
                "the tokenizers of the model and of the reference make different tokens of the text",
                where=str(theirs.path),
                hint="the reference is the same model in full precision",
            )
    return text


def _layers(
    model: Path,
    reference: Path | None,
    text: Text,
    tokens: int | None,
    reporter: Reporter,
    **options: Any,
) -> list[LayerError]:
    """The errors of the layers when they were asked for, or are cheap."""
    from ir.diagnostics import DiagnosticError
    from runtime.artifact import is_artifact
    from stratum import layer_errors

    if tokens == 0 or (reference is None and tokens is None):
        return []
    if reference is None:
        raise click.UsageError("--layer-tokens compares with a reference: give --reference")
    for path in (model, reference):
        if is_artifact(path):
            if tokens is None:
                return []
            raise DiagnosticError(
                "the layers of a built artifact cannot be looked into",
                where=str(path),
                expected="Hugging Face directories of model and reference, or --layer-tokens 0",
            )
    if tokens is None and layer_errors.is_large(model):
        return []
    count = min(tokens or layer_errors.DEFAULT_TOKENS, len(text.ids))
    return layer_errors.measure_layers(
        model,
        reference,
        text.ids[:count],
        tell=lambda done, total: reporter("layers", done, total, "ops"),
        **options,
    )


def _facts(ours: Model, theirs: Model | None, text: Text, plan: Plan, result: Evaluation) -> dict[str, Any]:
    """All that is said of an evaluation, in the order in which it is said; numbers that are not finite become None."""
    manifest = ours.manifest
    facts: dict[str, Any] = {
        "model": manifest.model.get("name"),
        "dtype": manifest.dtype,
        "recipe": manifest.raw.get("recipe") or None,
        "kv": manifest.kv.format,
        "weights_bytes": manifest.weights.bytes,
        "bits_per_weight": _bits_per_weight(manifest),
        "text_tokens": len(text.ids),
        "text_bytes": text.num_bytes,
        "context": plan.length,
        "windows": len(plan.starts),
        "scored_per_window": plan.scored,
        **_finite(vars(result.perplexity)),
    }
    if theirs is not None and result.reference is not None and result.divergence is not None:
        facts["reference"] = {
            "model": theirs.manifest.model.get("name"),
            "dtype": theirs.manifest.dtype,
            **_finite(vars(result.reference)),
        }
        facts["divergence"] = _finite(vars(result.divergence))
    return facts


def _bits_per_weight(manifest: Manifest) -> float:
    """What the build says of itself; of one that does not, the whole weights file over the parameters."""
    said = manifest.raw["weights"].get("bits_per_weight")
    if isinstance(said, (int, float)) and not isinstance(said, bool):
        return float(said)
    return 8 * manifest.weights.bytes / max(1, int(manifest.model.get("parameters") or 0))


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _title(facts: dict[str, Any]) -> str:
    formats = facts["recipe"] or facts["dtype"]
    return f"{facts['model']} ({formats}) against {facts['reference']['dtype']}"


def _number(value: float | None, digits: int = 4) -> str:
    return "inf" if value is None else f"{value:.{digits}f}"


def _report(facts: dict[str, Any]) -> str:
    """The same for people."""
    formats = f"{facts['recipe'] or facts['dtype']}, KV cache {facts['kv']}, {facts['bits_per_weight']:.2f} bits/weight"
    windows = f"{facts['windows']} window{'s' if facts['windows'] != 1 else ''} of {facts['context']}"
    lines = [
        f"model       {facts['model']} ({formats})",
        f"text        {facts['tokens']} of {facts['text_tokens']} tokens predicted, in {windows}, "
        f"the last {facts['scored_per_window']} of each",
        f"perplexity  {_number(facts['perplexity'])} ± {_number(facts['perplexity_error'])}  "
        f"({_number(facts['nats_per_token'])} nats per token, {_number(facts['bits_per_byte'])} bits per byte)",
    ]
    if "divergence" in facts:
        d, reference = facts["divergence"], facts["reference"]
        lines += [
            f"reference   {reference['model']} ({reference['dtype']}), perplexity {_number(reference['perplexity'])} ± "
            f"{_number(reference['perplexity_error'])}",
            f"ratio       {_number(d['ratio'])} ± {_number(d['ratio_error'])} of the reference's perplexity",
            f"divergence  mean {_number(d['mean'], 6)} ± {_number(d['error'], 6)}, median {_number(d['median'], 6)}, "
            f"99 % below {_number(d['p99'], 4)}, max {_number(d['max'], 4)} nats",
            f"top-1       {100 * d['top1']:.2f} ± {100 * d['top1_error']:.2f} % of positions agree",
        ]
    if "stand_ins" in facts:
        lines.append(f"stand-ins   {facts['stand_ins']['said']}; of {facts['stand_ins']['experts']} experts asked for")
    lines += _layer_lines(facts.get("layers", ()))
    return "\n".join(lines)


def _layer_lines(layers: Sequence[dict[str, Any]]) -> list[str]:
    if not layers:
        return []
    width = max(len(layer["name"]) for layer in layers)
    lines = ["relative error of the residual stream"]
    lines += [f"  {layer['name']:<{width}}  {layer['error']:.5f}" for layer in layers[:LAYERS_SHOWN]]
    if len(layers) > LAYERS_SHOWN:
        lines.append(f"  and {len(layers) - LAYERS_SHOWN} more; --json gives all")
    return lines
