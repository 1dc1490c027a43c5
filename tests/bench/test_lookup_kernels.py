"""The kernels that the comparison of lookups and byte products times: both give what the weights are worth."""

from __future__ import annotations

import numpy as np
import pytest

from bench.lookup_kernels import (
    X_GROUP,
    byte_kernel,
    byte_operands,
    lookup_kernel,
    lookup_operands,
    make_case,
)
from ir.ops.builtin import FuncOp
from ir.tile_interpreter import interpret_kernel


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_both_ways_give_the_same_bits(bits: int) -> None:
    case = make_case(64, 128, bits, vectors=1 + bits % 2)

    def result(kernel: FuncOp, operands: list[np.ndarray]) -> np.ndarray:
        y = np.zeros(case.n, np.float32)
        interpret_kernel(kernel, [*(a.reshape(-1) for a in operands), y, 1, 0], threads=2)
        return y

    by_bytes = result(byte_kernel(case), byte_operands(case))
    by_lookup = result(lookup_kernel(case), lookup_operands(case))
    assert by_bytes.tobytes() == by_lookup.tobytes()
    x = case.x.astype(np.float64) * np.repeat(case.x_scales, X_GROUP)
    wanted = case.packed.format.unpack(case.packed).astype(np.float64) @ x
    assert np.abs(by_bytes - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_saturated_activations_do_not_carry() -> None:
    """All activations at the end of their range and all codes at the largest: the sums of both halves of a word."""
    case = make_case(32, 128, 3, vectors=1)
    for value in (127, -127):
        case.x[:] = value
        for code in (0x00, 0xFF):
            case.packed.codes[:] = code
            y = [np.zeros(case.n, np.float32) for _ in range(2)]
            for out, kernel, operands in (
                (y[0], byte_kernel(case), byte_operands(case)),
                (y[1], lookup_kernel(case), lookup_operands(case)),
            ):
                interpret_kernel(kernel, [*(a.reshape(-1) for a in operands), out, 1, 0])
            assert y[0].tobytes() == y[1].tobytes() and y[0].any()
