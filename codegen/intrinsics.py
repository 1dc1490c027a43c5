"""Which `llvm.*` intrinsics generated code may use, and the CPU features each needs.

LLVM ends the whole process when it meets an intrinsic that the function's features do not cover, so IR text is
checked before it reaches LLVM: an intrinsic is allowed when it is in the generic table, or when its target-specific
entry's features are among those of the module plus those of the function that calls it (`"target-features"="+..."`,
inline or in an attribute group). Everything else is refused with the name of the function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hw_targets.cpu_features import cpu_baseline, parse_feature_string
from ir.diagnostics import DiagnosticError

# Expanded by every CPU backend into instructions or into a call of the C library's memory or mathematics functions.
_GENERIC_NAMES = """
    abs assume bitreverse bswap canonicalize ceil compiler.used convert.from.fp16 convert.to.fp16 copysign ctlz
    ctpop cttz debugtrap donothing exp exp10 exp2 expect experimental.noalias.scope.decl fabs floor fma fmuladd
    fptosi.sat fptoui.sat frexp fshl fshr get.active.lane.mask invariant.end invariant.start is.fpclass ldexp
    lifetime.end lifetime.start llrint log log10 log2 lrint masked.compressstore masked.expandload masked.gather
    masked.load masked.scatter masked.store maximum maximumnum maxnum memcpy memcpy.inline memmove memset
    memset.inline minimum minimumnum minnum nearbyint pow powi prefetch readcyclecounter readsteadycounter rint
    round roundeven sadd.sat sadd.with.overflow sideeffect sin cos smax smin smul.with.overflow sqrt ssub.sat
    ssub.with.overflow stepvector trap trunc uadd.sat uadd.with.overflow umax umin umul.with.overflow used usub.sat
    usub.with.overflow vector.deinterleave2 vector.extract vector.insert vector.interleave2
    vector.partial.reduce.add vector.reduce.add vector.reduce.and vector.reduce.fadd vector.reduce.fmax
    vector.reduce.fmaximum vector.reduce.fmin vector.reduce.fminimum vector.reduce.fmul vector.reduce.mul
    vector.reduce.or vector.reduce.smax vector.reduce.smin vector.reduce.umax vector.reduce.umin vector.reduce.xor
    vector.reverse vector.splice
"""
_GENERIC = frozenset(_GENERIC_NAMES.split())

# The few that the backends for GPUs have instructions for; they end the process on those that would be calls.
_GPU_NAMES = """
    abs assume ctlz ctpop cttz fabs fma fshl fshr masked.load masked.store rint roundeven smax smin sqrt umax umin
