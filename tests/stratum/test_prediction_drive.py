"""The drive of a prediction is measured on the memory of the session, and leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.prediction.drive import Drive
from runtime import Session
from runtime.artifact import open_artifact
from runtime.stream_plan import StreamPlan, least_expert_bytes, live_bytes


def test_the_drive_is_read_as_a_session_reads_it(moe_artifact: Path) -> None:
    """The same bytes once more: the session answers as before, and its counts stay."""
    artifact = open_artifact(moe_artifact)
    manifest = artifact.manifest
    stays = [n for n, piece in enumerate(manifest.weights.pieces) if piece.kind == "dense"][:1]
    window = max(live_bytes(manifest, program, frozenset(stays)) for program in manifest.programs)
    plan = StreamPlan(1 << 40, tuple(stays), window, least_expert_bytes(manifest) * 2)
    with Session(moe_artifact, threads=1, stream=plan, max_context=64) as session:
        assert session.streamer is not None
        first = session.step([1, 2, 3], [0, 1, 2], [0, 0, 0], [2])
        drive = Drive(artifact, session.streamer)
        drive.rate(0.05)  # what the session reads ahead of the next step is there then
        counts = session.streamer.report()
        assert drive.rate(0.05) > 0 and session.streamer.report() == counts
        drive.close()
        assert np.array_equal(session.step([1, 2, 3], [0, 1, 2], [0, 0, 0], [2]), first)
