"""LLVM in child processes: objects come back, and nothing that LLVM does to its process reaches this one."""

import os
import signal

import pytest

from codegen import compile_worker
from codegen.compile_worker import CompileRequest, compile_llvm, compile_many
from codegen.object_cache import ObjectCache
from ir.diagnostics import DiagnosticError

TRIPLE = "x86_64-unknown-linux-gnu"
GOOD = """
define <8 x float> @scale(<8 x float> %a, ptr %p) {
  %x = load <8 x float>, ptr %p
  %y = fmul <8 x float> %a, %x
  ret <8 x float> %y
}
"""
DOT = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @dot(<16 x float> %a, <32 x bfloat> %b) {
  %y = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %a, <32 x bfloat> %b, <32 x bfloat> %b)
  ret <16 x float> %y
}
"""


@pytest.fixture(autouse=True)
def _end_workers():
    yield
    compile_worker.shutdown()


def request(text: str, **options: object) -> CompileRequest:
    return CompileRequest(text, TRIPLE, **({"cpu": "x86-64-v3"} | options))


def test_object_is_elf_and_deterministic():
    first = compile_llvm(GOOD, triple=TRIPLE, cpu="x86-64-v3", features="", opt_level=3)
    compile_worker.shutdown()
    second = compile_llvm(GOOD, triple=TRIPLE, cpu="x86-64-v3", features="", opt_level=3)
    assert first[:4] == b"\x7fELF"
    assert first == second


def test_assembly_uses_the_cpu_asked_for():
    narrow, wide = compile_many([request(GOOD, cpu="x86-64", emit="assembly"), request(GOOD, emit="assembly")])
    assert b"ymm" in wide and b"ymm" not in narrow


def test_function_attributes_give_features():
    text = DOT.replace(") {\n", ') "target-features"="+avx512bf16" {\n')
    (assembly,) = compile_many([request(text, emit="assembly")])
    assert b"vdpbf16ps" in assembly


def test_several_modules_keep_their_order():
    modules = [request(GOOD.replace("@scale", f"@scale{i}"), emit="assembly") for i in range(6)]
    for index, assembly in enumerate(compile_many(modules, workers=2)):
        assert f"scale{index}:".encode() in assembly


def test_equal_requests_are_compiled_once(monkeypatch):
    sent = []
    original = compile_worker._Worker.compile
    monkeypatch.setattr(compile_worker._Worker, "compile", lambda self, r, t: sent.append(r) or original(self, r, t))
    first, second = compile_many([request(GOOD), request(GOOD)])
    assert first == second and len(sent) == 1


def test_cache_avoids_llvm(tmp_path, monkeypatch):
    cache = ObjectCache(tmp_path)
    (first,) = compile_many([request(GOOD)], cache=cache)
    monkeypatch.setattr(compile_worker, "_pool", lambda: pytest.fail("LLVM was asked again"))
    assert compile_many([request(GOOD)], cache=cache) == [first]
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize("change", [{"cpu": "x86-64"}, {"features": "+avx512f"}, {"opt_level": 2}, {"unroll": True}])
def test_cache_key_holds_every_option(change):
    assert request(GOOD).cache_key() != request(GOOD, **change).cache_key()


def test_cache_key_holds_generator_version(monkeypatch):
    before = request(GOOD).cache_key()
    monkeypatch.setattr(compile_worker, "CODEGEN_VERSION", compile_worker.CODEGEN_VERSION + 1)
    assert request(GOOD).cache_key() != before


def test_missing_feature_is_refused_before_llvm(monkeypatch):
    monkeypatch.setattr(compile_worker, "_pool", lambda: pytest.fail("LLVM was asked"))
    with pytest.raises(DiagnosticError, match=r"@dot.*\n?.*needs the CPU feature avx512bf16"):
        compile_many([request(DOT)])


def test_abort_in_llvm_is_a_diagnostic(monkeypatch):
    monkeypatch.setattr(CompileRequest, "check", lambda self: None)
    with pytest.raises(DiagnosticError) as caught:
        compile_many([request(DOT, cpu="x86-64", name="decode")])
    text = str(caught.value)
    assert "LLVM was ended by SIGABRT while compiling module decode: @dot for x86-64" in text
    assert "LLVM ERROR" in text


def test_good_modules_compile_after_and_beside_an_abort(tmp_path, monkeypatch):
    monkeypatch.setattr(CompileRequest, "check", lambda self: None)
    cache = ObjectCache(tmp_path)
    with pytest.raises(DiagnosticError) as caught:
        compile_many([request(DOT, cpu="x86-64"), request(GOOD), request(DOT, cpu="x86-64", opt_level=1)], cache=cache)
    assert len(caught.value.diagnostics) == 2
    assert cache.get(request(GOOD).cache_key()) is not None
    assert compile_many([request(GOOD)])[0][:4] == b"\x7fELF"


def test_parse_error_names_line_and_function():
    with pytest.raises(DiagnosticError) as caught:
        compile_many([request(GOOD.replace("fmul", "fmulx"))])
    text = str(caught.value)
    assert "LLVM refused the IR at parsing" in text
    assert "line 4 of the LLVM IR: %y = fmulx" in text
    assert "in @scale" in text


def test_verifier_error_is_a_diagnostic():
    text = """define i32 @f(i1 %c) {
  br i1 %c, label %a, label %b
a:
  %x = add i32 1, 2
  br label %b
b:
  ret i32 %x
}
"""
    with pytest.raises(DiagnosticError, match=r"LLVM refused the IR at verification in @f: .*does not dominate"):
        compile_many([request(text)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "+avx1024"}, r"'\+avx1024' is not a recognized feature"),
        ({"triple": "vax-unknown-linux-gnu"}, "No available targets"),
    ],
)
def test_unknown_target_parts_are_refused(change, message):
    with pytest.raises(DiagnosticError, match=message):
        compile_many([CompileRequest(**({"ir_text": GOOD, "triple": TRIPLE, "cpu": "x86-64-v3"} | change))])


def test_unknown_cpu_is_refused():
    with pytest.raises(DiagnosticError, match="'z80' is not a recognized processor"):
        compile_many([request(GOOD, cpu="z80")])


def test_worker_killed_from_outside():
    compile_many([request(GOOD)])
    worker = compile_worker._pool().idle.get_nowait()
    os.kill(worker.process.pid, signal.SIGKILL)
    compile_worker._pool().idle.put(worker)
    with pytest.raises(DiagnosticError, match="was ended by SIGKILL"):
        compile_many([request(GOOD)])
    assert compile_many([request(GOOD)])[0][:4] == b"\x7fELF"


def test_time_is_bounded():
    compile_many([request(GOOD)])
    worker = compile_worker._pool().idle.get_nowait()
    os.kill(worker.process.pid, signal.SIGSTOP)
    compile_worker._pool().idle.put(worker)
    with pytest.raises(DiagnosticError, match="did not finish in the time allowed"):
        compile_many([request(GOOD)], timeout_seconds=0.3)
    assert worker.process.poll() is not None


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(compile_worker, "DEFAULT_MEMORY_BYTES", 48 << 20)
    with pytest.raises(DiagnosticError, match="while compiling @scale"):
        compile_many([request(GOOD)])


def test_idle_children_end_with_the_pool():
    compile_many([request(GOOD)])
    worker = compile_worker._pool().idle.get_nowait()
    compile_worker._pool().idle.put(worker)
    compile_worker.shutdown()
    assert worker.process.poll() is not None
