"""Feature names: implications, levels, feature strings. LLVM itself is asked whether it knows every name."""

import itertools

import pytest

from codegen.compile_worker import CompileRequest, compile_many, shutdown
from hw_targets import cpu_features
from hw_targets.cpu_features import X86_LEVELS, closure, cpu_baseline, parse_feature_string, vector_bits, without


def test_closure_follows_implications():
    assert closure(["avx512bf16"]) >= {"avx512bw", "avx512f", "avx2", "fma", "f16c", "sse4.2", "sse2"}
    assert closure(["unheard-of"]) == {"unheard-of"}


def test_without_removes_what_depends():
    left = without(closure(["avx512bf16", "bmi2"]), ["avx512bw"])
    assert "avx512f" in left and "bmi2" in left
    assert not left & {"avx512bw", "avx512bf16"}


def test_feature_string():
    enabled, disabled = parse_feature_string("+avx2, fma,-f16c")
    assert {"avx2", "avx", "fma"} <= enabled and disabled == {"f16c"} and "f16c" not in enabled
    assert parse_feature_string("") == (frozenset(), frozenset())


def test_levels_grow_and_are_closed():
    levels = list(X86_LEVELS.values())
    for lower, higher in itertools.pairwise(levels):
        assert lower < higher
    for level in levels:
        assert closure(level) == level


def test_baseline_of_a_cpu_name():
    assert "avx2" in cpu_baseline("x86_64-unknown-linux-gnu", "x86-64-v3")
    assert cpu_baseline("x86_64-unknown-linux-gnu", "znver4") == X86_LEVELS["x86-64"]
    assert cpu_baseline("aarch64-unknown-linux-gnu", "generic") == {"neon", "fp-armv8"}
    assert cpu_baseline("nvptx64-nvidia-cuda", "sm_90") == frozenset()


@pytest.mark.parametrize(("features", "bits"), [(["sse2"], 128), (["avx2"], 256), (["avx512f"], 512), (["neon"], 128)])
def test_vector_width(features, bits):
    assert vector_bits(closure(features)) == bits
    assert vector_bits([]) == 64


def test_vector_registers():
    assert cpu_features.num_vector_registers(closure(["avx2"])) == 16
    assert cpu_features.num_vector_registers(closure(["avx512f"])) == 32
    assert cpu_features.num_vector_registers(closure(["neon"])) == 32


def test_llvm_knows_every_name():
    """A name that LLVM does not know is refused by the compile worker."""
    arm = {"neon", "fp-armv8", "fullfp16", "dotprod", "i8mm", "bf16", "sve", "sve2"}
    implied = set(cpu_features.IMPLIED) | {n for names in cpu_features.IMPLIED.values() for n in names}
    x86 = (implied - arm) | X86_LEVELS["x86-64-v4"] | cpu_features.NEVER_SELECTED
    requests = [
        CompileRequest("define void @f() {\n  ret void\n}\n", triple, cpu, ",".join(f"+{n}" for n in sorted(names)))
        for triple, cpu, names in (
            ("x86_64-unknown-linux-gnu", "x86-64", x86),
            ("aarch64-unknown-linux-gnu", "generic", arm),
        )
    ]
    assert all(code[:4] == b"\x7fELF" for code in compile_many(requests, workers=1))
    shutdown()
