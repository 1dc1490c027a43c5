"""`compile-model opt`: splitting, RUN lines, expectations, and the verb itself on files and stdin."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import ir
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.location import Location
from stratum import opt_driver
from stratum.cli import cli, main

ADD_TWICE = """\
func @step(%x: tensor<4 x f32>) -> tensor<4 x f32> {
  %a = tensor.silu %x : (tensor<4 x f32>) -> (tensor<4 x f32>)
  %b = tensor.silu %x : (tensor<4 x f32>) -> (tensor<4 x f32>)
  %c = tensor.add %a, %b : (tensor<4 x f32>, tensor<4 x f32>) -> (tensor<4 x f32>)
  return %c : tensor<4 x f32>
}
"""


def test_split_keeps_line_numbers() -> None:
    pieces = list(opt_driver.split_input("one\ntwo\n// -----\nthree\n"))
    assert pieces == ["one\ntwo\n", "\n\n\nthree\n"]


def test_text_without_split_lines_is_one_piece() -> None:
    assert list(opt_driver.split_input("one\n// --- two\n")) == ["one\n// --- two\n"]


@pytest.mark.parametrize(
    ("line", "pipeline"),
    [
        ("// RUN: compile-model opt %s -p 'cse,dce' | filecheck %s", "cse,dce"),
        ("// RUN: compile-model opt %s --pipeline='fuse-qkv{x=1}'", "fuse-qkv{x=1}"),
        ("// RUN: compile-model opt %s", None),
        ("// RUN: compile-model opt %s -p 'open", None),
        ("func @f", None),
    ],
)
def test_pipeline_of_run_line(line: str, pipeline: str | None) -> None:
    assert opt_driver.pipeline_of(f"// a comment\n{line}\n") == pipeline


def test_passes_change_the_text_and_it_parses_back() -> None:
    result = opt_driver.optimize(ADD_TWICE, "cse")
    assert result.text.count("tensor.silu") == 1
    ir.verify(ir.parse(result.text))
    assert [record.name for record in result.report.records] == ["cse"]


def test_named_pipeline_stands_for_its_passes() -> None:
    assert opt_driver.resolve_pipeline("simplify") == "canonicalize,cse"
    assert opt_driver.resolve_pipeline("cse") == "cse"


def error_at(line: int, message: str, severity: str = "error") -> Diagnostic:
    return Diagnostic(severity, message, Location(file="x.ir", line=line, column=1))


def test_met_expectations_leave_no_problem() -> None:
    text = (
        "// expected-error @+1 {{unknown op}}\nfoo\nbar // expected-error {{two}} // expected-error @? {{somewhere}}\n"
    )
    found = (error_at(2, "unknown op 'foo'"), error_at(3, "number two"), Diagnostic("error", "it is somewhere"))
    assert opt_driver.check_expected(text, found) == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ((), "x.ir:2: expected error was not reported: unknown op"),
        ((error_at(3, "unknown op"),), "unexpected diagnostic: x.ir:3:1: error: unknown op"),
        ((error_at(2, "another fault"),), "unexpected diagnostic: x.ir:2:1: error: another fault"),
        ((error_at(2, "unknown op", "warning"),), "unexpected diagnostic: x.ir:2:1: warning: unknown op"),
    ],
)
def test_unmet_expectations_are_named(found: tuple[Diagnostic, ...], problem: str) -> None:
    problems = opt_driver.check_expected("// expected-error @+1 {{unknown op}}\nfoo\n", found, "x.ir")
    assert problem in problems


def test_one_diagnostic_meets_one_expectation() -> None:
    text = "// expected-error @+2 {{bad}}\n// expected-error @+1 {{bad}}\nfoo\n"
    assert len(opt_driver.check_expected(text, (error_at(3, "bad"),))) == 1
    assert opt_driver.check_expected(text, (error_at(3, "bad"), error_at(3, "bad"))) == []


def test_notes_count_only_where_expected() -> None:
    error = Diagnostic("error", "bad", Location(line=2), (Diagnostic("note", "made here", Location(line=1)),))
    assert opt_driver.check_expected("// expected-note {{made here}}\nfoo // expected-error {{bad}}\n", (error,)) == []
    assert opt_driver.check_expected("\nfoo // expected-error {{bad}}\n", (error,)) == []


def test_verb_reads_stdin_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(cli, ["opt", "-", "-p", "cse", "--time", "--explain"], input=ADD_TWICE)
    assert result.exit_code == 0
    assert result.stdout.count("tensor.silu") == 1
    assert "cse" in result.stderr


def test_verb_runs_a_reproducer_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reproducer.ir"
    path.write_text(f"// RUN: compile-model opt %s -p 'cse'\n{ADD_TWICE}")
    assert main(["opt", str(path)]) == 0
    assert capsys.readouterr().out.count("tensor.silu") == 1


def test_verb_splits_and_dumps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.ir"
    path.write_text(f"{ADD_TWICE}// -----\n{ADD_TWICE}")
    assert main(["opt", str(path), "-p", "cse,dce", "--split-input", "--dump-ir", str(tmp_path / "dump")]) == 0
    assert capsys.readouterr().out.count("// -----") == 1
    dumps = sorted(p.relative_to(tmp_path / "dump").as_posix() for p in (tmp_path / "dump").rglob("*.ir"))
    assert dumps[0].startswith("0/000_input") and any(d.startswith("1/001_cse") for d in dumps)


def test_verb_stops_after_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(
        cli, ["opt", "-", "-p", "canonicalize,cse", "--stop-after", "canonicalize"], input=ADD_TWICE
    )
    assert result.exit_code == 0 and result.stdout.count("tensor.silu") == 2


def test_verb_verifies_diagnostics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "faults.ir"
    good = ADD_TWICE.replace("  %a = tensor.silu %x", "  // expected-error @+1 {{unknown op}}\n  %a = tensor.silly %x")
    path.write_text(good)
    assert main(["opt", str(path), "--verify-diagnostics", "--split-input"]) == 0
    path.write_text(good.replace("unknown op", "something else"))
    assert main(["opt", str(path), "--verify-diagnostics"]) == 2
    assert "expected error was not reported: something else" in capsys.readouterr().err


def test_list_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "--list-passes"]) == 0
    out = capsys.readouterr().out
    assert "canonicalize" in out and "pipeline cpu\n" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"func @f(%x: tensor<4 x f32>) -> {", "error:"),
        (b"\xff\xfe", "not UTF-8 text (byte 0)"),
    ],
)
def test_bad_text_is_one_diagnostic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "bad.ir"
    path.write_bytes(content)
    assert main(["opt", str(path), "-p", "cse"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and "Traceback" not in captured.err
    assert str(path) in captured.err


def test_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(DiagnosticError, match="did you mean 'canonicalize'"):
        opt_driver.optimize(ADD_TWICE, "canonicalise")
