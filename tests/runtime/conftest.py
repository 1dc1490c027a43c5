"""Fixtures of the runtime's tests: one artifact on disk that the tests only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.fake_artifact import write_artifact


@pytest.fixture(scope="session")
def artifact_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake artifact; tests that change one write their own."""
    return write_artifact(tmp_path_factory.mktemp("fake") / "artifact")
