"""The runtime on artifacts the compiler built: batches, threads, memory and profiles of real steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import stratum
from runtime import (
    GenerationParams,
    GenerationRequest,
    SamplingParams,
    Session,
    generate,
    generate_batch,
    open_artifact,
)
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, VOCAB, write_model

pytestmark = pytest.mark.slow
FAMILIES = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE}
# f32 throughout; only the order of additions differs between programs and tile sizes, over at most 96 terms
RELATIVE = 2e-5


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_model(folder / "model", FAMILIES[request.param])
    return stratum.build(model, folder / "artifact", dtype="f32")


@pytest.fixture(scope="module")
def session(built: Path) -> Iterator[Session]:
    with Session(built, threads=2, num_slots=3) as session:
        yield session


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def alone(session: Session, ids: Sequence[int], slot: int = 0) -> np.ndarray:
    return session.step(ids, range(len(ids)), [slot] * len(ids), range(len(ids)))


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=RELATIVE * np.abs(want).max())


def test_opens_with_full_verification(built: Path) -> None:
    artifact = open_artifact(built, verify=True)
    assert artifact.manifest.vocab_size == VOCAB
    assert [program.name for program in artifact.manifest.programs] == ["decode", "prefill"]
    assert all(launch.origin and launch.name for p in artifact.manifest.programs for launch in p.launches)


def test_a_prompt_at_once_equals_token_by_token(session: Session) -> None:
    ids = prompt(100)
    one_by_one = np.concatenate([session.step([token], [at], [1], [0]) for at, token in enumerate(ids)])
    assert_close(alone(session, ids), one_by_one)


def test_ragged_batch_equals_each_alone(session: Session) -> None:
    """Three sequences in one step: a whole prompt, the rest of one, a single token."""
    sequences = [prompt(40, 1), prompt(33, 2), prompt(20, 3)]
    want = [alone(session, ids) for ids in sequences]
    session.step(sequences[1][:10], range(10), [1] * 10, [])
    session.step(sequences[2][:19], range(19), [2] * 19, [])
    ids = [*sequences[0], *sequences[1][10:], sequences[2][19]]
    positions = [*range(40), *range(10, 33), 19]
    slots = [0] * 40 + [1] * 23 + [2]
    rows = [63, 39, 0, 62]  # in no order
    got = session.step(ids, positions, slots, rows)
    assert_close(got, np.stack([want[2][19], want[0][39], want[0][0], want[1][32]]))


def test_any_number_of_threads_gives_the_same_bits(built: Path) -> None:
    ids = prompt(50)
    results = []
    for threads in (1, 2, 3):
        with Session(built, threads=threads) as session:
            results.append(alone(session, ids))
            results.append(alone(session, ids))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_batch_generation_equals_each_alone(session: Session) -> None:
    requests = [GenerationRequest(prompt(n, n), GenerationParams(10)) for n in (1, 30, 70, 7, 100)]
    events = list(generate_batch(session, requests))
    for index, request in enumerate(requests):
        expected = [event.token for event in generate(session, request.prompt_ids, request.params)]
        assert [event.token for event in events if event.sequence == index] == expected


def test_a_seed_repeats(session: Session) -> None:
    params = GenerationParams(15, SamplingParams(temperature=1.0, top_k=40, seed=3))
    first, second = ([event.token for event in generate(session, prompt(5), params)] for _ in range(2))
    assert first == second


def test_cache_memory_follows_the_sequence(built: Path) -> None:
    with Session(built, threads=1, num_slots=64) as session:
        kv = session.manifest.kv
        assert session.memory().kv_reserved == kv.bytes_per_position * session.max_context * 64
        alone(session, prompt(8))
        few = session.memory().kv_committed
        assert 0 < few <= session.memory().kv_reserved // 32
        alone(session, prompt(250), slot=40)
        assert session.memory().kv_committed > few


def test_profile_names_the_parts_of_the_model(session: Session, tmp_path: Path) -> None:
    with session.profile() as profile:
        list(generate(session, prompt(20), GenerationParams(3)))
    assert [step.tokens for step in profile.steps] == [20, 1, 1]
    for step in profile.steps:
        assert np.all(step.cycles[:, :, 0] > 0) and np.all(step.cycles[:, :, 1] >= step.cycles[:, :, 0])
        starts = step.cycles[:, 0, 0]
        assert np.all(np.diff(starts) >= 0)  # thread 0 runs the launches in the manifest's order
    origins = {row.origin for row in profile.rows()}
    assert any("layers.*" in origin and "q_proj" in origin for origin in origins)
    assert any("lm_head" in origin for origin in origins)
    profile.write_trace(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").stat().st_size > 1000
