"""The quality table: rounded checkpoints, bars, and what is said of rows that cannot be built."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bench import quality
from bench.quality import Figures, markdown
from bench.quality_checks import checks
from bench.quality_rows import MissingError, Rounded, Row, built, is_layer, rounded_checkpoint, with_format, with_recipe
from passes.quantize.recipe import read_recipe
from tests.own_cache import own_cache
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, write_model


def halved(name: str, role: str, values: np.ndarray) -> Rounded | None:
    return Rounded(values / 2, values.size) if is_layer(role) else None


def test_only_asked_weights_are_rounded(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", QWEN3_MOE)
    assert rounded_checkpoint(model, tmp_path / "out", halved) == 8.0
    before, after = (load_file(d / "model.safetensors") for d in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        changed = "_proj" in name
        expected = values.astype(np.float32) / (2 if changed else 1)
        assert after[name].dtype == np.float32 and np.array_equal(after[name], expected), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_tied_table_that_is_rounded_as_head_becomes_two(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {**LLAMA, "tie_word_embeddings": True})
    rounding = with_format("q4_sym<group=32, scale=f16>", "nearest", head=True)
    bits = rounded_checkpoint(model, tmp_path / "out", rounding)
    assert bits == pytest.approx(4.5)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    table, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    assert np.array_equal(table, load_file(model / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32))
    assert 0 < np.abs(head - table).max() < 0.2 * np.abs(table).max()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_recipes_round_what_they_name() -> None:
    text = '[weights]\nformat = "q8_sym<group=row, scale=f32>"\nrounding = "nearest"\n'
    rounding = with_recipe(read_recipe(text + '[[rule]]\nrole = "head"\nformat = "bf16"\n', "x"))
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    layer, head = rounding("a", "attention.q", values), rounding("b", "head", values)
    assert layer is not None and head is not None
    assert layer.nbytes == 64 + 2 * 4 and np.abs(layer.values - values).max() <= 0.5 / 127 * 1.001
    assert head.nbytes == 128 and np.abs(head.values - values).max() <= 2**-9
    assert rounding("c", "embedding", values) is None and rounding("d", "norm", values) is None
    assert rounding("e", "moe.router", values) is None


def test_formats_that_do_not_exist_are_missing() -> None:
    with pytest.raises(MissingError, match="q9_sym"):
        with_format("q9_sym<group=32, scale=f16>", "mse", head=False)


def figures(**divergences: float) -> dict[str, Figures]:
    return {
        key: Figures(key, quality.LAYERS, key, bits=4.5, perplexity=10.0, divergence=value, top1=0.9)
        for key, value in divergences.items()
    }


def verdict(bar: str, rows: dict[str, Figures]) -> str:
    (found,) = [c.verdict for c in checks(rows) if c.bar.startswith(bar)]
    return found


def test_bars() -> None:
    four, eight = "4.5 bits: KL at most 0.7 x llama.cpp Q4_0", "8.5 bits"
    (first, _) = [c for c in checks(figures(**{"layers/q4": 0.7, "layers/gguf-Q4_0": 1.0})) if c.bar.startswith(four)]
    assert first.verdict == "pass" and first.measured == "0.70000 / 1.00000 = 0.700 (layers/q4)"
    (first, _) = [c for c in checks(figures(**{"layers/q4": 0.71, "layers/gguf-Q4_0": 1.0})) if c.bar.startswith(four)]
    assert first.verdict == "**fail**"
    assert verdict(eight, figures(**{"layers/q8": 1.0, "layers/gguf-Q8_0": 1.0})) == "pass"
    assert verdict(eight, figures(**{"layers/q8": 1.0})) == "open"
    assert verdict("kv8", figures(**{"kv/kv8": 0.0005})) == "pass"
    assert verdict("kv8", figures(**{"kv/kv8": 0.00051})) == "**fail**"
    assert verdict("kv4", figures(**{"kv/kv4": 1.0, "kv/kv4-plain": 3.0})) == "pass"
    assert verdict("kv4", figures(**{"kv/kv4": 1.0, "kv/kv4-plain": 2.9})) == "**fail**"
    activations = "int8 activations: KL at most 4/3 of the weights alone, "
    assert verdict(f"{activations}w4a8-g32", figures(**{"f32/w4a8-g32": 4.0, "alone/w4a8-g32": 3.0})) == "pass"
    assert verdict(f"{activations}w3", figures(**{"f32/w3": 9.0, "alone/w3": 1.0})) == "**fail**"
    four_bits = figures(**{"layers/nf4": 0.72, "layers/gguf-Q4_0": 1.0})
    assert verdict("layers/nf4 against llama.cpp Q4_0", four_bits) == ""  # reported only
    solver = "solver/4.5: "
    assert verdict(solver, figures(**{"solver/4.5": 1.0, "whole/q4": 1.0, "whole/k4": 2.0})) == "pass"
    assert verdict(solver, figures(**{"solver/4.5": 1.0, "whole/q4": 0.9, "whole/k4": 2.0})) == "**fail**"
    assert verdict(solver, figures(**{"solver/4.5": 1.0, "whole/gguf-Q4_0": 0.9})) == "open"


def test_rows_that_cannot_be_built_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row that builds and one that does not, through a real evaluation."""
    monkeypatch.setenv("STRATUM_CACHE", own_cache(tmp_path / "cache"))
    model = write_model(tmp_path / "model", LLAMA)
    (model / "held_out.txt").write_text("a few words of text, to be predicted byte by byte. " * 12)
    monkeypatch.setattr(quality, "CONTEXT", 65)
    monkeypatch.setattr(quality, "STRIDE", 64)
    rows = [
        Row("good", quality.LAYERS, "good", lambda folder: (built(model, folder / "b", "--dtype", "f32"), None)),
        Row("bad", quality.LAYERS, "bad", lambda folder: (built(model, folder / "b", "--recipe", "absent"), None)),
    ]
    good, bad = quality.measure(rows, model, 1)
    assert not good.missing and good.divergence == 0.0 and good.top1 == 1.0 and good.perplexity > 1  # the reference
    assert "there is no recipe 'absent'" in bad.missing
    text = markdown([good, bad], "header")
    assert "| bad |  |  | missing: " in text and f"{good.perplexity:.3f}" in text and text.startswith("header")
