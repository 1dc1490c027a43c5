"""Sessions on an emulated GPU: logits of ragged batches in any order of work, cache, graphs, faults, Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cuda.device import CudaDevice
from runtime.cuda.driver import DeviceFault, OutOfDeviceMemory
from runtime.cuda.session import CudaSession, device_bytes
from runtime.cuda.weights import ResidentWeights
from runtime.errors import RuntimeDiagnostic
from runtime.generation import GenerationParams, GenerationRequest, generate, generate_batch
from runtime.session import Session
from tests.runtime.cuda.emulated_driver import EmulatedDriver, Status
from tests.runtime.cuda.toy_model import CELL_BYTES, GRANULE, emulated_driver, open_checked, open_toy, write_toy
from tests.runtime.fake_artifact import MAX_CONTEXT, VOCAB, greedy_tokens, sequence_logits

ORDERS = ("eager", "lazy", "shuffled")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.mark.parametrize("order", ORDERS)
def test_a_text_is_the_one_it_must_be(toy: Path, order: str) -> None:
    driver = emulated_driver(order=order, seed=5)
    prompt = [7, 3, 44, 9, 1] * 9  # longer than a step of prefill takes
    with open_toy(toy, driver) as session:
        tokens = [event.token for event in generate(session, prompt, GenerationParams(max_tokens=12))]
        assert tokens == greedy_tokens(prompt, 12)
        assert session.filled(0) == len(prompt) + 11
        assert session.executor.replayed == 11 and session.executor.launched == 3
    assert driver.leaks() == []


@pytest.mark.parametrize("order", ORDERS)
def test_several_sequences_come_and_go(toy: Path, order: str) -> None:
    driver = emulated_driver(order=order, seed=2)
    prompts = [[5, 6, 7], [1] * 20, [2, 4], [9, 8, 7, 6, 5, 4], [3]]
    requests = [GenerationRequest(p, GenerationParams(max_tokens=4 + i)) for i, p in enumerate(prompts)]
    made: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    with open_toy(toy, driver, num_slots=3) as session:
        for event in generate_batch(session, requests):
            made[event.sequence].append(event.token)
    assert made == {i: greedy_tokens(p, 4 + i) for i, p in enumerate(prompts)}
    assert driver.leaks() == []


class Ragged:
    """Random steps of several sequences, and what each must give."""

    def __init__(self, draw: Callable[[Any], Any], slots: int) -> None:
        self.draw, self.sequences = draw, [[] for _ in range(slots)]

    def step(self) -> tuple[list[int], list[int], list[int], list[int], np.ndarray]:
        ids, positions, slots, expected = [], [], [], []
        for slot, sequence in enumerate(self.sequences):
            back = self.draw(st.integers(0, len(sequence)))
            if self.draw(st.booleans()):
                del sequence[len(sequence) - back :]
            for token in self.draw(st.lists(st.integers(0, VOCAB - 1), max_size=9)):
                positions.append(len(sequence))
                sequence.append(token)
                ids.append(token)
                slots.append(slot)
                expected.append(sequence_logits(sequence))
        rows = self.draw(st.lists(st.integers(0, len(ids) - 1), unique=True)) if ids else []
        return ids, positions, slots, rows, np.array([expected[r] for r in rows]).reshape(len(rows), VOCAB)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_ragged_batches(toy: Path, data: st.DataObject) -> None:
    order = data.draw(st.sampled_from(ORDERS))
    driver = emulated_driver(order=order, seed=data.draw(st.integers(0, 9)))
    ragged = Ragged(data.draw, 3)
    with open_toy(toy, driver, num_slots=3) as session:
        for _ in range(3):
            ids, positions, slots, rows, expected = ragged.step()
            np.testing.assert_array_equal(session.step(ids, positions, slots, rows), expected)
    assert driver.leaks() == []


def test_replayed_steps_give_the_bits_of_launched_ones(toy: Path) -> None:
    """The same steps, as graphs and (profiled) launch by launch; sizes come back, so graphs are used again."""
    steps = [([3], [0]), ([4], [1]), ([5, 6], [0, 1]), ([7], [1]), ([8], [0]), ([9, 10], [1, 2])]

    def run(session: CudaSession) -> list[np.ndarray]:
        found, at = [], [0, 0, 0]
        for ids, slots in steps:
            positions = [at[slot] for slot in slots]
            found.append(session.step(ids, positions, slots, range(len(ids))))
            for slot in slots:
                at[slot] += 1
        return found

    driver = emulated_driver()
    with open_toy(toy, driver, num_slots=3) as session:
        replayed = run(session)
        assert driver.calls["cuGraphInstantiate"] == 2 and driver.calls["cuGraphLaunch"] == 6
        for slot in range(3):
            session.release(slot)
        with session.profile() as profile:
            launched = run(session)
        assert driver.calls["cuGraphLaunch"] == 6
    for a, b in zip(replayed, launched, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(profile.steps) == 6
    assert driver.leaks() == []


def test_a_step_that_wants_other_rows_is_captured_anew(toy: Path) -> None:
    with open_toy(toy, emulated_driver(), num_slots=2) as session:
        for first, rows in ((0, [1]), (2, [0, 1]), (4, [0])):
            ids = [first + 1, first + 2]
            expected = [sequence_logits(range(1, first + 2 + row)) for row in rows]
            np.testing.assert_array_equal(session.step(ids, [first, first + 1], [0, 0], rows), expected)


def test_more_logits_than_there_is_room_for(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.cuda.step_memory.MOST_LOGIT_BYTES", 0)
    monkeypatch.setattr("runtime.cuda.step_memory.LEAST_ROWS", 3)
    ids = [int(i) for i in np.arange(30) * 7 % VOCAB]
    with open_toy(toy, emulated_driver()) as session:
        logits = session.step(ids, range(30), [0] * 30, range(29, -1, -1))
    for row, made in zip(range(29, -1, -1), logits, strict=True):
        np.testing.assert_array_equal(made, sequence_logits(ids[: row + 1]))


def test_the_cache_grows_and_shrinks(toy: Path) -> None:
    """A granule holds 128 positions of a layer; two slots have two each."""
    driver = emulated_driver()
    with open_toy(toy, driver, num_slots=2) as session:
        assert session.memory().kv_committed == 0
        session.step([1] * 100, range(100), [0] * 100, [])
        assert session.memory().kv_committed == 2 * GRANULE
        session.step([1] * 90, range(100, 190), [0] * 90, [])
        assert session.memory().kv_committed == 4 * GRANULE
        session.step([2], [0], [1], [0])
        assert session.memory().kv_committed == 6 * GRANULE
        assert session.release(0) == 4 * GRANULE and session.memory().kv_committed == 2 * GRANULE
        assert session.filled(0) == 0 and session.filled(1) == 1
        np.testing.assert_array_equal(session.step([9], [1], [1], [0])[0], sequence_logits([2, 9]))
        assert f"KV cache {2 * GRANULE / 2**20:.1f} MiB of" in str(session.memory())
    assert driver.leaks() == []


def test_slots_that_share_a_granule_keep_it(toy: Path) -> None:
    """With a granule larger than a slot, releasing one leaves the other's positions."""
    driver = emulated_driver(granule=1 << 20)
    with open_toy(toy, driver, num_slots=3) as session:
        for slot in range(3):
            session.step([slot + 1], [0], [slot], [])
        assert session.release(1) == 0
        np.testing.assert_array_equal(session.step([5], [1], [2], [0])[0], sequence_logits([3, 5]))
    assert driver.leaks() == []


