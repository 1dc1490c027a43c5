"""Layers that do not fit are streamed: a window of slots slides over them, so that copies run under computations.

    choice = choose_depth(problem, target)       # the depth that the simulator finds fastest
    choice.program                               # plan-level IR, to be checked, simulated, carried out

With depth d the pieces of the next d streamed layers are on their way, or wait for use, while a layer is computed;
fewer where the room for slots ends. Depth 0 copies and computes in turn. Steps follow one another in the same window.

`cliffs` warns where the window is narrower than a run of streamed layers that follow each other: each of them beyond
the window then waits for a whole copy, however long the resident layers before them took.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hw_targets.plan_demands import Prices
from hw_targets.simulator import simulate
from hw_targets.target import Target
from hw_targets.timeline import Timeline
from ir.core import Value
from ir.diagnostics import Diagnostic
from ir.ops.builtin import FuncOp
from passes.schedule.stream_problem import Piece, StreamProblem
from passes.schedule.stream_writer import StreamWriter

MOST_DEPTH = 16


@dataclass(frozen=True)
class DepthChoice:
    """The fastest depth with its plan and timeline. `tried` is ((depth, seconds, peak bytes of the tier), ...)."""

    depth: int
    program: FuncOp
    timeline: Timeline
    tried: tuple[tuple[int, float, int], ...]
    warnings: tuple[Diagnostic, ...]


def emit_layers(problem: StreamProblem, depth: int, room: int | None = None, name: str = "step") -> FuncOp:
    """The plan of a window of `depth`. `room` bounds the bytes of slots (default: as the problem says).

    Raises DiagnosticError when a layer does not fit into the room.
    """
    room = problem.room() if room is None else room
    writer, unit = StreamWriter(name), problem.unit
    sequence = [layer for _ in range(problem.steps) for layer in problem.layers]
    streamed = deque(i for i, layer in enumerate(sequence) if layer.streamed)
    for layer in problem.layers:
        for piece in layer.pieces:
            writer.segment(piece)
    scratch = [writer.slot(unit, problem.tier, problem.scratch_bytes, "scratch")] if problem.scratch_bytes else []
    window: dict[int, list[tuple[Value, Value]]] = {}  # layer -> (slot, token) of its pieces
    held = 0
    for i, layer in enumerate(sequence):
        ahead = depth + (1 if layer.streamed else 0)
        while streamed and len(window) < ahead:
            following = sequence[streamed[0]]
            if streamed[0] != i and room is not None and held + following.streamed_bytes > room:
                break
            window[streamed.popleft()] = _start(writer, problem, following.name, following.streamed)
            held += following.streamed_bytes
        mine = window.pop(i, [])
        writer.wait(unit, *(token for _, token in mine))
        slots = [slot for slot, _ in mine]
        resident = [writer.segment(p) for p in layer.pieces if not p.over]
        writer.compute(unit, layer.name, layer.work, [*slots, *resident], scratch)
        writer.evict(unit, *slots)
        held -= layer.streamed_bytes
    writer.evict(unit, *scratch)
    return writer.finish()


def _start(
    writer: StreamWriter, problem: StreamProblem, name: str, pieces: Sequence[Piece]
) -> list[tuple[Value, Value]]:
    started = []
    for piece in pieces:
        slot = writer.slot(problem.unit, problem.tier, piece.nbytes, name)
        started.append((slot, writer.fetch(problem.unit, piece, slot)))
    return started


def choose_depth(
    problem: StreamProblem, target: Target, prices: Prices | None = None, *, most: int = MOST_DEPTH
) -> DepthChoice:
    """The depth from 1 to `most` with the least simulated time; the smallest of those that are equal to 0.01 %."""
    room = problem.room(target)
    tried: list[tuple[int, float, int]] = []
    best: tuple[int, FuncOp, Timeline] | None = None
    limited = False
    streamed = sum(1 for layer in problem.layers if layer.streamed) * problem.steps
    for depth in range(1, max(1, min(most, streamed)) + 1):
        program = emit_layers(problem, depth, room)
        timeline = simulate(program, target, prices)
        peak = timeline.peak_bytes.get(problem.tier, 0)
        if tried and tried[-1][1] == timeline.seconds and tried[-1][2] == peak:
            limited = depth <= streamed and _wants_more(problem, depth, room)
            break  # there is no room for more
        tried.append((depth, timeline.seconds, peak))
        if best is None or timeline.seconds < best[2].seconds * (1 - 1e-4):
            best = (depth, program, timeline)
    assert best is not None
    warnings = cliffs(problem, best[0]) if limited or best[0] == most else []
    return DepthChoice(*best, tuple(tried), tuple(warnings))


def _wants_more(problem: StreamProblem, depth: int, room: int | None) -> bool:
    """Whether the room, and not the number of layers, keeps the window below `depth`."""
    sizes = [layer.streamed_bytes for layer in problem.layers if layer.streamed]
    return room is not None and sum(sorted(sizes)[-(depth + 1) :]) > room


def cliffs(problem: StreamProblem, depth: int) -> list[Diagnostic]:
    """A warning for a window narrower than the longest run of streamed layers, when resident ones lie between runs."""
    flags = [bool(layer.streamed) for layer in problem.layers]
    if all(flags) or not any(flags):
        return []
    turn = flags.index(False)  # runs may go over the end of a step into the next one
    around = flags[turn:] + flags[:turn] if problem.steps > 1 else flags
    longest = max(len(list(run)) for streamed, run in itertools.groupby(around) if streamed)
    if depth >= longest:
        return []
    message = (
        f"{longest} streamed layers follow each other but only {depth} are fetched ahead: "
        f"the other {longest - depth} of each group wait for their whole copy"
    )
    sizes = sorted(layer.streamed_bytes for layer in problem.layers if layer.streamed)
    hint = f"spread the streamed layers evenly, or give {sum(sizes[-longest:])} bytes of {problem.tier} to slots"
    return [Diagnostic("warning", message, notes=(Diagnostic("hint", hint),))]
