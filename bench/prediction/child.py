"""Runs the cases of one run in a process of its own, turn by turn: python -m bench.prediction.child REQUEST (JSON).

The request names the artifact, the budget in bytes (0: none), sequences and context. Behind the requests of
`bench.peers.child`: `begin` a case (phase, depth, batch), which is run once to warm up; `turn` runs it for so many
steps (a prompt: once) and answers their seconds; `drive` answers what the drive reads just now, bytes/s; `end`
answers what was read from disk in all turns, the experts found, the guesses of experts that came true, the process's
peak memory and the plan that was executed. `routing` writes which experts every token chose so far.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.peers.child import Answer, serve
from bench.prediction.drive import Drive
from runtime.artifact import open_artifact
from runtime.process_memory import peak_resident_bytes
from runtime.stream_plan import StreamPlan
from runtime.stream_report import StreamReport
from stratum.measure_run import MeasuredRun
from stratum.memory_plan import plan_memory
from stratum.process_account import baseline_bytes
from stratum.routing_recorder import RoutingRecorder


class Cases:
    """An open model."""

    def __init__(self, request: dict[str, Any]) -> None:
        artifact = Path(request["artifact"])
        self.recorder = RoutingRecorder() if request["record"] else None
        opened = open_artifact(artifact)
        self.manifest = opened.manifest
        self.stream: StreamPlan | None = None
        if request["memory"]:
            self.stream = plan_memory(
                self.manifest,
                request["memory"],
                baseline=baseline_bytes(self.manifest),
                context=request["context"],
                num_slots=request["batch"],
            ).stream
        self.run = MeasuredRun(
            artifact, self.stream, context=request["context"], batch=request["batch"], routing=self.recorder
        )
        streamer = self.run.session.streamer
        self.disk = Drive(opened, streamer) if streamer is not None else None
        self.phase, self.depth, self.batch = "decode", 1, 1
        self.passes = 0
        self.done: list[StreamReport] = []  # of each turn

    def about(self, request: dict[str, Any]) -> Answer:
        """Threads of the session."""
        return {"threads": self.run.session.threads}

    def begin(self, request: dict[str, Any]) -> Answer:
        """Fills the depth, warms up, and counts from here on."""
        self.phase, self.depth, self.batch = request["phase"], request["depth"], request["batch"]
        self.run.fill(self.depth, self.batch)
        self.turn({"steps": request["steps"]})
        self.passes, self.done = 0, []
        return {}

    def turn(self, request: dict[str, Any]) -> Answer:
        """Seconds of every step."""
        streamer = self.run.session.streamer
        before = streamer.report() if streamer is not None else None
        if self.phase == "prefill":
            seconds = [self.run.fill(self.depth, 1)]
        else:
            seconds = self.run.steps(self.depth, self.batch, int(request["steps"]))
        self.passes += len(seconds)
        if streamer is not None and before is not None:
            self.done.append(streamer.report().since(before))
        return {"seconds": seconds}

    def drive(self, request: dict[str, Any]) -> Answer:
        """bytes/s of the drive; 0 without a budget."""
        return {"rate": self.disk.rate() if self.disk is not None else 0.0}

    def end(self, request: dict[str, Any]) -> Answer:
        """Of one step or prompt: bytes read; of all turns: experts looked up and found, guesses read and right."""
        found: Answer = {"stream": self.stream.to_json() if self.stream is not None else ""}
        if self.done:
            found |= {
                "read_bytes": sum(one.read_bytes for one in self.done) / self.passes,
                "lookups": sum(one.expert_lookups for one in self.done),
                "hits": sum(one.expert_hits for one in self.done),
                "guesses_read": sum(one.guesses_read for one in self.done),
                "guesses_right": sum(one.guesses_right for one in self.done),
            }
        return {**found, "peak": peak_resident_bytes()}

    def routing(self, request: dict[str, Any]) -> Answer:
        """Writes a trace to `path`."""
        from hw_targets.routing.trace_file import write_trace

        assert self.recorder is not None
        write_trace(self.recorder.trace(self.manifest), Path(request["path"]))
        return {}


def main() -> None:
    cases = Cases(json.loads(sys.argv[1]))
    serve({name: getattr(cases, name) for name in ("about", "begin", "turn", "drive", "end", "routing")})


if __name__ == "__main__":
    main()
