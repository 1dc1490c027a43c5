"""Weights on a GPU: where a launch finds them, and how they come there.

`WeightStore` is what the executor asks; `ResidentWeights` has the whole file in device memory. It comes through a few
pinned buffers: while one is copied to the GPU, others are filled from the file by threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from runtime.artifact import Artifact
from runtime.cuda.device import Device, host_view
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.program import GpuLaunch, WeightArgument
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import REBUILD_HINT

CHUNK_BYTES = 16 << 20
BUFFERS = 4
READS = 2  # at once, into buffers that are not being copied


class LoadProgress(Protocol):
    """As `stratum.progress.Progress`: a stage, what is done of how much, and of what."""

    def __call__(self, stage: str, done: float, total: float, unit: str = "") -> None: ...


class WeightStore(Protocol):
    """The weights as launches find them. `captured`: addresses stay and the host decides nothing between two launches,
    so that a step may be captured as one graph, with what the store gives to streams of its own."""

    captured: bool
    device_bytes: int
    most_tokens: int  # of a step, 0 for any

    def attach(self, arena: int) -> None:
        """Where the step's memory begins on the device; before any launch."""
        ...

    def address(self, argument: WeightArgument) -> int:
        """Of the first byte, on the device."""
        ...

    def extent(self, argument: WeightArgument) -> int:
        """How many bytes are behind it."""
        ...

    def before(self, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        """What has to be given to the step's stream, or waited for, before this launch."""
        ...

    def cuts(self, launch: GpuLaunch) -> bool:
        """Whether `before` does anything for this launch; where not, it may be captured with the launch before it."""
        ...

    def given(self, launches: int, graphs: int) -> None:
        """So many kernels and graphs were launched: for reports."""
        ...

    # Of a store whose steps are captured whole.

    @property
    def state(self) -> Hashable:
        """What a captured step depends on beside its sizes."""
        ...

    def settle(self) -> None:
        """What the step's stream is given from now on is behind all that the store has given to others."""
        ...

    def capturing(self) -> AbstractContextManager[list[Any]]:
        """Round the capture of a step: the list then has what `replayed` takes. Nothing is done, nothing changes."""
        ...

    def replayed(self, step: Any) -> None:
        """A captured step was given to the stream; None: maybe."""
        ...

    def close(self) -> None:
        """Gives everything back; no work may be under way."""
        ...


class ResidentWeights:
    """All weights of an artifact in device memory; `stream` copies them. Raises OutOfDeviceMemory."""

    captured = True
    most_tokens = 0
    state = ()

    def __init__(
        self, device: Device, stream: Any, artifact: Artifact, progress: LoadProgress | None = None,
        *, chunk_bytes: int = CHUNK_BYTES,
    ) -> None:  # fmt: skip
        self._device = device
        self.device_bytes = artifact.manifest.weights.bytes
        where = str(artifact.path / artifact.manifest.weights.file)
        descriptor = artifact.open_weights()
        self._base: int | None = None
        try:
            with uninterrupted():
                self._base = device.allocate(self.device_bytes, "the weights")
            staging = _Staging(device, stream, min(chunk_bytes, max(1, self.device_bytes)))
            try:
                staging.load(descriptor, self.device_bytes, self._base, where, progress)
            finally:
                staging.close()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(descriptor)

    def attach(self, arena: int) -> None:
        """Weights that do not move ask for nothing of a step."""

    def address(self, argument: WeightArgument) -> int:
        assert self._base is not None
        return self._base + argument.offset

    def extent(self, argument: WeightArgument) -> int:
        return argument.bytes

    def before(self, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        """Everything is there."""

    def cuts(self, launch: GpuLaunch) -> bool:
        return False

    def given(self, launches: int, graphs: int) -> None:
        """Nobody reports it."""

    def settle(self) -> None:
        """Nothing is under way."""

    def capturing(self) -> AbstractContextManager[list[None]]:
        return nullcontext([None])

    def replayed(self, step: None) -> None:
        """A step does nothing to weights that do not move."""

    def close(self) -> None:
        if self._base is not None and not self._device.lost:
            base, self._base = self._base, None
            self._device.free(base)


class _Staging:
    """Pinned buffers, each with the event that says when its copy is over."""

    def __init__(self, device: Device, stream: Any, chunk_bytes: int) -> None:
        self._device, self._stream, self._chunk = device, stream, chunk_bytes
        self._buffers: list[tuple[int, Any]] = []
        try:
            for _ in range(BUFFERS):
                with uninterrupted():
                    buffer = device.allocate_pinned(chunk_bytes, "the copying of weights")
                    try:
                        self._buffers.append((buffer, device.new_event()))
                    except BaseException:
                        device.free_pinned(buffer)
                        raise
        except BaseException:
            self.close()
            raise

    def load(self, descriptor: int, nbytes: int, target: int, where: str, progress: LoadProgress | None) -> None:
        """The first `nbytes` of the file to `target` on the device, and waits until they are there."""
        reads: deque[Future[None]] = deque()
        chunks = -(-nbytes // self._chunk)
        with ThreadPoolExecutor(READS, "weights") as readers:
            for number in range(chunks + READS):
                if number < chunks:
                    buffer, event = self._buffers[number % BUFFERS]
                    self._device.synchronize_event(event)  # of the copy before
                    offset = number * self._chunk
                    view = host_view(buffer, min(self._chunk, nbytes - offset))
                    reads.append(readers.submit(_read, descriptor, view, offset, where))
                if number >= READS:
                    reads.popleft().result()
                    done = self._send(number - READS, nbytes, target)
                    if progress is not None:
                        progress("to the GPU", done, nbytes, "bytes")
        self._device.synchronize(self._stream)

    def _send(self, number: int, nbytes: int, target: int) -> int:
        """Gives the stream one chunk; the bytes that are then under way or there."""
        buffer, event = self._buffers[number % BUFFERS]
        start = number * self._chunk
        end = min(nbytes, start + self._chunk)
        with uninterrupted():
            self._device.copy_in(target + start, buffer, end - start, self._stream)
            self._device.record(event, self._stream)
        return end

    def close(self) -> None:
        if self._device.lost:
            return
        with uninterrupted():
            if self._buffers:
                self._device.synchronize(self._stream)
            for buffer, event in self._buffers:
                self._device.free_event(event)
                self._device.free_pinned(buffer)
            self._buffers = []


def _read(descriptor: int, view: np.ndarray, offset: int, where: str) -> None:
    """Fills `view` from the file."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done:].data], offset + done)
        except OSError as fault:
            raise RuntimeDiagnostic(f"cannot read the weights: {fault.strerror}", where=where) from None
        if got == 0:
            raise RuntimeDiagnostic(f"the weights end at byte {offset + done}", where=where, hint=REBUILD_HINT)
        done += got
