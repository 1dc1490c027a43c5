"""This compiler's artifact behind the requests of `bench.peers.child`.

    python -m bench.peers.stratum_child ARTIFACT --threads 2 --context 4096

Weights are copied into memory, as the peers do that repack them. Slot 0 takes prompts and decoding from an empty
context, slot 1 decoding at a depth, the others batches.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from bench.peers.child import Answer, serve, token_ids
from runtime.session import Session
from stratum.benchmark import BenchTest, work_of

MOST_SEQUENCES = 16
DEPTH_SLOT, FIRST_BATCH_SLOT = 1, 2
FIRST_PROMPT, PROMPT_STEP = 32, 24  # sequence i of a batch stands behind 32 + 24 i positions


class Stratum:
    """An open session."""

    def __init__(self, options: argparse.Namespace) -> None:
        slots = FIRST_BATCH_SLOT + MOST_SEQUENCES
        self.session = Session(
            options.artifact, threads=options.threads, max_context=options.context, num_slots=slots, mmap=False
        )
        self.artifact = options.artifact

    def about(self, request: dict[str, Any]) -> Answer:
        """Version, sizes, what the cache holds."""
        manifest = self.session.manifest
        return {
            "version": f"stratum {manifest.stratum_version}",
            "bytes": manifest.weights.bytes,
            "parameters": manifest.model.get("parameters"),
            "threads": self.session.threads,
            "kv": manifest.kv.format,
            "kv_bytes_per_position": manifest.kv.bytes_per_position,
        }

    def work(self, request: dict[str, Any]) -> Answer:
        """Bytes and FLOPs of a test, by the manifest."""
        test = BenchTest(request.get("prompt", 0), request.get("generate", 0), request.get("depth", 0))
        work = work_of(self.session.manifest, test)
        return {"bytes": work.bytes, "flops": work.flops}

    def prefill(self, request: dict[str, Any]) -> Answer:
        """Seconds of one prompt of `tokens`, from an empty context."""
        ids = np.array(token_ids(request["tokens"], self.session.vocab_size), np.int32)
        self.session.release(0)
        start = time.perf_counter()
        self._prompt(0, ids, 0)
        return {"seconds": time.perf_counter() - start}

    def decode(self, request: dict[str, Any]) -> Answer:
        """Seconds of `tokens` steps of one token behind `depth` positions and `warm` steps."""
        depth, warm = request["depth"], request["warm"]
        count = request["tokens"] + warm
        ids = np.array(token_ids(depth + count, self.session.vocab_size), np.int32)
        slot = DEPTH_SLOT if depth else 0
        if not depth:
            self.session.release(slot)
        elif not depth <= self.session.filled(slot) <= depth + count:
            self.session.release(slot)
            self._prompt(slot, ids[:depth], 0)
        start = 0.0
        for position in range(depth, depth + count):
            if position == depth + warm:
                start = time.perf_counter()
            self._prompt(slot, ids[position : position + 1], position)
        return {"seconds": time.perf_counter() - start}

    def batch(self, request: dict[str, Any]) -> Answer:
        """Seconds of `steps` steps in which each of `sequences` gets a token; all stand at different positions."""
        count, steps = request["sequences"], request["steps"]
        if not 1 <= count <= MOST_SEQUENCES:
            raise ValueError(f"{count} sequences; 1 to {MOST_SEQUENCES} can be measured")
        slots = np.arange(FIRST_BATCH_SLOT, FIRST_BATCH_SLOT + count, dtype=np.int32)
        lengths = FIRST_PROMPT + PROMPT_STEP * np.arange(count, dtype=np.int32)
        ids = np.array(token_ids(int(lengths.max()) + steps * count, self.session.vocab_size), np.int32)
        for slot, length in zip(slots, lengths, strict=True):
            kept = self.session.filled(int(slot))  # of the turn before
            if not length <= kept <= length + steps:
                self.session.release(int(slot))
                self._prompt(int(slot), ids[:length], 0)
        rows = np.arange(count, dtype=np.int32)
        start = time.perf_counter()
        for step in range(steps):
            self.session.step(ids[step * count : (step + 1) * count], lengths + np.int32(step), slots, rows)
        return {"seconds": time.perf_counter() - start}

    def _prompt(self, slot: int, ids: np.ndarray, first: int) -> None:
        count = len(ids)
        positions = np.arange(first, first + count, dtype=np.int32)
        self.session.step(ids, positions, np.full(count, slot, np.int32), np.array([count - 1], np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096)
    engine = Stratum(parser.parse_args())
    serve({name: getattr(engine, name) for name in ("about", "work", "prefill", "decode", "batch")})


if __name__ == "__main__":
    main()