"""
_ON_GPUS = frozenset(_GPU_NAMES.split())

# Longest prefix wins. A prefix covers itself and names that go on with a dot after it.
_TARGET: dict[str, tuple[str, ...]] = {
    "x86.rdtsc": (),
    "x86.sse": ("sse",),
    "x86.sse2": ("sse2",),
    "x86.sse3": ("sse3",),
    "x86.ssse3": ("ssse3",),
    "x86.sse41": ("sse4.1",),
    "x86.sse42": ("sse4.2",),
    "x86.avx": ("avx",),
    "x86.avx2": ("avx2",),
    "x86.vcvtps2ph.128": ("f16c",),
    "x86.vcvtps2ph.256": ("f16c",),
    "x86.vgf2p8affineqb.128": ("gfni",),
    "x86.vgf2p8affineqb.256": ("gfni", "avx"),
    "x86.vgf2p8affineqb.512": ("gfni", "avx512f"),
    "x86.avx512.vpdpbusd.128": ("avx512vnni", "avx512vl"),
    "x86.avx512.vpdpbusd.256": ("avx512vnni", "avx512vl"),
    "x86.avx512.vpdpbusd.512": ("avx512vnni",),
    "x86.avx512.vpdpbusds.512": ("avx512vnni",),
    "x86.avx512.vpdpwssd.512": ("avx512vnni",),
    "x86.avx512.mask.vcvtps2ph.512": ("avx512f",),
    "x86.avx512.mask.vcvtph2ps.512": ("avx512f",),
    "x86.avx512.mask.cvtps2dq.512": ("avx512f",),
    "x86.avx512.mask.cvttps2dq.512": ("avx512f",),
    "x86.avx512.mask.rndscale.ps.512": ("avx512f",),
    "x86.avx512.mask.scalef.ps.512": ("avx512f",),
    "x86.avx512.mask.getexp.ps.512": ("avx512f",),
    "x86.avx512.mask.getmant.ps.512": ("avx512f",),
    "x86.avx512.mask.fixupimm.ps.512": ("avx512f",),
    "x86.avx512.rcp14.ps.512": ("avx512f",),
    "x86.avx512.rsqrt14.ps.512": ("avx512f",),
    "x86.avx512.max.ps.512": ("avx512f",),
    "x86.avx512.min.ps.512": ("avx512f",),
    "x86.avx512.vfmadd.ps.512": ("avx512f",),
    "x86.avx512.permvar.sf.512": ("avx512f",),
    "x86.avx512.permvar.si.512": ("avx512f",),
    "x86.avx512.permvar.df.512": ("avx512f",),
    "x86.avx512.permvar.di.512": ("avx512f",),
    "x86.avx512.permvar.hi.512": ("avx512bw",),
    "x86.avx512.permvar.qi.512": ("avx512vbmi",),
    "x86.avx512.vpermi2var.ps.512": ("avx512f",),
    "x86.avx512.vpermi2var.d.512": ("avx512f",),
    "x86.avx512.vpermi2var.q.512": ("avx512f",),
    "x86.avx512.vpermi2var.hi.512": ("avx512bw",),
    "x86.avx512.vpermi2var.qi.512": ("avx512vbmi",),
    "x86.avx512.pmultishift.qb.512": ("avx512vbmi",),
    "x86.avx512.pmaddw.d.512": ("avx512bw",),
    "x86.avx512.pmaddubs.w.512": ("avx512bw",),
    "x86.avx512.pmul.hr.sw.512": ("avx512bw",),
    "x86.avx512.packssdw.512": ("avx512bw",),
    "x86.avx512.packsswb.512": ("avx512bw",),
    "x86.avx512.packusdw.512": ("avx512bw",),
    "x86.avx512.packuswb.512": ("avx512bw",),
    "x86.avx512.pshuf.b.512": ("avx512bw",),
    "x86.avx512.psad.bw.512": ("avx512bw",),
    "x86.avx512bf16.dpbf16ps.128": ("avx512bf16", "avx512vl"),
    "x86.avx512bf16.dpbf16ps.256": ("avx512bf16", "avx512vl"),
    "x86.avx512bf16.dpbf16ps.512": ("avx512bf16",),
    "x86.avx512bf16.cvtneps2bf16.256": ("avx512bf16", "avx512vl"),
    "x86.avx512bf16.cvtneps2bf16.512": ("avx512bf16",),
    "x86.avx512bf16.cvtne2ps2bf16.128": ("avx512bf16", "avx512vl"),
    "x86.avx512bf16.cvtne2ps2bf16.256": ("avx512bf16", "avx512vl"),
    "x86.avx512bf16.cvtne2ps2bf16.512": ("avx512bf16",),
    "nvvm": ("ptx78",),
    "amdgcn.workitem.id.x": ("mai-insts",),
    "amdgcn.workgroup.id.x": ("mai-insts",),
    "amdgcn.dispatch.ptr": ("mai-insts",),
    "amdgcn.mbcnt": ("mai-insts",),
    "amdgcn.ds.bpermute": ("mai-insts",),
    "amdgcn.ds.swizzle": ("mai-insts",),
    "amdgcn.s.barrier": ("mai-insts",),
    "amdgcn.exp2.f32": ("mai-insts",),
    "amdgcn.mfma": ("mai-insts",),
    "aarch64.hint": (),
    "aarch64.isb": (),
    "aarch64.neon": ("neon",),
    "aarch64.neon.sdot": ("dotprod",),
    "aarch64.neon.udot": ("dotprod",),
    "aarch64.neon.usdot": ("i8mm",),
    "aarch64.neon.smmla": ("i8mm",),
    "aarch64.neon.ummla": ("i8mm",),
    "aarch64.neon.usmmla": ("i8mm",),
    "aarch64.neon.bfdot": ("neon", "bf16"),
    "aarch64.neon.bfmlalb": ("neon", "bf16"),
    "aarch64.neon.bfmlalt": ("neon", "bf16"),
    "aarch64.neon.bfmmla": ("neon", "bf16"),
    "aarch64.neon.bfcvt": ("neon", "bf16"),
    "aarch64.neon.bfcvtn": ("neon", "bf16"),
    "aarch64.neon.bfcvtn2": ("neon", "bf16"),
}

# A second set of features that gives the same instruction, in another encoding.
_ALTERNATIVE: dict[str, tuple[str, ...]] = {
    "x86.avx512.vpdpbusd.128": ("avxvnni",),
    "x86.avx512.vpdpbusd.256": ("avxvnni",),
}

_NAME = re.compile(r"@\"?llvm\.([A-Za-z0-9_.]+)")
_DEFINE = re.compile(r"^define\b[^\n]*?@(\"[^\"]*\"|[\w.$-]+)\s*\(", re.MULTILINE)
_GROUP = re.compile(r"^attributes\s+#(\d+)\s*=\s*\{([^\n]*)\}", re.MULTILINE)
_TARGET_FEATURES = re.compile(r'"target-features"\s*=\s*"([^"]*)"')
_TARGET_CPU = re.compile(r'"target-cpu"\s*=\s*"([^"]*)"')


@dataclass(frozen=True)
class FunctionText:
    """A defined function in IR text: its name, its `define` line and the text up to its closing brace."""

    name: str
    header: str
    body: str
    line: int  # 1-based line of the `define`


def functions(ir_text: str) -> Iterator[FunctionText]:
    """Every function defined in `ir_text`, in order."""
    line, counted = 1, 0
    for match in _DEFINE.finditer(ir_text):
        line += ir_text.count("\n", counted, match.start())
        counted = match.start()
        header_end = ir_text.find("\n", match.start())
        end = ir_text.find("\n}", match.start())
        header = ir_text[match.start() : header_end if header_end >= 0 else len(ir_text)]
        body = ir_text[match.start() : end if end >= 0 else len(ir_text)]
        yield FunctionText(match[1].strip('"'), header, body, line)


def required_features(intrinsic: str, triple: str = "") -> tuple[str, ...] | None:
    """Features that `intrinsic` (with or without `llvm.`) needs; None when it is in neither table of that triple."""
    generic = _ON_GPUS if triple.startswith(("nvptx", "amdgcn")) else _GENERIC
    name = intrinsic.removeprefix("llvm.")
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in _TARGET:
            return _TARGET[prefix]
        if prefix in generic:
            return ()
    return None


def check_intrinsics(ir_text: str, features: Iterable[str], *, triple: str = "x86_64-unknown-linux-gnu") -> None:
    """Raises DiagnosticError unless every function's intrinsics are allowed with `features` plus its own attributes."""
    available = frozenset(features)
    groups = {match[1]: match[2] for match in _GROUP.finditer(ir_text)}
    for function in functions(ir_text):
        # dict.fromkeys keeps the order of appearance, so the first fault reported is the first in the text.
        used = dict.fromkeys(match[1] for match in _NAME.finditer(function.body))
        if not used:
            continue
        own = available | _function_features(function.header, groups, triple)
        for intrinsic in used:
            _check_one(intrinsic, own, function, triple)


