"""CudaSession: an artifact for GPUs on one of them, ready to step like `runtime.session.Session`.

Takes an artifact's path, a context length and a number of sequences (slots), and a bound of the device memory that all
of it together may take. A step first gets room in the cache; it is run in pieces where it is longer than the program
takes or wants more logits than there is room for.

A session serves one step at a time, from any thread, and only in the process that made it. Ctrl-C comes through
between steps: what a sequence holds is then what its finished steps wrote. After a fault that ends the GPU's context
the session says so and can only be closed.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from runtime.artifact import Artifact, open_artifact
from runtime.cuda.device import Device, open_device
from runtime.cuda.driver import OutOfDeviceMemory
from runtime.cuda.executor import Executor
from runtime.cuda.host_experts import host_code, open_host
from runtime.cuda.host_kv import HostCacheTooSmall, HostKV, HostKvPlan, HostKvReport, plan_host_kv
from runtime.cuda.host_plan import HostPlan
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.hybrid_weights import SPARE_BYTES, HybridReport, HybridWeights, passing_plan
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.kv import capacity_of
from runtime.cuda.measure import COPY_BYTES, copy_bandwidth
from runtime.cuda.missed_experts import AUTO, FETCH, Missed, missed_of
from runtime.cuda.profile import GpuProfile
from runtime.cuda.program import GpuProgram, GpuStep, KVPlan
from runtime.cuda.step_memory import pinned_bytes, scratch_bytes
from runtime.cuda.weights import BUFFERS, CHUNK_BYTES, LoadProgress, ResidentWeights, WeightStore
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import Manifest
from runtime.session_base import SessionBase
from runtime.session_parts import MemoryReport
from runtime.step_inputs import StepInputs

LEAST_CHUNK_BYTES = 1 << 20  # of the buffers that weights come through, beside a cache on the host


class _Held:
    """What a session holds, apart from it, so that dropping the session can release it."""

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self.device: Device | None = None
        self.stream: Any = None
        self.weights: WeightStore | None = None
        self.executor: Executor | None = None
        self.host: HostKV | None = None


def _release(held: _Held) -> None:
    """In the order of use. A forked child has no part in the parent's context; a lost one has nothing to give back."""
    device, held.device = held.device, None
    if held.owner_pid != os.getpid() or device is None:
        return
    if not device.lost:
        with uninterrupted():
            device.enter()
            if held.stream is not None:
                device.synchronize(held.stream)
            for part in (held.executor, held.weights, held.host):
                if part is not None:
                    part.close()
            if held.stream is not None:
                device.free_stream(held.stream)
            device.close()
    elif held.host is not None:
        held.host.close()  # its threads


MakeWeights = Callable[[Device, Any, Artifact], WeightStore]


