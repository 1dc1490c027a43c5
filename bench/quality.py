"""What every number format costs examples/tiny-moe: perplexity and divergence from its float build. Writes markdown.

    python -m bench.quality                        # all rows; writes the tables of docs/quality.md
    python -m bench.quality --only kv --only gguf  # only rows whose key holds one of these; prints, writes nothing
    python -m bench.quality --json FILE --resume   # keeps what a killed run had written to FILE

All builds read the held-out text side by side with the f32 build of the same model, in windows of 512 predictions that
start without context (`compile-model eval --ctx 513 --stride 512`). The yardstick is llama.cpp's own rounding by the
package `gguf` (extra `bench`). Rows that this version cannot build are shown as missing, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bench.measure import ROOT, machine, table
from bench.quality_checks import A8_RECIPES, checks
from bench.quality_rows import (
    MissingError,
    Rounding,
    Row,
    built,
    calibrated_row,
    recipe_row,
    rounded_row,
    shipped,
    solver_rows,
    with_format,
    with_gguf,
    with_recipe,
)
from runtime.session import Session
from stratum.evaluation import Evaluation, Plan, Text, encode_text, evaluate, plan_windows, read_text
from stratum.model import Model

MODEL = ROOT / "examples" / "tiny-moe"
PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- figures: python -m bench.quality -->", "<!-- end of figures -->"
BATCH = 12  # builds that run side by side with one run of the reference
CONTEXT, STRIDE = 513, 512
LAYERS, WHOLE, RECIPES, KV, CHOSEN = (
    "The layers' weights alone",
    "The layers' weights and the head's, alone",
    "Recipes: the weights alone, and the whole build",
    "KV cache, all weights float",
    "Chosen by measuring",
)
# Formats in groups of 32 unless said otherwise; the text form is that of docs/ir-text.md.
FORMATS = {
    "q8": "q8_sym<group=32, scale=f16>",
    "q6": "q6_sym<group=32, scale=f16>",
    "q5": "q5_sym<group=32, scale=f16>",
    "q4": "q4_sym<group=32, scale=f16>",
    "q4-zp": "q4_zp<group=32, scale=f16>",
    "q4-g64": "q4_sym<group=64, scale=f16>",
    "q4-g128": "q4_sym<group=128, scale=f16>",
    "q4-two-level": "q4_sym<group=32, scale=u8, channel=f16>",
    "q4-two-level-g16": "q4_sym<group=16, scale=u8, channel=f16>",
    "q4-signed-g16": "q4_sym<group=16, scale=i8, channel=f16>",
    "nf4": "nf4<group=32, scale=f16>",
    "nf4-signed-g16": "nf4<group=16, scale=i8, channel=f16>",
    "nl4": "nl4<group=32, scale=f16>",
    "k4": "k4<group=32, scale=f16>",
    "mxfp4": "mxfp4",
    "q3": "q3_sym<group=32, scale=f16>",
    "k3": "k3<group=32, scale=f16>",
    "q2": "q2_sym<group=32, scale=f16>",
    "k2": "k2<group=32, scale=f16>",
    "pq2": "pq<dim=4, bits=8, scale=f16>",
    "ternary": "ternary<group=32, scale=f16>",
    "q1": "q1_sym<group=32, scale=f16>",
    "fp8-row": "f8e4m3<block=row, scale=f32>",
    "fp8-block": "f8e4m3<block=128x128, scale=f32>",
}
UNIFORM = ("q8", "q6", "q5", "q4", "q4-g64", "q4-g128", "nf4", "k4", "q3")  # with the head, beside the solver
NAMES = (
    *("w8a8", "w6a8", "w5a8", "w4a8-g32", "w4a8-g128", "w4a16-g32", "w4a16-g128", "nf4", "nl4", "k4", "mxfp4"),
    *("w3", "w2a8", "w1a8", "ternary", "pq2", "fp8"),
)
KV_FORMATS = {
    "kv8": "kv8",
    "kv4": "kv4",
    "kv4-plain": 'name = "kv4-plain"\n[kv]\nformat = "q4_sym<group=row, scale=f16>"\n',
    "kv2": "kv2",
}


@dataclass(frozen=True)
class Figures:
    """One line of the tables; `missing` says why there are no figures."""

    key: str
    section: str
    name: str
    missing: str = ""
    bits: float | None = None
    perplexity: float = 0.0
    divergence: float = 0.0
    divergence_error: float = 0.0
    p99: float = 0.0
    top1: float = 0.0


def all_rows(model: Path) -> list[Row]:
    """Every row, in the order of the tables."""
    rows = []
    for section, scope, head in ((LAYERS, "layers", False), (WHOLE, "whole", True)):
        for kind in ("Q4_0", "Q8_0"):
            make = partial(with_gguf, kind, head=head)
            rows.append(rounded_row(model, f"{scope}/gguf-{kind}", section, f"llama.cpp {kind}", make))
        for name in UNIFORM if head else FORMATS:
            for method in ("nearest", "mse") if name in ("q8", "q4") and not head else ("mse",):
                make = partial(with_format, FORMATS[name], method, head=head)
                key, words = f"{scope}/{name}", f"`{FORMATS[name]}`"
                if method == "nearest":
                    key, words = f"{key}-nearest", f"{words}, nothing clipped"
                rows.append(rounded_row(model, key, section, words, make))
    for name in NAMES:
        if "a16" not in name:  # of the same weights as with int8 activations
            make = partial(_recipe_rounding, name)
            rows.append(rounded_row(model, f"alone/{name}", RECIPES, f"{name}: weights", make))
        if name in A8_RECIPES:
            rows.append(recipe_row(model, f"f32/{name}", RECIPES, f"{name}: build, rest f32", name, "f32"))
        rows.append(recipe_row(model, f"bf16/{name}", RECIPES, f"{name}: build, rest bf16", name))
    rows.append(Row("bf16", KV, "all bf16", lambda folder: (built(model, folder / "built", "--dtype", "bf16"), None)))
    rows += [recipe_row(model, f"kv/{name}", KV, name, text, "f32") for name, text in KV_FORMATS.items()]
    for method in ("gptq", "awq"):
        for recipe in ("w4a16-g32", "w4a16-g128"):
            rows.append(calibrated_row(model, f"{method}/{recipe}", CHOSEN, f"{method}, {recipe}", method, recipe))
    for bits in (4.125, 4.25, 4.5):
        rows += solver_rows(model, f"solver/{bits}", CHOSEN, f"solver, {bits} bits", bits)
    return rows


def _recipe_rounding(name: str) -> Rounding:
    """Looked up when the row is made: a recipe that is not there is a missing row."""
    return with_recipe(shipped(name))


def measure(rows: Sequence[Row], model: Path, threads: int | None, windows: int | None = None) -> Iterator[Figures]:
    """Builds and evaluates rows, a batch at a time; what cannot be built is told as missing."""
    with tempfile.TemporaryDirectory(prefix="stratum-quality-") as work, contextlib.ExitStack() as stack:
        reference = stack.enter_context(Model(built(model, Path(work) / "f32", "--dtype", "f32"), threads=threads))
        text = encode_text(read_text(model / "held_out.txt"), reference.tokenizer)
        plan = plan_windows(len(text.ids), CONTEXT, stride=STRIDE, limit=windows)
        for at in range(0, len(rows), BATCH):
            yield from _measure_batch(rows[at : at + BATCH], reference.session, text, plan, threads)


def _measure_batch(
    rows: Sequence[Row], reference: Session, text: Text, plan: Plan, threads: int | None
) -> Iterator[Figures]:
    with tempfile.TemporaryDirectory(prefix="stratum-quality-") as work, contextlib.ExitStack() as stack:
        sessions: dict[str, tuple[Session, float | None]] = {}
        missing: dict[str, str] = {}
        for number, row in enumerate(rows):
            folder = Path(work) / str(number)
            folder.mkdir()
            try:
                artifact, bits = row.make(folder)
            except MissingError as error:
                missing[row.key] = str(error)
                continue
            session = stack.enter_context(Session(artifact, threads=threads))
            sessions[row.key] = session, bits
        results = evaluate([s for s, _ in sessions.values()], text, plan, reference=reference) if sessions else []
        found = dict(zip(sessions, results, strict=True))
        for row in rows:
            if row.key in missing:
                yield Figures(row.key, row.section, row.name, missing=missing[row.key])
            else:
                yield _figures(row, found[row.key], sessions[row.key][1])


def _figures(row: Row, result: Evaluation, bits: float | None) -> Figures:
    divergence = result.divergence
    assert divergence is not None  # there was a reference
    return Figures(
        row.key,
        row.section,
        row.name,
        bits=bits,
        perplexity=result.perplexity.perplexity,
        divergence=divergence.mean,
        divergence_error=divergence.error,
        p99=divergence.p99,
        top1=divergence.top1,
    )


# -- the page --------------------------------------------------------------------------------------------------------


def markdown(figures: Sequence[Figures], reference: str) -> str:
    """The tables, one a section, and the checks."""
    parts = [reference]
    for section in (LAYERS, WHOLE, RECIPES, KV, CHOSEN):
        lines = [_cells(f) for f in figures if f.section == section]
        if lines:
            head = ["build", "bits/weight", "perplexity", "KL mean, nats", "KL 99 %", "top-1"]
            parts.append(f"### {section}\n\n{table(head, lines)}")
    found = checks({f.key: f for f in figures if not f.missing})
    parts.append("### Bars\n\n" + table(["bar", "measured", ""], [[c.bar, c.measured, c.verdict] for c in found]))
    return "\n\n".join(parts) + "\n"


def _cells(f: Figures) -> list[str]:
    if f.missing:
        return [f.name, "", "", f"missing: {f.missing.replace('|', '/')}", "", ""]
    bits = f"{f.bits:.3f}" if f.bits is not None else ""
    kl = f"{f.divergence:.5f} ± {f.divergence_error:.5f}"
    return [f.name, bits, f"{f.perplexity:.3f}", kl, f"{f.p99:.4f}", f"{100 * f.top1:.2f} %"]


def header(model: Path, *, one_run: bool) -> str:
    """Where and with what this was measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "llvmlite", "gguf"))
    return (
        f"Measured by `python -m bench.quality`: {machine()}, {versions}. Model: {model.relative_to(ROOT)}; text: its "
        "held_out.txt, 50 176 predictions in 98 windows of 512 without context; reference: its f32 build."
        + ("" if one_run else " Rows come from several runs of that day, those without figures from none.")
    )