@pytest.mark.parametrize("order", ["lazy", "shuffled"])
def test_a_full_gpu_refuses_a_step_and_goes_on(toy: Path, order: str) -> None:
    """Room for one granule a layer: what does not fit changes nothing, and after a release there is room."""
    with open_toy(toy, emulated_driver(), num_slots=2) as session:
        least = session.memory().weights + session.memory().arena
    driver = emulated_driver(order=order)
    with open_toy(toy, driver, least + 3 * GRANULE, num_slots=2) as session:
        session.step([1], [0], [0], [])
        with pytest.raises(OutOfDeviceMemory, match=r"no room for the KV cache[\s\S]*allow more memory"):
            session.step([2], [0], [1], [])
        assert session.memory().kv_committed == 2 * GRANULE and session.filled(1) == 0
        np.testing.assert_array_equal(session.step([3], [1], [0], [0])[0], sequence_logits([1, 3]))
        session.release(0)
        np.testing.assert_array_equal(session.step([2], [0], [1], [0])[0], sequence_logits([2]))
    assert driver.leaks() == []


def test_a_model_that_does_not_fit_is_refused_before_it_is_copied(toy: Path) -> None:
    driver = emulated_driver()
    with pytest.raises(OutOfDeviceMemory, match=r"the model does not fit[\s\S]*--device cpu"):
        open_toy(toy, driver, 8000)
    assert driver.leaks() == [] and driver.calls["cuMemcpyHtoDAsync"] == 0


