"""What every test shares: hypothesis profiles, the `reference` marker, and a cache directory of the tests' own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Two cores are shared by pytest's workers; a library that starts a thread per core only slows the others down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A suite started in the background of a shell is told to ignore Ctrl-C, and so would the children it interrupts.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

_RELAXED = (HealthCheck.too_slow, HealthCheck.data_too_large)
# The same examples on every machine: a red run is a change in the code, never luck. `make fuzz` looks further.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=_RELAXED)
settings.register_profile("fuzz", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_RELAXED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_REFERENCE = Path(__file__).parent / "reference"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/goldens afresh (needs torch)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/reference needs torch and transformers."""
    for item in items:
        if _REFERENCE in item.path.parents:
            item.add_marker(pytest.mark.reference)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the tests out of the user's cache: compiled objects and built models go to a temporary directory."""
    patch = pytest.MonkeyPatch()
    patch.setenv("STRATUM_CACHE", str(tmp_path_factory.mktemp("stratum-cache")))
    yield
    patch.undo()
