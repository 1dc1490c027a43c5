"""This compiler's artifact under a budget, behind the requests of `bench.peers.child`.

python -m bench.streaming.stratum_child ARTIFACT --memory 2147483648 --threads 2 --context 128
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

from bench.peers.child import Answer, serve, token_ids
from runtime.artifact import open_artifact
from runtime.session import Session
from stratum.memory_plan import baseline_bytes, plan_memory


class Streamed:
    """An open session. `memory` 0: the weights are mapped."""

    def __init__(self, options: argparse.Namespace) -> None:
        manifest = open_artifact(options.artifact).manifest
        plan = None
        if options.memory:
            baseline = baseline_bytes(manifest)
            made = plan_memory(manifest, options.memory, baseline=baseline, context=options.context)
            plan = made.stream
        self.session = Session(options.artifact, threads=options.threads, max_context=options.context, stream=plan)

    def about(self, request: dict[str, Any]) -> Answer:
        """Size of the weights."""
        return {"bytes": self.session.manifest.weights.bytes, "threads": self.session.threads}

    def prefill(self, request: dict[str, Any]) -> Answer:
        """Seconds of one prompt of `tokens`, and what was read for it."""
        ids = token_ids(request["tokens"], self.session.vocab_size)
        return self._timed(lambda: self.session.step(ids, range(len(ids)), [0] * len(ids), [len(ids) - 1]))

    def decode(self, request: dict[str, Any]) -> Answer:
        """Seconds of `tokens` steps of one token from an empty context, and what was read for them."""
        ids = token_ids(request["tokens"], self.session.vocab_size)

        def steps() -> None:
            for position, token in enumerate(ids):
                self.session.step([token], [position], [0], [0])

        return self._timed(steps)

    def _timed(self, work: Any) -> Answer:
        streamer = self.session.streamer
        before = streamer.report() if streamer else None
        start = time.perf_counter()
        work()
        answer: Answer = {"seconds": time.perf_counter() - start}
        if streamer is not None and before is not None:
            done = streamer.report().since(before)
            answer |= {"read_bytes": done.read_bytes, "disk_s": done.disk_s, "hit_rate": done.hit_rate}
        answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    engine = Streamed(parser.parse_args())
    serve({name: getattr(engine, name) for name in ("about", "prefill", "decode")})


if __name__ == "__main__":
    main()