@pytest.mark.parametrize(
    "failing",
    ["cuStreamCreate", "cuMemAlloc", "cuMemHostAlloc", "cuEventCreate", "cuModuleLoadDataEx", "cuModuleGetFunction",
     "cuFuncSetAttribute", "cuMemAddressReserve", "cuMemcpyHtoDAsync", "cuMemGetAllocationGranularity"],
)  # fmt: skip
def test_nothing_is_left_when_opening_fails(toy: Path, failing: str) -> None:
    """Whichever call of the function fails."""
    skip = 0
    while True:
        driver = emulated_driver(order="shuffled")
        device = open_checked(driver)
        driver.plant(failing, Status.CUDA_ERROR_OUT_OF_MEMORY, skip=skip)
        try:
            CudaSession(toy, device=device).close()
        except RuntimeDiagnostic:
            assert driver.leaks() == []
            skip += 1
            continue
        break
    assert skip > 0 and driver.leaks() == []


@pytest.mark.parametrize("failing", ["cuLaunchKernel", "cuStreamBeginCapture", "cuStreamEndCapture",
                                     "cuGraphInstantiate", "cuGraphLaunch", "cuMemcpyDtoHAsync"])  # fmt: skip
def test_a_step_that_fails_can_be_made_again(toy: Path, failing: str) -> None:
    driver = emulated_driver()
    with open_toy(toy, driver) as session:
        session.step([1], [0], [0], [])
        driver.plant(failing, Status.CUDA_ERROR_INVALID_VALUE)
        with pytest.raises(DeviceFault, match=failing):
            session.step([2], [1], [0], [0])
        assert session.filled(0) == 1
        np.testing.assert_array_equal(session.step([2], [1], [0], [0])[0], sequence_logits([1, 2]))
    assert driver.leaks() == []


def test_a_failed_step_back_takes_what_it_may_have_written_over(toy: Path) -> None:
    driver = emulated_driver()
    with open_toy(toy, driver) as session:
        session.step([1, 2, 3], range(3), [0] * 3, [])
        driver.plant("cuGraphLaunch", Status.CUDA_ERROR_INVALID_VALUE)
        with pytest.raises(DeviceFault):
            session.step([9], [1], [0], [0])
        assert session.filled(0) == 1
        with pytest.raises(RuntimeDiagnostic, match="starts at position 3"):
            session.step([4], [3], [0], [0])


def test_a_forked_child_has_no_part_in_it(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = emulated_driver()
    with open_toy(toy, driver) as session:
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: -1)
            with pytest.raises(RuntimeDiagnostic, match="GPU context exists only in the parent"):
                session.step([1], [0], [0], [0])
        np.testing.assert_array_equal(session.step([1], [0], [0], [0])[0], sequence_logits([1]))
    assert driver.leaks() == []


