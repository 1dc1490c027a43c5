"""LLVM IR text of the calibration's micro-benchmarks, for the features at hand.

Each kernel is `i64 NAME(ptr data, i64 count)` and is called by several threads at once: `read` sums `count` bytes (a
multiple of 4096) with a prefetch 4 KiB ahead; the peak kernels run `count` rounds of independent accumulators over
registers. The result depends on all the work, so none of it can be left out.

`barrier_kernel` is apart: `count` times all threads wait for each other, as the threads of a generated step do (one
atomic addition on arrival, the last one starts a new generation, the others spin with pauses). `data` holds the
number of threads (i64), and at 64 and 128 two words that are zero at first.
"""

from __future__ import annotations

from dataclasses import dataclass

from hw_targets.cpu_features import vector_bits

_LINES = 8  # cache lines that the read kernel takes in a round
_PREFETCH_AHEAD = 4096


@dataclass(frozen=True)
class Kernel:
    """`operations` are FLOPs (or integer operations) of one round, 0 for the read kernel."""

    name: str
    ir_text: str
    operations: int


@dataclass(frozen=True)
class _Dot:
    """One multiply-add instruction: accumulator and operand types, the call with {acc}, its declaration, its work."""

    accumulator: str
    operand: str
    call: str
    declaration: str
    operations: int


def kernels(arch: str, features: frozenset[str]) -> list[Kernel]:
    """`read`, `f32`, and `bf16` and `i8` where the CPU has dot products for them."""
    found = [Kernel("read", _read_kernel(features), 0)]
    accumulators = 24 if features & {"avx512f", "neon"} else 12
    for name, dot in (("f32", _f32(arch, features)), ("bf16", _bf16(arch, features)), ("i8", _i8(arch, features))):
        if dot is not None:
            found.append(Kernel(name, _peak_kernel(name, dot, accumulators), dot.operations * accumulators))
    return found


def barrier_kernel(arch: str) -> Kernel:
    """The kernel named `barrier`."""
    pause = "llvm.aarch64.hint(i32 1)" if arch == "aarch64" else "llvm.x86.sse2.pause()"
    declared = "llvm.aarch64.hint(i32)" if arch == "aarch64" else "llvm.x86.sse2.pause()"
    lines = [
        f"declare void @{declared}",
        "define i64 @barrier(ptr %data, i64 %count) {",
        "entry:",
        "  %threads64 = load i64, ptr %data, align 8",
        "  %threads = trunc i64 %threads64 to i32",
        "  %arrived = getelementptr i8, ptr %data, i64 64",
        "  %generation = getelementptr i8, ptr %data, i64 128",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [ 0, %entry ], [ %i1, %next ]",
        "  %seen = load atomic i32, ptr %generation acquire, align 4",
        "  %before = atomicrmw add ptr %arrived, i32 1 acq_rel",
        "  %after = add i32 %before, 1",
        "  %last = icmp eq i32 %after, %threads",
        "  br i1 %last, label %release, label %spin",
        "release:",
        "  store atomic i32 0, ptr %arrived monotonic, align 4",
        "  %following = add i32 %seen, 1",
        "  store atomic i32 %following, ptr %generation seq_cst, align 4",
        "  br label %next",
        "spin:",
        "  %now = load atomic i32, ptr %generation acquire, align 4",
        "  %changed = icmp ne i32 %now, %seen",
        "  br i1 %changed, label %next, label %rest",
        "rest:",
        f"  call void @{pause}",
        "  br label %spin",
        "next:",
        "  %i1 = add i64 %i, 1",
        "  %more = icmp ult i64 %i1, %count",
        "  br i1 %more, label %loop, label %done",
        "done:",
        "  ret i64 %i1",
        "}",
        "",
    ]
    return Kernel("barrier", "\n".join(lines), 1)


def _f32(arch: str, features: frozenset[str]) -> _Dot:
    lanes = 16 if "avx512f" in features else 8 if "avx" in features else 4
    vector = f"<{lanes} x float>"
    # fmuladd becomes one instruction where there is one, else a multiplication and an addition.
    name = f"llvm.fmuladd.v{lanes}f32"
    call = f"call {vector} @{name}({vector} %a, {vector} %b, {vector} {{acc}})"
    return _Dot(vector, vector, call, f"declare {vector} @{name}({vector}, {vector}, {vector})", 2 * lanes)


def _bf16(arch: str, features: frozenset[str]) -> _Dot | None:
    if "avx512bf16" in features:
        return _dot_of("llvm.x86.avx512bf16.dpbf16ps.512", "<16 x float>", "<32 x bfloat>", 64)
    if arch == "aarch64" and "bf16" in features:
        return _dot_of("llvm.aarch64.neon.bfdot.v4f32.v8bf16", "<4 x float>", "<8 x bfloat>", 16)
    return None


