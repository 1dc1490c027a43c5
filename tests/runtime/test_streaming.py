"""Running with part of the weights on disk: the same bits under every plan and fault of the disk, bounded memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import codegen.weight_pieces
import stratum
from runtime import Session, weight_reader
from runtime.errors import RuntimeDiagnostic
from runtime.eviction import POLICIES
from runtime.manifest import manifest_digest, parse_manifest
from runtime.stream_plan import StreamPlan, least_expert_bytes, live_bytes
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, VOCAB, write_model

pytestmark = pytest.mark.slow
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


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Builds whose dense pieces are single tensors, so that there is something to stream."""
    folder = tmp_path_factory.mktemp("streaming")
    made = {}
    with patch.object(codegen.weight_pieces, "DENSE_BYTES", 1), patch.dict(os.environ, STRATUM_CACHE=str(folder)):
        for name, family in FAMILIES.items():
            model = write_model(folder / name, family)
            recipe = folder / "mixed.toml"
            recipe.write_text(MIXED)
            chosen = str(recipe) if name == "mixed" else None
            made[name] = stratum.build(model, folder / f"{name}.stratum", dtype="f32", recipe=chosen)
    return made


def least_plan(path: Path, **changes: object) -> StreamPlan:
    """Nothing stays: the smallest window and the experts of one token."""
    from runtime import open_artifact

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


@pytest.fixture(scope="module")
def expected(artifacts: dict[str, Path]) -> dict[tuple[str, int], list[np.ndarray]]:
    """Logits with all weights in memory."""
    made = {}
    for name, path in artifacts.items():
        for seed in range(4):
            with opened(path, None) as session:
                made[name, seed] = logits(session, batches(seed))
    return made


def assert_same(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 3))
def test_the_same_bits_under_every_plan(
    artifacts: dict[str, Path], expected: dict, data: st.DataObject, name: str, seed: int
) -> None:
    path = artifacts[name]
    from runtime import open_artifact

    pieces = open_artifact(path).manifest.weights.pieces
    others = [n for n, piece in enumerate(pieces) if piece.kind != "experts"]
    scope = data.draw(st.sampled_from(("global", "layer")))
    least = least_plan(path, resident=tuple(data.draw(st.lists(st.sampled_from(others), unique=True))), scope=scope)
    total = sum(piece.bytes for piece in pieces)
    plan = least_plan(
        path,
        resident=least.resident,
        scope=scope,
        window_bytes=least.window_bytes + data.draw(st.integers(0, total)),
        expert_bytes=least.expert_bytes + data.draw(st.integers(0, total)),
        rows_bytes=data.draw(st.sampled_from((4096, 1 << 20))),
        policy=data.draw(st.sampled_from(POLICIES)),
        step_tokens=data.draw(st.sampled_from((1, 7, 512))),
        threads=data.draw(st.integers(1, 3)),
        request_bytes=data.draw(st.sampled_from((4096, 1 << 20))),
        guesses=data.draw(st.sampled_from((0, 2, 16))),
        short_tokens=data.draw(st.sampled_from((0, 1, 16))),
        short_bytes=data.draw(st.integers(0, total)),
    )
    with opened(path, plan, threads=1 + seed % 2) as session:
        assert_same(logits(session, batches(seed)), expected[name, seed])
        assert session.streamer is not None
        kept = sum(pieces[n].bytes for n in plan.resident)
        most = kept + plan.window_bytes + plan.expert_bytes + plan.short_bytes + plan.rows_bytes + 64 * 4096
        assert session.streamer.memory_bytes() <= most
        assert session.streamer.most_window_bytes <= plan.window_bytes


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_plan_with_all_in_memory_reads_once(artifacts: dict[str, Path], name: str) -> None:
    from runtime import open_artifact

    pieces = open_artifact(artifacts[name]).manifest.weights.pieces
    resident = tuple(n for n, piece in enumerate(pieces) if piece.kind != "experts")
    experts = sum(piece.bytes for piece in pieces if piece.kind == "experts")
    with opened(artifacts[name], least_plan(artifacts[name], resident=resident, expert_bytes=experts)) as session:
        assert session.streamer is not None
        logits(session, batches(0))
        before = session.streamer.report()
        assert before.read_bytes <= sum(piece.bytes for piece in pieces)
        session.release(0)
        session.release(1)
        logits(session, batches(0))
        since = session.streamer.report().since(before)
        assert since.read_bytes == 0 and since.hit_rate in (0.0, 1.0)


