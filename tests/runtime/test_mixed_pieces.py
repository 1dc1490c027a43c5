"""Pieces whose experts differ in size: every byte belongs to one expert, and a cache takes what each is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import RuntimeDiagnostic
from runtime.eviction import POLICIES
from runtime.expert_cache import ExpertCache
from runtime.manifest_fields import Fields
from runtime.manifest_reader import read_weights
from runtime.piece_info import PAGE_BYTES, PieceInfo
from runtime.stream_books import missing_in

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)  # pages of each expert


def piece_of(sizes: list[int]) -> PieceInfo:
    """The experts of a layer, those of one size after another."""
    found: dict[int, list[int]] = {}
    for expert, pages in enumerate(sizes):
        found.setdefault(pages * PAGE_BYTES, []).append(expert)
    classes = tuple((unit, tuple(experts)) for unit, experts in found.items())
    return PieceInfo("experts", 5 * PAGE_BYTES, sum(sizes) * PAGE_BYTES, max(found), "experts", classes)


@given(SIZES)
def test_every_byte_belongs_to_one_expert(sizes: list[int]) -> None:
    piece = piece_of(sizes)
    assert piece.count == len(sizes) and piece.sizes == tuple(pages * PAGE_BYTES for pages in sizes)
    places = sorted(piece.place(expert) for expert in range(piece.count))
    at = piece.offset
    for offset, nbytes in places:
        assert offset == at
        at += nbytes
    assert at == piece.offset + piece.bytes
    for count in range(len(sizes) + 2):
        assert piece.largest(count) == sum(sorted(sizes)[::-1][:count]) * PAGE_BYTES


@given(sizes=SIZES, policy=st.sampled_from(POLICIES), room=st.integers(0, 40), data=st.data())
def test_a_cache_holds_what_experts_are(sizes: list[int], policy: str, room: int, data: st.DataObject) -> None:
    piece = piece_of(sizes)
    cache = ExpertCache([piece.sizes], room * PAGE_BYTES, policy=policy)
    for _ in range(data.draw(st.integers(1, 12))):
        used = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3))
        _, misses = cache.lookup(0, used)
        cache.admit(0, misses)
        there = [expert for expert in range(len(sizes)) if cache.is_resident(0, expert)]
        assert cache.used_bytes == sum(piece.sizes[e] for e in there)
        assert cache.used_bytes <= max(cache.capacity_bytes, sum(piece.sizes[e] for e in dict.fromkeys(used)))
        more = missing_in(piece, 0, cache, cache.capacity_bytes)
        assert not set(more) & set(there)
        assert not more or sum(piece.sizes[e] for e in (*more, *there)) <= cache.capacity_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": [{"unit": 4096, "experts": [0, 1]}, {"unit": 8192, "experts": [1]}]}, "each once"),
        ({"classes": [{"unit": 4096, "experts": [0]}, {"unit": 8192, "experts": [2]}]}, "each once"),
        ({"classes": [{"unit": 4096, "experts": [0, 2]}, {"unit": 4097, "experts": [1]}]}, "whole pages"),
        ({"classes": [{"unit": 4096, "experts": [0]}, {"unit": 8192, "experts": [1]}]}, "those of all experts"),
        ({"kind": "dense"}, "each once"),
        ({"unit": 4096}, "those of the largest"),
        ({"classes": "x"}, "classes"),
        ({"classes": [{"unit": 0, "experts": [0]}]}, "unit"),
        ({"classes": [{"unit": 4096, "experts": "0-3"}]}, "experts"),
    ],
)
def test_classes_that_are_not_the_piece_are_refused(change: dict, message: str) -> None:
    classes = [{"unit": 4096, "experts": [0, 2]}, {"unit": 8192, "experts": [1]}]
    good = {"kind": "experts", "offset": 0, "bytes": 16384, "unit": 8192, "origin": "e", "classes": classes}
    fields = Fields({"file": "w", "bytes": 16384, "tensors": [], "pieces": [good]}, "a")
    assert read_weights(fields).pieces[0].sizes == (4096, 8192, 4096)
    fields.values["pieces"] = [good | change]
    with pytest.raises(RuntimeDiagnostic, match=message):
        read_weights(fields)
