"""Every value op of the tile level: native code gives the bits that its meaning says, on three kinds of CPU.

One module holds a kernel for each op, element and number of lanes. All pairs of special and random numbers go through
each; some blocks also go through the tile interpreter, whose loop, loads and stores are then the same kernel's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.intrinsics import required_features
from codegen.llvm.instructions import INSTRUCTIONS, Instruction, InstructionSet
from codegen.llvm.lower_kernel import lower_kernel
from codegen.llvm.lowering import LOWERINGS, lowering
from ir.builder import Builder
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, F64, I8, I32, I64, U8, PlainFormat
from ir.op_def import OPS
from ir.ops import plan, tile, tile_convert, tile_lanes, tile_packed, tile_products
from ir.ops.builtin import FuncOp, ReturnOp
from ir.tile_interpreter import interpret_kernel
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels
from tests.codegen.tile_cases import Case, all_cases

# What is left out of the host decides which instructions an op may be issued as, see codegen/llvm/instructions.py.
TARGETS: dict[str, tuple[str, ...]] = {"host": (), "avx2": ("avx512",), "sse": ("avx", "fma", "f16c")}
COMPUTING = [module.__name__ for module in (tile, tile_convert, tile_lanes, tile_packed, tile_products)]
WORDS = 48  # numbers of a pool; all pairs of them go through a kernel, and pairs of pairs for three operands


@cache
def cases(target: str) -> list[Case]:
    """Every width on the host; the others take one narrow, one that fits a register there and one of several."""
    found = all_cases(with_f16="f16c" not in TARGETS[target])
    return [c for c in found if target == "host" or c.lanes in (1, 4, 16)]


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> Iterator[tuple[str, NativeKernels]]:
    with native_kernels([c.kernel for c in cases(request.param)], host_target(TARGETS[request.param])) as kernels:
        yield request.param, kernels


SPECIAL: dict[PlainFormat, tuple[float, ...]] = {
    F32: (
        0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -2.5, 127.5, 8388607.5, 2147483647.0, 3.4e38, -3.4e38, 1e-38, 1e-40, -1e-45,
        1.17549435e-38, float("inf"), float("-inf"), float("nan"), 1.00390625, 1.01171875, 65520.0,
    ),
    F64: (
        0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -2.5, 2147483647.5, 1e308, -1e308, 5e-324, 2.2250738585072014e-308, 1e-310,
        float("inf"), float("-inf"), float("nan"), 1.0000000596046448, 2.0**53 + 2,
    ),
    BF16: (0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-38, 1e-39, float("inf"), float("-inf"), float("nan")),
    F16: (0.0, -0.0, 1.0, -1.0, 65504.0, 6e-8, -6e-5, float("inf"), float("-inf"), float("nan")),
    I32: (0, 1, -1, 2, 31, 32, 127, 128, -128, 255, 256, 65535, 2**31 - 1, -(2**31), -(2**31) + 1),
    I64: (0, 1, -1, 2, 63, 64, 127, 255, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, -(2**63)),
    I8: (0, 1, -1, 127, -128),
    U8: (0, 1, 127, 128, 255),
}  # fmt: skip
# Near ties of bf16 rounding: odd and even upper halves, a bit above, at and below the half; NaN whose bits all lie low.
_TIES = np.array(
    [0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x7F7FFFFF, 0xFF7F8000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000],
    np.uint32,
).view(np.float32)


def pool(element: PlainFormat, bits: Sequence[int]) -> np.ndarray:
    """Special numbers, then `bits` read as numbers, then numbers of random bits and of everyday size."""
    random = np.random.default_rng([*bits, zlib.crc32(str(element).encode())])
    special = np.array(SPECIAL[element], np.float64 if element.is_float else element.dtype).astype(element.dtype)
    if element == F32:
        special = np.concatenate([special, _TIES])
    given_bits = np.array(bits, np.uint64).view(element.dtype)[:: 8 // element.dtype.itemsize]
    any_bits = random.integers(0, 256, (WORDS, element.dtype.itemsize), np.uint8).view(element.dtype)[:, 0]
    usual = (random.standard_normal(WORDS) * 100).astype(element.dtype)
    rest = np.concatenate([given_bits, np.stack([any_bits, usual], 1).reshape(-1)])
    return random.permutation(np.concatenate([special, rest])[:WORDS])


def operands(case: Case, bits: Sequence[int]) -> list[np.ndarray]:
    """All pairs of the pools; a third operand is a pool in another order."""
    shares = case.share or (1,) * len(case.inputs)
    arrays = []
    for i, (element, share) in enumerate(zip(case.inputs, shares, strict=True)):
        numbers = pool(element, bits)
        orders = (np.repeat(numbers, WORDS), np.tile(numbers, WORDS), np.roll(np.repeat(numbers, WORDS), 7 * WORDS + 5))
        arrays.append(np.tile(orders[i % 3], share))
    return [np.ascontiguousarray(a) for a in case.domain(*arrays)]


def same_bits(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """bool per element: equal bit by bit; any NaN equals any other."""
    if got.dtype.kind not in "fV":
        return got == want
    words = f"u{got.dtype.itemsize}"
    return (got.view(words) == want.view(words)) | (np.isnan(got) & np.isnan(want))


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign, as the bf16 instructions take and give them."""
    smallest = np.float32(2.0**-126)
    return np.where(np.abs(x.astype(np.float32)) < smallest, np.copysign(np.float32(0), x.astype(np.float32)), x)