def test_guesses_are_read_before_their_layer_and_change_nothing(artifacts: dict[str, Path], expected: dict) -> None:
    path = artifacts["qwen3_moe"]
    from runtime import open_artifact

    manifest = open_artifact(path).manifest
    pieces = manifest.weights.pieces
    dense = tuple(n for n, piece in enumerate(pieces) if piece.kind == "dense")
    some = 2 * least_expert_bytes(manifest)
    with opened(path, least_plan(path, resident=dense, expert_bytes=some, guesses=2)) as session:
        assert session.streamer is not None
        assert_same(logits(session, batches(1)), expected["qwen3_moe", 1])
        for token in range(8):
            session.step([token], [session.filled(0)], [0], [0])
        report = session.streamer.report()
        assert 0 < report.guesses_right <= report.guesses_read
        assert "of guesses were right" in str(report)
        assert session.streamer.memory_bytes() <= sum(pieces[n].bytes for n in dense) + some + (1 << 20)


def test_experts_take_what_short_steps_leave_of_the_activations(artifacts: dict[str, Path], expected: dict) -> None:
    path = artifacts["qwen3_moe"]
    from runtime import open_artifact

    manifest = open_artifact(path).manifest
    least = least_expert_bytes(manifest)
    with opened(path, least_plan(path, short_tokens=16, short_bytes=2 * least)) as session:
        streamer = session.streamer
        assert streamer is not None and streamer.cache is not None
        sizes = []
        for step, want in zip(batches(1), expected["qwen3_moe", 1], strict=True):
            np.testing.assert_array_equal(session.step(*step), want)
            sizes.append((len(step[0]) <= 16, streamer.cache.capacity_bytes, streamer.cache.used_bytes))
        assert {short for short, _, _ in sizes} == {True, False}
        for short, capacity, used in sizes:
            assert capacity == (3 if short else 1) * least
            assert used <= max(capacity, max(p.bytes for p in manifest.weights.pieces if p.kind == "experts"))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 3), kept=st.integers(0, 1 << 20), scope=st.sampled_from(("global", "layer")))
def test_experts_take_what_the_kv_cache_leaves(
    artifacts: dict[str, Path], expected: dict, seed: int, kept: int, scope: str
) -> None:
    """Never more than what is kept for it less what it takes, and all of that once a sequence is gone."""
    path = artifacts["qwen3_moe"]
    plan = least_plan(path, kv_bytes=kept, scope=scope)
    with opened(path, plan) as session:
        streamer = session.streamer
        assert streamer is not None and streamer.cache is not None
        sizes = []
        for step, want in zip(batches(seed), expected["qwen3_moe", seed], strict=True):
            np.testing.assert_array_equal(session.step(*step), want)
            lent = streamer.cache.capacity_bytes - plan.expert_bytes
            assert -2 < lent <= max(0, kept - session.memory().kv_committed)
            sizes.append(lent)
        assert sizes == sorted(sizes, reverse=True)  # sequences only grow
        for slot in (0, 1):
            session.release(slot)
        session.step([1], [0], [0], [0])
        assert streamer.cache.capacity_bytes - plan.expert_bytes >= sizes[0]


# -- faults of the disk


class Disk:
    """os.preadv with faults planted: `plan(number of the call)` gives an errno, a number of bytes, or None.

    Errors strike the first read at each place only when they are `once`, so that trying again helps.
    """

    def __init__(self, plan: Callable[[int], int | tuple[str, int] | None], *, once: bool = False) -> None:
        self.plan, self.calls, self.once = plan, 0, once
        self._struck: dict[int, None] = {}
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            number = self.calls
            self.calls += 1
        fault = self.plan(number)
        if isinstance(fault, int) and not (self.once and offset in self._struck):
            self._struck[offset] = None
            raise OSError(fault, os.strerror(fault))
        if isinstance(fault, tuple):
            kind, size = fault
            if kind == "end":
                return 0
            return os.preadv(descriptor, [buffers[0][:size]], offset)
        return os.preadv(descriptor, buffers, offset)


