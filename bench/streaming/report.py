"""The table of a run, in Markdown: ours with what was foretold of it, llama.cpp below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.streaming.forecast import Forecast
from bench.streaming.rows import Row

HEAD = (
    "| row | engine | tok/s | of the best llama.cpp | peak MiB | limit hits | read GB | GB/s while reading | "
    "disk alone, before / after | of the disk bound, time reading | distinct experts | "
    "hits: measured / replayed / foretold | foretold tok/s |"
)


@dataclass(frozen=True)
class Result:
    """What one engine did in one row. `answer`: seconds, tokens, read_bytes, peak, hits, what the engine told besides;
    `fault`: why there is nothing."""

    row: Row
    engine: str
    answer: dict[str, Any]
    disk: tuple[float, float] = (0.0, 0.0)  # bytes/s by itself, before and after
    target: str = ""  # the machine as it was, for the forecast
    forecast: Forecast | None = None
    fault: str = ""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.answer["tokens"] / self.answer["seconds"] if self.answer else 0.0

    @property
    def disk_bytes_per_s(self) -> float:
        """Mean of the two moments."""
        return sum(self.disk) / len(self.disk)

    @property
    def rate_meanwhile(self) -> float:
        """Bytes/s while reads were under way; for llama.cpp over the whole time. 0 where nothing was read."""
        seconds = self.answer.get("disk_s", self.answer["seconds"])
        return self.answer["read_bytes"] / seconds if seconds else 0.0

    @property
    def share_of_bound(self) -> float | None:
        """Of the time that the disk would need for the bytes that were read."""
        if not self.row.cap or not self.disk_bytes_per_s:
            return None
        return self.answer["read_bytes"] / self.disk_bytes_per_s / self.answer["seconds"]


def table(results: Sequence[Result]) -> str:
    """All rows, and what they mean."""
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for result in results:
        others = [r.rate for r in results if r.row is result.row and r.engine.startswith("llama") and r.answer]
        lines.append(_line(result, max(others, default=0.0)))
    return "\n".join(lines)


def _line(result: Result, best: float) -> str:
    row, answer = result.row, result.answer
    cap = f" of {row.cap >> 20}" if row.cap else ""
    if not answer:
        return f"| {row.title} | {result.engine} | {result.fault} |" + " |" * 10
    read = answer["read_bytes"]
    share = f"{result.share_of_bound:.0%}" if result.share_of_bound is not None else ""
    share += f", {answer['disk_s'] / answer['seconds']:.0%}" if "disk_s" in answer else ""
    speed = f"{result.rate:.2f}" if not row.prompt else f"first token {answer['seconds']:.2f} s"
    if row.prompt and result.forecast and result.disk_bytes_per_s:
        speed += f", {answer['seconds'] * result.disk_bytes_per_s / answer['bytes']:.2f}x reading the model once"
    cells = [
        row.title,
        result.engine,
        speed,
        f"{result.rate / best:.2f}x" if best and result.forecast else "",
        f"{answer['peak'] / (1 << 20):.0f}{cap}",
        f"{answer['hits']:.0f}",
        f"{read / 1e9:.2f}" if row.cap else "",
        f"{result.rate_meanwhile / 1e9:.2f}" if row.cap else "",
        " / ".join(f"{d / 1e9:.2f}" for d in result.disk) if row.cap else "",
        share,
        *_foretold(result),
    ]
    return "| " + " | ".join(cells) + " |"


def _foretold(result: Result) -> tuple[str, str, str]:
    """Distinct experts, hits, tokens a second."""
    told, answer = result.forecast, result.answer
    if told is None:
        return "", "", ""
    hits = ""
    if told.hits is not None and told.replayed is not None:
        rates = [answer["hit_rate"], told.replayed] + ([] if result.row.prompt else [told.hits])
        hits = " / ".join(f"{rate:.1%}" for rate in rates)
    distinct = f"{told.distinct:.1f}" if told.distinct is not None else ""
    if result.row.prompt:  # a prompt that follows another is foretold
        again = answer["again_seconds"]
        return distinct, hits, f"{told.seconds:.2f} s for the next prompt ({told.seconds / again - 1:+.0%})"
    rate = 1.0 / told.seconds
    return distinct, hits, f"{rate:.2f} ({rate / result.rate - 1:+.0%})"