def _i8(arch: str, features: frozenset[str]) -> _Dot | None:
    if "avx512vnni" in features:
        return _dot_of("llvm.x86.avx512.vpdpbusd.512", "<16 x i32>", "<64 x i8>", 128)
    if "avxvnni" in features:
        return _dot_of("llvm.x86.avx512.vpdpbusd.256", "<8 x i32>", "<32 x i8>", 64)
    if arch == "aarch64" and "dotprod" in features:
        return _dot_of("llvm.aarch64.neon.sdot.v4i32.v16i8", "<4 x i32>", "<16 x i8>", 32)
    return None


def _dot_of(name: str, accumulator: str, operand: str, operations: int) -> _Dot:
    call = f"call {accumulator} @{name}({accumulator} {{acc}}, {operand} %a, {operand} %b)"
    declaration = f"declare {accumulator} @{name}({accumulator}, {operand}, {operand})"
    return _Dot(accumulator, operand, call, declaration, operations)


def _peak_kernel(name: str, dot: _Dot, accumulators: int) -> str:
    """Accumulators start as zero; the operands come from memory, so that nothing is known when it is compiled."""
    indices = range(accumulators)
    lanes = dot.accumulator.split()[0].lstrip("<")
    phis = [f"  %p{i} = phi {dot.accumulator} [ zeroinitializer, %entry ], [ %n{i}, %loop ]" for i in indices]
    work = [f"  %n{i} = {dot.call.format(acc=f'%p{i}')}" for i in indices]
    floating = "float" in dot.accumulator
    add = "fadd" if floating else "add"
    sums = [f"  %s{i} = {add} {dot.accumulator} %{'n0' if i == 1 else f's{i - 1}'}, %n{i}" for i in indices if i]
    last = f"%s{accumulators - 1}"
    bits = f"  %bits = bitcast {dot.accumulator} {last} to <{lanes} x i32>"
    return "\n".join(
        [
            dot.declaration,
            f"define i64 @{name}(ptr %data, i64 %count) {{",
            "entry:",
            f"  %a = load {dot.operand}, ptr %data, align 64",
            "  %next = getelementptr i8, ptr %data, i64 64",
            f"  %b = load {dot.operand}, ptr %next, align 64",
            "  br label %loop",
            "loop:",
            "  %i = phi i64 [ 0, %entry ], [ %i1, %loop ]",
            *phis,
            *work,
            "  %i1 = add i64 %i, 1",
            "  %more = icmp ult i64 %i1, %count",
            "  br i1 %more, label %loop, label %done",
            "done:",
            *sums,
            bits,
            f"  %word = extractelement <{lanes} x i32> %bits, i32 0",
            "  %wide = zext i32 %word to i64",
            "  ret i64 %wide",
            "}",
            "",
        ]
    )


def _read_kernel(features: frozenset[str]) -> str:
    """Eight 64-byte loads a round: one prefetch for each line, 4 KiB ahead, in one sequential stream.

    A sum of a line takes one, two or four registers; as many sums are kept as fit into eight.
    """
    vector = "<8 x i64>"
    sums_kept = _LINES * vector_bits(features) // 512
    phis = [f"  %p{i} = phi {vector} [ zeroinitializer, %entry ], [ %t{i}, %loop ]" for i in range(sums_kept)]
    sums = [f"%p{i}" for i in range(sums_kept)]
    work = []
    for i in range(_LINES):
        last_use = i + sums_kept >= _LINES
        result = f"%t{i % sums_kept}" if last_use else f"%n{i}"
        work += [
            f"  %o{i} = add i64 %i, {64 * i}",
            f"  %q{i} = getelementptr i8, ptr %data, i64 %o{i}",
            f"  %f{i} = getelementptr i8, ptr %q{i}, i64 {_PREFETCH_AHEAD}",
            f"  call void @llvm.prefetch.p0(ptr %f{i}, i32 0, i32 3, i32 1)",
            f"  %v{i} = load {vector}, ptr %q{i}, align 64",
            f"  {result} = xor {vector} {sums[i % sums_kept]}, %v{i}",
        ]
        sums[i % sums_kept] = result
    joins = [f"  %s{i} = xor {vector} %{'t0' if i == 1 else f's{i - 1}'}, %t{i}" for i in range(1, sums_kept)]
    return "\n".join(
        [
            "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
            f"declare i64 @llvm.vector.reduce.xor.v8i64({vector})",
            "define i64 @read(ptr %data, i64 %count) {",
            "entry:",
            "  br label %loop",
            "loop:",
            "  %i = phi i64 [ 0, %entry ], [ %i1, %loop ]",
            *phis,
            *work,
            f"  %i1 = add i64 %i, {64 * _LINES}",
            "  %more = icmp ult i64 %i1, %count",
            "  br i1 %more, label %loop, label %done",
            "done:",
            *joins,
            f"  %total = call i64 @llvm.vector.reduce.xor.v8i64({vector} %s{sums_kept - 1})",
            "  ret i64 %total",
            "}",
            "",
        ]
    )
