"""The pass manager: order, verification, timing, dumps, stopping, explanations, reproducers."""

import shlex
from dataclasses import dataclass
from typing import ClassVar

import pytest

import ir
from ir.builder import Builder
from ir.core import Op
from ir.diagnostics import DiagnosticError
from ir.formats import BF16
from ir.ops.tensor import CastOp
from passes import FunctionPass, Pass, PassContext, PassError, PassManager, parse_pipeline, register_pass
from passes.clone import clone
from passes.snapshot import snapshot
from tests.passes.step_graphs import build_step


@register_pass
@dataclass(frozen=True)
class CrashPass(FunctionPass):
    """Fails after having changed the IR."""

    name: ClassVar[str] = "test-crash"
    kind: str = "assertion"

    def run(self, func: Op, ctx: PassContext) -> None:
        ctx.rewriter().erase(next(op for op in func.walk() if op.name == "func.return"))
        if self.kind == "diagnostic":
            raise DiagnosticError("the target has no such unit", hint="choose another")
        raise AssertionError("a broken invariant")


@register_pass
@dataclass(frozen=True)
class BreakPass(FunctionPass):
    """Leaves IR that does not verify: a function without its end."""

    name: ClassVar[str] = "test-break"

    def run(self, func: Op, ctx: PassContext) -> None:
        ctx.rewriter().erase(next(op for op in func.walk() if op.name == "func.return"))


@register_pass
@dataclass(frozen=True)
class CastPass(FunctionPass):
    """Adds a cast that nobody reads, through Builder, telling nobody."""

    name: ClassVar[str] = "test-cast"

    def run(self, func: Op, ctx: PassContext) -> None:
        embed = next(op for op in func.walk() if op.name == "tensor.embed")
        assert embed.parent is not None
        Builder.before(embed.parent.ops[-1]).insert(CastOp(embed.results[0], to=BF16))


def test_passes_run_in_order_and_are_timed():
    report = PassManager("canonicalize,test-cast,dce").run(build_step())
    assert [r.text for r in report.records] == ["canonicalize", "test-cast", "dce"]
    assert [r.changed for r in report.records] == [False, True, True]
    assert all(r.seconds > 0 for r in report.records) and report.seconds > 0
    assert report.records[1].num_ops == report.records[0].num_ops + 1 == report.records[2].num_ops + 1
    assert "canonicalize  (no change)" in report.timings() and "test-cast\n" in report.timings()


def test_only_changed_ir_is_verified(monkeypatch):
    verified = []
    monkeypatch.setattr(ir, "verify", lambda module: verified.append(module))
    PassManager("canonicalize,test-cast,cse").run(build_step())
    assert len(verified) == 2  # the input, and after test-cast
    PassManager("test-cast", verify=False).run(build_step())
    assert len(verified) == 2


def test_input_that_does_not_verify_is_refused():
    module = build_step()
    PassManager("test-break", verify=False).run(module)
    with pytest.raises(DiagnosticError):
        PassManager("cse").run(module)


def test_analyses_live_until_the_ir_changes():
    computed = []

    def count_ops(op: Op) -> int:
        computed.append(op)
        return sum(1 for _ in op.walk())

    @dataclass(frozen=True)
    class AskPass(Pass):
        """Asks for the analysis twice."""

        name: ClassVar[str] = "test-ask"

        def run(self, module: Op, ctx: PassContext) -> None:
            assert ctx.analysis(count_ops, module) == ctx.analysis(count_ops, module) == sum(1 for _ in module.walk())

    ask = AskPass()
    PassManager([ask, ask, *parse_pipeline("canonicalize"), ask]).run(build_step())
    assert len(computed) == 1
    PassManager([ask, *parse_pipeline("test-cast"), ask]).run(build_step())
    assert len(computed) == 3


@pytest.mark.parametrize(("stop", "ran"), [(1, 1), ("2", 2), ("cse", 2), (0, 0), (99, 3), (None, 3)])
def test_stop_after(stop, ran):
    manager = PassManager("canonicalize,cse,dce", stop_after=stop)
    report = manager.run(build_step())
    assert len(report.records) == ran and report.stopped == (ran < 3)


def test_stop_after_a_pass_that_is_not_there():
    with pytest.raises(
        DiagnosticError, match="cannot stop after 'cee': no such pass in the pipeline; did you mean 'cse'"
    ):
        PassManager("canonicalize,cse", stop_after="cee")


