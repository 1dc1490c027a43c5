"""What a session is made of besides its steps: the resources it holds, its memory in numbers, checks of its sizes."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.manifest import KVInfo, Manifest
from runtime.manifest_fields import REBUILD_HINT
from runtime.native import NativeCode
from runtime.step_inputs import StepInputs
from runtime.team import WorkerTeam


class Closable(Protocol):
    def close(self) -> None: ...


_C = TypeVar("_C", bound=Closable)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by part. `mapped` weights are shared with the page cache; the KV cache is reserved and fills on demand.

    `arena` has the activations, on a GPU also the inputs and logits.
    """

    weights: int
    kv_reserved: int
    kv_committed: int
    arena: int
    mapped: bool = True

    def __str__(self) -> str:
        return (
            f"weights {mebibytes(self.weights)}{' (mapped)' * self.mapped}, KV cache {mebibytes(self.kv_committed)} of "
            f"{mebibytes(self.kv_reserved)} (on demand), activations {mebibytes(self.arena)}"
        )


class Resources:
    """What a session holds, apart from the session, so that dropping the session can release it."""

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self.native: NativeCode | None = None
        self.team: WorkerTeam | None = None
        self.memories: list[Closable] = []

    def add(self, memory: _C) -> _C:
        """Keeps `memory` until the end and gives it back."""
        self.memories.append(memory)
        return memory


def release_all(resources: Resources) -> None:
    """Threads first, then what they touch. What a hung thread may still touch is kept for the life of the process."""
    if resources.owner_pid != os.getpid():
        return  # a forked child: the threads are the parent's, and the kernel drops the child's copies with it
    if resources.team is not None and not resources.team.close():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(resources))  # also through the clean-up at interpreter exit
        return
    for memory in reversed(resources.memories):  # what reads into a memory ends before it
        memory.close()
    if resources.native is not None:
        resources.native.close()


def refuse_gpu(manifest: Manifest, where: str) -> None:
    """Raises RuntimeDiagnostic for an artifact whose code is for GPUs."""
    if manifest.target.is_gpu:
        raise RuntimeDiagnostic(
            f"the artifact was built for a GPU (target {manifest.target.name}), not for this CPU",
            where=where,
            hint="run it with --device cuda, or build it again with --target host",
        )


def checked_context(asked: int | None, manifest: Manifest, where: str) -> int:
    """Positions a sequence may have: the model's where nothing was asked for. Raises RuntimeDiagnostic for more."""
    if asked is None:
        return manifest.max_context
    if not 1 <= asked <= manifest.max_context:
        raise RuntimeDiagnostic(
            f"a context of {asked} positions was asked for",
            where=where,
            expected=f"1 to {manifest.max_context}, the context the model was made for",
        )
    return asked


def checked_count(count: int, what: str, most: int) -> int:
    """`count`, when it is 1 to `most`. Raises RuntimeDiagnostic."""
    if not 1 <= count <= most:
        raise RuntimeDiagnostic(f"cannot make {count} {what}", expected=f"1 to {most}")
    return count


def check_ring(kv: KVInfo, inputs: StepInputs, newest: np.ndarray, where: str) -> None:
    """A low-bit cache keeps the newest positions in 16 bits: a sequence cannot go back to where they are gone.

    `newest` i64 [slots], the last position ever written, is -1 afterwards for those that begin anew.
    """
    if not kv.ring:
        return
    newest[inputs.slots[inputs.positions == 0]] = -1  # a sequence from its start reads nothing old
    reach = kv.ring - kv.recent - 2 * kv.block
    gone = newest[inputs.slots] - inputs.positions >= reach
    if gone.any():
        at = int(np.flatnonzero(gone)[0])
        slot, position = int(inputs.slots[at]), int(inputs.positions[at])
        raise RuntimeDiagnostic(
            f"slot {slot} goes back to position {position} from position {int(newest[slot])}",
            where=where,
            expected=f"fewer than {reach} positions back: the cache ({kv.format}) keeps no more in 16 bits",
            hint="release the slot and start the sequence again",
        )


def check_kv_waits(manifest: Manifest, where: str, *, spills: bool) -> None:
    """Raises RuntimeDiagnostic where parts of the cache cannot come and go."""
    layers = set(range(manifest.kv.layers))
    if spills:
        raise RuntimeDiagnostic(
            "a session streams its KV cache or spills sequences, not both",
            where=where,
            hint="streaming takes sequences that no step uses to disk, too: leave the other out",
        )
    if any(set(program.kv_awaits) != layers for program in manifest.programs):
        raise RuntimeDiagnostic(
            "the artifact's programs do not wait for their KV cache, so all of it must stay in memory",
            where=where,
            hint=REBUILD_HINT,
        )


def mebibytes(nbytes: int) -> str:
    """`12.3 MiB`, `1.25 GiB`."""
    return f"{nbytes / (1 << 20):.1f} MiB" if nbytes < 1 << 30 else f"{nbytes / (1 << 30):.2f} GiB"
