"""Measures the cases of one run in a process of its own: python -m bench.prediction.child REQUEST (JSON).

The request names the artifact, the budget in bytes (0: none), sequences and context. Each line of stdin is a case as
JSON, (phase, depth, batch); the answer, a line, has its seconds, what was read from disk for it, the share of experts
found, the process's peak memory and the plan that was executed. With `record`, a file, it writes at the end which
experts every token chose.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from runtime.artifact import open_artifact
from runtime.process_memory import peak_resident_bytes
from runtime.stream_plan import StreamPlan
from stratum.measure_run import MeasuredRun
from stratum.memory_plan import baseline_bytes, plan_memory


def main() -> None:
    request = json.loads(sys.argv[1])
    artifact = Path(request["artifact"])
    recorder, stream = None, None
    if request.get("record"):
        from stratum.routing_recorder import RoutingRecorder

        recorder = RoutingRecorder()
    manifest = open_artifact(artifact).manifest
    if request["memory"]:
        stream = plan_memory(
            manifest,
            request["memory"],
            baseline=baseline_bytes(manifest),
            context=request["context"],
            num_slots=request["batch"],
        ).stream
    with MeasuredRun(
        artifact, stream, context=request["context"], batch=request["batch"], routing=recorder
    ) as measured:
        for line in sys.stdin:
            phase, depth, batch = json.loads(line)
            if phase == "prefill":
                found = measured.prefill(depth, parts=False)
            else:
                found = measured.decode(depth, batch, int(request["steps"]), parts=False)
            peak = peak_resident_bytes()
            print(json.dumps({**asdict(found), "peak": peak, "stream": _text(stream)}), flush=True)
    if recorder is not None:
        from hw_targets.routing.trace_file import write_trace

        write_trace(recorder.trace(manifest), Path(request["record"]))


def _text(stream: StreamPlan | None) -> str:
    return stream.to_json() if stream is not None else ""


if __name__ == "__main__":
    main()
