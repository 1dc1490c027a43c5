"""Measures the cases of one run in a process of its own: python -m bench.prediction.child REQUEST (JSON).

The request names the artifact, the budget in bytes (0: none), sequences and context. Each line of stdin is a case as
JSON, (phase, depth, batch); the answer, a line, has its seconds, what was read from disk for it, the share of experts
found, and the process's peak memory. With `record`, a file, it writes at the end which experts every token chose.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.child import token_ids
from runtime.artifact import open_artifact
from runtime.session import Session
from stratum.memory_plan import baseline_bytes, plan_memory

REPETITIONS = 3


class Measured:
    """An open session of one artifact."""

    def __init__(self, request: dict[str, Any], routing: Any = None) -> None:
        manifest = open_artifact(request["artifact"]).manifest
        stream = None
        if request["memory"]:
            stream = plan_memory(
                manifest,
                request["memory"],
                baseline=baseline_bytes(manifest),
                context=request["context"],
                num_slots=request["batch"],
            ).stream
        self.steps = int(request["steps"])
        self.session = Session(
            request["artifact"],
            max_context=request["context"],
            num_slots=request["batch"],
            stream=stream,
            routing=routing,
        )

    def case(self, phase: str, depth: int, batch: int) -> dict[str, Any]:
        """Seconds of one prompt, or of one step."""
        streamer = self.session.streamer
        times: list[float] = []
        if phase == "prefill":
            self.fill(depth, 1)
        else:
            self.fill(depth, batch)
            self.decode(depth, batch)
        before = streamer.report() if streamer is not None else None
        for _ in range(REPETITIONS if streamer is None else 2):
            times.append(self.fill(depth, 1) if phase == "prefill" else self.decode(depth, batch))
        found: dict[str, Any] = {"seconds": statistics.median(times)}
        if streamer is not None and before is not None:
            done = streamer.report().since(before)
            passes = len(times) * (1 if phase == "prefill" else self.steps)
            found |= {"read_bytes": done.read_bytes / passes, "hit_rate": done.hit_rate}
        return found

    def fill(self, depth: int, batch: int) -> float:
        """Seconds of the prompts of `batch` sequences, one after the other."""
        start = time.perf_counter()
        for slot in range(batch):
            self.session.release(slot)
            ids = token_ids(depth, self.session.vocab_size)
            self.session.step(ids, np.arange(depth), np.full(depth, slot), [depth - 1])
        return time.perf_counter() - start

    def decode(self, depth: int, batch: int) -> float:
        """Seconds of a step: their median, or their mean where reads of one step serve the next."""
        slots, rows = np.arange(batch), np.arange(batch)
        ids = token_ids(self.steps * batch, self.session.vocab_size)
        times = []
        for i in range(self.steps):
            start = time.perf_counter()
            self.session.step(ids[i * batch : (i + 1) * batch], np.full(batch, depth + i), slots, rows)
            times.append(time.perf_counter() - start)
        return statistics.median(times) if self.session.streamer is None else statistics.fmean(times)


def main() -> None:
    request = json.loads(sys.argv[1])
    recorder = None
    if request.get("record"):
        from stratum.routing_recorder import RoutingRecorder

        recorder = RoutingRecorder()
    measured = Measured(request, recorder)
    for line in sys.stdin:
        found = measured.case(*json.loads(line))
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps(found), flush=True)
    if recorder is not None:
        from hw_targets.routing.trace_file import write_trace

        write_trace(recorder.trace(measured.session.manifest), Path(request["record"]))


if __name__ == "__main__":
    main()
