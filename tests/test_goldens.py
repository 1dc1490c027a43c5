"""Generated code equals what transformers computed for the committed tiny checkpoints: logits, then greedy tokens."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import hw_targets
from codegen.build import build_artifact
from codegen.object_cache import ObjectCache
from frontends.huggingface import import_model
from runtime import Session
from tests.goldens import GOLDEN_CASES, GOLDENS, Golden
from tests.plain_code import plain_code


@pytest.fixture(scope="module", params=sorted(GOLDEN_CASES))
def session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Golden, Session, Session]:
    """(golden, f32 build, bf16 build); the first is optimized as builds are."""
    directory: Path = GOLDENS / request.param
    sessions = []
    for dtype in ("f32", "bf16"):
        imported = import_model(directory)
        out = tmp_path_factory.mktemp(f"{request.param}-{dtype}") / "artifact"
        with nullcontext() if dtype == "f32" else plain_code():
            build_artifact(imported, out, target=hw_targets.load("host"), dtype=dtype, cache=ObjectCache())
        imported.checkpoint.close()
        sessions.append(Session(out))
    request.addfinalizer(lambda: [s.close() for s in sessions])
    return Golden.load(directory), sessions[0], sessions[1]


def prefill(session: Session, ids: np.ndarray) -> np.ndarray:
    session.release(0)
    at = np.arange(len(ids))
    return session.step(ids, at, np.zeros_like(at), at)


def test_f32_logits(session: tuple[Golden, Session, Session]) -> None:
    golden, f32, _ = session
    got = prefill(f32, golden.ids)
    assert np.abs(got - golden.logits).max() <= 1e-4 * np.abs(golden.logits).max()


def test_f32_greedy_tokens(session: tuple[Golden, Session, Session]) -> None:
    golden, f32, _ = session
    tokens = [int(prefill(f32, golden.ids)[-1].argmax())]
    while len(tokens) < len(golden.greedy):
        position = len(golden.ids) + len(tokens) - 1
        tokens.append(int(f32.step(tokens[-1:], [position], [0], [0])[0].argmax()))
    assert tokens == golden.greedy.tolist()


def test_bf16_is_close(session: tuple[Golden, Session, Session]) -> None:
    """Rounding to bf16 costs little: the mean KL divergence of the next token from the float model."""
    golden, _, bf16 = session
    got = prefill(bf16, golden.ids).astype(np.float64)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    want, have = log_softmax(golden.logits.astype(np.float64)), log_softmax(got)
    divergence = (np.exp(want) * (want - have)).sum(-1)
    assert divergence.mean() < 0.02
