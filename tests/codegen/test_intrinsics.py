"""The intrinsic tables: what is allowed with which features, and what the refusal says."""

import pytest

from codegen.intrinsics import _GENERIC, _TARGET, check_intrinsics, functions, required_features
from hw_targets.cpu_features import cpu_baseline
from ir.diagnostics import DiagnosticError


def body(intrinsic: str, attributes: str = "", tail: str = "") -> str:
    call = f"define void @kernel() {attributes} {{\n  call void @{intrinsic}()\n  ret void\n}}\n"
    return f"declare void @{intrinsic}()\n\n{call}{tail}"


@pytest.mark.parametrize(
    "name", ["llvm.fma.v16f32", "llvm.memcpy.p0.p0.i64", "llvm.vector.reduce.fadd.v8f32", "llvm.smax.i64"]
)
def test_generic_needs_nothing(name):
    assert required_features(name) == ()
    check_intrinsics(body(name), frozenset())


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("llvm.x86.avx512.vpdpbusd.512", "avx512vnni"),
        ("llvm.x86.avx512bf16.dpbf16ps.512", "avx512bf16"),
        ("llvm.x86.avx512.permvar.qi.512", "avx512vbmi"),
        ("llvm.x86.avx2.pmadd.wd", "avx2"),
        ("llvm.aarch64.neon.bfdot.v4f32.v8bf16", "neon, bf16"),
        ("llvm.aarch64.neon.sdot.v4i32.v16i8", "dotprod"),
    ],
)
def test_target_specific_needs_its_feature(name, needed):
    with pytest.raises(DiagnosticError, match=f"needs the CPU feature {needed},") as caught:
        check_intrinsics(body(name), frozenset())
    assert "@kernel, line 3" in str(caught.value)
    check_intrinsics(body(name), frozenset(needed.split(", ")))


@pytest.mark.parametrize(
    "name",
    ["llvm.x86.tdpbf16ps", "llvm.x86.avx512.new.thing.512", "llvm.nonsense", "llvm.amdgcn.s.sleep", "llvm.fmax2.f32"],
)
def test_unknown_is_refused(name):
    with pytest.raises(DiagnosticError, match="is not one that generated code may use"):
        check_intrinsics(body(name), frozenset({"avx512f", "avx512bf16", "amx-bf16"}))


def test_either_of_two_features():
    text = body("llvm.x86.avx512.vpdpbusd.256")
    check_intrinsics(text, frozenset({"avxvnni"}))
    check_intrinsics(text, frozenset({"avx512vnni", "avx512vl"}))
    with pytest.raises(DiagnosticError):
        check_intrinsics(text, frozenset({"avx512vnni"}))


def test_a_prefix_covers_whole_words_only():
    assert required_features("llvm.x86.sse2.pause") == ("sse2",)
    assert required_features("llvm.x86.sse22.pause") is None
    assert required_features("llvm.absolute.i32") is None


def test_feature_from_inline_attribute_group_and_cpu():
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    check_intrinsics(body(name, '"target-features"="+avx512bf16"'), frozenset())
    check_intrinsics(body(name, "#3", 'attributes #3 = { nounwind "target-features"="+fma,+avx512bf16" }'), frozenset())
    check_intrinsics(body("llvm.x86.avx2.permd", '"target-cpu"="x86-64-v3"'), frozenset())
    with pytest.raises(DiagnosticError):
        check_intrinsics(body(name, "#4", 'attributes #3 = { "target-features"="+avx512bf16" }'), frozenset())


def test_features_of_one_function_do_not_cover_the_next():
    name = "llvm.x86.avx2.permd"
    text = body(name, '"target-features"="+avx2"') + body(name).replace("@kernel", "@second")
    with pytest.raises(DiagnosticError, match="@second"):
        check_intrinsics(text, frozenset())


def test_functions_are_found_with_quoted_names_and_linkage():
    first = 'define internal fastcc void @"a b"(ptr noalias %p) #0 {\n  ret void\n}\n'
    text = first + "\ndefine dso_local i32 @c.1() {\n  ret i32 0\n}\n"
    assert [(f.name, f.line) for f in functions(text)] == [("a b", 1), ("c.1", 5)]


def test_ptx_has_few_generic_intrinsics_and_its_own():
    """LLVM ends the process on llvm.exp for a GPU; for a CPU it is a call."""
    gpu = "nvptx64-nvidia-cuda"
    assert required_features("llvm.exp.f32") == () and required_features("llvm.exp.f32", gpu) is None
    assert required_features("llvm.fma.f32", gpu) == ()
    check_intrinsics(body("llvm.nvvm.barrier.cta.sync.aligned.all"), {"ptx78"}, triple=gpu)
    with pytest.raises(DiagnosticError, match=r"llvm\.exp\.f32 is not one that generated code may use"):
        check_intrinsics(body("llvm.exp.f32"), {"ptx78"}, triple=gpu)
    with pytest.raises(DiagnosticError, match="needs the CPU feature ptx78"):
        check_intrinsics(body("llvm.nvvm.barrier.cta.sync.aligned.all"), {"avx2"})


def test_tables_are_disjoint_and_levels_enable_their_own():
    assert not _GENERIC & set(_TARGET)
    v4 = cpu_baseline("x86_64-unknown-linux-gnu", "x86-64-v4")
    for name, needed in _TARGET.items():
        if needed == ("avx512f",) or needed == ("avx512bw",):
            check_intrinsics(body("llvm." + name), v4)