def write_page(text: str) -> None:
    """Puts the tables into the page, between its markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="rows whose key holds this")
    parser.add_argument("--windows", type=int, help="only so many windows of the text, for a quick look")
    parser.add_argument("--threads", type=int, help="default: one a physical core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here as well, as they come")
    parser.add_argument("--show", action="store_true", help="measure nothing: the page from --json FILE")
    parser.add_argument("--resume", action="store_true", help="keep the figures that --json FILE holds already")
    options = parser.parse_args()
    rows = [r for r in all_rows(MODEL) if not options.only or any(part in r.key for part in options.only)]
    known: dict[str, Figures] = {}
    if (options.resume or options.show) and options.json is not None and options.json.exists():
        known = {r["key"]: Figures(**r) for r in json.loads(options.json.read_text()) if not r["missing"]}
    asked = [r for r in rows if r.key not in known]
    for found in measure(asked, MODEL, options.threads, options.windows) if not options.show else ():
        known[found.key] = found
        print(f"{found.key:<24}", *_cells(found)[1:], sep="  ", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(f) for f in known.values()], indent=1) + "\n")
    unknown = "not measured in this run"
    text = markdown(
        [known.get(r.key, Figures(r.key, r.section, r.name, unknown)) for r in rows],
        header(MODEL, one_run=not options.show),
    )
    print(f"\n{text}")
    if not options.only and options.windows is None:
        write_page(text)


if __name__ == "__main__":
    main()
