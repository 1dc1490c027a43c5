"""Points whose machine and work are known: ours at the stated peaks and as planned, beside what was measured.

Whole models stand in `rooflines.toml` (`bench.published.cases`); here are single products, messages and reads of
memories and drives. Nothing is fitted to a row: efficiencies stand in the files of the machines, each from one figure
of one source, and hold for all rows on the machine. Where that figure is a row here, it says which constant it `sets`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import hw_targets
from bench.published.cases import entries
from bench.published.ours import Case, ideal
from bench.published.points import Point, published, table
from hw_targets.cost_model import Work, price
from hw_targets.target import Target
from passes.place.parallel import all_reduce_seconds


def models() -> Iterator[Point]:
    """The rows of the table."""
    for entry in entries().values():
        row = table()[entry.id]
        hardware = row.hardware.partition(" (")[0]
        yield Point(
            (entry.id,),
            "roofline",
            f"{row.system}: {row.model}, {row.precision}, {hardware}: {entry.measured}",
            published(entry.id),
            lambda e=entry: (e.figure(peak=True),),
            row.unit,
            rate=row.unit.startswith("tok"),
            planned=None if entry.measured.endswith("at peak") else lambda e=entry: (e.figure(peak=False),),
            why=entry.why,
            sets=entry.sets,
        )


def _found(name: str, peak: bool) -> Target:
    found = hw_targets.load(name)
    return ideal(found) if peak else found


def product_seconds(name: str, m: int, k: int, n: int, *, peak: bool) -> float:
    """Of one product in f16 on a GPU."""
    target = _found(name, peak)
    unit = target.unit("gpu")
    assert unit is not None
    nbytes = 2.0 * (m * k + k * n + m * n)
    return price(Work(2.0 * m * k * n, "f16", ((unit.tier, nbytes),), launches=1), unit, target).seconds


def message_seconds(nbytes: int, *, peak: bool) -> float:
    """Of an all-reduce among eight H100."""
    fabric = hw_targets.load("8xh100").fabric("hbm")
    assert fabric is not None
    return all_reduce_seconds(dataclasses.replace(fabric, efficiency=None) if peak else fabric, 8, nbytes)


def flash_rate(lanes: int) -> float:
    """MiB a second of reads of 4 MiB, so many at once."""
    return (hw_targets.load("phone-ufs4").storage[0].read_rate(4 << 20, lanes) or 0.0) / (1 << 20)


def passes_a_second(name: str, nbytes: float, *, peak: bool) -> float:
    """Of a GPU over so many bytes of its memory."""
    target = _found(name, peak)
    unit = target.unit("gpu")
    assert unit is not None
    return 1.0 / price(Work(traffic=((unit.tier, nbytes),)), unit, target).seconds


def tokens_by_cores(count: int, *, peak: bool) -> float:
    """Tokens a second of LLaMA-7B in 4.5 bits by so many cores of an i9-13900K."""
    target = _found("i9-13900k", peak)
    unit = target.unit("cores")
    assert unit is not None
    parts = Case("Llama-2-7b-hf", "i9-13900k", "w4a16-g32", (), dtype="f32").problem().parts()
    nbytes = float(sum(p.nbytes * p.count for p in parts if p.group != "embedding"))
    flops = float(sum(p.flops_per_token * p.count for p in parts))
    work = Work(flops, "f32", (("dram", nbytes),), threads=count, rows=1.0)
    return 1.0 / price(work, unit, target).seconds


def _of_cores(count: int) -> Callable[[bool], float]:
    return lambda peak: tokens_by_cores(count, peak=peak)


def _of_flash(lanes: int) -> Callable[[bool], float]:
    return lambda peak: flash_rate(lanes)


def _of_product(m: int, k: int, n: int) -> Callable[[bool], float]:
    return lambda peak: 1e6 * product_seconds("v100-dgx2{gpu.peak.f16=112TFLOP/s}", m, k, n, peak=peak)


def _of_message(kib: int) -> Callable[[bool], float]:
    return lambda peak: 1e6 * message_seconds(kib * 1024, peak=peak)


def parts() -> Iterator[Point]:
    """Single products, messages and reads; tokens of which only the bytes or the cores are known."""
    best = "the best product of its file; the stated efficiency is that of a common one"
    whole = "llama.cpp: 27B in IQ4_NL, 16.34 GB, Apple M1 Max: decode"
    by_cores = "llama.cpp: LLaMA-7B Q4_0, {} cores of an i9-13900K: decode"
    product, message = "V100-PCIE-16GB, f16: product of {} x {} x {}", "8 H100: all-reduce of {} KiB"
    flash, flash_sets = "phone: reads of 4 MiB, {} at once", "flash of the phone"
    rows: tuple[tuple[str, str, str, Callable[[bool], float], str, str], ...] = (
        ("P111", whole, "tok/s", lambda p: passes_a_second("m1-max", 16.34e9, peak=p), "", "memory of M1 Max"),
        ("P098", by_cores.format(2), "tok/s", _of_cores(2), "", ""),
        ("P099", by_cores.format(4), "tok/s", _of_cores(4), "", ""),
        ("P343", product.format(1024, 4096, 4096), "us", _of_product(1024, 4096, 4096), "", "f16 of V100"),
        ("P344", product.format(2048, 32768, 768), "us", _of_product(2048, 32768, 768), best, ""),
        ("P347", message.format(8192), "us", _of_message(8192), "", ""),
        ("P348", message.format(16384), "us", _of_message(16384), "", ""),
        ("P350", message.format(65536), "us", _of_message(65536), "", ""),
        ("P351", message.format(131072), "us", _of_message(131072), "", "NVLink of H100"),
        ("P242", flash.format(1), "MiB/s", _of_flash(1), "", flash_sets),
        ("P244", flash.format(4), "MiB/s", _of_flash(4), "", flash_sets),
        ("P246", flash.format(32), "MiB/s", _of_flash(32), "", flash_sets),
    )
    for i, what, unit, figure, why, sets in rows:
        yield Point(
            (i,),
            "roofline",
            what,
            published(i),
            lambda f=figure: (f(True),),
            unit,
            rate=unit.endswith("/s"),
            planned=lambda f=figure: (f(False),),
            why=why,
            sets=sets,
        )


def points() -> Iterator[Point]:
    """All rooflines."""
    yield from models()
    yield from parts()
