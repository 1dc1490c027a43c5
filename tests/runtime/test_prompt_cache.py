"""Prompts in a file: the same tokens with and without, whatever the file holds and the disk does."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import RuntimeDiagnostic, Session
from runtime.generation import generate
from runtime.kv_spill import SpillOptions
from runtime.prompt_cache import PromptCache
from tests.runtime.fake_artifact import DEAD_WORKER_ID, MAX_CONTEXT, greedy_tokens, sequence_logits, write_artifact

PROMPT = np.random.default_rng(0).integers(0, DEAD_WORKER_ID, 150).tolist()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 positions, so that there are several."""
    monkeypatch.setattr("runtime.kv_chunks.RECORD_BYTES", 64 * 32)


def opened(path: Path, **options: Any) -> Session:
    return Session(path, threads=1, **options)


def write(path: Path, artifact: Path, ids: Sequence[int] = PROMPT, **options: Any) -> None:
    with opened(artifact, **options) as session:
        session.step(ids, range(len(ids)), [0] * len(ids), [])
        assert PromptCache(path, session).save(0, ids)


def use(path: Path, artifact: Path, ids: Sequence[int], **options: Any) -> Any:
    """Reuses the file for a prompt, then checks a text after it; what was reused."""
    preadv = options.pop("preadv", os.preadv)
    with opened(artifact, **options) as session:
        reused = PromptCache(path, session, preadv=preadv).reuse(0, ids)
        assert session.filled(0) == reused.positions < len(ids)
        events = generate(session, ids, reuse=reused.positions)
        tokens = [next(events).token for _ in range(3)]
        assert tokens == greedy_tokens(ids, 3)
    return reused


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_common_part_is_reused(artifact_path: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("cache") / "prompt"
    ids = PROMPT[: data.draw(st.integers(1, 150))]
    write(path, artifact_path, ids)
    common = data.draw(st.integers(0, len(ids)))
    other = ids[:common] + [(token + 1) % DEAD_WORKER_ID for token in PROMPT[common : common + 30]]
    context = data.draw(st.sampled_from((MAX_CONTEXT, len(other) + 5)))
    if other:
        reused = use(path, artifact_path, other, max_context=min(context, MAX_CONTEXT))
        most = min(common, len(other) - 1)
        assert reused.positions == most or (len(ids) > context and reused.positions <= most)
        assert not reused.fault


def test_what_is_saved_and_when(artifact_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt"
    write(path, artifact_path)
    before = path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0 and list(tmp_path.iterdir()) == [path]
    with opened(artifact_path, num_slots=2, kv_spill=SpillOptions()) as session:
        cache = PromptCache(path, session)
        assert cache.tokens == PROMPT
        assert cache.reuse(1, PROMPT).positions == 149
        logits = session.step(PROMPT[149:], [149], [1], [0])
        np.testing.assert_array_equal(logits[0], sequence_logits(PROMPT))
        assert not cache.save(1, PROMPT) and path.read_bytes() == before  # nothing new
        session.spill(1)
        session.step([3], [150], [1], [])
        session.spill(1)
        assert cache.save(1, [*PROMPT, 3]) and cache.tokens == [*PROMPT, 3]
        with pytest.raises(RuntimeDiagnostic, match="slot 1 has 151 positions"):
            cache.save(1, PROMPT)
    assert use(path, artifact_path, [*PROMPT, 3, 4]).positions == 151


def test_the_front_is_computed_where_that_is_sooner(
    artifact_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompt"
    write(path, artifact_path)
    monkeypatch.setattr("runtime.prompt_cache.ASSUMED_BYTES_PER_S", 1.0)
    assert use(path, artifact_path, PROMPT).computed == 0  # nothing is known of computing
    monkeypatch.setattr(PromptCache, "_read_head", _with_compute_s(PromptCache._read_head, 100.0))
    reused = use(path, artifact_path, PROMPT)
    assert reused.computed == 64 and reused.positions == 149 and "64 of them computed again" in str(reused)
    monkeypatch.setattr(PromptCache, "_read_head", _with_compute_s(PromptCache._read_head, 1e-9))
    assert use(path, artifact_path, PROMPT).positions == 0  # computing all is what happens without a file


def _with_compute_s(read: Any, seconds: float) -> Any:
    def changed(self: PromptCache) -> None:
        read(self)
        self._compute_s = seconds

    return changed


@pytest.mark.parametrize("fault", [errno.EIO, "flip", "short"])
def test_what_cannot_be_read_is_computed(
    artifact_path: Path, tmp_path: Path, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.weight_reader._PAUSES_S", (0.0, 0.0, 0.0))
    path = tmp_path / "prompt"
    write(path, artifact_path)

    def ill(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        if fault == errno.EIO:
            raise OSError(errno.EIO, "Input/output error")
        got = os.preadv(descriptor, buffers, at)
        if fault == "flip":
            buffers[0][200] ^= 1
        return got

    if fault == "short":
        os.truncate(path, path.stat().st_size - 4096)
        with pytest.raises(RuntimeDiagnostic, match=r"this file has \d+ bytes instead of"):
            use(path, artifact_path, PROMPT)
        return
    reused = use(path, artifact_path, PROMPT, preadv=ill)
    assert reused.computed == 149 and reused.fault and "damaged" in str(reused)


def test_files_of_others_are_refused(artifact_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt"
    other = write_artifact(tmp_path / "other", change=lambda manifest: manifest["model"].update(name="other"))
    write(path, other)
    with pytest.raises(RuntimeDiagnostic, match="was made with another model") as told:
        use(path, artifact_path, PROMPT)
    assert told.value.where == str(path) and told.value.hint
    (tmp_path / "text").write_text("hello")
    with pytest.raises(RuntimeDiagnostic, match="is not a prompt cache"):
        use(tmp_path / "text", artifact_path, PROMPT)
    with pytest.raises(RuntimeDiagnostic, match="is no file"):
        use(tmp_path, artifact_path, PROMPT)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RuntimeDiagnostic, match="is no file"):
        use(tmp_path / "pipe", artifact_path, PROMPT)
    with opened(artifact_path) as session:
        session.step([1], [0], [0], [])
        missing = PromptCache(tmp_path / "none" / "prompt", session)
        with pytest.raises(RuntimeDiagnostic, match="the prompt cache cannot be written"):
            missing.save(0, [1])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_hostile_file_ends_in_a_diagnostic_or_the_right_tokens(
    artifact_path: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    path = tmp_path_factory.mktemp("cache") / "prompt"
    write(path, artifact_path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 63), st.integers(4096, 4300), st.integers(0, len(content) - 1)))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.sampled_from((len(content), len(content), 5000, 4096, 60, 0)))])
    try:
        use(path, artifact_path, PROMPT)
    except RuntimeDiagnostic as told:
        assert "this file" in told.message
