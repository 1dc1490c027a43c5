"""The mutants runner: its list fits the sources, and it tells caught from survived."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import mutants
from tools.mutants import ListError, Mutant

SOURCE = "def double(x):\n    return 2 * x\n"
TEST = "from code_under_test import double\n\ndef test_double():\n    assert double(3) == 6\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny project for the runner to work on."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "code_under_test.py").write_text(SOURCE)
    (root / "test_double.py").write_text(TEST)
    monkeypatch.setattr(mutants, "ROOT", root)
    return root


def mutant(**changes: object) -> Mutant:
    fields = {
        "name": "wrong-factor",
        "kind": "swapped scale",
        "file": "code_under_test.py",
        "old": "2 * x",
        "new": "3 * x",
        "tests": ("test_double.py",),
    }
    return Mutant(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_list_fits_the_sources() -> None:
    found = mutants.read_list(mutants.LIST)
    assert len(found) >= 20 and len({m.kind for m in found}) >= 15
    for entry in found:
        mutants.planted(entry, mutants.ROOT)
        for test in entry.tests:
            path, _, function = test.partition("::")
            assert (mutants.ROOT / path).exists(), f"{entry.name}: no {test}"
            if function:
                text = (mutants.ROOT / path).read_text(encoding="utf-8")
                assert f"def {function.partition('[')[0]}(" in text, f"{entry.name}: no {test}"


def test_caught_and_survived(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = mutant(name="harmless", new="x * 2")
    assert mutants.run_all([mutant(), same], 1, 60) == [same]
    out = capsys.readouterr().out
    assert any(line.startswith("caught") and "wrong-factor" in line for line in out.splitlines())
    assert any(line.startswith("SURVIVED") and "harmless" in line for line in out.splitlines())
    assert (tree / "code_under_test.py").read_text() == SOURCE


def test_a_hanging_mutant_is_caught(tree: Path) -> None:
    hanging = mutant(old="return 2 * x", new="while True: pass")
    assert mutants.run_all([hanging], 1, 2.0) == []


def test_tests_that_fail_anyway_prove_nothing(tree: Path) -> None:
    (tree / "test_double.py").write_text(TEST.replace("== 6", "== 7"))
    with pytest.raises(ListError, match="fail without any mutant"):
        mutants.run_all([mutant()], 1, 60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": "4 * x"}, "stands 0 times"),
        ({"old": "x"}, "stands 2 times"),
        ({"file": "absent.py"}, "no file absent.py"),
        ({"new": "2 * x"}, "are the same"),
    ],
)
def test_a_list_that_does_not_fit(tree: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ListError, match=message):
        mutants.planted(mutant(**changes), tree)


def test_no_test_is_no_proof(tree: Path) -> None:
    with pytest.raises(ListError, match="no test ran"):
        mutants.run_tests(["test_double.py", "-k", "nothing"], tree, 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[mutant]]\nname = "a"\n', "missing or unknown keys: file, kind, new, old, tests"),
        (2 * '[[mutant]]\nname="a"\nkind="k"\nfile="f"\nold="o"\nnew="n"\ntests=["t"]\n', "names used twice: a"),
    ],
)
def test_a_list_that_says_too_little(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.toml").write_text(text)
    with pytest.raises(ListError, match=message):
        mutants.read_list(tmp_path / "list.toml")
