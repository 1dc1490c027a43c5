"""Plans of a GPU and its host beside simpler ones, as simulated: the table of docs/plan.md.

    python -m bench.hybrid

A decode step of one sequence, context 4096: the plan as solved and refined; the best without computing
missing experts where they lie; everything by the CPU; everything streamed to the GPU. Nothing is measured.
"""

from __future__ import annotations

import dataclasses

import hw_targets
from frontends.shape_library import load_shape
from ir.diagnostics import DiagnosticError
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.pins import parse_pin
from passes.place.problem import Problem, Session
from passes.place.refine import refine
from passes.place.solve import solve

GIB = 1 << 30
CASES = (
    ("Qwen3-30B-A3B", "rtx-4090", 8),
    ("Qwen3-30B-A3B", "a100-80gb", 8),
    ("Qwen3-30B-A3B", "h100-sxm", 8),
    ("Qwen3-30B-A3B", "gh200", 8),
    ("DeepSeek-V3", "xeon-6454s-4090", 0),
    ("Llama-3.1-70B", "rtx-4090", 0),
)
CPU = ("attention=cores", "mlp=cores", "experts=cores", "head=cores", "kv=cores")
STREAMED = ("attention=streamed", "mlp=streamed", "experts=streamed", "attention=gpu", "mlp=gpu", "experts=gpu",
            "head=gpu", "kv=gpu")  # fmt: skip


def problem(model: str, target: str, gib: int) -> Problem:
    """A model in 4 bits on a machine of whose GPU memory `gib` may be used (0: all)."""
    machine = hw_targets.load(target)
    tier = next(unit.tier for unit in machine.units if unit.kind == "gpu")
    where = machine_of(machine, budgets={tier: gib * GIB} if gib else {})
    return Problem(load_shape(model), where, formats_of("w4a8-g32"), Session())


def milliseconds(base: Problem, pins: tuple[str, ...] = ()) -> str:
    """A decode step, `-` where nothing fits."""
    groups = {part.group for part in base.parts()} | {"kv"}
    wanted = tuple(pin for pin in pins if pin.partition("=")[0] in groups)
    pinned = dataclasses.replace(base, pins=tuple(parse_pin(pin, base.shape, base.machine) for pin in wanted))
    try:
        seconds = refine(solve(pinned)).step_seconds
    except DiagnosticError:
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds is not None else "-"


def rows() -> list[str]:
    """The lines of the table, without its head."""
    found = []
    for model, target, gib in CASES:
        base = problem(model, target, gib)
        times = [milliseconds(base), milliseconds(dataclasses.replace(base, compute_missed=False))]
        times += [milliseconds(base, CPU), milliseconds(base, STREAMED)]
        name = f"{target}, {gib} GiB" if gib else target
        found.append(f"| {model}, {name} | " + " | ".join(times) + " |")
    return found


if __name__ == "__main__":
    print("\n".join(rows()))
