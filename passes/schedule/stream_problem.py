"""Data that a plan copies: a name, bytes, a home, and how they are brought. Emitters are given these and write
slots and transfers for them (`passes.schedule.stream_writer`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Named data of `nbytes` at home in a tier or storage. With `over` (a link or storage) they are copied to the
    unit's tier for each use, without it they are read where they lie.

    `block`, `depth` and `pinned` are those of the requests, `stream` tells queues over one link apart.
    """

    name: str
    nbytes: int
    home: str
    over: str = ""
    stream: str = ""
    block: int = 0
    depth: int = 1
    pinned: bool = True
