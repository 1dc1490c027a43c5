"""Small models whose weights are streamed: builds, steps of ragged batches, and the logits without streaming."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

import codegen.weight_pieces
import stratum
from runtime import Session, open_artifact
from runtime.stream_plan import StreamPlan, least_expert_bytes, live_bytes
from tests.plain_code import plain_code
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, VOCAB, write_model

FAMILIES = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE, "mixed": QWEN3_MOE}
MIXED = """[[rule]]
experts = "0,2"
format = "bf16"
[[rule]]
experts = "3"
role = "experts.down"
format = "bf16"
"""  # experts of three sizes
Batch = tuple[list[int], list[int], list[int], list[int]]


def build_all(folder: Path, cache: Path) -> dict[str, Path]:
    """Builds whose dense pieces are single tensors, so that there is something to stream; the cache is theirs alone."""
    made = {}
    own = patch.dict(os.environ, STRATUM_CACHE=str(cache))
    with patch.object(codegen.weight_pieces, "DENSE_BYTES", 1), own, plain_code():
        for name, family in FAMILIES.items():
            model = write_model(folder / name, family)
            recipe = folder / "mixed.toml"
            recipe.write_text(MIXED)
            chosen = str(recipe) if name == "mixed" else None
            made[name] = stratum.build(model, folder / f"{name}.stratum", dtype="f32", recipe=chosen)
    return made


def least_plan(path: Path, **changes: object) -> StreamPlan:
    """Nothing stays: the smallest window and the experts of one token."""
    manifest = open_artifact(path).manifest
    resident = frozenset(changes.get("resident", ()))  # type: ignore[arg-type]
    layers = sum(piece.kind == "experts" for piece in manifest.weights.pieces) if changes.get("scope") == "layer" else 1
    values: dict[str, object] = {
        "budget_bytes": 0,
        "resident": tuple(resident),
        "window_bytes": max(live_bytes(manifest, program, resident) for program in manifest.programs),
        "expert_bytes": least_expert_bytes(manifest) * layers,
        "rows_bytes": 4096,
        "threads": 2,
    }
    return StreamPlan(**values | changes)  # type: ignore[arg-type]


def batches(seed: int) -> list[Batch]:
    """A prompt and a part of another, then ragged steps of both, then one token."""
    random = np.random.default_rng(seed)
    lengths = [(int(random.integers(1, 40)), int(random.integers(0, 20))) for _ in range(2)]
    lengths += [(1, 1), (int(random.integers(0, 4)), 1), (1, 0)]
    at = [0, 0]
    made = []
    for counts in lengths:
        ids, positions, slots, rows = [], [], [], []
        for slot, count in enumerate(counts):
            ids += random.integers(0, VOCAB, count).tolist()
            positions += range(at[slot], at[slot] + count)
            slots += [slot] * count
            at[slot] += count
            rows += [len(ids) - 1] if count else []
        made.append((ids, positions, slots, rows))
    return made


def logits(session: Session, steps: Sequence[Batch]) -> list[np.ndarray]:
    return [session.step(*step) for step in steps]


def opened(path: Path, plan: StreamPlan | None, **options: object) -> Session:
    values: dict[str, object] = {"threads": 1, "max_context": 128, "num_slots": 2, "stream": plan}
    return Session(path, **values | options)  # type: ignore[arg-type]


def assert_same(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def resident_logits(artifacts: dict[str, Path]) -> dict[tuple[str, int], list[np.ndarray]]:
    """Logits with all weights in memory."""
    made = {}
    for name, path in artifacts.items():
        for seed in range(4):
            with opened(path, None) as session:
                made[name, seed] = logits(session, batches(seed))
    return made