def flushing_dot2(acc: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """tile.dot2 without subnormal numbers anywhere."""
    a, b = flushed(a).astype(np.float64), flushed(b).astype(np.float64)
    total = flushed(acc)
    for part in (1, 0):
        total = flushed((total.astype(np.float64) + a[part::2] * b[part::2]).astype(np.float32))
    return total


def unfused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """tile.fma where there is no such instruction."""
    return a * b + c


def unfused_dot2(acc: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float32), b.astype(np.float32)
    return (acc + a[1::2] * b[1::2]) + a[0::2] * b[0::2]


def meanings(case: Case, target: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the case may give on the target: each element is that of one of these."""
    with np.errstate(all="ignore"):
        exact = [case.meaning(*arrays)]
        if case.group == "fma" and target == "sse":
            return [unfused(*arrays)]
        if case.group == "dot2" and target == "sse":
            return [unfused_dot2(*arrays)]
        if case.group == "dot2" and target == "host":
            return [*exact, flushing_dot2(*arrays)]
        if case.group == "to_bf16" and target == "host":
            return [*exact, case.meaning(flushed(arrays[0]))]
        return exact


def complain(case: Case, out: np.ndarray, arrays: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> str:
    """Where `out` is first not what one of `wanted` says; nothing when it is everywhere."""
    with np.errstate(invalid="ignore"):
        good = np.any([same_bits(out, want) for want in wanted], axis=0)
    if good.all():
        return ""
    at = int(np.argmin(good))
    shown = [a[at * len(a) // len(out) : (at + 1) * len(a) // len(out)] for a in arrays]
    return f"{case}: {(~good).sum()} differ, first at {at}: {shown} gives {out[at]}, not {[w[at] for w in wanted]}"


def native_complaints(compiled: tuple[str, NativeKernels], bits: Sequence[int]) -> list[str]:
    target, kernels = compiled
    found = []
    for case in cases(target):
        with np.errstate(all="ignore"):
            arrays = operands(case, bits)
        out = case.outputs(WORDS * WORDS)
        kernels.run(case.name, *arrays, out, WORDS * WORDS // case.lanes)
        found.append(complain(case, out, arrays, meanings(case, target, arrays)))
    return [f for f in found if f]


def test_native_code_means_what_the_ops_say(compiled: tuple[str, NativeKernels]) -> None:
    assert native_complaints(compiled, []) == []


@settings(max_examples=4)
@given(bits=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_native_code_means_what_the_ops_say_of_any_bits(compiled: tuple[str, NativeKernels], bits: list[int]) -> None:
    assert native_complaints(compiled, bits) == []


def test_the_interpreter_means_what_the_ops_say() -> None:
    """Through the kernels' loops, loads and stores: 32 lanes of each."""
    found = []
    for case in cases("host"):
        out = case.outputs(32)
        with np.errstate(all="ignore"):
            arrays = [a.reshape(WORDS * WORDS // 16, -1)[3:13:9].reshape(-1) for a in operands(case, [1])]
            interpret_kernel(case.kernel, [*arrays, out, 32 // case.lanes])
            found.append(complain(case, out, arrays, [case.meaning(*arrays)]))
    assert [f for f in found if f] == []


def test_the_cases_meet_every_value_op() -> None:
    met = {type(op) for case in cases("host") for op in case.kernel.walk()}
    wanted = {cls for cls in LOWERINGS if cls.__module__ in COMPUTING}
    assert wanted - met == set()
    named = {name for name in OPS if name.startswith("tile.")}
    assert named - {"tile.yield"} == {cls.name for cls in LOWERINGS}


def test_f16_without_its_instruction_is_refused() -> None:
    case = next(c for c in cases("host") if c.name == "cast_f16_f32_4")
    features = host_target(TARGETS["sse"]).llvm_features
    with pytest.raises(DiagnosticError, match=r"'tile\.cast' between f32 and f16 needs the CPU feature f16c"):
        lower_kernel(case.kernel, InstructionSet(features), {}, "#0")


def test_an_op_of_another_level_is_refused() -> None:
    kernel = FuncOp.create("kernel", [])
    builder = Builder.at_end(kernel.block)
    builder.insert(plan.BarrierOp())
    builder.insert(ReturnOp())
    with pytest.raises(DiagnosticError, match=r"no lowering of plan.barrier to LLVM; have tile.add, tile.and,"):
        lower_kernel(kernel, InstructionSet(frozenset()), {}, "#0")


def test_a_second_lowering_of_an_op_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tile.add is lowered by codegen.llvm.tile_lowerings already"):
        lowering(tile.AddOp)(lambda emitter, op: None)


@pytest.mark.parametrize("entry", INSTRUCTIONS, ids=lambda e: e.intrinsic)
def test_an_instruction_is_issued_where_its_features_are(entry: Instruction) -> None:
    """Each entry is found by its op on its features, not with one missing, and its intrinsic may then be used."""
    assert InstructionSet(entry.features).find(entry.op, entry.element, entry.lanes) == entry
    for feature in entry.features:
        assert InstructionSet(entry.features - {feature}).find(entry.op, entry.element, entry.lanes) is None
    named = {"tile.dot2": "dot2", "tile.dot4": "dot4", "tile.cast": "cast_f32_bf16"}[entry.op]
    case = next(c for c in cases("host") if c.name == f"{named}_{entry.lanes}")
    text = lower_kernel(case.kernel, InstructionSet(entry.features), {}, "#0")
    assert f"@{entry.intrinsic}(" in text
    assert entry.intrinsic not in lower_kernel(case.kernel, InstructionSet(frozenset()), {}, "#0")
    assert frozenset(required_features(entry.intrinsic) or ()) <= entry.features
