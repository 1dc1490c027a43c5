"""A KV cache larger than its memory: the same bits in every format, the limit kept, whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stratum
from runtime import RuntimeDiagnostic, Session, open_artifact
from runtime.generation import GenerationParams, generate
from runtime.kv_spill import SpillOptions
from runtime.kv_stream import KVStreamer, KVStreamOptions
from runtime.prompt_cache import CachedGeneration, PromptCache
from stratum.cli.bench import open_on_cpu
from stratum.cli.run_options import Limits
from stratum.memory_plan import DoesNotFit, plan_for, plan_memory
from tests.runtime.conftest import KV_LAYERS
from tests.runtime.interrupts import interrupted
from tests.runtime.test_kv_spill import IllDisk
from tests.stratum.tiny_model import VOCAB

pytestmark = pytest.mark.slow
Steps = list[tuple[list[int], list[int], list[int], list[int]]]


@pytest.fixture(scope="module", params=["bf16", "kv2"])
def artifact(request: pytest.FixtureRequest, kv_build: Callable[[str], Path]) -> Path:
    return kv_build(request.param)


def opened(path: Path, limit: int | None = None, **options: Any) -> Session:
    stream = KVStreamOptions(limit, **options) if limit is not None else None
    return Session(path, threads=1, max_context=1024, num_slots=2, kv_stream=stream)


def room(session: Session, layers: int, *lengths: int) -> int:
    """A limit for sequences of those lengths of which so many layers fit."""
    kv = session.kv
    return sum(kv.hot_bytes(length) + layers * kv.layer_bytes(length) for length in lengths)


def steps(seed: int, lengths: Sequence[tuple[int, int]]) -> Steps:
    """By step, how many tokens of either sequence; a negative number goes back so far and half on.

    What stands at a position after going back is another token.
    """
    random = np.random.default_rng(seed)
    at, made = [0, 0], []
    for counts in lengths:
        batch: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        for slot, count in enumerate(counts):
            if count < 0:
                at[slot], count = max(0, at[slot] + count), 1 - count // 2
            batch[0].extend(random.integers(0, VOCAB, count).tolist())
            batch[1].extend(range(at[slot], at[slot] + count))
            batch[2].extend([slot] * count)
            at[slot] += count
            batch[3].extend([len(batch[0]) - 1] if count else [])
        made.append(batch)
    return made


LONGEST = (703, 376)
LONG = [(500, 0), (0, 300), (1, 1), (1, 1), (200, 1), (1, 0), (-150, 1), (1, 0), (70, 70), (0, 1), (1, 1)]


@pytest.fixture(scope="module")
def expected(artifact: Path) -> list[np.ndarray]:
    with opened(artifact) as session:
        return [session.step(*step) for step in steps(0, LONG)]


def assert_same(session: Session, wanted: Sequence[np.ndarray], made: Steps) -> None:
    for step, logits in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(session.step(*step), logits)


def streamer(session: Session) -> KVStreamer:
    assert session.kv_stream is not None
    return session.kv_stream


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_same_bits_within_the_limit(artifact: Path, expected: list[np.ndarray], layers: int) -> None:
    with opened(artifact) as plain:
        limit = room(plain, layers, *LONGEST)
    with opened(artifact, limit) as session:
        for step, logits in zip(steps(0, LONG), expected, strict=True):
            np.testing.assert_array_equal(session.step(*step), logits)
            assert session.memory().kv_committed <= limit
        report = streamer(session).report()
        assert (report.calls > 0) == (layers < KV_LAYERS) and (report.read_bytes > 0) == (layers < KV_LAYERS)
        assert ("read a step" in str(report)) == (layers < KV_LAYERS)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_steps_and_faults_give_the_same_bits(artifact: Path, data: st.DataObject) -> None:
    counts = st.one_of(st.just(0), st.just(1), st.integers(1, 200), st.integers(-200, -1))
    lengths = [(n, m) for n, m in data.draw(st.lists(st.tuples(counts, counts), min_size=3, max_size=8)) if n or m]
    made = steps(1, [(300, 0), *lengths])
    faults: list[Any] = [None, None, None, "short", errno.EIO, errno.EINTR]
    read, written = (IllDisk(data.draw(st.lists(st.sampled_from(faults), max_size=6))) for _ in range(2))
    with opened(artifact) as plain:
        wanted = [plain.step(*step) for step in made]
        length = int(max(plain.filled(0), plain.filled(1), 300) + 200)
        least, most = (room(plain, layers, length, length) for layers in (1, KV_LAYERS))
        limit = data.draw(st.integers(least, most))
    with opened(artifact, limit, preadv=read.of(os.preadv), pwritev=written.of(os.pwritev)) as session:
        for step, logits in zip(made, wanted, strict=True):
            np.testing.assert_array_equal(session.step(*step), logits)
            assert session.memory().kv_committed <= limit


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("runtime.weight_reader._PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr("runtime.kv_file._PAUSES_S", (0.0, 0.0, 0.0))
    yield


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fault", ["read", "full", "interrupt"])
def test_a_step_that_failed_can_be_tried_again(artifact: Path, expected: list[np.ndarray], fault: str) -> None:
    """At every step the disk fails once for good; the same step is then right, and so is all that follows."""
    disk = IllDisk([])

    def interrupted(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        if disk.faults and disk.faults.pop() is not None:
            raise KeyboardInterrupt
        return os.pwritev(descriptor, buffers, at)

    calls: dict[str, Any] = {"read": {"preadv": disk.of(os.preadv)}, "full": {"pwritev": disk.of(os.pwritev)}}
    calls["interrupt"] = {"pwritev": interrupted}
    with opened(artifact) as plain:
        limit = room(plain, 1, *LONGEST)
    failed = 0
    with opened(artifact, limit, **calls[fault]) as session:
        for number, (step, logits) in enumerate(zip(steps(0, LONG), expected, strict=True)):
            disk.faults = [errno.ENOSPC if fault == "full" else errno.EIO] * (32 if number else 0)
            try:
                got = session.step(*step)
            except (RuntimeDiagnostic, KeyboardInterrupt) as why:
                assert isinstance(why, KeyboardInterrupt) or "KV cache cannot be" in why.message
                failed += 1
                disk.faults = []
                got = session.step(*step)
            np.testing.assert_array_equal(got, logits)
    assert failed >= 1


def test_an_interrupt_at_any_moment_loses_nothing(artifact: Path, expected: list[np.ndarray]) -> None:
    """Ctrl-C anywhere in the runtime's code: the step is made again, right and within the limit."""
    moments = np.random.default_rng(0).integers(1, 3000, len(LONG))
    with opened(artifact) as plain:
        limit = room(plain, 2, *LONGEST)
    with opened(artifact, limit) as session:
        count = 0
        for step, moment, logits in zip(steps(0, LONG), moments.tolist(), expected, strict=True):
            count += interrupted(moment, lambda step=step: session.step(*step))
            np.testing.assert_array_equal(session.step(*step), logits)
            assert session.memory().kv_committed <= limit
        assert count > 3


