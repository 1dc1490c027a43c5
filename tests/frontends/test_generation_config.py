"""generation_config.json: defaults, both forms of eos, bounds, and what is said about kinds that are not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frontends.config import ModelConfig
from frontends.config_reader import ConfigReader
from frontends.generation_config import GenerationDefaults, load_generation_defaults
from frontends.huggingface import read_model_config
from ir.diagnostics import DiagnosticError
from tests.frontends.model_files import config_of


def _model(**changes: Any) -> ModelConfig:
    return read_model_config(ConfigReader(config_of("llama", **changes), "config.json"))[1]


def _load(directory: Path, fields: dict[str, Any] | None, **changes: Any) -> GenerationDefaults:
    if fields is not None:
        (directory / "generation_config.json").write_text(json.dumps(fields))
    return load_generation_defaults(directory, _model(**changes))


def test_no_file_means_greedy_with_the_ids_of_the_config(tmp_path: Path) -> None:
    found = _load(tmp_path, None, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0)
    assert found == GenerationDefaults(bos_ids=(1,), eos_ids=(2, 3), pad_ids=(0,))


def test_the_file_comes_before_the_config(tmp_path: Path) -> None:
    fields = {"eos_token_id": [5, 6], "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
              "min_p": 0.05, "repetition_penalty": 1.05, "max_new_tokens": 100}  # fmt: skip
    assert _load(tmp_path, fields, eos_token_id=2, bos_token_id=1) == GenerationDefaults(
        True, 0.7, 20, 0.8, 0.05, 1.05, 100, bos_ids=(1,), eos_ids=(5, 6)
    )
    assert _load(tmp_path, {"eos_token_id": 7}).eos_ids == (7,)


def test_sampling_without_top_k_means_fifty(tmp_path: Path) -> None:
    assert _load(tmp_path, {"do_sample": True}).top_k == 50
    assert _load(tmp_path, {"do_sample": True, "top_k": 0}).top_k == 0
    assert _load(tmp_path, {}).top_k == 0


def test_temperature_zero_is_greedy(tmp_path: Path) -> None:
    assert not _load(tmp_path, {"do_sample": True, "temperature": 0.0}).do_sample


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "field 'temperature' is -1"),
        ({"temperature": "hot"}, "field 'temperature' is 'hot'"),
        ({"top_p": 0}, "field 'top_p' is 0"),
        ({"top_p": 1.5}, "field 'top_p' is 1.5"),
        ({"min_p": 2}, "field 'min_p' is 2"),
        ({"top_k": -1}, "field 'top_k' is -1"),
        ({"top_k": 2.5}, "field 'top_k' is 2.5"),
        ({"repetition_penalty": 0}, "field 'repetition_penalty' is 0"),
        ({"max_new_tokens": 0}, "field 'max_new_tokens' is 0"),
        ({"do_sample": 1}, "field 'do_sample' is 1"),
        ({"eos_token_id": 40}, "field 'eos_token_id' names token 40\nexpected: ids below 40"),
        ({"eos_token_id": ["x"]}, "field 'eos_token_id' is ['x']"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as caught:
        _load(tmp_path, fields)
    assert f"{tmp_path}/generation_config.json: error: " in str(caught.value)
    assert message in str(caught.value)


def test_other_kinds_of_generation_are_said(tmp_path: Path) -> None:
    found = _load(tmp_path, {"num_beams": 4, "no_repeat_ngram_size": 0, "typical_p": 0.9})
    assert [line.partition("field ")[2] for line in found.warnings] == [
        "'num_beams' = 4 is not supported and was ignored",
        "'typical_p' = 0.9 is not supported and was ignored",
    ]