def test_dumps_are_numbered_and_parse_back(tmp_path):
    (tmp_path / "000_old-run.ir").write_text("stale")
    (tmp_path / "014_Other.ir").write_text("not ours")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "001_kept.ir").mkdir()
    (tmp_path / "002_link.ir").symlink_to(tmp_path / "notes.txt")
    module = build_step()
    report = PassManager("canonicalize,test-cast,cse,dce", dump_dir=tmp_path).run(module)
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == [
        "000_input.ir",
        "001_kept.ir",
        "001_test-cast.ir",
        "002_dce.ir",
        "002_link.ir",
        "003_final.ir",
        "014_Other.ir",
        "notes.txt",
    ]
    assert [r.dump.name if r.dump else None for r in report.records] == [None, "001_test-cast.ir", None, "002_dce.ir"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for name in ("000_input.ir", "001_test-cast.ir", "002_dce.ir", "003_final.ir"):
        ir.verify(ir.parse((tmp_path / name).read_text()))
    assert (tmp_path / "003_final.ir").read_text() == ir.print_module(module)


def test_a_dump_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticError, match="cannot write IR dumps"):
        PassManager("cse", dump_dir=tmp_path / "file" / "below").run(build_step())


@pytest.mark.parametrize(
    ("text", "message", "told"),
    [
        ("test-crash", "pass 'test-crash' failed with AssertionError: a broken invariant (pass 3 of 4)", None),
        ("test-crash{kind=diagnostic}", "pass 'test-crash' failed (pass 3 of 4)", "the target has no such unit"),
        ("test-break", "pass 'test-break' left IR that does not verify (pass 3 of 4)", "terminator"),
    ],
)
def test_a_failure_names_the_pass_and_can_be_seen_again(tmp_path, text, message, told):
    module = build_step()
    path = tmp_path / "again.ir"
    with pytest.raises(PassError) as caught:
        PassManager(f"canonicalize,test-cast,{text},cse", reproducer=path).run(module)
    shown = str(caught.value)
    assert shown.startswith(f"error: {message}")
    assert "passes before it: canonicalize, test-cast" in shown
    assert f"compile-model opt {path} -p {shlex.quote(text + ',cse')}" in shown
    assert told is None or told in shown
    assert caught.value.reproducer == path

    first, rest = path.read_text().split("\n", 1)
    assert first == f"// RUN: compile-model opt %s -p {shlex.quote(text + ',cse')}"
    given = ir.parse(first + "\n" + rest)
    expected = build_step()
    PassManager("canonicalize,test-cast").run(expected)
    assert ir.structural_equal(given, expected) is None
    with pytest.raises(PassError) as again:
        PassManager(f"{text},cse", reproducer=path).run(given)
    assert again.value.diagnostics[0].message.startswith(message.split(" (pass")[0])


def test_reproducers_go_to_the_dump_directory_or_a_temporary_file(tmp_path, monkeypatch):
    with pytest.raises(PassError) as caught:
        PassManager("test-break", dump_dir=tmp_path).run(build_step())
    assert caught.value.reproducer == tmp_path / "reproducer.ir" and (tmp_path / "reproducer.ir").exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PassError) as caught:
        PassManager("test-break").run(build_step())
    assert caught.value.reproducer is not None and caught.value.reproducer.name.startswith("reproducer-")


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_fault(tmp_path):
    with pytest.raises(PassError, match="test-break") as caught:
        PassManager("test-break", reproducer=tmp_path / "missing" / "again.ir").run(build_step())
    assert caught.value.reproducer is None
    assert "no reproducer was written: " in str(caught.value) and "No such file" in str(caught.value)


def test_explain_groups_what_happened_alike():
    report = PassManager("fuse-attention,fuse-norm-gemm").run(build_step(layers=3))
    told = report.explain()
    assert (
        "1 fuse-attention\n  layers.0.self_attn and 2 more: the cascade needs 3, then 2, then 1 pass over ctx" in told
    )
    assert "2 fuse-norm-gemm" in told
    reason = "FoldPrologueIntoGemm left gemm.matmul alone: norm.rms has 3 readers"
    assert f"layers.0.self_attn.q_proj and 8 more: {reason}" in told


def test_a_pass_that_does_not_run_says_so():
    with pytest.raises(PassError, match="does not say what it does"):
        PassManager([Pass()]).run(build_step())


def test_snapshots_see_every_kind_of_change():
    module = build_step()
    before = snapshot(module)
    assert snapshot(module) == before
    embed = next(op for op in module.walk() if op.name == "tensor.embed")
    embed.results[0].type, kept = embed.results[0].type.with_element(BF16), embed.results[0].type
    assert snapshot(module) != before
    embed.results[0].type = kept
    assert snapshot(module) == before
    norm = next(op for op in module.walk() if op.name == "norm.rms")
    norm.attributes["eps"] = 0.5
    assert snapshot(module) != before


def test_a_clone_is_equal_and_independent():
    module = build_step(experts=4)
    PassManager("fuse-attention,fuse-qkv,fuse-norm-gemm").run(module)
    copy = clone(module)
    assert ir.structural_equal(module, copy) is None
    ir.verify(copy)
    text = ir.print_module(module)
    PassManager("fuse-epilogue,set-precision").run(copy)
    assert ir.print_module(module) == text != ir.print_module(copy)
