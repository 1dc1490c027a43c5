"""PTX of every op and of the kernels: what is in it, that ptxas takes it for each architecture, without spills."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import codegen.nvptx.grid_lowerings
import codegen.nvptx.hopper_lowerings  # noqa: F401 - both register lowerings
from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.compile import ARCHITECTURES, compile_ptx, compile_ptx_for, llvm_module
from codegen.nvptx.lowering import GRID_LOWERINGS, HOPPER, dynamic_bytes, shared_bytes
from codegen.nvptx.ptxas import Resources, assemble, find_ptxas, read_resources
from ir.diagnostics import DiagnosticError
from ir.formats import F32, I32
from ir.op_def import OPS
from tests.codegen.nvptx.kernel_list import fp8_kernels, hopper_kernels, kernels, one_of_each, one_of_each_on_hopper

_missing = pytest.mark.skipif(find_ptxas() is None, reason="no ptxas; pip install 'stratum[cuda-tools]'")


def needs_ptxas(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that `make test-extras` runs, where ptxas is installed."""
    return pytest.mark.extra(_missing(test))


@cache
def ptx(architecture: str) -> str:
    """PTX of all kernels. LLVM takes seconds for it: a run without ptxas needs it for sm_90 only."""
    return compile_ptx([one_of_each(), *kernels()], architecture)


@pytest.fixture(scope="module")
def small() -> dict[str, str]:
    """Architecture -> PTX of the kernel that has one of each op."""
    return compile_ptx_for([one_of_each()])


def entry(text: str, name: str) -> str:
    """The body of a kernel."""
    return text.split(f".entry {name}(")[1].split("\n}\n")[0]


def test_one_of_each_has_every_op() -> None:
    met = {type(op) for kernel in (one_of_each(), one_of_each_on_hopper()) for op in kernel.func.walk()}
    wanted = {cls for name, cls in OPS.items() if name.startswith("grid.")} | set(GRID_LOWERINGS)
    assert [cls.name for cls in wanted if cls not in met] == []


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group", "bar.sync",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
        "ex2.approx.ftz.f32", "shfl.sync.bfly.b32", "%ctaid.x", "%nctaid.x", "%ntid.x", "cvt.rn.bf16x2.f32",
        "st.global.v2", "fma.rn.bf16x2",
    ],
)  # fmt: skip
def test_instructions_of_the_ops(small: dict[str, str], instruction: str) -> None:
    assert instruction in entry(small["sm_80"], "one_of_each")


def test_weights_are_loaded_sixteen_bytes_at_a_time() -> None:
    for name in ("decode_w16", "decode_w8", "decode_w4"):
        body = entry(ptx("sm_90"), name)
        assert body.count("ld.global.nc.v4.b32") >= 8, name
        assert "call" not in body and ".local" not in body


def test_the_header_says_what_it_is_for(small: dict[str, str]) -> None:
    for architecture, text in small.items():
        assert ".version 7.8" in text and f".target {architecture}" in text


@needs_ptxas
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_assemble_without_spills(architecture: str) -> None:
    """The text for sm_80 serves sm_89 too."""
    made = assemble(ptx("sm_90" if architecture == "sm_90" else "sm_80"), architecture)
    assert made.cubin[:4] == b"\x7fELF"
    assert set(made.resources) == {"one_of_each", *(k.name for k in kernels())}
    assert {name: r for name, r in made.resources.items() if r.spill_bytes or r.stack_bytes} == {}
    for kernel in kernels():
        registers = made.resources[kernel.name].registers
        assert registers * kernel.threads * kernel.blocks_at_once <= 65536


