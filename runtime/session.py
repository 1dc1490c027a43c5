"""Session: an opened artifact ready to step, and the one place where native code is called.

Takes an artifact's path, a thread count, a context length and a number of sequences (slots). Gives `step`: token ids,
positions and slots of a ragged batch in, float32 logits out. Holds the mapped weights, the KV cache, the arena and the
threads; `close`, leaving a `with` block, dropping the object and interpreter exit all release them.

A session serves one step at a time (callers on several threads wait for each other) and only in the process that made
it: after `os.fork` the child has no worker threads and is told so.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np

from runtime import host
from runtime.artifact import open_artifact
from runtime.errors import RuntimeDiagnostic
from runtime.kv_cache import KVCache
from runtime.kv_chunks import kv_key
from runtime.kv_loader import LoadFault, RecordLoader, StoredRecord, bring_back
from runtime.kv_spill import KVSpill, Sequences, SpillOptions
from runtime.kv_stream import KVStreamer, KVStreamOptions
from runtime.kv_use import KVUse
from runtime.load_or_compute import Prices
from runtime.manifest import Manifest, ProgramInfo
from runtime.memory import Reservation
from runtime.native import CycleCounter, NativeCode
from runtime.process_memory import give_back_read_ahead
from runtime.session_base import SessionBase
from runtime.session_parts import (
    MemoryReport,
    Resources,
    check_kv_waits,
    refuse_gpu,
    release_all,
)
from runtime.step_inputs import StepInputs
from runtime.step_reader import RoutingListener, StepReader
from runtime.stream_plan import StreamPlan
from runtime.team import WorkerTeam, on_cpu
from runtime.trace import Profile, StepRecord
from runtime.weight_reader import Pread
from runtime.weight_streamer import WeightStreamer

STEP_ARGUMENT_WORDS = 32
ENDED_EARLY = 2  # a step's status: its weights did not come
MEASURED_TOKENS = 64  # of a step that tells what computing a position costs: shorter ones read weights for few tokens


class Session(SessionBase):
    """An artifact in memory. `max_context` defaults to the model's, `threads` to one a physical core of this process.

    Without `mmap` the weights are copied into memory of huge pages: slower to open, faster where the page cache is in
    small pieces. With `stream` they are not mapped but read, as the plan says; `preadv` reads them. With `kv_spill`
    sequences that a step does not use may lie on disk; with `kv_stream`, which excludes that, a part of the cache.
    `routing` is told which experts every token chose.

    Raises RuntimeDiagnostic for whatever is wrong with the artifact, the machine or the sizes asked for.
    """

    device_name = architecture = ""  # of a GPU
    _of_parent = "its threads exist"
    _after_fault = ("a failed step", "open a new one")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        max_context: int | None = None,
        num_slots: int = 1,
        verify: bool = False,
        stream: StreamPlan | None = None,
        routing: RoutingListener | None = None,
        preadv: Pread = os.preadv,
        kv_spill: SpillOptions | None = None,
        kv_stream: KVStreamOptions | None = None,
        mmap: bool = True,
    ) -> None:
        super().__init__(path)
        if stream is not None and not mmap:
            raise RuntimeDiagnostic(
                "weights of a budget or a plan are read as they are needed: there is nothing to map or to copy",
                hint="leave out --no-mmap, or the budget",
            )
        self.artifact = open_artifact(path, verify=verify)
        refuse_gpu(self.artifact.manifest, str(path))
        self.manifest: Manifest = self.artifact.manifest
        self._hold_sequences(max_context, num_slots)
        self.threads = host.available_cores().default_threads if threads is None else threads
        self._resources = resources = Resources()
        self._finalizer = weakref.finalize(self, release_all, resources)
        self._stream, self._preadv, self._mmap = stream, preadv, mmap
        self._routing, self._kv_spill, self._kv_stream = routing, kv_spill, kv_stream
        self._computed_s, self._computed_tokens = 0.0, 0  # of longer steps
        try:
            self._acquire()
        except BaseException:
            self.close()
            raise
        self._profile: Profile | None = None

    def _acquire(self) -> None:
        resources = self._resources
        programs = self.manifest.programs
        self.streamer: WeightStreamer | None = None
        if self._stream is not None:
            self.streamer = resources.add(WeightStreamer(self.artifact, self._stream, preadv=self._preadv))
            weights_address = self.streamer.address
        else:
            but = [(piece.offset, piece.bytes) for piece in self.manifest.weights.pieces if piece.kind == "stand_ins"]
            if self._mmap:
                weights = resources.add(self.artifact.map_weights())
                weights.read_ahead(but)
            else:
                weights = resources.add(self.artifact.load_weights(self.threads, self._preadv, but))
            weights_address = weights.address
        resources.native = NativeCode(self.artifact.code, [p.symbol for p in programs], where=self._where)
        self._kv = resources.add(KVCache(self.manifest.kv, self.max_context, self.num_slots))
        self._kv_use = KVUse(self._kv) if self._stream is not None and self._stream.kv_bytes else None
        self.kv_spill: KVSpill | None = None
        if self._kv_spill is not None:
            self._ids = np.zeros((self.num_slots, self.max_context), dtype=np.int32)
            books = Sequences(self._filled, self._newest, self._recompute, self.prices)
            self.kv_spill = resources.add(KVSpill(self._kv, kv_key(self.manifest), self._kv_spill, books))
        self.kv_stream: KVStreamer | None = None
        if self._kv_stream is not None:
            check_kv_waits(self.manifest, self._where, spills=self._kv_spill is not None)
            self.kv_stream = resources.add(KVStreamer(self._kv, self._kv_stream, self._filled))
        arena_bytes = max(program.arena_bytes for program in programs)
        available = host.total_memory_bytes()
        if available and arena_bytes > available:
            raise RuntimeDiagnostic(
                f"the program needs {arena_bytes} bytes for activations",
                where=self._where,
                expected=f"at most {available} bytes, the memory of this machine",
            )
        self._arena = resources.add(Reservation(arena_bytes, what="activations", huge=self.streamer is None))
        resources.team = WorkerTeam(resources.native, self.threads)
        self._memory_sizes = (self.manifest.weights.bytes, self._kv.reserved_bytes, arena_bytes)
        arguments = np.zeros(STEP_ARGUMENT_WORDS, dtype=np.int64)
        arguments[5:8] = weights_address, self._arena.address, self._kv.address
        arguments[10:12] = self.threads, resources.team.address
        arguments[13:15] = self._kv.capacity, self.num_slots
        self._arguments = arguments
        self._reader: StepReader | None = None
        self._most_tokens = 1 << 62
        if self.streamer is not None or self._routing is not None or self.kv_stream is not None:
            self._reader = StepReader(
                self.manifest, arguments, self.streamer, self._routing, self.kv_stream, self._arena, self._kv_use
            )
        self._own_cpu: int | None = None
        streams = self.streamer is not None or self.kv_stream is not None
        if streams and self.threads > 1 and hasattr(os, "sched_setaffinity"):
            cpus = os.sched_getaffinity(0)
            if len(cpus) >= self.threads:
                self._own_cpu = min(cpus)
                resources.team.keep_off(self._own_cpu)
        if self.streamer is not None and self._stream is not None:
            self._most_tokens = self._stream.tokens_at_once(self.manifest)
            self.streamer.arena = self._arena
            give_back_read_ahead()  # of what linking took
            self.streamer.load()

    def _make_room(self, inputs: StepInputs) -> None:
        if self.kv_spill is not None:
            self.kv_spill.make_room(inputs.slots, inputs.positions)

    def _run_all(self, inputs: StepInputs, rows: np.ndarray, logits: np.ndarray) -> None:
        """All tokens, in as few native calls as they take; `rows` ascend."""
        start = 0
        while start < len(inputs.ids):
            program = self._program_for(len(inputs.ids) - start)
            end = min(start + program.max_tokens, len(inputs.ids))
            # Parts of what the program takes at once are run by the same program: another one may add in
            # another order.
            while start < end:
                stop = min(start + self._most_tokens, end)
                first, last = np.searchsorted(rows, (start, stop))
                self._run(program, inputs, start, stop, rows[first:last] - start, logits[first:last])
                start = stop

    def _recompute(self, slot: int, first: int, last: int) -> None:
        """Computes positions first..last of a slot again, from the ids that they were computed from."""
        self._compute(slot, first, self._ids[slot, first:last])

    def _compute(self, slot: int, first: int, ids: np.ndarray) -> None:
        positions = np.arange(first, first + len(ids), dtype=np.int32)
        none = np.empty(0, dtype=np.int32)
        inputs = StepInputs(ids, positions, np.full_like(positions, slot), none)
        self._run_all(inputs, none, np.empty((0, self.vocab_size), dtype=np.float32))

    def bring_prefix(
        self, slot: int, ids: Sequence[int], loader: RecordLoader, records: Sequence[StoredRecord], split: int
    ) -> tuple[int, LoadFault | None]:
        """Begins the sequence in `slot` anew with the positions of `ids`: the first `split` computed, the rest read.

        The records hold at least those positions. Gives how many were computed, and what could not be read (and was
        computed instead).
        """
        slot = self._checked_slot(slot)
        last = len(ids) - 1
        inputs = self._checked_inputs(ids, range(len(ids)), [slot] * len(ids), [])
        with self._lock:
            self._check_usable()
            if self.kv_stream is not None:
                if len(ids) > self.kv_stream.whole_positions(slot):
                    raise self._in_parts(f"{len(ids)} positions are more than fit", "taken from a file")
                split = 0  # a step at position 0 would give up what was read meanwhile
            self._forget(slot)
            if self.kv_spill is not None:
                self.kv_spill.make_room(inputs.slots[-1:], inputs.positions[-1:])
                self._ids[slot, : len(ids)] = inputs.ids
            if self.streamer is not None and self._kv_use is not None:
                self.streamer.share(False, self._kv_use.after(inputs.positions, inputs.slots))
            done = bring_back(
                loader, slot, records, split, len(ids),
                lambda first, end: self._compute(slot, first, inputs.ids[first:end]),
            )  # fmt: skip
            newest = max((r.name.last for r in records), default=0) - 1 if done[1] is None else last
            self._filled[slot], self._newest[slot] = len(ids), max(newest, last)
        return done

    def _in_parts(self, why: str, what: str) -> RuntimeDiagnostic:
        return RuntimeDiagnostic(
            f"the KV cache of this session comes and goes in parts, and {why}: no prompt is {what}",
            where=self._where,
            hint="a shorter prompt, more memory, or no prompt cache",
        )

    @property
    def whole_positions(self) -> int:
        """Of the only sequence, positions that lie in memory together: all, but where parts of layers come and go."""
        return self.max_context if self.kv_stream is None else self.kv_stream.whole_positions(0)

    @property
    def kv(self) -> KVCache:
        """The cache, for its sizes; its bytes only inside of `in_memory`."""
        return self._kv

    @contextmanager
    def in_memory(self, slot: int) -> Iterator[KVCache]:
        """The cache, with the sequence of `slot` in memory; no step runs meanwhile."""
        slot = self._checked_slot(slot)
        with self._lock:
            self._check_usable()
            if self.kv_stream is not None and not self.kv_stream.is_whole(slot):
                raise self._in_parts("some of them are on disk", "put into a file")
            if self.kv_spill is not None:
                self.kv_spill.restore(slot)
            yield self._kv

    def prices(self, disk_bytes_per_s: float, compute_s: float = 0.0) -> Prices | None:
        """What computing positions costs, as measured in this session; before its first longer step `compute_s` seconds
        each, or None where that is 0."""
        if self._computed_tokens:
            compute_s = self._computed_s / self._computed_tokens
        if not compute_s:
            return None
        streamed = 0
        if self.streamer is not None:
            read = sum(piece.bytes for piece in self.manifest.weights.pieces if piece.kind != "stand_ins")
            streamed = read - self.streamer.report().resident_bytes
        program = self.manifest.programs[-1]
        return Prices(
            compute_s,
            disk_bytes_per_s,
            step_tokens=min(program.max_tokens, self._most_tokens),
            step_bytes=streamed,
        )

    def _program_for(self, tokens: int) -> ProgramInfo:
        """The smallest program that takes all tokens at once, else the largest."""
        programs = self.manifest.programs
        return next((program for program in programs if tokens <= program.max_tokens), programs[-1])

    def _run(
        self, program: ProgramInfo, inputs: StepInputs, start: int, stop: int, rows: np.ndarray, logits: np.ndarray
    ) -> None:
        """One native call on tokens start..stop; `rows` are counted from `start`, `logits` is written."""
        team, native = self._resources.team, self._resources.native
        assert team is not None and native is not None
        # Slices of int32 arrays: contiguous, but kept alive here while native code reads them.
        pieces = [np.ascontiguousarray(a[start:stop]) for a in (inputs.ids, inputs.positions, inputs.slots)]
        rows = np.ascontiguousarray(rows, dtype=np.int32)
        arguments = self._arguments
        arguments[0:5] = [*(piece.ctypes.data for piece in pieces), rows.ctypes.data, logits.ctypes.data]
        arguments[8:10] = stop - start, len(rows)
        profile = self._profile
        stamps = profile.buffer(program) if profile is not None else None
        arguments[12] = stamps.ctypes.data if stamps is not None else 0
        reader = self._reader
        with reader.serving(program, *pieces) if reader is not None else nullcontext(), on_cpu(self._own_cpu):
            started_s = time.perf_counter()
            status = team.run(native.functions[program.symbol], arguments.ctypes.data)
            ended_s = time.perf_counter()
        if status == ENDED_EARLY and reader is not None:
            raise reader.fault()
        if status != 0:
            self._broken = True
            raise RuntimeDiagnostic(
                f"a step of {stop - start} tokens did not finish: a worker thread failed to arrive in time",
                where=self._where,
                hint="the process was stopped or the machine is overloaded; open a new session, with fewer threads",
            )
        self._filled[inputs.slots[start:stop]] = inputs.positions[start:stop] + 1  # ascending by slot: the last wins
        np.maximum.at(self._newest, inputs.slots[start:stop], inputs.positions[start:stop])
        if stop - start >= MEASURED_TOKENS:
            self._computed_s += ended_s - started_s
            self._computed_tokens += stop - start
        if self.kv_spill is not None:
            self._ids[inputs.slots[start:stop], inputs.positions[start:stop]] = inputs.ids[start:stop]
        if profile is not None and stamps is not None:
            profile.add(StepRecord(program, stop - start, len(rows), stamps, started_s, ended_s))

    def release(self, slot: int) -> int:
        """Forgets the sequence in `slot` and gives its memory back; returns the bytes of its whole pages."""
        slot = self._checked_slot(slot)
        with self._lock:
            self._check_usable()
            return self._forget(slot)

    def _forget(self, slot: int) -> int:
        self._filled[slot], self._newest[slot] = 0, -1
        if self.kv_spill is not None:
            self.kv_spill.drop(slot)
        if self.kv_stream is not None:
            self.kv_stream.forget(slot)
        if self._kv_use is not None:
            self._kv_use.forget(slot)
        return self._kv.release(slot)

    def spill(self, slot: int) -> int:
        """Writes the sequence in `slot` to disk and gives its memory back; returns the bytes written.

        The next step that uses it brings it back, bit for bit. Needs a session with `kv_spill`.
        """
        slot = self._checked_slot(slot)
        with self._lock:
            self._check_usable()
            if self.kv_spill is None:
                raise RuntimeDiagnostic(
                    "this session keeps all sequences in memory", expected="a session opened with kv_spill"
                )
            return self.kv_spill.spill(slot)

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Records every step inside the `with` block; read the profile after it."""
        with self._lock:
            self._check_usable()
            profile = self._profile = Profile(self.threads, CycleCounter())
            streamers = [streamer for streamer in (self.streamer, self.kv_stream) if streamer is not None]
            for streamer in streamers:
                streamer.record(True)
        try:
            yield profile
        finally:
            self._profile = None
            for streamer in streamers:
                reads, stalls = streamer.record(False)
                profile.reads += reads
                profile.stalls += stalls
            profile.finish()

    def memory(self) -> MemoryReport:
        """Where the memory goes, now."""
        self._check_usable()
        weights, kv_reserved, arena = self._memory_sizes
        return MemoryReport(weights, kv_reserved, self._kv.committed_bytes(), arena)

    def close(self) -> None:
        """Ends the threads and unmaps everything, after a step in progress. Closing twice is fine."""
        with self._lock:
            self._finalizer()
