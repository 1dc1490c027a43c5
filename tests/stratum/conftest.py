"""Models written and built once for all tests of this folder; tests that spoil one copy it first."""

from __future__ import annotations

from pathlib import Path

import pytest

import stratum
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, write_model


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama", LLAMA)


@pytest.fixture(scope="session")
def moe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-moe", QWEN3_MOE)


@pytest.fixture(scope="session")
def llama_artifact(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stratum.build(llama_directory, tmp_path_factory.mktemp("artifacts") / "tiny-llama")


@pytest.fixture(scope="session")
def moe_artifact(moe_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stratum.build(moe_directory, tmp_path_factory.mktemp("artifacts") / "tiny-moe")