@needs_ptxas
def test_kernels_for_hopper_assemble_without_spills() -> None:
    """Products of warpgroups that ptxas would run one after the other, it says so."""
    text = compile_ptx([one_of_each_on_hopper(), *hopper_kernels()], HOPPER)
    assert ".version 8.4" in text and f".target {HOPPER}" in text
    shapes = ("m64n256k16.f32.bf16.bf16", "m64n64k32.s32.s8.s8", "m64n64k32.f32.e4m3.e4m3")
    for instruction in (*shapes, "cp.async.bulk", "cp.async.ca", "try_wait.parity"):
        assert instruction in text
    made = assemble(text, HOPPER)
    assert "serialized" not in made.report
    assert {name: r for name, r in made.resources.items() if r.spill_bytes or r.stack_bytes} == {}
    for kernel in hopper_kernels():
        assert made.resources[kernel.name].registers * kernel.threads * kernel.blocks_at_once <= 65536


@needs_ptxas
def test_kernels_of_fp8_assemble_without_spills() -> None:
    for architecture, text in compile_ptx_for(fp8_kernels(), ("sm_89", "sm_90")).items():
        assert "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32" in text
        made = assemble(text, architecture)
        assert {name: r for name, r in made.resources.items() if r.spill_bytes or r.stack_bytes} == {}


@needs_ptxas
def test_what_ptxas_refuses() -> None:
    with pytest.raises(DiagnosticError, match="ptxas refused the PTX for sm_80") as caught:
        assemble(".version 7.8\n.target sm_80\n.address_size 64\nnonsense\n", "sm_80")
    assert "nonsense" in str(caught.value) or "yntax" in str(caught.value)


def test_without_ptxas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("codegen.nvptx.ptxas.find_ptxas", lambda: None)
    with pytest.raises(DiagnosticError, match="there is no ptxas") as caught:
        assemble("", "sm_90")
    assert "cuda-tools" in str(caught.value)


def test_the_report_of_ptxas() -> None:
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas info    : Function properties for a
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem, 8 bytes cmem[2]
ptxas info    : Compiling entry function 'b' for 'sm_90'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 376 bytes cmem[0]
"""
    assert read_resources(report) == {"a": Resources(18, 20, 16, 4096), "b": Resources(255, 0, 0, 0)}


def test_an_unknown_architecture() -> None:
    with pytest.raises(DiagnosticError, match="no kernels for the GPU architecture 'sm_52'") as caught:
        compile_ptx([one_of_each()], "sm_52")
    assert "sm_80, sm_89, sm_90" in str(caught.value)


def ticket(k: GridBuilder) -> None:
    k.ticket()


def much(k: GridBuilder) -> None:
    k.shared(100 << 8, F32)


@pytest.mark.parametrize(
    ("add", "message"),
    [(ticket, "no lowering of tile.ticket to PTX"), (much, "wants 102400 bytes of shared memory; a block has 101376")],
)
def test_what_gpus_cannot_do(add: Callable[[GridBuilder], None], message: str) -> None:
    k = GridBuilder("refused", threads=32)
    add(k)
    with pytest.raises(DiagnosticError, match=message):
        llvm_module([k.grid_kernel()])


def test_much_shared_memory_is_asked_for_at_the_launch() -> None:
    for size, at_launch in ((12 << 10, 0), (13 << 10, 13 << 12)):
        k = GridBuilder("memory", threads=32)
        s, y = k.shared(size, I32), k.buffer("y", I32)
        y.store(k.thread_id(), s.load(k.thread_id()))
        kernel = k.grid_kernel()
        assert (shared_bytes(kernel), dynamic_bytes(kernel)) == (4 * size, at_launch)
        assert ("external addrspace(3)" in llvm_module([kernel])) == bool(at_launch)


def test_buffers_that_are_written_are_not_read_only() -> None:
    k = GridBuilder("both", threads=32)
    x, y = k.buffer("x", F32), k.buffer("y", F32)
    y.at(4).view(I32).store(k.thread_id(), x.view(I32).load(k.thread_id()))
    text = llvm_module([k.grid_kernel()])
    assert "readonly align 16 %a0" in text and "noundef align 16 %a1" in text
