"""Runs every text test: each `tests/text/**/*.ir` names its own command in `// RUN:` lines, as in MLIR.

    // RUN: compile-model opt %s -p cse | filecheck %s
    // RUN: compile-model opt %s --split-input --verify-diagnostics

The command runs in this process, not in a shell; `%s` is the file, `%S` its folder, `2>&1` joins the two streams.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import parse_argv_options
from filecheck.parser import Parser

from stratum.cli import main

HERE = Path(__file__).parent
RUN = re.compile(r"^//\s*RUN:\s*(.+)$", re.MULTILINE)
FILES = sorted(HERE.rglob("*.ir"))


def run_line(line: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs one RUN line and fails with what is wrong."""
    command, _, check = line.partition("|")
    words = [str(path) if word == "%s" else word.replace("%S", str(path.parent)) for word in shlex.split(command)]
    joined = "2>&1" in words
    words = [word for word in words if word != "2>&1"]
    assert words[:2] == ["compile-model", "opt"], f"a RUN line runs 'compile-model opt', not {line!r}"
    capsys.readouterr()
    code = main(words[1:])
    out, err = capsys.readouterr()
    if not check:
        assert code == 0, err
        return
    assert joined or code == 0, err
    arguments = [str(path) if word == "%s" else word for word in shlex.split(check)]
    assert arguments[0] == "filecheck", f"output goes to filecheck, not {arguments[0]!r}"
    file_check(arguments, out + err if joined else out)
    message = capsys.readouterr().err
    assert not message, message


def file_check(arguments: list[str], output: str) -> None:
    """filecheck on `output`; it prints what does not match to stderr."""
    options = parse_argv_options(arguments)
    Matcher(options, FInput("<output>", output), Parser.from_opts(options)).run()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HERE)))
def test_text_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = RUN.findall(path.read_text(encoding="utf-8"))
    assert lines, "a text test needs a '// RUN:' line"
    for line in lines:
        run_line(line, path, capsys)


SAMPLE = """\
// RUN: compile-model opt %s -p dce | filecheck %s
// CHECK: func @f
// CHECK-NEXT: {check}
func @f(%x: tensor<4 x f32>) -> tensor<4 x f32> {{
  %a = tensor.silu %x : (tensor<4 x f32>) -> tensor<4 x f32>
  return %x : tensor<4 x f32>
}}
"""


def test_a_wrong_check_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sample.ir"
    path.write_text(SAMPLE.format(check="return %x"))
    test_text_file(path, capsys)
    path.write_text(SAMPLE.format(check="tensor.silu"))
    with pytest.raises(AssertionError, match=r"sample\.ir"):
        test_text_file(path, capsys)


def test_a_failing_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sample.ir"
    path.write_text(SAMPLE.format(check="return %x").replace("-p dce", "-p no-such-pass"))
    with pytest.raises(AssertionError, match="unknown pass 'no-such-pass'"):
        test_text_file(path, capsys)
