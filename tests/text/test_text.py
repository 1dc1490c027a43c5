"""Runs the text tests: every `*.ir` file below this folder is one test, told by its first line what to do.

    // RUN: compile-model opt %s -p "PIPELINE" | filecheck %s      the output matches the CHECK lines of the file
    // RUN: compile-model opt %s --verify-diagnostics              the faults are those of the expected-error comments
    // RUN: compile-model opt %s                                   it goes through, and its output prints to itself

`--split-input` treats the pieces between `// -----` lines one by one. Everything happens in this process; the
comments are described in `stratum.opt_driver`, CHECK lines in the documentation of filecheck.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from filecheck.matcher import Matcher
from filecheck.options import Options

from stratum import opt_driver

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.rglob("*.ir"))
FLAGS = ("--split-input", "--verify-diagnostics")


def name_of(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def run_line(text: str, path: Path) -> str:
    match = opt_driver.RUN_LINE.match(text)
    assert match, f"{path.name} does not begin with '// RUN: compile-model opt %s ...'"
    return match["arguments"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_text(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    command, _, filter_command = run_line(text, path).partition("|")
    words = command.split()
    unknown = [w for w in words if w.startswith("--") and w not in (*FLAGS, "--pipeline")]
    assert not unknown, f"{path.name}: this runner does not know {unknown[0]}"
    pieces = list(opt_driver.split_input(text)) if "--split-input" in words else [text]
    pipeline = opt_driver.pipeline_of(text) or ""
    if "--verify-diagnostics" in words:
        assert "expected-" in text, f"{path.name} expects nothing"
        problems = []
        for piece in pieces:
            found = opt_driver.diagnostics_of(piece, pipeline, file=path.name)
            problems += opt_driver.check_expected(piece, found, path.name)
        assert not problems, "\n" + "\n".join(problems)
        return
    output = "\n// -----\n".join(opt_driver.optimize(piece, pipeline, file=path.name).text for piece in pieces)
    for piece in output.split("\n// -----\n"):
        assert opt_driver.optimize(piece, "").text == piece, "the output does not print to itself"
    if filter_command:
        assert filter_command.split() == ["filecheck", "%s"]
        code, message = file_check(path, output, tmp_path)
        assert code == 0, f"\n{message}\noutput:\n{output}"


def file_check(path: Path, output: str, tmp_path: Path) -> tuple[int, str]:
    """(exit code, message) of filecheck on `output` with the CHECK lines of `path`."""
    given = tmp_path / "output.ir"
    given.write_text(output, encoding="utf-8")
    message = io.StringIO()
    with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
        code = Matcher.from_opts(Options(match_filename=str(path), input_file=str(given))).run()
    return code, message.getvalue()


def test_file_check_can_fail(tmp_path: Path) -> None:
    """The runner notices output that lacks a CHECK line, and a file without any."""
    path = tmp_path / "wrong.ir"
    path.write_text("// CHECK: tensor.mul\n", encoding="utf-8")
    code, message = file_check(path, "tensor.add\n", tmp_path)
    assert code != 0
    assert "tensor.mul" in message
    path.write_text("// nothing to check\n", encoding="utf-8")
    assert file_check(path, "tensor.add\n", tmp_path)[0] != 0


def test_there_are_text_tests() -> None:
    assert len(FILES) > 10
