"""The training code of examples/tiny-moe computes what transformers computes, and its README tells the truth."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from examples import train_tiny_moe as training
from examples.moe_model import Experts, MoeModel, MoeShape, load_checkpoint, save_checkpoint

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"


def test_orthogonal_updates() -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 24), (24, 8)):
        sizes = torch.linalg.svdvals(training.orthogonal(torch.randn(shape)).float())
        assert sizes.min() > 0.5
        assert sizes.max() < 1.4


def test_the_learning_rate_rises_holds_and_falls_to_zero() -> None:
    rates = [training.learning_rate(step / 1000) for step in range(1001)]
    assert rates[0] < 0.2
    assert max(rates) == 1.0 == rates[200]
    assert rates[300:] == sorted(rates[300:], reverse=True)
    assert rates[-1] == 0.0


def test_grouped_experts_equal_a_loop_over_tokens() -> None:
    torch.manual_seed(1)
    experts = Experts(MoeShape(hidden_size=32, moe_intermediate_size=16, num_experts=5))
    x = torch.randn(7, 32)
    mixed, balance = experts(x)
    for token in range(7):
        weight, chosen = (experts.router @ x[token]).softmax(0).topk(2)
        expected = torch.zeros(32)
        for share, expert in zip(weight / weight.sum(), chosen, strict=True):
            gate, up = (experts.gate_up[expert] @ x[token]).chunk(2)
            expected = expected + share * (experts.down[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(mixed[token], expected)
    assert float(balance.detach()) > 0.5


def test_a_saved_model_computes_the_same_in_transformers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = MoeModel(
        MoeShape(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=3,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=4,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():
        model.embedding.mul_(20)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_checkpoint(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        ours = load_checkpoint(tmp_path)(ids)[0]
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_readme_records_the_perplexity_that_is_measured() -> None:
    torch.set_num_threads(1)
    recorded = re.search(r"perplexity \*\*([\d.]+)\*\*", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert recorded is not None
    text = (FOLDER / "held_out.txt").read_text(encoding="utf-8")[:40_000]  # a quarter keeps the test short
    model = load_checkpoint(FOLDER)
    measured = training.evaluate(model, Tokenizer.from_file(str(FOLDER / "tokenizer.json")), text)
    assert abs(math.log(measured["perplexity"] / float(recorded[1]))) < 0.35
    assert np.isfinite(measured["bits_per_byte"])