def _function_features(header: str, groups: dict[str, str], triple: str) -> frozenset[str]:
    attributes = header + " ".join(groups.get(number, "") for number in re.findall(r"#(\d+)", header))
    found: frozenset[str] = frozenset()
    for text in _TARGET_FEATURES.findall(attributes):
        found |= parse_feature_string(text)[0]
    for cpu in _TARGET_CPU.findall(attributes):
        found |= cpu_baseline(triple, cpu)
    return found


def _check_one(intrinsic: str, features: frozenset[str], function: FunctionText, triple: str) -> None:
    needed = required_features(intrinsic, triple)
    where = f"@{function.name}, line {function.line} of the LLVM IR"
    if needed is None:
        raise DiagnosticError(
            f"the intrinsic llvm.{intrinsic} is not one that generated code may use",
            where=where,
            expected="a name from the tables of codegen/intrinsics.py",
            hint="LLVM may end the process on an intrinsic that a target lacks; add it with its features",
        )
    missing = [name for name in needed if name not in features]
    alternative = _ALTERNATIVE.get(intrinsic)
    if missing and not (alternative and features.issuperset(alternative)):
        raise DiagnosticError(
            f"llvm.{intrinsic} needs the CPU feature {', '.join(missing)}, which this function is not compiled for",
            where=where,
            hint='name a target that has it, or give the function "target-features"="+' + ",+".join(missing) + '"',
        )
