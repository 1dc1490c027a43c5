"""This compiler's artifact under a budget, behind the requests of `bench.peers.child`.

python -m bench.streaming.stratum_child ARTIFACT --memory 2147483648 --threads 2 --context 128
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from bench.peers.child import Answer, serve, token_ids
from hw_targets.routing import RoutingTrace
from runtime.artifact import open_artifact
from runtime.native import load_libraries
from runtime.process_memory import resident_bytes
from runtime.session import Session
from stratum.memory_plan import plan_memory
from stratum.routing_recorder import RoutingRecorder


class Streamed:
    """An open session. `memory` 0: the weights are mapped. Under a budget routing is recorded on the way."""

    def __init__(self, options: argparse.Namespace) -> None:
        manifest = open_artifact(options.artifact).manifest
        self.plan, self.recorder = None, None
        if options.memory:
            load_libraries()
            assert RoutingTrace is not None  # loaded before the process is measured
            made = plan_memory(
                manifest,
                options.memory,
                baseline=resident_bytes(),
                context=options.context,
                policy=options.expert_policy,
            )
            self.plan = made.stream
            self.recorder = RoutingRecorder() if manifest.experts_per_token else None
        self.session = Session(
            options.artifact,
            threads=options.threads,
            max_context=options.context,
            stream=self.plan,
            routing=self.recorder,
            mmap=self.plan is not None,  # without a limit in memory of its own, as llama.cpp then repacks
        )

    def about(self, request: dict[str, Any]) -> Answer:
        """Size of the weights, and the plan."""
        plan = self.plan.to_json() if self.plan is not None else ""
        return {"bytes": self.session.manifest.weights.bytes, "threads": self.session.threads, "plan": plan}

    def prefill(self, request: dict[str, Any]) -> Answer:
        """Seconds of the first prompt of `tokens`, of one after it, and what was read for the first."""
        ids = token_ids(request["tokens"], self.session.vocab_size, request.get("topics", 1))

        def prompt() -> int:
            self.session.step(ids, range(len(ids)), [0] * len(ids), [len(ids) - 1])
            return len(ids)

        answer = self._timed(prompt)
        self.session.release(0)
        start = time.perf_counter()
        prompt()
        return answer | {"again_seconds": time.perf_counter() - start}

    def decode(self, request: dict[str, Any]) -> Answer:
        """Seconds of steps of one token after `warm` others, from an empty context: `tokens` of them, or as many as
        `seconds` allow."""
        warm, most = request["warm"], request.get("seconds", 1e9)
        ids = token_ids(warm + request["tokens"], self.session.vocab_size, request.get("topics", 1))
        for position, token in enumerate(ids[:warm]):
            self.session.step([token], [position], [0], [0])

        def steps() -> int:
            start = time.perf_counter()
            for position in range(warm, len(ids)):
                self.session.step([ids[position]], [position], [0], [0])
                if time.perf_counter() - start > most:
                    return position + 1 - warm
            return len(ids) - warm

        return self._timed(steps)

    def _timed(self, work: Callable[[], int]) -> Answer:
        streamer = self.session.streamer
        before = streamer.report() if streamer else None
        start = time.perf_counter()
        tokens = work()
        answer: Answer = {"seconds": time.perf_counter() - start, "tokens": tokens}
        if streamer is not None and before is not None:
            done = streamer.report().since(before)
            answer |= {
                "read_bytes": done.read_bytes,
                "disk_s": done.disk_s,
                "stall_s": done.stall_s,
                "hit_rate": done.hit_rate,
                "lookups": done.expert_lookups,
            }
        if self.recorder is not None:
            answer["routing"] = self.recorder.trace(self.session.manifest).experts.tolist()
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--expert-policy")
    engine = Streamed(parser.parse_args())
    serve({name: getattr(engine, name) for name in ("about", "prefill", "decode")})


if __name__ == "__main__":
    main()