def test_a_fault_of_a_kernel_ends_the_session(toy: Path) -> None:
    driver = emulated_driver()
    session = open_toy(toy, driver)
    session.step([1], [0], [0], [])
    driver.plant("kernel", Status.CUDA_ERROR_ILLEGAL_ADDRESS)
    with pytest.raises(DeviceFault, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        session.step([2], [1], [0], [0])
    with pytest.raises(RuntimeDiagnostic, match="stopped after a fault of the GPU"):
        session.step([2], [1], [0], [0])
    session.close()
    with pytest.raises(RuntimeDiagnostic, match="the session is closed"):
        session.step([2], [1], [0], [0])


@pytest.mark.parametrize("when", ["interrupt_at", "interrupt_behind"])
def test_ctrl_c_at_any_call(toy: Path, when: str) -> None:
    """In whichever call of the driver SIGINT comes: it is raised, nothing is left, and a session goes on rightly."""
    prompt, at, interrupted = [4, 5, 6, 7, 8], 1, 0
    while True:
        driver = emulated_driver()
        setattr(driver, when, at)
        session = None
        try:
            session = open_toy(toy, driver)
            list(generate(session, prompt, GenerationParams(max_tokens=2)))
            session.release(0)
            session.close()
            session.close()
        except KeyboardInterrupt:
            interrupted += 1
            if session is not None and session._held.device is not None:
                filled = session.filled(0)
                rest = prompt[filled:]
                if rest:  # the sequence holds what its finished steps wrote
                    logits = session.step(rest, range(filled, 5), [0] * len(rest), [len(rest) - 1])
                    np.testing.assert_array_equal(logits[0], sequence_logits(prompt))
                session.close()
            del session
            assert driver.leaks() == [], at
        else:
            break
        at += 2
    assert interrupted > 40


def test_dropping_a_session_gives_everything_back(toy: Path) -> None:
    driver = emulated_driver()
    session = open_toy(toy, driver)
    session.step([1], [0], [0], [])
    del session
    assert driver.leaks() == []


def test_weights_come_in_pieces_through_pinned_memory(toy: Path) -> None:
    """Chunks of 1000 bytes through four buffers; each buffer is filled again only when its copy is over."""
    told: list[tuple[str, float, float, str]] = []

    def progress(stage: str, done: float, total: float, unit: str = "") -> None:
        told.append((stage, done, total, unit))

    driver = emulated_driver(order="lazy")

    def load(device: CudaDevice, stream: Any, artifact: Any) -> ResidentWeights:
        return ResidentWeights(device, stream, artifact, progress, chunk_bytes=1000)

    with open_toy(toy, driver, weights=load) as session:
        (region,) = (r for r in driver.memory.regions.values() if r.kind == "device" and r.nbytes == 8192)
        assert region.storage.tobytes() == (toy / "weights/weights.bin").read_bytes()
        assert session.step([1], [0], [0], [0]).shape == (1, VOCAB)
    assert [said[1] for said in told] == [*range(1000, 8193, 1000), 8192]
    assert told[0] == ("to the GPU", 1000, 8192, "bytes")
    assert driver.leaks() == []


def test_weights_that_end_too_early(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = emulated_driver()
    monkeypatch.setattr("runtime.cuda.weights.os.preadv", lambda descriptor, buffers, offset: 0)
    with pytest.raises(RuntimeDiagnostic, match="the weights end at byte 0"):
        open_toy(toy, driver)
    assert driver.leaks() == []


def test_artifacts_of_the_other_kind(toy: Path, artifact_path: Path) -> None:
    with pytest.raises(RuntimeDiagnostic, match=r"was built for a GPU \(target h100\)[\s\S]*--device cuda"):
        Session(toy)
    driver = EmulatedDriver()
    with pytest.raises(RuntimeDiagnostic, match=r"was built for a CPU \(target host\)[\s\S]*--device cpu"):
        open_toy(artifact_path, driver)
    assert driver.leaks() == []


def test_a_damaged_program_is_refused(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "none", lambda manifest: manifest.pop("gpu"))
    with pytest.raises(RuntimeDiagnostic, match="has no program for one"):
        open_toy(path, emulated_driver())

    def other_kernel(manifest: dict) -> None:
        manifest["gpu"]["programs"][0]["launches"][0]["kernel"] = "nothing"

    with pytest.raises(RuntimeDiagnostic, match=r"gpu\.programs\[0\]\.launches\[0\]\.kernel"):
        open_toy(write_toy(tmp_path / "kernel", other_kernel), emulated_driver())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([VOCAB], [0], [0], [0]), "ids"),
        (([1], [1], [0], [0]), "starts at position 1"),
        (([1], [0], [1], [0]), "slots"),
        (([1], [MAX_CONTEXT], [0], [0]), "positions"),
    ],
)
def test_steps_are_checked(toy: Path, arguments: tuple[Any, ...], message: str) -> None:
    with open_toy(toy, emulated_driver()) as session:
        with pytest.raises(RuntimeDiagnostic, match=message):
            session.step(*arguments)
        assert session.step([], [], [], []).shape == (0, VOCAB)
        with pytest.raises(RuntimeDiagnostic, match="slot 7 does not exist"):
            session.release(7)


def test_profile_tells_what_ran_on_the_gpu(toy: Path, tmp_path: Path) -> None:
    with open_toy(toy, emulated_driver()) as session:
        with session.profile() as profile:
            session.step([1, 2, 3], range(3), [0] * 3, [2])
        rows = profile.rows()
        assert {row.kernel for row in rows} == {"append", "gemm"}  # the names that the manifest lists
        assert all(row.seconds == pytest.approx(4e-6, rel=0.3) for row in rows)
        assert "1 native steps" in profile.table() and "on emulated GPU (sm_90)" in profile.table()
        profile.write_trace(tmp_path / "trace.json")
        assert '"emulated GPU (sm_90)"' in (tmp_path / "trace.json").read_text()


def test_device_bytes_counts_everything(toy: Path) -> None:
    with open_toy(toy, emulated_driver()) as session:
        few, many = (device_bytes(session.artifact, 1, positions) for positions in (64, 128))
        assert many - few == 2 * 64 * CELL_BYTES and few > session.memory().weights + session.memory().arena
