"""Loading object code: what is not loadable here is refused before LLVM sees it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import RuntimeDiagnostic, Session
from runtime.native import CycleCounter, NativeCode
from tests.runtime.fake_artifact import default_files, fake_object, write_artifact

SYMBOLS = ("stratum_step_decode", "stratum_step_prefill")


def test_loads_twice_and_unloads() -> None:
    first, second = (NativeCode(fake_object(), SYMBOLS, where="x") for _ in range(2))
    assert set(first.functions) == set(SYMBOLS)
    assert set(first.functions.values()).isdisjoint(second.functions.values())
    first.close()
    second.close()


def changed(offset: int, content: bytes) -> bytes:
    code = fake_object()
    return code[:offset] + content + code[offset + len(content) :]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"", "not an ELF object"),
        (b"\x7fELF", "not an ELF object"),
        (b"!<arch>\n" + bytes(100), "not an ELF object"),
        (changed(4, b"\x01"), "not an ELF object"),  # 32 bit
        (changed(16, b"\x03"), r"\(type 3\)"),  # a shared library
        (changed(18, b"\x08\x00"), "ELF machine 8 "),  # MIPS
    ],
)
def test_foreign_objects(code: bytes, message: str) -> None:
    with pytest.raises(RuntimeDiagnostic, match=message):
        NativeCode(code, SYMBOLS, where="x")


def test_missing_symbols() -> None:
    with pytest.raises(RuntimeDiagnostic, match=r"cannot be loaded(.|\n)*defines stratum_run.*stratum_step_decode"):
        NativeCode(fake_object(only_team=True), SYMBOLS, where="x")
    with pytest.raises(RuntimeDiagnostic, match="cannot be loaded"):
        NativeCode(fake_object(), ("stratum_step_other",), where="x")


def test_truncated_object_with_right_hashes(tmp_path: Path) -> None:
    """Hashes prove nothing about an artifact made wrongly: the linker's refusal is a diagnostic, too."""
    files = {**default_files(), "code/step.host.o": fake_object()[:700]}
    path = write_artifact(tmp_path / "a", files=files)
    with pytest.raises(RuntimeDiagnostic, match="the object code cannot be loaded"):
        Session(path, threads=1)


def test_cycle_counter_runs() -> None:
    counter = CycleCounter()
    first = counter()
    time.sleep(0.002)
    assert counter() > first


def test_loading_is_light(artifact_path: Path) -> None:
    """No compiler, no torch, no grammar: what an artifact needs and nothing else."""
    script = """
import sys
import runtime
assert "numpy" not in sys.modules
session = runtime.Session(sys.argv[1], threads=1)
heavy = {"torch", "transformers", "lark", "ir", "codegen", "passes", "frontends", "tokenizers", "numpy.random"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
