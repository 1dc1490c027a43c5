"""Runs an artifact whose weights are not all in memory: keeps some, reads the others when a program comes to them.

Takes an artifact and a `StreamPlan`. Gives the address that native code reads weights at: a reservation as large as the
file, of which only what is in memory takes memory. Virtual memory is the table that says where things lie; kernels do
not know that anything is missing, because the program waits (`plan.await_*`) before it reads.

Dense pieces that are not resident are read in the order of the program, ahead of it by as much as the window takes,
also while the caller chooses a token. Experts live in a cache (`runtime.expert_cache`); when a step has so many tokens
that every expert will be used, the next layer's are read while this one computes.

The caller's own thread keeps the books (`runtime.stream_books`), between its launches; reading threads only read. An
interrupt in the middle of the books leaves them marked as torn, and they are begun anew before the next call.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from runtime.artifact import Artifact
from runtime.await_info import AwaitInfo
from runtime.disk_watch import DiskWatch
from runtime.expert_cache import CacheCounters, ExpertCache
from runtime.expert_guess import ExpertGuess, GuessCounters
from runtime.manifest import ProgramInfo
from runtime.memory import Reservation
from runtime.page_pool import PagePool
from runtime.piece_info import PAGE_BYTES
from runtime.stand_ins import choice_weights, in_program, largest_shares
from runtime.stream_books import StreamBooks
from runtime.stream_plan import StreamPlan
from runtime.stream_report import StreamReport
from runtime.streamed_pieces import StreamedPieces
from runtime.weight_reader import Pread, ReadJob, WeightReader

ALL_EXPERTS_USED = 3  # choices an expert from which on a step is taken to use all experts of a layer


class WeightStreamer:
    """The weights of one session under a budget. `preadv` is the seam where tests plant faults."""

    def __init__(self, artifact: Artifact, plan: StreamPlan, *, preadv: Pread = os.preadv) -> None:
        manifest = artifact.manifest
        plan.check(manifest)
        self.plan, self.manifest = plan, manifest
        streamed = StreamedPieces.of(manifest, plan)
        self.pieces, self.resident = streamed.pieces, streamed.resident
        self.expert_pieces, self.stand_in_pieces = streamed.experts, streamed.stand_ins
        self._layer_of = {piece: layer for layer, piece in enumerate(self.expert_pieces)}
        self.cache = self._new_cache() if self.expert_pieces else None
        self._done = {program.name: self._done_before(program) for program in manifest.programs}
        self.stall_s = 0.0
        self.jobs: list[ReadJob] | None = None  # finished reads, while a profile is made
        self.stalls: list[tuple[str, float, float]] = []
        self._memory = Reservation(manifest.weights.bytes, what="the weights")
        self._pool = PagePool(self._memory, plan.request_bytes // PAGE_BYTES * PAGE_BYTES or PAGE_BYTES)
        try:
            self._reader = WeightReader(
                str(artifact.path / manifest.weights.file),
                artifact.open_weights(),
                manifest.weights.bytes,
                self._memory.view(),
                threads=plan.threads,
                request_bytes=plan.request_bytes,
                preadv=preadv,
                prepare=self._pool.put_under,
                on_done=self._finished,
            )
        except BaseException:
            self._memory.close()
            raise
        self._torn = False
        self.arena: Reservation | None = None  # the activations
        self._short = False  # whether experts have a part of it
        self._share_bytes = plan.expert_bytes  # what they have
        self.guess: ExpertGuess | None = None
        if plan.guesses and self.cache is not None:
            guess = ExpertGuess(manifest, self._memory.view(), self.resident)
            self.guess = guess if guess.possible else None
        self.tell: Callable[[str], None] = _warn  # of a disk that is slower than planned
        self._watch = DiskWatch(plan.disk_bytes_per_s)
        self._books = StreamBooks(streamed, self.cache, self._reader, self._memory, self._pool)

    @property
    def address(self) -> int:
        """Where byte 0 of the weights file is, or would be."""
        return self._memory.address

    def load(self) -> None:
        """Reads what stays; returns when it is there."""
        pieces = [self.pieces[n] for n in sorted(self.resident)]
        self._reader.submit([(piece.offset, piece.bytes) for piece in pieces], "resident").wait()
        with self._keeping():
            pinned = self._books.pinned()
        for job in pinned:
            job.wait()

    def wanted(self, program: ProgramInfo) -> bytes:
        """One byte for each wait of the program: 1 where something may have to be read."""
        return bytes(int(wait.piece not in self.resident) for wait in program.awaits)

    def _done_before(self, program: ProgramInfo) -> list[tuple[int, ...]]:
        """By wait: what is done with there. Native code passes waits for what stays, so theirs go to the next one."""
        done: list[tuple[int, ...]] = []
        passed: list[int] = []
        for wait, wanted in zip(program.awaits, self.wanted(program), strict=True):
            passed += wait.done
            done.append(tuple(passed) if wanted else ())
            if wanted:
                passed = []
        return done

    def begin(self, ids: Sequence[int], program: ProgramInfo, kv_bytes: int | None = None) -> None:
        """A native call begins, behind which the KV cache takes `kv_bytes` at most; returns when the rows of its ids
        are in memory."""
        if self._torn:
            self._books.forget()
            self._short, self._share_bytes = False, self.plan.expert_bytes
            if self.cache is not None:
                self.cache = self._books.cache = self._new_cache()
        short = len(ids) <= self.plan.short_tokens and program is self.manifest.programs[0] and self.arena is not None
        self.share(short, kv_bytes)
        with self._keeping():
            jobs = self._books.rows(ids)
        self._wait(jobs, "rows")

    def share(self, short: bool, kv_bytes: int | None) -> None:
        """Experts have what a short step leaves of the activations, until a long one needs it, and of the KV cache what
        nobody uses yet."""
        if self.cache is None:
            return
        wanted = self.plan.expert_bytes_in(1 if short else self.plan.short_tokens + 1, kv_bytes)
        with self._keeping():
            if short and not self._short and self.plan.short_bytes and self.arena is not None:
                self.arena.discard(0, self.arena.nbytes)
            self._short = short
            if wanted != self._share_bytes:
                self._books.resize(wanted)
                self._share_bytes = wanted

    def wait_for(self, program: ProgramInfo, number: int, experts: Sequence[int]) -> Sequence[int]:
        """Wait `number` of the program; `experts` are the ids that its layer chose. Gives those that it is to use: the
        same, but for stand-ins. Raises RuntimeDiagnostic."""
        wait, done = program.awaits[number], self._done[program.name][number]
        piece = self.pieces[wait.piece]
        layer = self._layer_of.get(wait.piece)
        if layer is None:
            with self._keeping():
                jobs = self._books.dense(wait.piece, done)
            self._wait(jobs, piece.origin)
            return experts
        with self._keeping():
            used, weights = self._used(wait, layer, experts)
            jobs = self._books.experts(layer, used, done, weights)
            self._guess(program, number, layer, experts)
        self._wait(jobs, piece.origin)
        if len(experts) >= ALL_EXPERTS_USED * piece.count and layer + 1 < len(self.expert_pieces):
            with self._keeping():
                self._books.ahead(layer + 1)
        return in_program(used, piece) if self.stand_in_pieces else experts

    def _used(
        self, wait: AwaitInfo, layer: int, experts: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[float] | None]:
        """Entries of the cache for what a layer chose, and the router's weights where they are known."""
        if not self.stand_in_pieces or self.arena is None or self.cache is None:
            return experts, None
        top_k = max(1, self.manifest.experts_per_token)
        weights = choice_weights(wait, len(experts) // top_k, top_k, self.arena.view())
        assert weights is not None  # checked with the plan
        light = [e for e, share in largest_shares(experts, weights).items() if share < self.plan.stand_ins]
        return self.cache.with_stand_ins(layer, experts, frozenset(light)), weights.ravel().tolist()

    def _guess(self, program: ProgramInfo, number: int, layer: int, experts: Sequence[int]) -> None:
        """Reads what the next layer will probably want, behind what this one waits for."""
        if self.guess is None or self.arena is None:
            return
        self.guess.learn(layer, experts)
        tokens = len(experts) // max(1, self.manifest.experts_per_token)
        likely = self.guess.guess(program, number, tokens, self.arena.view(), self.plan.stand_ins)
        chosen = self._books.guessed(layer + 1, likely) if likely else []
        if chosen and self.guess.worth_reading(layer + 1, chosen):
            self._books.read_guessed(layer + 1, chosen)

    def end(self) -> None:
        """The native call is over: what it used may go, what the next one needs first is read."""
        if not self._torn:
            with self._keeping():
                self._books.end()
            counters = self._reader.counters
            message = self._watch.observe(counters.bytes, counters.busy_s)
            if message is not None:
                # The slower the disk, the less of a step is left for reads that nobody waits for. Where tokens depend
                # on what is in memory, that must not depend on the disk.
                if not self.stand_in_pieces:
                    self._books.most_guesses = min(1, self._books.most_guesses)
                self.tell(message)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Round every change of the books: what is left by an exception is torn."""
        self._torn = True
        yield
        self._torn = False

    def report(self) -> StreamReport:
        """What has happened so far."""
        plan, reads = self.plan, self._reader.counters
        cached = self.cache.counters if self.cache else CacheCounters()
        guessed = self.guess.counters if self.guess else GuessCounters()
        return StreamReport(
            budget_bytes=plan.budget_bytes,
            resident_bytes=sum(self.pieces[n].bytes for n in self.resident),
            window_bytes=plan.window_bytes,
            expert_bytes=plan.expert_bytes,
            other_bytes=plan.other_bytes,
            read_bytes=reads.bytes,
            disk_s=reads.busy_s,
            stall_s=self.stall_s,
            retries=reads.retries,
            expert_lookups=cached.lookups,
            expert_hits=cached.hits,
            direct=self._reader.direct,
            guesses_read=guessed.read,
            guesses_right=guessed.right,
            stand_in_share=plan.stand_ins,
            stand_ins=cached.stand_ins,
            stand_in_hits=cached.stand_in_hits,
        )

    def record(self, on: bool) -> tuple[list[tuple[str, float, float, int]], list[tuple[str, float, float]]]:
        """Begins or ends to note each read and wait; at the end gives them, as `Profile` keeps them."""
        jobs, stalls = self.jobs or [], self.stalls
        self.jobs, self.stalls = ([] if on else None), []
        return [(job.label, job.started_s, job.ended_s, job.nbytes) for job in jobs], stalls

    def memory_bytes(self) -> int:
        """What the weights take in memory now."""
        return self._memory.committed_bytes()

    @property
    def most_window_bytes(self) -> int:
        """The most that streamed dense pieces took so far."""
        return self._books.most_held_bytes

    def close(self) -> None:
        """Ends the threads and gives the memory back."""
        if self._memory.address == 0:
            return
        self._reader.close()
        self._memory.close()

    def _new_cache(self) -> ExpertCache:
        units = [self.pieces[n].sizes for n in self.expert_pieces]
        copies = [self.pieces[n].unit for n in self.stand_in_pieces]
        return ExpertCache(
            units, self.plan.expert_bytes, policy=self.plan.policy, scope=self.plan.scope, stand_in_bytes=copies,
            pinned=self.plan.pinned,
        )  # fmt: skip

    def _wait(self, jobs: list[ReadJob], label: str) -> None:
        if not jobs:
            return
        started_s = time.perf_counter()
        try:
            for job in jobs:
                job.wait()
        finally:
            ended_s = time.perf_counter()
            self.stall_s += ended_s - started_s
            if self.jobs is not None:
                self.stalls.append((label, started_s, ended_s))

    def _finished(self, job: ReadJob) -> None:
        if self.jobs is not None:
            self.jobs.append(job)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
