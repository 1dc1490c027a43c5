"""CPU feature names as LLVM spells them, which ones imply which, and the x86-64 levels as sets of them.

Takes and gives frozensets of names such as `avx512bf16`. The implications follow LLVM's `X86.td` and `AArch64.td`;
the levels follow the x86-64 psABI (version 1.0, section 3.1.1). Only features that a kernel here can ask for, or that
a level names, are listed; an unlisted name stands for itself.
"""

from __future__ import annotations

from collections.abc import Iterable

_LEVEL_1 = ("64bit", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2")
_LEVEL_2 = (*_LEVEL_1, "cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2", "crc32")
_LEVEL_3 = (*_LEVEL_2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_LEVEL_4 = (*_LEVEL_3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

X86_LEVELS: dict[str, frozenset[str]] = {
    "x86-64": frozenset(_LEVEL_1),
    "x86-64-v2": frozenset(_LEVEL_2),
    "x86-64-v3": frozenset(_LEVEL_3),
    "x86-64-v4": frozenset(_LEVEL_4),
}

IMPLIED: dict[str, tuple[str, ...]] = {
    "sse2": ("sse",),
    "sse3": ("sse2",),
    "ssse3": ("sse3",),
    "sse4.1": ("ssse3",),
    "sse4.2": ("sse4.1",),
    "avx": ("sse4.2",),
    "avx2": ("avx",),
    "f16c": ("avx",),
    "fma": ("avx",),
    "avxvnni": ("avx2",),
    "avx512f": ("avx2", "f16c", "fma"),
    "avx512cd": ("avx512f",),
    "avx512dq": ("avx512f",),
    "avx512bw": ("avx512f",),
    "avx512vl": ("avx512f",),
    "avx512vnni": ("avx512f",),
    "avx512ifma": ("avx512f",),
    "avx512vpopcntdq": ("avx512f",),
    "avx512bf16": ("avx512bw",),
    "avx512bitalg": ("avx512bw",),
    "avx512vbmi": ("avx512bw",),
    "avx512vbmi2": ("avx512bw",),
    "avx512fp16": ("avx512bw", "avx512dq", "avx512vl"),
    "gfni": ("sse2",),
    "neon": ("fp-armv8",),
    "fullfp16": ("fp-armv8",),
    "dotprod": ("neon",),
    "i8mm": ("neon",),
    "bf16": (),
    "sve": ("fullfp16",),
    "sve2": ("sve",),
}

VECTOR_BITS: tuple[tuple[str, int], ...] = (("avx512f", 512), ("avx", 256), ("sse2", 128), ("neon", 128))


# Reached only by the operating system or by intrinsics that no kernel here uses: code never comes to need them.
NEVER_SELECTED = frozenset(
    (
        "64bit", "adx", "aes", "clflushopt", "clwb", "clzero", "cx8", "enqcmd", "fsgsbase", "fxsr", "hreset", "invpcid",
        "kl", "movdir64b", "movdiri", "mwaitx", "pconfig", "pku", "ptwrite", "rdpid", "rdpru", "rdrnd", "rdseed", "rtm",
        "serialize", "sgx", "sha", "sha512", "shstk", "sm3", "sm4", "sse4a", "tsxldtrk", "uintr", "usermsr", "vaes",
        "vpclmulqdq", "pclmul", "waitpkg", "wbnoinvd", "widekl", "xsave", "xsavec", "xsaveopt", "xsaves",
    )
)  # fmt: skip


def without(features: Iterable[str], removed: Iterable[str]) -> frozenset[str]:
    """`features` less `removed` and less everything that implies one of those."""
    gone = frozenset(removed)
    return frozenset(name for name in features if not closure((name,)) & gone)


def closure(features: Iterable[str]) -> frozenset[str]:
    """`features` with everything they imply."""
    found: set[str] = set()
    worklist = list(features)
    while worklist:
        name = worklist.pop()
        if name not in found:
            found.add(name)
            worklist.extend(IMPLIED.get(name, ()))
    return frozenset(found)


def parse_feature_string(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """(enabled with implications, disabled) of an LLVM feature string `+avx2,-avx512f`."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    enabled = closure(n.lstrip("+") for n in names if not n.startswith("-"))
    disabled = frozenset(n[1:] for n in names if n.startswith("-"))
    return enabled - disabled, disabled


def cpu_baseline(triple: str, cpu: str) -> frozenset[str]:
    """Features that every CPU of this `-mcpu` name has, as far as the name alone says.

    A level (`x86-64-v3`) gives its set; any other x86-64 name the base level; AArch64 gives NEON.
    """
    arch = triple.split("-", 1)[0]
    if arch in ("x86_64", "amd64"):
        return closure(X86_LEVELS.get(cpu, X86_LEVELS["x86-64"]))
    if arch in ("aarch64", "arm64"):
        return closure(("neon",))
    return frozenset()


def vector_bits(features: Iterable[str]) -> int:
    """Width in bits of the widest vector register that `features` give; 64 when none is known."""
    have = frozenset(features)
    for name, bits in VECTOR_BITS:
        if name in have:
            return bits
    return 64


def num_vector_registers(features: Iterable[str]) -> int:
    """Architectural vector registers: 32 with AVX-512 or NEON, else 16."""
    have = frozenset(features)
    return 32 if "avx512f" in have or "neon" in have else 16
