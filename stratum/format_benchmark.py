"""One model in several number formats: the table from which a user chooses.

    rows = measure_formats(Path("model"), ("float", "w8a8", "w4a8-g32"), FormatPlan(text=Path("held-out.txt")))
    print(format_table(rows))

Takes a Hugging Face directory and recipes ("float": none). Builds each through the cache, measures prompt processing
and decoding as `stratum.benchmark` does, the machine's read bandwidth beside every row (it drifts on shared machines),
and, where a text is given, the divergence from the model's own f32 build. A recipe that cannot be built for the model
is a row that says so; when none can be, the first reason is raised. A row is marked when no other row is at least as
fast, as small and as close to the float model and better in one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.diagnostics import DiagnosticError

if TYPE_CHECKING:
    from hw_targets.calibrate import Calibration
    from runtime.manifest import Manifest
    from runtime.session import Session
    from stratum.benchmark import Result
    from stratum.evaluation import Evaluation, Text
    from stratum.progress import Progress

FLOAT = "float"  # the row without a recipe
NEEDS_OTHERS = ("as-stored", "none", "rotate64", "outliers16")  # recipes that are no choice of formats by themselves
LIMIT_REPEATS = 6
_PLAIN = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class FormatPlan:
    """What to measure: a prompt of `num_prompt` tokens, `num_generate` tokens one by one, each behind `depth`
    positions; 0 leaves a test out. `text`: UTF-8, for the divergence, in windows of `context` tokens, the first
    `windows` of them."""

    num_prompt: int = 512
    num_generate: int = 128
    depth: int = 0
    repetitions: int = 3
    threads: int | None = None
    target: str = "host"
    dtype: str = "bf16"
    text: Path | None = None
    context: int = 512
    windows: int | None = None


@dataclass(frozen=True)
class FormatRow:
    """A build by `recipe`. Bits are those of the low-bit weights with their scales (of all, where none is low-bit);
    `fraction_of_bandwidth` is decoding's bytes/s over what the machine was measured to read; divergence in nats.
    `fault` says why there is nothing else. `chosen`: no other row is better in everything."""

    recipe: str
    bits_per_weight: float | None = None
    weights_bytes: int | None = None
    kv: str = ""
    prefill_ts: float | None = None
    decode_ts: float | None = None
    decode_bytes_per_s: float | None = None
    read_bandwidth: float | None = None
    fraction_of_bandwidth: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    fault: str = ""
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def default_recipes() -> tuple[str, ...]:
    """The float build and every shipped recipe that says in which format weights are, most bits first; none for GPUs
    alone."""
    from passes.quantize.recipe import shipped_recipes
    from passes.quantize.recipe_formats import is_fp8

    found = [
        (name, recipe.weights.format) for name, recipe in shipped_recipes().items()
        if name not in NEEDS_OTHERS and recipe.weights.format is not None and not is_fp8(recipe.weights.activations)
    ]  # fmt: skip
    sized = sorted((-_bits_of(format), name) for name, format in found)
    return (FLOAT, *(name for _, name in sized))


def _bits_of(format: object) -> float:
    """Bits of an element in a matrix of 256 x 4096 numbers; formats that cannot hold that come last."""
    nbytes = getattr(format, "nbytes", None)
    if nbytes is None:
        return 0.0
    try:
        return 8 * nbytes((256, 4096)) / (256 * 4096)
    except (ValueError, DiagnosticError):
        return 0.0


def split_recipes(text: str) -> tuple[str, ...]:
    """Recipes by blanks: `w8a8 w4a8-g32 w4a8-g32,kv8`; each once. Raises DiagnosticError for none."""
    names = tuple(dict.fromkeys(text.split()))
    if not names:
        raise DiagnosticError("no recipe is named", expected="recipes by blanks: 'float w8a8 w4a8-g32,kv8'")
    return names


def measure_formats(
    model: Path,
    recipes: Sequence[str],
    plan: FormatPlan,
    *,
    progress: Progress | None = None,
    tell: Callable[[FormatRow], None] | None = None,
) -> list[FormatRow]:
    """A row for each recipe, in their order; `tell` gets each when it is measured.

    Raises DiagnosticError for a model that is built already or cannot be read, a text that cannot be used, and when no
    recipe could be built.
    """
    from runtime.artifact import is_artifact

    if is_artifact(model):
        raise DiagnosticError(
            "an artifact has the formats that it was built with",
            where=str(model),
            expected="the Hugging Face directory of the model, which can be built in others",
        )
    if not plan.num_prompt and not plan.num_generate:
        raise DiagnosticError("nothing to measure", expected="a prompt or generated tokens")
    quality = _Quality(model, plan, progress) if plan.text is not None else None
    rows: list[FormatRow] = []
    first_fault: DiagnosticError | None = None
    try:
        for recipe in recipes:
            try:
                row = _measure(model, recipe, plan, quality, progress)
            except DiagnosticError as fault:
                first_fault = first_fault or fault
                row = FormatRow(recipe, fault=fault.diagnostics[0].message)
            rows.append(row)
            if tell is not None:
                tell(row)
    finally:
        if quality is not None:
            quality.close()
    if first_fault is not None and all(row.fault for row in rows):
        raise first_fault
    return mark_choices(rows)


def _build(model: Path, recipe: str, dtype: str, plan: FormatPlan, progress: Progress | None) -> Path:
    from stratum import api

    chosen = None if recipe == FLOAT else recipe
    return api.ensure_built(model, target=plan.target, dtype=dtype, recipe=chosen, progress=progress)


def _measure(
    model: Path, recipe: str, plan: FormatPlan, quality: _Quality | None, progress: Progress | None
) -> FormatRow:
    from runtime.session import Session
    from stratum import benchmark

    path = _build(model, recipe, plan.dtype, plan, progress)
    tests = benchmark.plan_tests((plan.num_prompt,), (plan.num_generate,), (plan.depth,))
    with Session(path, threads=plan.threads) as session:
        benchmark.check_context(tests, session.max_context, str(model))
        if progress is not None:
            progress("measure", 0, 0)
        results = {bool(test.num_prompt): _timed(session, test, plan.repetitions) for test in tests}
        row = _row(recipe, session.manifest, results)
        if quality is None:
            return row
        found = quality.of(session).divergence
        assert found is not None  # there is a reference
        return replace(row, kl_mean=found.mean, kl_p99=found.p99, top1=found.top1)


def _timed(session: Session, test: Any, repetitions: int) -> tuple[Result, Calibration]:
    """The result of a test, and what the machine was measured to do right after it."""
    from hw_targets.calibrate import calibrate
    from stratum import benchmark

    result = benchmark.measure(session, test, repetitions)
    return result, calibrate(session.threads, refresh=True, repeats=LIMIT_REPEATS)


def _row(recipe: str, manifest: Manifest, results: dict[bool, tuple[Result, Calibration]]) -> FormatRow:
    row = FormatRow(recipe, low_bits(manifest), manifest.weights.bytes, manifest.kv.format)
    if True in results:
        row = replace(row, prefill_ts=results[True][0].avg_ts)
    if False in results:
        result, limits = results[False]
        row = replace(
            row,
            decode_ts=result.avg_ts,
            decode_bytes_per_s=result.bytes_per_s,
            read_bandwidth=limits.read_bandwidth,
            fraction_of_bandwidth=result.bytes_per_s / limits.read_bandwidth,
        )
    return row


def low_bits(manifest: Manifest) -> float | None:
    """Bits of a low-bit weight on average, scales included; of all weights in a build of floats; None if unsaid."""
    weights = manifest.raw.get("weights")
    uses = weights.get("formats") if isinstance(weights, dict) else None
    if not isinstance(uses, list):
        return None
    known = [u for u in uses if isinstance(u, dict) and {"format", "parameters", "nbytes"} <= u.keys()]
    counted = [u for u in known if u["format"] not in _PLAIN] or known
    parameters = sum(u["parameters"] for u in counted)
    return 8 * sum(u["nbytes"] for u in counted) / parameters if parameters else None


class _Quality:
    """The float build of a model, a text, and the divergence of other builds from it."""

    def __init__(self, model: Path, plan: FormatPlan, progress: Progress | None) -> None:
        from stratum import evaluation
        from stratum.model import Model

        assert plan.text is not None
        words = evaluation.read_text(plan.text)
        path = _build(model, FLOAT, "f32", plan, progress)
        self._progress = progress
        self._model = Model(path, threads=plan.threads)
        try:
            self._text: Text = evaluation.encode_text(words, self._model.tokenizer, str(plan.text))
            length = min(plan.context, self._model.session.max_context)
            self._plan = evaluation.plan_windows(len(self._text.ids), length, limit=plan.windows)
        except BaseException:
            self._model.close()
            raise

    def of(self, session: Session) -> Evaluation:
        """What the text tells of a build."""
        from stratum import evaluation

        progress = self._progress
        tell = (lambda done, total: progress("evaluate", done, total, "tokens")) if progress is not None else None
        (found,) = evaluation.evaluate([session], self._text, self._plan, reference=self._model.session, tell=tell)
        return found

    def close(self) -> None:
        """Closes the reference."""
        self._model.close()


def mark_choices(rows: Sequence[FormatRow]) -> list[FormatRow]:
    """The rows; `chosen` where no other is at least as good in speed, size and divergence, and better in one."""

    def merits(row: FormatRow) -> tuple[float, ...]:
        """Larger is better. Speed is that of decoding where there is one."""
        speed = row.decode_ts if row.decode_ts is not None else row.prefill_ts
        size = -(row.weights_bytes or 0)
        if any(r.kl_mean is not None for r in rows):
            return (speed or 0.0, size, -(row.kl_mean if row.kl_mean is not None else math.inf))
        return (speed or 0.0, size)

    def beaten(row: FormatRow) -> bool:
        own = merits(row)
        others = (merits(other) for other in rows if other is not row and not other.fault)
        return any(all(a >= b for a, b in zip(theirs, own, strict=True)) and theirs != own for theirs in others)

    return [replace(row, chosen=not row.fault and not beaten(row)) for row in rows]


def format_table(rows: Sequence[FormatRow], *, num_prompt: int, num_generate: int, depth: int = 0) -> str:
    """The table in Markdown; columns of what was not measured are left out."""
    at = f" @ d{depth}" if depth else ""
    columns: list[tuple[str, Callable[[FormatRow], str]]] = [
        ("recipe", lambda r: ("* " if r.chosen else "") + r.recipe),
        ("bits/weight", lambda r: _number(r.bits_per_weight, 2)),
        ("MB", lambda r: _number(r.weights_bytes, 1, 1e6)),
        ("KV cache", lambda r: r.kv),
        (f"pp{num_prompt}{at} t/s", lambda r: _number(r.prefill_ts, 1)),
        (f"tg{num_generate}{at} t/s", lambda r: _number(r.decode_ts, 1)),
        ("GB/s", lambda r: _number(r.decode_bytes_per_s, 1, 1e9)),
        ("% bandwidth", lambda r: _number(r.fraction_of_bandwidth, 1, 0.01)),
        ("KL mean", lambda r: _number(r.kl_mean, 6)),
        ("KL 99 %", lambda r: _number(r.kl_p99, 4)),
        ("top-1 %", lambda r: _number(r.top1, 2, 0.01)),
    ]
    good = [row for row in rows if not row.fault]
    used = [(head, cell) for head, cell in columns if any(cell(row) for row in good)]
    table = [[head for head, _ in used], *([cell(row) for _, cell in used] for row in good)]
    widths = [max(len(line[i]) for line in table) for i in range(len(used))]
    lines = ["| " + " | ".join(_aligned(line, widths)) + " |" for line in table]
    lines.insert(1, "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |")
    lines += [f"\n{row.recipe}: {row.fault}" for row in rows if row.fault]
    return "\n".join(lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"
