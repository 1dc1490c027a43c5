"""Fixtures of the runtime's tests: artifacts on disk that the tests only read."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import stratum
from tests.runtime.fake_artifact import write_artifact
from tests.runtime.streamed_models import build_all, resident_logits
from tests.stratum.tiny_model import LLAMA, write_model

KV_LAYERS = 4
KV_CONFIG = {
    **LLAMA,
    "num_hidden_layers": KV_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="session")
def artifact_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake artifact; tests that change one write their own."""
    return write_artifact(tmp_path_factory.mktemp("fake") / "artifact")


@pytest.fixture(scope="session")
def kv_build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model whose KV cache has the format of that name (bf16, kv8, ...), built once."""
    folder = tmp_path_factory.mktemp("kv")
    model = write_model(folder / "model", KV_CONFIG)

    @cache
    def build(name: str) -> Path:
        return stratum.build(model, folder / name, recipe="none" if name == "bf16" else f"none,{name}")

    return build


@pytest.fixture(scope="session")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by family; what one worker has compiled of them, the others take."""
    cache = Path(os.environ["STRATUM_TEST_CACHE"]) / "streamed"
    return build_all(tmp_path_factory.mktemp("streamed"), cache)


@pytest.fixture(scope="session")
def expected(streamed: dict[str, Path]) -> dict[tuple[str, int], list[np.ndarray]]:
    """Logits of `streamed_models.batches`, by family and seed."""
    return resident_logits(streamed)