def test_what_does_not_fit_or_go_together_is_refused(artifact: Path) -> None:
    with opened(artifact, 1000) as session, pytest.raises(RuntimeDiagnostic, match="one layer of the KV cache takes"):
        session.step([1] * 500, range(500), [0] * 500, [])
    with pytest.raises(RuntimeDiagnostic, match="not both"):
        Session(artifact, kv_stream=KVStreamOptions(1 << 20), kv_spill=SpillOptions())


@pytest.mark.parametrize("layers", [2, KV_LAYERS])
def test_a_prompt_cache_beside_it(artifact: Path, tmp_path: Path, layers: int) -> None:
    """What of a prompt lies in memory together comes from a file and goes there; the rest is computed."""
    ids = np.random.default_rng(9).integers(0, VOCAB, 640).tolist()
    file = tmp_path / "prompt.kv"

    def text(session: Session, prompt: list[int]) -> tuple[list[int], int, RuntimeDiagnostic | None]:
        cached = CachedGeneration(PromptCache(file, session), prompt, GenerationParams(6))
        tokens = [event.token for event in cached.events()]
        assert cached.reused is not None
        return tokens, cached.reused.positions, cached.fault

    with opened(artifact) as plain:
        wanted = [list_of(plain, prompt) for prompt in (ids, [*ids, 7, 8])]
        limit = room(plain, layers, 704)
    with opened(artifact, limit) as session:
        tokens, reused, fault = text(session, ids)
        assert (tokens, reused) == (wanted[0], 0)
        assert (fault is None) == file.exists() == (layers == KV_LAYERS)
        assert fault is None or "some of them are on disk" in fault.message
    with opened(artifact) as plain:
        assert text(plain, ids)[0] == wanted[0] and file.exists()
    with opened(artifact, limit) as session:
        tokens, reused, _ = text(session, [*ids, 7, 8])
        assert tokens == wanted[1] and reused <= streamer(session).whole_positions(0)
        assert reused == len(ids) if layers == KV_LAYERS else reused < len(ids)
    damaged = bytearray(file.read_bytes())
    damaged[-5000] ^= 255
    file.write_bytes(damaged)
    with opened(artifact, limit) as session:
        assert text(session, [*ids, 7, 8])[0] == wanted[1]


def list_of(session: Session, prompt: list[int]) -> list[int]:
    return [event.token for event in generate(session, prompt, GenerationParams(6))]


def test_a_sequence_that_begins_anew_reads_nothing_old(artifact: Path) -> None:
    made = steps(2, [(400, 0), (1, 0)])
    with opened(artifact) as plain:
        wanted = [plain.step(*step) for step in made]
        limit = room(plain, 1, 401)
    with opened(artifact, limit) as session:
        for _ in range(2):
            assert_same(session, wanted, made)
        session.release(0)
        assert_same(session, wanted, made)


