"""Work that threads share by who is free: numbered pieces, of which each thread takes the next that nobody has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import I32


class Tickets:
    """Numbered pieces of work that the threads of a team share by who is free.

    The pieces between two barriers are 0, 1, 2, ... without a gap. Every thread passes all of them in ascending order,
    does those whose number it `holds`, and after each `take`s another. With `ahead` it draws the number of the piece
    after that before it begins one, so that it can ask memory meanwhile for what it reads next.
    """

    def __init__(self, k: KernelBuilder, ahead: bool = False) -> None:
        self.k = k
        self.mine = k.scratch(1, I32)  # the next piece of this thread
        self.later = k.scratch(1, I32) if ahead else self.mine  # and the one after it
        self._draw(self.mine)
        if ahead:
            self._draw(self.later)

    def _draw(self, place: Buffer) -> None:
        place.store(0, self.k.ticket().from_index())

    def holds(self, number: Expr) -> Expr:
        """i1: whether this thread does the piece."""
        return self.mine.load(0).compare("eq", number.from_index())

    def next(self) -> Expr:
        """The number of the piece that this thread does next."""
        return self.mine.load(0).to_index()

    def after_next(self) -> Expr:
        """With `ahead`, the number of the one after it."""
        return self.later.load(0).to_index()

    def take(self) -> None:
        """The next piece that nobody has."""
        if self.later is not self.mine:
            self.mine.store(0, self.later.load(0))
        self._draw(self.later)

    @contextmanager
    def piece(self, number: Expr) -> Iterator[None]:
        """Runs the body on the thread that holds the piece, which then takes another."""
        with self.k.when(self.holds(number)):
            yield
            self.take()
