"""How fast the drive is just now, read as a streaming session reads it.

    Drive(artifact, session.streamer).rate()      # bytes/s, in a quarter of a second

Reads weights that lie in memory for a while once more, from the file into their own place (the same bytes, so nothing
changes), past the page cache, in requests as long and on as many threads as the streamer's. The place matters: a
virtual drive here reads 2.3 GB/s into huge pages, 1.1 to 1.9 into scattered pages of 4096 bytes. No read of the session
may be under way.
"""

from __future__ import annotations

import ctypes
import time

import numpy as np

from runtime.artifact import Artifact
from runtime.memory import PAGE_BYTES
from runtime.weight_reader import ReadJob, WeightReader
from runtime.weight_streamer import WeightStreamer

SECONDS = 0.25


class Drive:
    """Reads with a reader of its own; the session's counts stay as they are. Close it before the session."""

    def __init__(self, artifact: Artifact, streamer: WeightStreamer) -> None:
        weights, plan = artifact.manifest.weights, streamer.plan
        self._streamer, self._nbytes = streamer, weights.bytes
        self._request, self._threads = plan.request_bytes, plan.threads
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * weights.bytes).from_address(streamer.address))
        self._reader = WeightReader(
            str(artifact.path / weights.file), artifact.open_weights(), weights.bytes, memory,
            threads=plan.threads, request_bytes=plan.request_bytes,
        )  # fmt: skip
        self._random = np.random.default_rng(0)

    def rate(self, seconds: float = SECONDS) -> float:
        """bytes/s now; 0 where nothing lies in memory."""
        parts = self._parts(streamed=True) or self._parts(streamed=False)
        if not parts:
            return 0.0
        order = self._random.permutation(len(parts)).tolist()
        jobs: list[ReadJob] = []
        start, nbytes, at = time.perf_counter(), 0, 0
        while time.perf_counter() - start < seconds:
            while len(jobs) < 2 * self._threads:
                part = parts[order[at % len(order)]]
                jobs.append(self._reader.submit([part], "once more"))
                nbytes, at = nbytes + part[1], at + 1
            jobs.pop(0).wait()
        for job in jobs:
            job.wait()
        return nbytes / (time.perf_counter() - start)

    def _parts(self, *, streamed: bool) -> list[tuple[int, int]]:
        """(offset, bytes) of requests for what is in memory: of what comes and goes, or of what stays."""
        pages = np.zeros(-(-self._nbytes // PAGE_BYTES), np.uint8)
        if _mincore(self._streamer.address, len(pages) * PAGE_BYTES, pages.ctypes.data) != 0:
            return []
        pages &= 1
        for number, piece in enumerate(self._streamer.pieces):
            if piece.kind == "rows" or (number in self._streamer.resident) == streamed:
                pages[piece.offset // PAGE_BYTES : -(-(piece.offset + piece.bytes) // PAGE_BYTES)] = 0
        edges = np.flatnonzero(np.diff(np.concatenate([[0], pages, [0]]).astype(np.int8))) * PAGE_BYTES
        last = self._nbytes // PAGE_BYTES * PAGE_BYTES
        return [
            (at, min(self._request, end - at))
            for first, end in zip(edges[::2].tolist(), np.minimum(edges[1::2], last).tolist(), strict=True)
            for at in range(first, end, self._request)
        ]

    def close(self) -> None:
        """Ends the reader."""
        self._reader.close()


_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