def test_an_artifact_without_waits_is_refused(artifact_path: Path) -> None:
    with pytest.raises(RuntimeDiagnostic, match="do not wait for their KV cache"):
        Session(artifact_path, kv_stream=KVStreamOptions(1 << 20))


def test_a_context_that_does_not_fit_a_budget_is_planned_and_run(
    kv_build: Callable[[str], Path], tmp_path: Path
) -> None:
    path, context = kv_build("bf16"), 4096
    with pytest.raises(DoesNotFit) as told:
        plan_for(path, 1 << 20, context, kv_on_disk=False)
    budget = told.value.minimum - (12 << 20)
    with pytest.raises(DoesNotFit):
        plan_for(path, budget, context, kv_on_disk=False)
    ids = np.random.default_rng(3).integers(0, VOCAB, 3100)
    inputs = ids, range(len(ids)), [0] * len(ids), [len(ids) - 1]
    with Session(path, threads=1) as plain:
        wanted = plain.step(*inputs)
        whole = plain.memory().kv_committed
    with stratum.load(path, memory=budget, max_context=context, threads=1) as model:
        session = model.session
        assert isinstance(session, Session)
        limit = streamer(session).options.limit_bytes
        assert whole > limit > whole / 2
        np.testing.assert_array_equal(session.step(*inputs), wanted)
        assert session.memory().kv_committed <= limit
        assert streamer(session).report().read_bytes > 0
    with open_on_cpu(
        path, 1, context, Limits(str(budget), kv_dir=tmp_path)
    ) as session:  # what `bench --memory` measures
        np.testing.assert_array_equal(session.step(*inputs), wanted)
        assert streamer(session).options.directory == str(tmp_path) and streamer(session).report().read_bytes > 0


def test_a_trace_shows_what_was_read(artifact: Path, tmp_path: Path) -> None:
    with opened(artifact) as plain:
        limit = room(plain, 3, 703)
    with opened(artifact, limit) as session:
        for step in steps(0, [(500, 0), (200, 0)]):
            session.step(*step)
        with session.profile() as profile:
            session.step([1, 2], [700, 701], [0, 0], [1])
        assert 0 < sum(nbytes for _, _, _, nbytes in profile.reads) <= streamer(session).report().read_bytes
        assert all(name.startswith("kv of layer ") for name, *_ in (*profile.reads, *profile.stalls)) and profile.stalls
        profile.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["cat"] for event in events if event.get("name", "").startswith("kv of")} == {"read", "wait"}


def test_what_weights_leave_is_the_caches(kv_build: Callable[[str], Path]) -> None:
    """More budget never gives the cache less, and the parts stay within it."""
    manifest = open_artifact(kv_build("bf16")).manifest
    limits = []
    for budget in range(100 << 20, 140 << 20, 4 << 20):
        try:
            made = plan_memory(manifest, budget, baseline=60 << 20, context=4096)
        except DoesNotFit:
            assert not limits
            continue
        if made.kv_bytes is not None:
            assert made.stream.other_bytes >= made.kv_bytes + (60 << 20)
            kept = sum(manifest.weights.pieces[n].bytes for n in made.stream.resident)
            assert kept + made.stream.window_bytes + made.stream.other_bytes <= budget
            limits.append(made.kv_bytes)
    assert limits and limits == sorted(limits)


def test_the_least_memory_that_is_named_is_enough(kv_build: Callable[[str], Path]) -> None:
    """One layer of the cache beside the weights in use, where three quarters of it may lie on the drive."""
    path, context, baseline = kv_build("bf16"), 4096, 60 << 20
    manifest = open_artifact(path).manifest

    def least(*, kv_on_disk: bool) -> int:
        with pytest.raises(DoesNotFit) as told:
            plan_memory(manifest, 1 << 20, baseline=baseline, context=context, kv_on_disk=kv_on_disk)
        return told.value.minimum

    budget = least(kv_on_disk=True)
    made = plan_memory(manifest, budget, baseline=baseline, context=context)
    assert made.kv_bytes is not None
    with pytest.raises(DoesNotFit):
        plan_memory(manifest, budget - (2 << 20), baseline=baseline, context=context)
    ids = np.random.default_rng(3).integers(0, VOCAB, 1200)
    inputs = ids, range(len(ids)), [0] * len(ids), [len(ids) - 1]
    with Session(path, threads=1, max_context=context) as plain:
        wanted, layer = plain.step(*inputs), plain.kv.layer_bytes(context)
    assert budget <= least(kv_on_disk=False) - 3 * layer + (2 << 20)
    options = KVStreamOptions(made.kv_bytes)
    with Session(path, threads=1, max_context=context, stream=made.stream, kv_stream=options) as session:
        np.testing.assert_array_equal(session.step(*inputs), wanted)
        assert session.memory().kv_committed <= made.kv_bytes and streamer(session).report().read_bytes > 0
