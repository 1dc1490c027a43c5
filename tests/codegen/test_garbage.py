"""The collector's setting while a module grows."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from codegen.garbage import OBJECTS, rare_collections


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_the_former_setting_comes_back() -> None:
    gc.set_threshold(700, 10, 10)
    with rare_collections(), rare_collections():
        assert gc.get_threshold()[0] == OBJECTS
    assert gc.get_threshold()[:2] == (700, 10)
    with pytest.raises(KeyError), rare_collections():
        raise KeyError
    assert gc.get_threshold()[:2] == (700, 10)


def test_what_was_chosen_elsewhere_is_kept() -> None:
    gc.set_threshold(2 * OBJECTS, 10, 10)
    with rare_collections():
        assert gc.get_threshold()[0] == 2 * OBJECTS
    gc.set_threshold(0)
    with rare_collections():
        assert gc.get_threshold()[0] == 0  # off
