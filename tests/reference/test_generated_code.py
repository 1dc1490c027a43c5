"""Native code against transformers in float32: logits, greedy tokens, chunks, ragged batches. Also makes the goldens.

`python -m pytest tests/reference --update-golden` writes tests/goldens afresh; without the flag the committed ones are
compared with what transformers says now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hw_targets
from codegen.build import build_artifact
from codegen.object_cache import ObjectCache
from frontends.huggingface import import_model
from runtime import Session
from tests.goldens import GOLDEN_CASES, GOLDENS, Golden
from tests.reference.tiny_models import CASES, SMALL, save_model

CONTEXT, GREEDY = 14, 32


def artifact_of(directory: Path, out: Path, dtype: str = "f32") -> Path:
    """The model in `directory`, built for this machine."""
    imported = import_model(directory)
    result = build_artifact(imported, out, target=hw_targets.load("host"), dtype=dtype, cache=ObjectCache())
    imported.checkpoint.close()
    return result.path


def feed(session: Session, ids: np.ndarray, first: int = 0, slot: int = 0) -> np.ndarray:
    """Logits of every position of a chunk of one sequence."""
    count = len(ids)
    return session.step(ids, np.arange(first, first + count), np.full(count, slot), np.arange(count))


def greedy_of_transformers(model: Any, ids: np.ndarray, count: int) -> list[int]:
    """Tokens by argmax of a full forward pass each."""
    import torch

    tokens = [int(i) for i in ids]
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def greedy_of_session(session: Session, ids: np.ndarray, count: int) -> list[int]:
    """The same tokens by prefill and single steps."""
    tokens = [int(feed(session, ids)[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(feed(session, np.array(tokens[-1:]), len(ids) + len(tokens) - 1)[-1].argmax()))
    return tokens


@pytest.mark.parametrize(("family", "changes", "dtype"), CASES)
def test_native_code_equals_transformers(family: str, changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    import torch

    model = save_model(family, changes, dtype, tmp_path / "model")
    ids = np.random.default_rng(3).integers(0, SMALL["vocab_size"], CONTEXT)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    with Session(artifact_of(tmp_path / "model", tmp_path / "out"), num_slots=3) as session:
        whole = feed(session, ids)
        assert np.abs(whole - wanted).max() <= 1e-4 * np.abs(wanted).max()

        # prefill = token by token, to the bit
        single = [feed(session, ids[i : i + 1], i, slot=1) for i in range(CONTEXT)]
        np.testing.assert_array_equal(np.concatenate(single), whole)

        # three ragged sequences in one batch = each alone, to the bit
        lengths = (5, CONTEXT, 9)
        parts = [(ids[:n][::-1] if s == 2 else ids[:n], np.arange(n), np.full(n, s)) for s, n in enumerate(lengths)]
        joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        for slot in range(3):
            session.release(slot)
        together = session.step(*joined, np.arange(sum(lengths)))
        starts = np.cumsum((0, *lengths))
        for slot in range(3):
            session.release(slot)
            alone = feed(session, parts[slot][0], slot=slot)
            np.testing.assert_array_equal(together[starts[slot] : starts[slot + 1]], alone)

        session.release(0)
        assert greedy_of_session(session, ids, GREEDY) == greedy_of_transformers(model, ids, GREEDY)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "olmoe"])
def test_all_tokens_on_the_same_experts(case: str, tmp_path: Path) -> None:
    """One token repeated: every row has one hidden state, so the chosen experts get all rows, the others none."""
    import torch

    family, changes, _ = next(c for c in CASES if c[0] == case)
    model = save_model(family, changes, "float32", tmp_path / "model")
    ids = np.full(CONTEXT, 17)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.ptp(wanted, axis=0).max() <= 1e-4 * np.abs(wanted).max()  # the rows are alike indeed
    with Session(artifact_of(tmp_path / "model", tmp_path / "out")) as session:
        got = feed(session, ids)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", sorted(GOLDEN_CASES))
def test_goldens_are_what_transformers_says(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import torch

    family, changes = GOLDEN_CASES[name]
    update = bool(request.config.getoption("--update-golden"))
    directory = GOLDENS / name if update else tmp_path
    model = save_model(family, changes, "bfloat16", directory)
    ids = np.random.default_rng(11).integers(0, SMALL["vocab_size"], CONTEXT)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    fresh = Golden(ids, logits, np.array(greedy_of_transformers(model, ids, GREEDY)))
    if update:
        fresh.save(directory)
    committed = Golden.load(GOLDENS / name)
    np.testing.assert_array_equal(committed.ids, fresh.ids)
    np.testing.assert_array_equal(committed.greedy, fresh.greedy)
    assert np.abs(committed.logits - fresh.logits).max() <= 1e-5 * np.abs(fresh.logits).max()
