"""A row without a limit of memory: engines that hold the model decode in turns, the machine measured between them.

    results = in_turns(row, {"stratum": [...], "llama.cpp": [...]}, tokens=64)      # one `Result` an engine

A shared machine reads its memory at 30 GB/s or at 50, for about a second each, and a row takes a second and a half:
one sample of each says more of the moment than of the engine. So each engine decodes the same tokens `ROUNDS` times,
one after the other, what memory and products give is measured before and after each of our turns, and medians count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

from bench.peers.child import Engine
from bench.prediction.machine import Machine, Moment, between, host_of, usual
from bench.streaming.memory_group import MemoryGroup
from bench.streaming.report import Result
from bench.streaming.rows import Row
from hw_targets.host import usable_cores

ROUNDS = 9
WARM = 64  # tokens after which a model is in memory, nearly every expert of it too
WARM_AGAIN = 4  # of a turn: what other engines left in the caches of the cores is gone


def in_turns(row: Row, commands: Mapping[str, Sequence[str]], tokens: int) -> list[Result]:
    """Of each engine the median turn; of the first one what the machine gave around its turns, for the forecast.
    Raises EngineError where one ends."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    moments: list[Moment] = []
    with ExitStack() as stack:
        machine = stack.enter_context(Machine(usable_cores()))
        groups = {name: stack.enter_context(MemoryGroup(row.cap, i)) for i, name in enumerate(commands)}
        engines = {
            name: stack.enter_context(Engine(name, groups[name].command(command))) for name, command in commands.items()
        }
        for engine in engines.values():
            engine.ask(_request(row, 1, WARM))
        ours = next(iter(engines))
        for _ in range(ROUNDS):
            before = machine.now()
            seconds[ours].append(float(engines[ours].ask(_request(row, tokens, WARM_AGAIN))["seconds"]))
            moments.append(between(before, machine.now()))
            for name, engine in engines.items():
                if name != ours:
                    seconds[name].append(float(engine.ask(_request(row, tokens, WARM_AGAIN))["seconds"]))
        answers = {
            name: {"tokens": tokens, **engine.about, "seconds": median(seconds[name]), "turns": seconds[name],
                   "read_bytes": 0, **groups[name].facts()}
            for name, engine in engines.items()
        }  # fmt: skip
    target = host_of(usual(moments), usable_cores())
    return [Result(row, name, answer, target=target if name == ours else "") for name, answer in answers.items()]


def _request(row: Row, tokens: int, warm: int) -> dict[str, Any]:
    return {"do": "decode", "topics": row.topics, "tokens": tokens, "depth": 0, "warm": warm}