class CudaSession(SessionBase):
    """An artifact on a GPU. `memory` bounds the device memory in bytes, `host_memory` what is pinned of the host's:
    weights for which neither has room are read from the disk. `missed_experts` says what is done about those that are
    not on the device: `auto` (brought there or computed by the CPU, whichever is sooner as measured now), `fetch`
    (brought, so that outputs are those of a device with room for all to the last bit), `cpu`; or with prices. Keys and
    values of the layers `host_kv` lie in the host's memory, where the CPU attends to them (`runtime.cuda.host_kv`).
    `threads` are the CPU's that compute; given where nothing is computed there they are refused. `device` is one that
    is open, which the session then closes; `weights` makes another store than one that has them all on the
    device.

    Raises NoDevice without a usable GPU, OutOfDeviceMemory where something does not fit, RuntimeDiagnostic for whatever
    is wrong with the artifact or the sizes.
    """

    streamer = kv_spill = kv_stream = None
    _of_parent = "its GPU context exists"
    _after_fault = ("a fault of the GPU", "open a new one, in a new process")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_context: int | None = None,
        num_slots: int = 1,
        verify: bool = False,
        memory: int | None = None,
        host_memory: int | None = None,
        missed_experts: str | Missed = AUTO,
        host_kv: Sequence[int] = (),
        threads: int | None = None,
        device: Device | None = None,
        weights: MakeWeights | None = None,
        progress: LoadProgress | None = None,
    ) -> None:
        super().__init__(path)
        self._held = held = _Held()
        held.device = device
        self._finalizer = weakref.finalize(self, _release, held)
        try:
            self.artifact = open_artifact(path, verify=verify)
            self.manifest: Manifest = self.artifact.manifest
            self.gpu = gpu_step(self.artifact)
            self._hold_sequences(max_context, num_slots)
            if held.device is None:
                with uninterrupted():
                    held.device = open_device(limit_bytes=memory)
            self._missed = missed_of(missed_experts)
            self._host_plan = plan_host_kv(self.artifact, host_kv, self.num_slots, self.max_context)
            held.device.host_limit_bytes = self._pinned_limit(host_memory)
            self._acquire(held.device, weights, progress, threads)
        except BaseException:
            self.close()
            raise
        self._profile: GpuProfile | None = None

    def _pinned_limit(self, host_memory: int | None) -> int | None:
        """What may be pinned beside the host's part of the cache."""
        plan = self._host_plan
        if host_memory is None or plan is None:
            return host_memory
        needed = plan.plain_bytes + plan.pinned_bytes + pinned_bytes(self.gpu, self.vocab_size)
        needed += BUFFERS * min(LEAST_CHUNK_BYTES, self.manifest.weights.bytes)  # through which weights come
        if needed > host_memory:
            raise HostCacheTooSmall(host_memory, needed)
        return host_memory - plan.plain_bytes

    def _acquire(
        self, device: Device, weights: MakeWeights | None, progress: LoadProgress | None, threads: int | None
    ) -> None:
        held = self._held
        device.enter()
        plan = self._hybrid_plan(device) if weights is None else None
        host_plan = self._host_plan
        others = pinned_bytes(self.gpu, self.vocab_size) + (host_plan.pinned_bytes if host_plan is not None else 0)
        own = weights is None
        if plan is not None:
            weights = lambda device, stream, artifact: HybridWeights(  # noqa: E731
                device, stream, artifact, plan, others_pinned=others, missed=self._missed,
                code=open_host(artifact, threads) if self._missed.mode != FETCH and plan.slots else None,
            )  # fmt: skip
        self._check_room(device, weights is None)
        if threads is not None and own and host_plan is None:
            self._check_threads(threads, plan)
        with uninterrupted():
            held.stream = device.new_stream()
        make = weights or (
            lambda device, stream, artifact: ResidentWeights(
                device, stream, artifact, progress, chunk_bytes=_chunk_bytes(device, others)
            )
        )
        held.weights = make(device, held.stream, self.artifact)
        if host_plan is not None:
            held.host = HostKV(device, held.stream, self.artifact, host_plan, threads)
        self.executor = held.executor = Executor(
            device, held.stream, self.gpu, self.artifact.gpu_images(), held.weights,
            slots=self.num_slots, max_context=self.max_context, vocab_size=self.vocab_size, where=self._where,
            host=held.host,
        )  # fmt: skip
        reports = [found for found in (self.hybrid, self.host_kv) if found is not None]
        self.threads = max([1, *(found.host_threads for found in reports)])  # 1: gives the GPU its work
        self.device_name, self.architecture = device.name, f"sm_{device.capability[0]}{device.capability[1]}"

    def _check_threads(self, threads: int, plan: HbmPlan | None) -> None:
        """Raises RuntimeDiagnostic where threads were asked for that would have nothing to do."""
        pieces = self.manifest.weights.pieces
        if threads < 1:
            raise RuntimeDiagnostic(f"{threads} threads", where="--threads", expected="1 or more")
        if plan is None:
            why = "all weights are on the GPU"
        elif not any(count * pieces[piece].unit < pieces[piece].bytes for piece, count in plan.slots):
            why = "only dense weights pass through the GPU's memory"
        elif self._missed.mode == FETCH:
            why = "missing experts are brought to the GPU (--missed-experts fetch)"
        elif not host_code(self.artifact)[1]:
            why = "the artifact has no code of experts for this CPU"
        else:
            return
        raise RuntimeDiagnostic(
            f"the CPU computes nothing in this run: {why}", where="--threads",
            expected="a model whose experts do not all fit the device memory", hint="leave --threads out",
        )  # fmt: skip

    def _hybrid_plan(self, device: Device) -> HbmPlan | None:
        """What of the weights stays on the device where not all of them fit beside activations and a cache of all
        positions; None where they do, or where not even that helps."""
        here = device_kv(self.gpu, self._host_plan)
        cache = here.nbytes(self.num_slots, capacity_of(self.gpu.kv, self.max_context))
        try:
            return passing_plan(self.artifact, device.free_bytes(), cache)
        except RuntimeDiagnostic:
            return None  # `_check_room` says so

    def _check_room(self, device: Device, whole: bool) -> None:
        """Says at once what would else be found after gigabytes were copied."""
        free, needed = device.free_bytes(), scratch_bytes(self.gpu, self.vocab_size)
        needed += self.manifest.weights.bytes if whole else 0
        if needed > free:
            raise OutOfDeviceMemory(
                f"the model does not fit: it needs {needed} bytes beside its KV cache",
                2,
                where=device.name,
                expected=f"at most {free} bytes, which are free of the {device.total_bytes} of this GPU",
                hint="quantize the weights (--recipe), allow more memory, or run on the CPU (--device cpu)",
            )

    def _make_room(self, inputs: StepInputs) -> None:
        self._device().enter()
        assert self.executor.kv is not None
        ends: dict[int, int] = {}
        for slot, position in zip(inputs.slots.tolist(), inputs.positions.tolist(), strict=True):
            ends[slot] = position + 1  # ascending by slot: the last counts
        for slot, end in ends.items():
            self.executor.kv.ensure(slot, end)

    def _run_all(self, inputs: StepInputs, rows: np.ndarray, logits: np.ndarray) -> None:
        """All tokens, in as few runs as they take; `rows` ascend."""
        start = 0
        while start < len(inputs.ids):
            left = len(inputs.ids) - start
            program = self.gpu.program(min(left, self.gpu.programs[-1].max_tokens))
            stop = min(start + program.max_tokens, len(inputs.ids))
            first, last = np.searchsorted(rows, (start, stop))
            if last - first > self.executor.most_rows:
                last = first + self.executor.most_rows
                stop = int(rows[last - 1]) + 1
            self._run_parts(program, inputs, start, stop, rows[first:last], logits[first:last])
            start = stop

    def _run_parts(
        self, program: GpuProgram, inputs: StepInputs, start: int, stop: int, rows: np.ndarray, logits: np.ndarray
    ) -> None:
        """Tokens start..stop by one program, no more at once than the weights allow."""
        assert self._held.weights is not None
        most = self._held.weights.most_tokens or stop - start
        for part in range(start, stop, most):
            end = min(part + most, stop)
            first, last = np.searchsorted(rows, (part, end))
            self._run(program, inputs, part, end, rows[first:last] - part, logits[first:last])

    def _run(
        self, program: GpuProgram, inputs: StepInputs, start: int, stop: int, rows: np.ndarray, logits: np.ndarray
    ) -> None:
        """Tokens start..stop, with what is known of their sequences before and after."""
        ids, positions, slots = (a[start:stop] for a in (inputs.ids, inputs.positions, inputs.slots))
        device, profile = self._held.device, self._profile
        assert device is not None
        # Until the step is done, and where it never is, a sequence holds what was before its first token here.
        self._filled[slots[::-1]] = positions[::-1]
        np.maximum.at(self._newest, slots, positions)
        try:
            times = self.executor.run(program, ids, positions, slots, rows, logits, timed=profile is not None)
        except BaseException:
            self._broken = device.lost
            raise
        self._filled[slots] = positions + 1  # ascending by slot: the last wins
        if profile is not None and times is not None:
            profile.add_step(program, len(ids), len(rows), times)

    def _device(self) -> Device:
        self._check_usable()
        assert self._held.device is not None
        return self._held.device

    def release(self, slot: int) -> int:
        """Forgets the sequence in `slot`; returns the bytes of device memory that became free."""
        slot = self._checked_slot(slot)
        with self._lock:
            self._device().enter()
            assert self.executor.kv is not None
            self.executor.settle()
            with uninterrupted():
                self._filled[slot], self._newest[slot] = 0, -1
                if self._held.host is not None:
                    self._held.host.release(slot)
                return self.executor.kv.release(slot)

    @contextmanager
    def profile(self) -> Iterator[GpuProfile]:
        """Records every step inside the `with` block, launched one by one; read the profile after it."""
        with self._lock:
            self._check_usable()
            profile = self._profile = GpuProfile(self.manifest, self.gpu, f"{self.device_name} ({self.architecture})")
        try:
            yield profile
        finally:
            self._profile = None
            profile.finish()

    def memory(self) -> MemoryReport:
        """Where the device memory goes, now."""
        self._check_usable()
        kv, weights = self.executor.kv, self._held.weights
        assert kv is not None and weights is not None
        arena = self.executor.arena_bytes
        return MemoryReport(weights.device_bytes, kv.reserved_bytes, kv.committed_bytes(), arena, mapped=False)

    def copy_bandwidth(self) -> float:
        """Bytes read and written in a second by a copy within the GPU, measured now."""
        with self._lock:
            device = self._device()
            device.enter()
            return copy_bandwidth(device, max(1, min(COPY_BYTES, device.free_bytes() // 4)))

    @property
    def missed(self) -> str:
        """What is done about experts that are not on the device: one of `runtime.cuda.missed_experts.MODES`."""
        return self._missed.mode

    @property
    def passing(self) -> tuple[HbmPlan, HostPlan | None] | None:
        """What of the weights stays on the device, and what of the others is pinned; None where all are there."""
        weights = self._held.weights
        return (weights.plan, weights.host_plan) if isinstance(weights, HybridWeights) else None

    @property
    def hybrid(self) -> HybridReport | None:
        """What passed through the device memory since the session was opened; None where all weights are there."""
        weights = self._held.weights
        return weights.report if isinstance(weights, HybridWeights) else None

    @property
    def host_kv(self) -> HostKvReport | None:
        """What the CPU attended to; None where keys and values of all layers lie on the device."""
        return self._held.host.report if self._held.host is not None else None

    def close(self) -> None:
        """Gives the device memory back, after a step in progress. Closing twice is fine."""
        with self._lock, uninterrupted():
            self._finalizer()


def _chunk_bytes(device: Device, others: int) -> int:
    """Of the buffers that all weights come through, where the pinned memory has room for `others` too."""
    limit = device.host_limit_bytes
    return CHUNK_BYTES if limit is None else max(1, min(CHUNK_BYTES, (limit - others) // BUFFERS))


def device_kv(step: GpuStep, host: HostKvPlan | None) -> KVPlan:
    """The part of the cache that lies on the device."""
    return replace(step.kv, layers=step.kv.layers - (len(host.layers) if host is not None else 0))


def gpu_step(artifact: Artifact) -> GpuStep:
    """The program of an artifact for GPUs. Raises RuntimeDiagnostic for one that was built for a CPU."""
    if artifact.gpu is None:
        raise RuntimeDiagnostic(
            f"the artifact was built for a CPU (target {artifact.manifest.target.name})",
            where=str(artifact.path),
            hint="build it for a GPU: compile-model build MODEL -o OUT --device cuda; or run it with --device cpu",
        )
    return artifact.gpu


def device_bytes(artifact: Artifact, num_slots: int, positions: int) -> int:
    """Device memory for so many sequences of so many positions, everything counted."""
    step, manifest = gpu_step(artifact), artifact.manifest
    kv = step.kv.nbytes(num_slots, capacity_of(step.kv, positions))
    return manifest.weights.bytes + scratch_bytes(step, manifest.vocab_size) + kv + SPARE_BYTES
