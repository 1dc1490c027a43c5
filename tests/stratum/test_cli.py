"""The command as a whole: exit codes, messages, and what is imported when."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from ir.diagnostics import DiagnosticError
from runtime.errors import RuntimeDiagnostic
from stratum.cli import cli, main
from stratum.cli.errors import guarded

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("numpy", "llvmlite", "lark", "tokenizers", "jinja2", "ml_dtypes", "rich", "msgspec", "torch", "transformers")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["build", "-h"], ["bench", "--help"], ["eval", "--help"], ["--version"]],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from stratum.cli import main; code = main(sys.argv[1:]);"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules]); sys.exit(code)"
    )
    result = python(code, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_importing_the_package_is_light() -> None:
    code = f"import sys, stratum; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_public_names_are_loaded_on_use() -> None:
    import stratum

    assert callable(stratum.build) and callable(stratum.load)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stratum.nothing  # noqa: B018


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = ["batch", "bench", "build", "eval", "inspect", "opt", "plan", "quantize", "recipes", "routing", "run"]
    assert sorted(cli.commands) == [*verbs, "targets"]
    for verb in cli.commands:
        assert main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: compile-model {verb}")


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            DiagnosticError("cannot", where="x.json", expected="a", hint="b"),
            2,
            "x.json: error: cannot\nexpected: a\nhint: b",
        ),
        (RuntimeDiagnostic("cannot", where="x", hint="b"), 2, "x: error: cannot\nhint: b"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "out: error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "p"), 2, "p: error: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (click.UsageError("No such option: --x."), 2, "error: no such option: --x"),
    ],
)
def test_faults_become_one_message_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    assert guarded(raising(error)) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == text + "\n"


def test_out_of_memory_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raising(MemoryError())) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_a_bug_is_one_line_unless_asked_for_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STRATUM_TRACEBACK", raising=False)
    assert guarded(raising(ValueError("first\nsecond"))) == 70
    err = capsys.readouterr().err
    assert err.startswith("internal error: ValueError: first\nhint: ") and "Traceback" not in err
    monkeypatch.setenv("STRATUM_TRACEBACK", "1")
    assert guarded(raising(ValueError("first"))) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_result_is_the_exit_code() -> None:
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 3) == 3
    assert guarded(lambda: True) == 0
    assert guarded(lambda: "text") == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["frobnicate"], "error: no such command 'frobnicate'\nhint: try 'compile-model --help'"),
        (["opt"], "error: missing argument 'FILE'\nhint: try 'compile-model opt --help'"),
        (["build", "x"], "error: missing option '-o' / '--output'"),
        (["opt", "absent.ir"], "absent.ir: error: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(text)


def test_no_arguments_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: compile-model" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_not_a_traceback() -> None:
    code = (
        "from stratum.cli.errors import guarded\nimport sys\n"
        "def work():\n  for _ in range(99999): print('x' * 99)\n"
        "sys.exit(guarded(work))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    errors = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait(timeout=30) == 141
    assert errors == b""


def test_interrupt_ends_cleanly() -> None:
    """Ctrl-C while waiting for stdin: exit code 130, no traceback."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = (
        "import sys; from stratum.cli import main; print('ready', flush=True);sys.exit(main(['opt', '-', '-p', 'cse']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read().decode().strip() == "interrupted"
