"""Strips: every element lies where the layout's docstring says, padding is zero, unpack undoes pack."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen.strips import pack_strips, strip_count, strip_rows, unpack_strips
from ir.types import Layout

ROWS, PACKS, INTERLEAVES = (
    st.sampled_from([1, 2, 4, 16, 32]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 3]),
)
LAYOUTS = st.builds(Layout, ROWS, PACKS, INTERLEAVES)
DTYPES = st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16, np.int8])


def matrix_of(n: int, k: int, dtype) -> np.ndarray:
    """No element is zero, so that padding shows."""
    return ((np.arange(n * k) % 97) + 1).reshape(n, k).astype(dtype)


@given(LAYOUTS, DTYPES, st.integers(1, 40), st.integers(1, 40))
def test_round_trip(layout, dtype, parts, k):
    n = parts * layout.interleave
    matrix = matrix_of(n, k, dtype)
    stored = pack_strips(matrix, layout)
    rows, columns = layout.padded(n, k)
    assert stored.size == rows * columns and stored.dtype == matrix.dtype
    assert np.array_equal(unpack_strips(stored, layout, n, k), matrix)
    assert np.count_nonzero(stored) == matrix.size  # the padding, and only the padding, is zero


@given(LAYOUTS, st.integers(1, 30), st.integers(1, 30))
def test_place_of_every_element(layout, parts, k):
    """The formula of ir.types.Layout, element by element."""
    n = parts * layout.interleave
    matrix = matrix_of(n, k, np.float32)
    flat = pack_strips(matrix, layout).reshape(-1)
    rows, columns = layout.padded(n, k)
    part_rows, padded_part = n // layout.interleave, rows // layout.interleave
    for part in range(layout.interleave):
        for r in range(padded_part):
            strip = r // layout.rows * layout.interleave + part
            for c in range(columns):
                groups = columns // layout.pack
                row = (strip * groups + c // layout.pack) * layout.rows + r % layout.rows
                at = row * layout.pack + c % layout.pack
                inside = r < part_rows and c < k
                assert flat[at] == (matrix[part * part_rows + r, c] if inside else 0)


def test_worked_example():
    """2 rows a strip, 2 columns a pack, gate (1x) and up (2x) alternating."""
    gate_up = np.array([[11, 12, 13], [14, 15, 16], [21, 22, 23], [24, 25, 26]], np.int8)
    stored = pack_strips(gate_up, Layout(2, 2, 2)).reshape(-1).tolist()
    assert stored == [11, 12, 14, 15, 13, 0, 16, 0, 21, 22, 24, 25, 23, 0, 26, 0]


def test_strip_rows_cover_every_row_once():
    layout = Layout(16, 2, 2)
    covered = [r for s in range(strip_count(layout, 70)) for r in range(*strip_rows(layout, 70, s))]
    assert sorted(covered) == list(range(70))


def test_rows_that_do_not_interleave_are_refused():
    with pytest.raises(ValueError, match="5 rows do not divide into 2"):
        pack_strips(np.zeros((5, 4), np.float32), Layout(2, 1, 2))


def test_strided_input():
    matrix = matrix_of(10, 20, np.float32)[::2, ::2]
    layout = Layout(4, 2)
    assert np.array_equal(unpack_strips(pack_strips(matrix, layout), layout, 5, 10), matrix)
