"""What a plan is asked for, as the command line has it, and what the texts mean: bounds, the session, budgets of tiers.

    request = PlanRequest("Qwen3-30B-A3B", target="rtx-4090", context=8192, budgets=(("memory", "2GiB"),))
    session_of(request, shape), budgets_of(request, target), parse_slo("ttft=2s,tpot=50ms"), read_placement(path)

Raises DiagnosticError for texts that mean nothing, contexts that a model does not take, and tiers that are not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from frontends.model_shape import ModelShape
from hw_targets.quantities import parse_quantity
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.machine import main_tier
from passes.place.pins import MEASURE_DRIVE
from passes.place.placement import MAX_BYTES, Placement
from passes.place.problem import Session, Slo
from stratum.process_room import room_of


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is wanted for. Sizes are texts like `2GiB`; `batch` 0 chooses it, for most tokens a second."""

    model: str
    target: str = "host"
    recipe: str | None = None
    dtype: str = "bf16"
    context: int | None = None
    batch: int = 1
    prompt: int | None = None
    generate: int = 128
    budgets: tuple[tuple[str, str], ...] = ()  # (tier or storage, size); "memory" and "disk" stand for the main ones
    pins: tuple[str, ...] = ()
    slo: str | None = None
    trace: Path | None = None
    plan: Path | None = None
    formats: tuple[str, ...] = ()  # recipes that a plan chooses among, part by part
    max_loss: float | None = None
    bits_per_weight: float | None = None  # that are kept at least, on average
    sensitivity: Path | None = None
    what_if: bool = True
    simulate: bool = True
    by_expert: bool = False  # whether the experts of a layer may have several of `formats`
    kv_formats: tuple[str, ...] = ()  # that the cache may have, by where its parts lie
    stand_ins: float | None = None  # of a built model with copies: experts of less of a token's weight


def parse_slo(text: str | None) -> Slo:
    """`ttft=2s,tpot=50ms` -> bounds in seconds."""
    bounds: dict[str, float] = {}
    for part in (text or "").split(","):
        name, equals, value = part.strip().partition("=")
        if not part.strip():
            continue
        if name not in ("ttft", "tpot") or not equals or name in bounds:
            raise DiagnosticError(f"{part.strip()!r} is not a bound", where="--slo", expected="ttft=2s,tpot=50ms")
        bounds[name] = parse_quantity(value, "time", where=f"--slo {name}")
    return Slo(**bounds)


def session_of(request: PlanRequest, shape: ModelShape) -> Session:
    """How the model is used: what is not asked for is what fits the model."""
    context = request.context if request.context is not None else min(shape.max_context, 4096)
    prompt = request.prompt if request.prompt is not None else max(1, min(512, context // 2))
    if prompt >= context + 1:
        raise DiagnosticError(f"a prompt of {prompt} tokens is longer than the context of {context}")
    if context > shape.max_context:
        raise DiagnosticError(
            f"{shape.name} takes a context of at most {shape.max_context} tokens, not {context}",
            expected=f"--ctx {shape.max_context} or less",
        )
    generate = max(1, min(request.generate, context - prompt)) if context > prompt else 1
    return Session(context=context, batch=max(1, request.batch), prompt=prompt, generate=generate)


def read_placement(path: Path) -> Placement:
    """The plan of a file. DiagnosticError for what cannot be read or is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as fault:
        raise DiagnosticError(f"the plan cannot be read: {fault.strerror}", where=str(path)) from None
    return Placement.from_json(data, str(path))


def budgets_of(request: PlanRequest, target: Target) -> dict[str, int]:
    """Bytes that may be used, by the names of tiers and drives; of this machine what a process leaves of them."""
    found: dict[str, int] = {}
    for name, size in request.budgets:
        whole = False
        if name == "memory":
            name, whole = main_tier(target), target.name == "host"  # `run --memory` bounds the whole process
        elif name == "disk":
            if not target.storage:
                hint = MEASURE_DRIVE if target.name == "host" else ""
                raise DiagnosticError(f"target {target.name} has no storage", where="--disk", hint=hint)
            name = target.storage[0].name
        nbytes = int(parse_quantity(size, "bytes", where=f"budget of {name}"))
        found[name] = room_of(nbytes) if whole else nbytes
    return found
