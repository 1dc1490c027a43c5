"""`compile-model quantize`: from a directory and a text to a checkpoint that builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frontends.huggingface import import_model
from stratum.cli import main
from tests.stratum.tiny_model import QWEN3_MOE, write_model

# matrices too small to be worth compiled rounding
RECIPE = """
[[rule]]
role = "experts"
format = "q4_sym<group=32, scale=f16>"
[[rule]]
role = "attention.k"
format = "q6_sym<group=32, scale=f16>"
"""
TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("quantize") / "model", QWEN3_MOE)


def test_a_calibrated_checkpoint_is_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out, recipe = tmp_path / "text.txt", tmp_path / "out", tmp_path / "mine.toml"
    text.write_text(TEXT)
    recipe.write_text(RECIPE)
    options = ["--recipe", str(recipe), "--calibration", str(text), "--tokens", "256", "--json"]
    assert main(["quantize", str(model), *options, "-o", str(out)]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"round", "write"} <= {event["stage"] for event in events if event["event"] == "stage"}
    done = events[-1]
    assert done["event"] == "done" and done["path"] == str(out) and done["reused"] == 0
    assert done["report"]["method"] == "gptq" and done["report"]["tokens"] == 256
    assert set(done["report"]["formats"]) == {"q4_sym<group=32, scale=f16>", "q6_sym<group=32, scale=f16>"}
    imported = import_model(out)
    imported.checkpoint.close()
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert main(["inspect", str(out)]) == 0
    assert "compressed-tensors, pack-quantized: 6 bit integers, group 32; 4 bit" in capsys.readouterr().out


def test_rounding_to_the_nearest_needs_no_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE)
    assert main(["quantize", str(model), "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "rtn: weights 2 in q6_sym<group=32, scale=f16>, 24 in q4_sym<group=32, scale=f16>" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "w4a16-g32", "--method", "gptq"], "--method gptq needs calibration text"),
        (["--recipe", "w4a16-g32", "--method", "awq"], "--method awq needs calibration text"),
        (["--recipe", "w4a16-g32", "--method", "rtn", "--calibration", "x"], "--method rtn uses no calibration text"),
        (["--recipe", "w4a16-g32", "--calibration", "none.txt"], "the text cannot be read"),
        (["--recipe", "w4a16-g3"], "there is no recipe 'w4a16-g3'"),
        (["--recipe", "kv8"], "rounds no weight"),
        ([], "missing option '--recipe'"),
    ],
)
def test_mistakes_are_one_diagnostic(
    options: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(model), *options, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
