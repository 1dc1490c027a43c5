"""What every test shares: hypothesis profiles, the `reference` marker, and cache directories of the tests' own."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Two cores are shared by pytest's workers; a library that starts a thread per core only slows the others down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Loops that numba compiles are decorated on import, before any fixture; all workers and children share their machine
# code, and so does the next run: it is kept by the source file's date.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "test-numba"))

# The tests make many modules of ops, which the collector would visit all the time (see codegen/garbage.py): it looks
# when the tests of a file are done.
gc.disable()

# A suite started in the background of a shell is told to ignore Ctrl-C, and so would the children it interrupts.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

_RELAXED = (HealthCheck.too_slow, HealthCheck.data_too_large)
# The same examples on every machine: a red run is a change in the code, never luck. `make fuzz` looks further.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=_RELAXED)
_FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "400"))
settings.register_profile(
    "fuzz", deadline=None, max_examples=_FUZZ_EXAMPLES, print_blob=True, suppress_health_check=_RELAXED
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_ROOT = Path(__file__).parents[1]
_REFERENCE = Path(__file__).parent / "reference"
_RUN_CACHE = "STRATUM_TEST_CACHE"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/goldens afresh (needs torch)")


def pytest_configure(config: pytest.Config) -> None:
    """The run has one cache for compiled objects and built models; its workers inherit the name.

    Objects are found by their LLVM text, options and generator: those of earlier runs are taken too.
    """
    if not hasattr(config, "workerinput"):
        os.environ[_RUN_CACHE] = folder = tempfile.mkdtemp(prefix="stratum-test-cache-")
        compiler = hashlib.sha256((_ROOT / "codegen" / "compile_child.py").read_bytes()).hexdigest()[:16]
        kept = _ROOT / "build" / "test-objects" / compiler
        with contextlib.suppress(OSError):  # a tree that cannot be written: nothing is kept
            kept.mkdir(parents=True, exist_ok=True)
            os.symlink(kept, Path(folder) / "objects")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(_RUN_CACHE), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/reference needs torch and transformers."""
    for item in items:
        if _REFERENCE in item.path.parents:
            item.add_marker(pytest.mark.reference)


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: the collector need not look at them after each file."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a file computed once for all of its tests (`functools.cache`) goes when they are done, with all garbage."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear") and value.__module__ == request.module.__name__:
            value.cache_clear()
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Keeps the tests out of the user's cache: compiled objects and built models go to the run's directory."""
    patch = pytest.MonkeyPatch()
    patch.setenv("STRATUM_CACHE", os.environ[_RUN_CACHE])
    yield
    patch.undo()
