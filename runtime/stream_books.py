"""The books of streamed weights: what is in memory, what is on its way, what goes to make room.

`StreamBooks` takes what a program comes to (a dense piece, the experts of a layer, rows of a table) and gives the reads
that must end before it may go on. It submits those and others ahead of them, and gives memory back.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import RuntimeDiagnostic
from runtime.expert_cache import Entry, ExpertCache
from runtime.memory import Reservation
from runtime.page_pool import PagePool
from runtime.piece_info import PAGE_BYTES, PieceInfo
from runtime.stand_ins import stand_in
from runtime.streamed_pieces import StreamedPieces
from runtime.weight_reader import ReadJob, WeightReader


class StreamBooks:
    """What is in memory, and what is on its way. Used by one thread at a time."""

    def __init__(
        self,
        streamed: StreamedPieces,
        cache: ExpertCache | None,
        reader: WeightReader,
        memory: Reservation,
        pool: PagePool,
    ) -> None:
        self._reader, self._memory, self._pool = reader, memory, pool
        self._pieces, self._plan, self.cache = streamed.pieces, streamed.plan, cache
        self._resident = streamed.resident
        self._expert_pieces, self._stand_in_pieces = streamed.experts, streamed.stand_ins
        self._order = [n for n, p in enumerate(self._pieces) if p.kind == "dense" and n not in self._resident]
        self._cursor = 0  # in `_order`: what is read next
        self._begun = 0  # bytes of it that are read, or on their way
        self._request_bytes = max(PAGE_BYTES, self._plan.request_bytes // PAGE_BYTES * PAGE_BYTES)
        self._held: dict[int, list[ReadJob]] = {}
        self._held_bytes = 0
        self.most_held_bytes = 0
        self._live: dict[int, None] = {}  # waited for in this call, not done with
        self._experts: dict[Entry, ReadJob] = {}
        self.most_guesses = self._plan.guesses
        self._tables = [p for n, p in enumerate(self._pieces) if p.kind == "rows" and n not in self._resident]
        self._pages: dict[int, ReadJob] = {}  # first byte of a page of a table

    # -- dense pieces

    def dense(self, piece: int, done: Sequence[int]) -> list[ReadJob]:
        """`piece` is needed, `done` are not any more."""
        self._done(done)
        if piece not in self._held or any(job.fault for job in self._held[piece]):
            # The call before ended early, or a read failed: begin again from here.
            for other in [n for n in self._held if n not in self._live or n == piece]:
                self._drop(other)
            self._cursor, self._begun = self._order.index(piece), 0
        self._live[piece] = None
        self._fill(needed=piece)
        return [job for job in self._held[piece] if not job.done or job.fault is not None]

    def _done(self, pieces: Sequence[int]) -> None:
        for piece in pieces:
            self._live.pop(piece, None)
            if piece in self._held:
                self._drop(piece)

    def _drop(self, piece: int) -> None:
        for job in self._held.pop(piece):
            _settle(job)
        nbytes = self._pieces[piece].bytes
        if piece == self._order[self._cursor] and self._begun:
            nbytes, self._begun = self._begun, 0
        self._pool.give(self._pieces[piece].offset, nbytes)
        self._held_bytes -= nbytes

    def _fill(self, needed: int = -1) -> None:
        """Reads ahead as far as the window takes, parts of a piece also; all of `needed` in any case."""
        while True:
            piece = self._order[self._cursor]
            if piece in self._held and not self._begun:
                return  # all that is streamed fits into the window
            info = self._pieces[piece]
            nbytes = info.bytes - self._begun
            if piece != needed:
                room = self._plan.window_bytes - self._held_bytes
                if nbytes > room:
                    nbytes = room // self._request_bytes * self._request_bytes
                if nbytes <= 0:
                    return
            place = (info.offset + self._begun, nbytes)
            self._pool.take_back(*place)
            self._held.setdefault(piece, []).append(self._reader.submit([place], info.origin))
            self._held_bytes += nbytes
            self.most_held_bytes = max(self.most_held_bytes, self._held_bytes)
            self._begun += nbytes
            if self._begun == info.bytes:
                self._cursor, self._begun = (self._cursor + 1) % len(self._order), 0

    def end(self) -> None:
        """The call is over."""
        self._done(list(self._live))
        if self._order and not any(job.fault for jobs in self._held.values() for job in jobs):
            self._fill()

    # -- experts

    def pinned(self) -> list[ReadJob]:
        """Reads the experts that never leave."""
        return [self._submit(layer, expert, urgent=False) for layer, expert in self._plan.pinned]

    def experts(
        self, layer: int, ids: Sequence[int], done: Sequence[int], weights: Sequence[float] | None = None
    ) -> list[ReadJob]:
        """The experts that a layer uses, or their stand-ins, as entries of the cache; `weights` of the router."""
        assert self.cache is not None
        self._done(done)
        if self._order:
            self._fill()
        hits, misses = self.cache.lookup(layer, ids, weights)
        self._give_up(self.cache.admit(layer, misses))
        waiting = []
        for expert in (*hits, *misses):
            job = self._experts.get((layer, expert))
            if job is None or job.fault is not None:
                job = self._submit(layer, expert, urgent=True)
            if not job.done:
                waiting.append(job)
        return waiting

    def ahead(self, layer: int) -> None:
        """Reads the experts of a layer that is sure to use them all, as many as fit beside those in use."""
        assert self.cache is not None
        info = self._pieces[self._expert_pieces[layer]]
        before = self._pieces[self._expert_pieces[layer - 1]]
        capacity = self.cache.capacity_bytes // (len(self._expert_pieces) if self._plan.scope == "layer" else 1)
        room = capacity - (before.bytes if self._plan.scope == "global" else 0)
        room -= self.cache.pinned_bytes(but=(layer - 1, layer))
        missing = missing_in(info, layer, self.cache, room)
        self._give_up(self.cache.admit(layer, missing))
        for expert in missing:
            if self.cache.is_resident(layer, expert):
                self._submit(layer, expert, urgent=False)

    def guessed(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Of experts that the layer will probably want: those to be read now, as they are missing and there is room."""
        assert self.cache is not None
        missing = [expert for expert in experts if not self.cache.is_resident(layer, expert)]
        largest = self._pieces[self._expert_pieces[layer]].unit
        return missing[: min(self.most_guesses, max(0, self.cache.room_ahead(layer)) // largest)]

    def read_guessed(self, layer: int, experts: Sequence[int]) -> None:
        """Reads them behind all that is waited for."""
        assert self.cache is not None
        self._give_up(self.cache.admit(layer, experts))
        for expert in experts:
            self._submit(layer, expert, urgent=False)

    def resize(self, nbytes: int) -> None:
        """The cache has so much from now on; what it gives up goes to the system."""
        assert self.cache is not None
        gone = self.cache.resize(nbytes)
        self._give_up(gone)
        if gone:
            self._pool.clear()

    def _place(self, entry: Entry) -> tuple[int, int]:
        """(offset, bytes) of an expert or a stand-in."""
        layer, expert = entry
        if expert >= 0:
            info = self._pieces[self._expert_pieces[layer]]
        else:
            info, expert = self._pieces[self._stand_in_pieces[layer]], stand_in(expert)
        return info.place(expert)

    def _submit(self, layer: int, expert: int, *, urgent: bool) -> ReadJob:
        """Reads an expert."""
        place = self._place((layer, expert))
        self._pool.take_back(*place)
        piece = (self._expert_pieces if expert >= 0 else self._stand_in_pieces)[layer]
        label = f"{self._pieces[piece].origin}.{expert if expert >= 0 else stand_in(expert)}"
        job = self._experts[layer, expert] = self._reader.submit([place], label, urgent=urgent)
        return job

    def _give_up(self, entries: Sequence[Entry]) -> None:
        """Their pages go to what is read next."""
        for entry in entries:
            job = self._experts.pop(entry, None)
            if job is not None:
                _settle(job)
            self._pool.give(*self._place(entry))

    def forget(self) -> None:
        """Begins anew: gives back all that does not stay."""
        self._reader.drain()
        self._pool.clear()
        for number, piece in enumerate(self._pieces):
            if number not in self._resident:
                self._memory.discard(piece.offset, piece.bytes)
        for book in (self._held, self._live, self._experts, self._pages):
            book.clear()
        self._held_bytes = self._cursor = self._begun = 0

    # -- tables

    def rows(self, ids: Sequence[int]) -> list[ReadJob]:
        """The pages that hold these rows."""
        waiting: list[ReadJob] = []
        for table in self._tables:
            wanted = _pages_of(table, ids)
            if (len(self._pages) + len(wanted)) * PAGE_BYTES > self._plan.rows_bytes:
                self._forget_rows(keep=frozenset(wanted))
            missing = [page for page in wanted if (job := self._pages.get(page)) is None or job.fault is not None]
            if missing:
                job = self._reader.submit(_ranges(missing), table.origin, urgent=True)
                self._pages.update(dict.fromkeys(missing, job))
            waiting += [self._pages[page] for page in wanted if not self._pages[page].done]
        return list(dict.fromkeys(waiting))

    def _forget_rows(self, keep: frozenset[int]) -> None:
        gone = sorted(page for page in self._pages if page not in keep)
        for page in gone:
            _settle(self._pages.pop(page))
        for start, size in _ranges(gone):
            self._memory.discard(start, size)


def missing_in(piece: PieceInfo, layer: int, cache: ExpertCache, room: int) -> list[int]:
    """The first experts of a layer that are not in memory and fit into `room` bytes together with those that are."""
    found: list[int] = []
    room -= sum(piece.place(e)[1] for e in range(piece.count) if cache.is_resident(layer, e))
    for expert in range(piece.count):
        if not cache.is_resident(layer, expert):
            room -= piece.place(expert)[1]
            if room < 0:
                break
            found.append(expert)
    return found


def _settle(job: ReadJob) -> None:
    """Waits until nothing writes to the job's memory any more, however it ended."""
    try:
        job.wait()
    except RuntimeDiagnostic:
        pass  # whoever needed it has been told; its memory is given back now


def _pages_of(table: PieceInfo, ids: Sequence[int]) -> list[int]:
    """First bytes of the pages that hold rows `ids`, ascending."""
    pages: dict[int, None] = {}
    for row in sorted(dict.fromkeys(ids)):
        first = table.offset + row * table.unit
        start = first // PAGE_BYTES * PAGE_BYTES
        pages.update(dict.fromkeys(range(start, first + table.unit, PAGE_BYTES)))
    return list(pages)


def _ranges(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring pages as (offset, bytes)."""
    ranges: list[tuple[int, int]] = []
    for page in pages:
        if ranges and sum(ranges[-1]) == page:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + PAGE_BYTES)
        else:
            ranges.append((page, PAGE_BYTES))
    return ranges
