"""Quantized checkpoints through the front door: what `inspect` says, and a build that keeps their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ir
import stratum
from frontends.huggingface import import_model
from ir.interpreter import zero_states
from stratum.cli import main
from tests.frontends import quantized_files as files
from tests.frontends.test_quantized_weights import GPTQ
from tests.plain_code import plain_code
from tests.stratum.tiny_model import LLAMA, write_tokenizer

IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
RECIPE = """\
name = "exact"
description = "weights as stored, activations in floats"
[weights]
format = "stored"
activations = "float"
"""


@pytest.fixture(scope="module", params=[False, True], ids=["in_order", "act_order"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> files.Model:
    settings = {**GPTQ, "group_size": 32, "desc_act": request.param}
    make = files.gptq(group=32, act_order=request.param)
    made = files.write_quantized(tmp_path_factory.mktemp("gptq"), LLAMA, make, settings)
    write_tokenizer(made.packed)
    return made


def test_inspect_says_what_was_found(model: files.Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model.packed), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "  quantized   GPTQ, 4 bit, group 32, zero points of version 1\n" in text
    assert "in 21 tensors: F32" in text and "q4_zp<group=32, scale=f16>" in text
    assert main(["inspect", str(model.packed), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quantization"].startswith("GPTQ") and facts["parameters"] == 94784
    assert facts["dtypes"]["q4_zp<group=32, scale=f16>"]["tensors"] == len(model.floats)


def test_a_build_keeps_the_numbers(model: files.Model, tmp_path: Path) -> None:
    (tmp_path / "exact.toml").write_text(RECIPE)
    with plain_code():
        artifact = stratum.build(model.packed, tmp_path / "out", dtype="f32", recipe=str(tmp_path / "exact.toml"))
    formats = {
        tensor["format"] for tensor in json.loads((artifact / "manifest.json").read_text())["weights"]["tensors"]
    }
    assert "q4_zp<group=32, scale=f16>" in formats
    count = len(IDS)
    with stratum.load(artifact, threads=1, max_context=64) as loaded:
        found = np.array(loaded.session.step(list(IDS), range(count), [0] * count, list(range(count))))
    plain = import_model(model.plain)
    func = plain.module.function("step")
    positions = np.arange(count, dtype=np.int32)
    inputs = [IDS, positions, np.zeros_like(positions), positions]
    with plain.checkpoint as checkpoint:
        (wanted,) = ir.interpret(func, inputs, weights=checkpoint.read, states=zero_states(func, slots=1, ctx=count))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
