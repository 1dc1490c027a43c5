"""Plants known wrong changes, one at a time, and shows that the suite catches each.

`mutants.toml` lists them: a file, the exact text there, the wrong text, and the tests that ought to notice. Each is
planted in a copy of the tree, never in the tree itself. A mutant is caught when a test fails, crashes or outlasts the
time limit. Before the first, the tests run without any change: they must pass, or being caught would mean nothing.

    python tools/mutants.py [--only NAME ...] [--jobs N] [--list]

Exit code 0 when every mutant is caught, 1 when one survives, 2 when the list no longer fits the sources.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("mutants.toml")
SKIPPED = ("__pycache__", ".git", ".venv", ".hypothesis", ".pytest_cache", ".ruff_cache", "build", "*.egg-info")
PYTEST = ("-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider")
NO_TESTS_RAN = 5  # pytest's exit code


@dataclass(frozen=True)
class Mutant:
    """One wrong change. `kind` says what sort of mistake it stands for; `tests` are pytest arguments."""

    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class ListError(Exception):
    """The list does not fit the sources, or the tests fail without any change."""


def read_list(path: Path) -> list[Mutant]:
    """The mutants of the TOML file, checked for what it can say wrong."""
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    mutants = []
    for entry in entries:
        unknown = sorted(set(entry) ^ {"name", "kind", "file", "old", "new", "tests"})
        if unknown:
            raise ListError(f"{entry.get('name', '?')}: missing or unknown keys: {', '.join(unknown)}")
        mutants.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
    names = [m.name for m in mutants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ListError(f"names used twice: {', '.join(twice)}")
    return mutants


def planted(mutant: Mutant, root: Path) -> str:
    """The mutated text of the file. Raises ListError unless the old text stands in it exactly once."""
    path = root / mutant.file
    if not path.is_file():
        raise ListError(f"{mutant.name}: no file {mutant.file}")
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ListError(f"{mutant.name}: the old text stands {text.count(mutant.old)} times in {mutant.file}, not once")
    if mutant.old == mutant.new:
        raise ListError(f"{mutant.name}: old and new text are the same")
    return text.replace(mutant.old, mutant.new)


def run_tests(tests: Sequence[str], root: Path, seconds: float) -> tuple[bool, str]:
    """(all passed, the line that tells most) of pytest in `root`."""
    environment = os.environ | {
        "PYTHONPATH": str(root),  # before an editable install of the tree itself
        "PYTHONDONTWRITEBYTECODE": "1",  # compiled files are recognised by whole seconds and size: too coarse here
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *PYTEST, *tests]
    try:
        run = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    if run.returncode == NO_TESTS_RAN:
        raise ListError(f"no test ran: {' '.join(tests)}")
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("FAILED", "ERROR", "Fatal", "E  "))]
    return run.returncode == 0, (telling or lines or [f"exit code {run.returncode}"])[-1][:110]


def copy_tree(target: Path) -> None:
    """The working tree, less what is made from it."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*SKIPPED), symlinks=True)


def check_baseline(mutants: Sequence[Mutant], root: Path, seconds: float) -> None:
    """Every test that a mutant names passes without it."""
    tests = list(dict.fromkeys(test for m in mutants for test in m.tests if not test.startswith("-")))
    passed, line = run_tests(tests, root, seconds)
    if not passed:
        raise ListError(f"the tests fail without any mutant: {line}")


def try_mutant(mutant: Mutant, root: Path, seconds: float) -> tuple[bool, str, float]:
    """(caught, telling line, seconds). Leaves `root` as it was."""
    path = root / mutant.file
    original = path.read_text(encoding="utf-8")
    started = time.monotonic()
    path.write_text(planted(mutant, root), encoding="utf-8")
    try:
        passed, line = run_tests(mutant.tests, root, seconds)
    finally:
        path.write_text(original, encoding="utf-8")
    return not passed, line, time.monotonic() - started


def run_all(mutants: Sequence[Mutant], jobs: int, seconds: float) -> list[Mutant]:
    """Tries every mutant, prints a row for each, returns the survivors."""
    for mutant in mutants:
        planted(mutant, ROOT)
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copy_tree(Path(folder) / str(number))
            copies.put(Path(folder) / str(number))
        started = time.monotonic()
        check_baseline(mutants, Path(folder) / "0", 4 * seconds)
        print(f"tests pass without mutants ({time.monotonic() - started:.0f} s)\n", flush=True)
        print(f"{'':8} {'s':>5}  {'mutant':34} {'kind':24} first failure", flush=True)

        def one(mutant: Mutant) -> tuple[bool, str, float]:
            root = copies.get()
            try:
                return try_mutant(mutant, root, seconds)
            finally:
                copies.put(root)

        with ThreadPoolExecutor(jobs) as pool:
            for mutant, (caught, line, took) in zip(mutants, pool.map(one, mutants), strict=True):
                word = "caught" if caught else "SURVIVED"
                print(f"{word:8} {took:5.1f}  {mutant.name:34} {mutant.kind:24} {line if caught else ''}", flush=True)
                if not caught:
                    survivors.append(mutant)
    return survivors


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant known wrong changes and show that the suite catches each.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these mutants only")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default 1)")
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit for the tests of one mutant")
    parser.add_argument("--list", action="store_true", help="print the list and check that it fits the sources")
    options = parser.parse_args(arguments)
    try:
        mutants = read_list(LIST)
        if options.only:
            unknown = sorted(set(options.only) - {m.name for m in mutants})
            if unknown:
                raise ListError(f"no such mutant: {', '.join(unknown)}")
            mutants = [m for m in mutants if m.name in options.only]
        if options.list:
            for mutant in mutants:
                planted(mutant, ROOT)
                print(f"{mutant.name:34} {mutant.kind:24} {mutant.file}")
            return 0
        survivors = run_all(mutants, max(1, options.jobs), options.seconds)
    except ListError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} caught")
    for mutant in survivors:
        print(f"survived: {mutant.name} ({mutant.file}): {mutant.old.strip()!r} -> {mutant.new.strip()!r}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