@pytest.mark.parametrize(
    "plan",
    [
        lambda n: errno.EIO if n % 3 == 1 else None,
        lambda n: errno.EINTR if n % 2 else None,
        lambda n: ("short", 4096) if n % 2 else None,
        lambda n: errno.EINVAL if n == 2 else None,  # the file system refuses O_DIRECT
        lambda n: ("short", 100) if n == 3 else None,
    ],
    ids=["eio", "interrupted", "short", "no-direct", "short-inside-a-page"],
)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_faults_that_pass_change_nothing(
    artifacts: dict[str, Path], expected: dict, name: str, plan: Callable[[int], object]
) -> None:
    disk = Disk(plan, once=True)  # type: ignore[arg-type]
    with (
        patch("runtime.weight_reader._PAUSES_S", (0, 0, 0)),
        opened(artifacts[name], least_plan(artifacts[name]), preadv=disk) as session,
    ):
        assert_same(logits(session, batches(1)), expected[name, 1])
    assert disk.calls > 10


def test_weights_in_a_memory_file_system(artifacts: dict[str, Path], expected: dict) -> None:
    """Older kernels refuse O_DIRECT there, newer ones take it: the same bits either way."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK) or not hasattr(os, "O_DIRECT"):
        pytest.skip("there is no /dev/shm to write to")
    path = artifacts["llama"]
    with tempfile.TemporaryDirectory(prefix="stratum-test-", dir=shared) as folder:
        there = shutil.copytree(path, Path(folder) / "model")
        try:
            os.close(os.open(there / "weights" / "weights.bin", os.O_RDONLY | os.O_DIRECT))
            takes = True
        except OSError:
            takes = False
        descriptor = os.open(there / "weights" / "weights.bin", os.O_RDONLY)
        try:
            assert weight_reader._direct(descriptor) == (descriptor, takes)
        finally:
            os.close(descriptor)
        with opened(there, least_plan(there)) as session:
            assert_same(logits(session, batches(1)), expected["llama", 1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [(errno.EIO, "cannot be read at byte"), (errno.ENXIO, "cannot be read"), (("end", 0), "the weights end at byte")],
)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_faults_that_stay_end_the_step_and_no_more(
    artifacts: dict[str, Path], expected: dict, name: str, fault: object, message: str
) -> None:
    """One diagnostic that names the file; when the disk is well again the session goes on, with the same bits."""
    ill = threading.Event()
    disk = Disk(lambda n: fault if ill.is_set() else None)  # type: ignore[arg-type,return-value]
    steps = batches(2)
    with (
        patch("runtime.weight_reader._PAUSES_S", (0, 0, 0)),
        opened(artifacts[name], least_plan(artifacts[name]), preadv=disk) as session,
    ):
        assert_same(logits(session, steps[:2]), expected[name, 2][:2])
        ill.set()
        for _ in range(2):
            with pytest.raises(RuntimeDiagnostic, match=message) as caught:
                session.step(*steps[2])
            assert "weights.bin" in caught.value.where and caught.value.hint
        ill.clear()
        assert_same(logits(session, steps[2:]), expected[name, 2][2:])


def test_a_file_cut_while_it_is_read(artifacts: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "cut.stratum"
    shutil.copytree(artifacts["llama"], path)
    with opened(path, least_plan(path)) as session:
        session.step([1], [0], [0], [0])
        os.truncate(path / "weights" / "weights.bin", 4096)
        with pytest.raises(RuntimeDiagnostic, match="the weights end at byte"):
            for at in range(1, 4):
                session.step([1], [at], [0], [0])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_an_interrupt_while_waiting(artifacts: dict[str, Path], expected: dict, name: str) -> None:
    """Ctrl-C in the middle of a step, at every read of it: the step ends, the next one is right."""
    steps = batches(3)
    at = -1

    def plan(number: int) -> None:
        if number == at:
            signal.raise_signal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else os.kill(
                os.getpid(), signal.SIGINT
            )

    disk = Disk(plan)  # type: ignore[arg-type]
    with opened(artifacts[name], least_plan(artifacts[name]), preadv=disk) as session:
        session.step(*steps[0])
        interrupted = 0
        for offset in (0, 1, 2, 5, 9):
            at = disk.calls + offset
            try:
                session.step(*steps[1])
            except KeyboardInterrupt:
                interrupted += 1
        at = -1
        assert interrupted
        assert_same(logits(session, steps[1:]), expected[name, 3][1:])


def test_a_disk_slower_than_planned_is_told_of_once(artifacts: dict[str, Path], expected: dict) -> None:
    """And fewer guesses are read; the tokens are the same."""
    path = artifacts["qwen3_moe"]
    told: list[str] = []
    plan = least_plan(path, guesses=2, disk_bytes_per_s=10**12)
    with patch("runtime.disk_watch.LEAST_BYTES", 4096), patch("runtime.disk_watch.LEAST_S", 0):
        with opened(path, plan) as session:
            assert session.streamer is not None
            session.streamer.tell = told.append
            assert_same(logits(session, batches(1)), expected["qwen3_moe", 1])
            assert len(told) == 1 and "the plan counts on 1000.00" in told[0]
            assert session.streamer._books.most_guesses == 1
        with opened(path, plan) as session, pytest.warns(RuntimeWarning, match="the disk gives"):
            logits(session, batches(1))


def test_a_file_that_vanishes_is_still_open(artifacts: dict[str, Path], expected: dict, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "gone.stratum"
    shutil.copytree(artifacts["qwen3_moe"], path)
    with opened(path, least_plan(path)) as session:
        steps = batches(1)
        got = logits(session, steps[:1])
        shutil.rmtree(path)
        assert_same([*got, *logits(session, steps[1:])], expected["qwen3_moe", 1])


def test_nothing_is_left_behind(artifacts: dict[str, Path]) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(2):
        with opened(artifacts["qwen3_moe"], least_plan(artifacts["qwen3_moe"])) as session:
            session.step([1, 2], [0, 1], [0, 0], [1])
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


# -- plans


@pytest.fixture
def plans(artifacts: dict[str, Path]) -> Iterator[StreamPlan]:
    yield least_plan(artifacts["qwen3_moe"])


def test_plans_are_json(plans: StreamPlan) -> None:
    assert StreamPlan.from_json(plans.to_json()) == plans


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable stream plan"),
        ("[]", "not a stream plan"),
        ('{"schema": "stratum.stream/1"}', "no 'budget_bytes' or 'resident'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "x": 1}', "unknown field 'x'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [true]}', "'resident'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": -1, "resident": []}', "'budget_bytes'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "threads": 65}', "'threads'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "policy": "fifo"}', "'policy'"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(RuntimeDiagnostic, match=message):
        StreamPlan.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_bytes": 0}, "a window of 0 bytes"),
        ({"expert_bytes": 4096}, "4096 bytes for experts"),
        ({"resident": (99,)}, "resident pieces that do not exist"),
        ({"resident": (2,)}, "which holds experts"),
    ],
)
def test_plans_that_cannot_run_are_refused(
    artifacts: dict[str, Path], changes: dict[str, object], message: str
) -> None:
    from runtime import open_artifact

    path = artifacts["qwen3_moe"]
    experts = [n for n, p in enumerate(open_artifact(path).manifest.weights.pieces) if p.kind == "experts"]
    if changes.get("resident") == (2,):
        changes = {"resident": (experts[0],)}
    plan = least_plan(path) if "resident" not in changes else least_plan(path, resident=(0,))
    with pytest.raises(RuntimeDiagnostic, match=message):
        opened(path, StreamPlan(**vars(plan) | changes)).close()  # type: ignore[arg-type]


# -- routers


def test_builds_say_where_routers_are(artifacts: dict[str, Path]) -> None:
    """Every layer with experts, of both programs; the matrix is the one of the layer's gate."""
    raw = json.loads((artifacts["qwen3_moe"] / "manifest.json").read_text())
    tensors = {t["offset"]: t["name"] for t in raw["weights"]["tensors"]}
    for program in raw["programs"].values():
        routers = [wait["router"] for wait in program["awaits"] if "router" in wait]
        assert len(routers) == QWEN3_MOE["num_hidden_layers"]
        assert [tensors[r["weights"]].split(".")[-1] for r in routers] == ["gate"] * len(routers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 1 << 40}, r"router\.hidden"),
        ({"hidden": 2}, r"router\.hidden"),
        ({"weights": 1 << 40}, r"router\.weights"),
        ({"weights": 1}, r"router\.weights"),
        ({"experts": 5}, r"router\.experts"),
        ({"columns": 1 << 20}, r"router\.hidden"),
        ({"strip": 1 << 15}, r"router\.weights"),
        ({"strip": 0}, "strip"),
        ({"columns": "x"}, "columns"),
    ],
)
def test_routers_outside_of_the_artifact_are_refused(artifacts: dict[str, Path], change: dict, message: str) -> None:
    raw = json.loads((artifacts["qwen3_moe"] / "manifest.json").read_text())
    wait = next(w for w in raw["programs"]["decode"]["awaits"] if "router" in w)
    wait["router"] |= change
    raw["manifest_sha256"] = manifest_digest(raw)
    with pytest.raises(RuntimeDiagnostic, match=message):
        parse_manifest(json.dumps(raw).encode(), "here")
