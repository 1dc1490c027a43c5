"""The tables of a run: every bar with its verdict, every engine with its figures, the machine's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.measure import table
from bench.peers.measurement import Measured, Quantized, Samples
from bench.peers.sections import JUDGED_BATCH, LLAMA, OPENVINO, OURS, Bar

QUANTIZE_BYTES_PER_S, QUANTIZE_PEAK = 200e6, 1 << 30


@dataclass(frozen=True)
class Verdict:
    """One bar: what was found, what is wanted, and whether it is reached; None where it could not be judged."""

    row: str
    found: str
    wanted: str
    passed: bool | None

    def cells(self) -> tuple[str, str, str, str]:
        return self.row, self.found, self.wanted, {True: "yes", False: "**no**", None: "not judged"}[self.passed]


def verdicts(measured: Sequence[Measured], quantized: Quantized | None) -> list[Verdict]:
    """Every bar of every section."""
    found: list[Verdict] = []
    for item in measured:
        section = item.section
        ours = [s for s in item.samples if s.engine.startswith(OURS)]
        if section.action == "batch":
            found += [_batch(item, bar) for bar in section.bars]
        elif section.each:
            found += [_judge(f"{section.title}: {s.engine}", s, item, bar) for s in ours for bar in section.bars]
        else:
            best = max(ours, key=lambda s: s.rate, default=Samples(OURS))
            found += [_judge(section.title, best, item, bar) for bar in section.bars]
    if quantized is not None:
        rate, peak = quantized.bytes_per_s, quantized.peak_bytes
        found.append(Verdict("quantize, round to nearest with the best scale", f"{rate / 1e6:.0f} MB/s of source",
                             ">= 200 MB/s", rate >= QUANTIZE_BYTES_PER_S))  # fmt: skip
        found.append(Verdict("quantize, peak memory", f"{peak >> 20} MiB", "< 1024 MiB", peak < QUANTIZE_PEAK))
    return found


def _judge(row: str, ours: Samples, item: Measured, bar: Bar) -> Verdict:
    if not ours.tokens_per_s:
        return Verdict(row, ours.fault or "not measured", _wanted(bar), None)
    if bar.against in ("bandwidth", "vnni"):
        share = ours.share_of_bandwidth if bar.against == "bandwidth" else ours.share_of_vnni
        if share is None:
            return Verdict(row, "not measured", _wanted(bar), None)
        return Verdict(row, f"{100 * share:.1f} %", _wanted(bar), share >= bar.least)
    kinds = (LLAMA, OPENVINO) if bar.against == "best peer" else (bar.against,)
    peers = [s for s in item.samples if s.engine.split(":")[0] in kinds and s.tokens_per_s]
    if not peers:
        return Verdict(row, f"{ours.rate:.1f} tok/s, no peer", _wanted(bar), None)
    peer = max(peers, key=lambda s: s.rate)
    ratio = median(a / b for a, b in zip(ours.tokens_per_s, peer.tokens_per_s, strict=False))
    found = f"{ours.rate:.1f} tok/s, {ratio:.2f} x {peer.engine} ({peer.rate:.1f})"
    if ours.bytes:
        found += f"; {_most(ours, peer):.2f} x would be all of the bandwidth"
    return Verdict(row, found, _wanted(bar), ratio >= bar.least)


def _most(ours: Samples, peer: Samples) -> float:
    """How many times the peer's speed ours would be if its bytes came at the speed of memory."""
    turns = zip(ours.tokens_per_s, ours.seconds, ours.bandwidth, peer.tokens_per_s, strict=False)
    return median(rate * seconds * bandwidth / ours.bytes / other for rate, seconds, bandwidth, other in turns)


def _batch(item: Measured, bar: Bar) -> Verdict:
    by_size = {int(s.engine.split()[1]): s for s in item.samples}
    one, many = by_size[1], by_size[JUDGED_BATCH]
    row = f"{item.section.title}, {JUDGED_BATCH} sequences"
    if not one.tokens_per_s or not many.tokens_per_s:
        return Verdict(row, one.fault or many.fault or "not measured", _wanted(bar), None)
    pairs = list(zip(many.tokens_per_s, one.tokens_per_s, strict=True))
    share = median(a / b for a, b in pairs) / JUDGED_BATCH
    found = f"{many.rate:.1f} tok/s, {share:.2f} x linear"
    if many.operations:
        # Tokens/s at the peak of the products, over those of as many sequences one by one.
        peaks = [v / (many.operations / item.section.tokens) for v in many.vnni]
        most = median(peak / alone for peak, (_, alone) in zip(peaks, pairs, strict=True)) / JUDGED_BATCH
        found += f"; {most:.2f} x would be all of the VNNI peak"
    return Verdict(row, found, _wanted(bar), share >= bar.least)


def _wanted(bar: Bar) -> str:
    if bar.against in ("bandwidth", "vnni"):
        return f">= {100 * bar.least:.0f} % of {'bandwidth' if bar.against == 'bandwidth' else 'the VNNI peak'}"
    return f">= {bar.least:g} x {bar.against}"


def figures(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Every engine of every section: median, range, bytes, shares of the limits, or the fault."""
    rows: list[tuple[str, ...]] = []
    for item in measured:
        for s in item.samples:
            if not s.tokens_per_s:
                rows.append((item.section.title, s.engine, s.fault or "not measured", "", "", "", ""))
                continue
            low, high = min(s.tokens_per_s), max(s.tokens_per_s)
            gbps = f"{median(s.bytes / t for t in s.seconds) / 1e9:.1f}" if s.bytes else ""
            size = f"{s.file_bytes / 1e6:.0f}" if s.file_bytes else ""
            share = s.share_of_bandwidth if s.bytes else s.share_of_vnni
            unit = "bandwidth" if s.bytes else "VNNI"
            rows.append((item.section.title, s.engine, f"{s.rate:.1f}", f"{low:.1f}-{high:.1f}", size, gbps,
                         f"{100 * share:.1f} % of {unit}" if share is not None else ""))  # fmt: skip
    return rows


def limits(measured: Sequence[Measured]) -> str:
    """What the machine was measured to do while this ran."""
    bandwidth = [b / 1e9 for item in measured for s in item.samples for b in s.bandwidth]
    vnni = [v / 1e12 for item in measured for s in item.samples for v in s.vnni]
    if not bandwidth:
        return "No limit of the machine was measured."
    return (
        f"Limits in this run, measured between the rows: read bandwidth {min(bandwidth):.1f}-{max(bandwidth):.1f} GB/s "
        f"(median {median(bandwidth):.1f}), VNNI {min(vnni):.2f}-{max(vnni):.2f} Tops/s (median {median(vnni):.2f})"
    )


def versions(measured: Sequence[Measured]) -> str:
    """Of all engines, each once."""
    seen = {str(s.about["version"]): None for item in measured for s in item.samples if s.about}
    return "; ".join(seen)


def markdown(measured: Sequence[Measured], quantized: Quantized | None, notes: Sequence[str]) -> str:
    """The whole report."""
    parts = [
        table(["what", "measured", "bar", "reached"], [v.cells() for v in verdicts(measured, quantized)]),
        table(["row", "engine", "tok/s", "range", "MB", "GB/s", "share of the limit"], figures(measured)),
        limits(measured) + ".",
        *notes,
    ]
    return "\n\n".join(parts)
