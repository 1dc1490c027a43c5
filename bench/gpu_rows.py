"""Rows of `bench.gpu`: what was measured, beside what, and the bar that it is to reach; as a table and as JSON lines.

A row that could not be measured says why in `fault`, one without what it is compared with in `said`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from bench.measure import table

# By case: the share that is to be reached, and of what. Those of kernels on other GPUs than their own are left out.
BARS: dict[str, float] = {
    "gemm": 0.8, "wgmma": 0.8, "decode_w4_m16": 3.0, "prefill": 0.7, "experts_w16_m4096": 0.7,
    "experts_wgmma_w16_m4096": 0.7,
}  # fmt: skip
OF_HOPPER = {"gemm": "wgmma", "experts_w16_m4096": "experts_wgmma_w16_m4096"}  # whose bar it is there
MODELS = ("decode_8b_bf16", "decode_8b_w4a16", "hybrid_8b_w4a16")  # rows with bars of their own
COPY, TORCH, DENSE = "bandwidth of a copy", "torch's speed", "the same product without experts"
BESIDE = {
    "gemm": TORCH, "wgmma": TORCH, "decode_w4_m16": TORCH, "prefill": TORCH, "experts_w16_m4096": DENSE,
    "experts_wgmma_w16_m4096": DENSE,
}  # fmt: skip
DENSE_OF = {"experts_w16_m4096": "dense_w16_m32768", "experts_wgmma_w16_m4096": "dense_wgmma_w16_m32768"}


@dataclass(frozen=True)
class Row:
    """`share` is of what `beside` says; `bar` is to be reached, or with `most` not to be passed. `error` is of what is
    allowed, None where nothing is compared."""

    name: str
    seconds: float = float("nan")
    share: float | None = None
    bar: float | None = None
    beside: str = ""
    error: float | None = None
    nbytes: float = 0.0
    flops: float = 0.0
    said: str = ""
    fault: str = ""
    most: bool = False

    @property
    def wrong(self) -> bool:
        """Whether results are not what they must be."""
        return self.error is not None and not self.error <= 1

    @property
    def verdict(self) -> str:
        """Whether the bar is reached."""
        if self.fault:
            return f"NOT MEASURED: {self.fault}"
        if self.wrong:
            return "WRONG"
        if self.bar is None:
            return self.said
        if self.share is None:
            return f"not compared: {self.said}"
        reached = self.share <= self.bar if self.most else self.share >= self.bar
        return "; ".join(filter(None, ["reached" if reached else "MISSED", self.said]))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Row:
        return cls(**json.loads(text))


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Those with a bar first, measured or not."""
    return sorted(rows, key=lambda row: row.bar is None and not (row.fault and row.name in (*BARS, *MODELS)))


def rows_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    head = ["row", "error, of what is allowed", "us", "GB/s", "TFLOP/s", "share", "of", "bar", ""]
    cells = []
    for row in in_order(rows):
        timed = row.seconds == row.seconds
        bar = "" if row.bar is None else f"{'at most' if row.most else 'at least'} {_share(row.bar)}"
        cells.append((
            row.name, "-" if row.error is None else f"{row.error:.2g}",
            f"{row.seconds * 1e6:.1f}" if timed else "-",
            f"{row.nbytes / row.seconds / 1e9:.0f}" if timed and row.nbytes else "-",
            f"{row.flops / row.seconds / 1e12:.1f}" if timed and row.flops else "-",
            "-" if row.share is None else _share(row.share), row.beside, bar, row.verdict,
        ))  # fmt: skip
    return table(head, cells)


def _share(share: float) -> str:
    return f"{share:.2f} x" if share >= 2 else f"{100 * share:.0f} %"
