"""Sensitivities: what one group of weights loses in one format, kept on disk and never measured twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from frontends.huggingface import import_model
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, GroupedIntFormat
from ir.ops.builtin import FuncOp
from passes.quantize import sensitivity
from passes.quantize.sensitivity import WholeModel, affordable_sequences, divergence, estimate, log_softmax, measure
from passes.quantize.sensitivity_table import Candidate, Entry, SensitivityTable
from passes.quantize.weight_groups import joined_products
from tests.stratum.tiny_model import QWEN3_MOE, VOCAB, write_model

Q8 = GroupedIntFormat(8, 0, False, F32)
EXACT = Candidate(F32, F32)
CANDIDATES = (
    Candidate(GroupedIntFormat(3, 32), Q8, "nearest"),
    Candidate(GroupedIntFormat(6, 32), Q8, "nearest"),
    Candidate(BF16),
)


class Case(NamedTuple):
    func: FuncOp
    products: Any
    read: Any
    tokens: np.ndarray


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    config = {**QWEN3_MOE, "tie_word_embeddings": True}
    imported = import_model(write_model(tmp_path_factory.mktemp("sensitivity") / "model", config))
    tokens = np.random.default_rng(5).integers(0, VOCAB, (2, 12)).astype(np.int32)
    with imported.checkpoint as checkpoint:
        func, products = joined_products(imported.module, {n: s.role for n, s in imported.weights.items()})
        yield Case(func, products, checkpoint.read, tokens)


def test_groups_are_the_joint_products(case: Case) -> None:
    found = [(g.role, g.parts, len(g.tensors), g.shape, g.layer) for _, g in case.products[-5:]]
    assert found == [
        ("attention", ("attention.q", "attention.k", "attention.v"), 3, (128, 64), 1),
        ("attention", ("attention.o",), 1, (64, 64), 1),
        ("experts", ("experts.gate", "experts.up"), 8, (4, 64, 64), 1),
        ("experts", ("experts.down",), 4, (4, 64, 32), 1),
        ("head", ("head",), 1, (VOCAB, 64), None),
    ]
    assert case.products[2][1].name == "model.layers.0.mlp.experts.*.gate_proj+up_proj"


def test_more_bits_lose_less_and_no_rounding_loses_nothing(case: Case) -> None:
    table = SensitivityTable()
    measure(case.func, case.products, case.read, case.tokens, (*CANDIDATES, EXACT), table)
    for _, group in case.products:
        coarse, fine, floats, exact = (table.get(group, c) for c in (*CANDIDATES, EXACT))
        assert coarse is not None and fine is not None and floats is not None and exact is not None
        assert coarse.error > fine.error > floats.error >= exact.error == 0
        assert coarse.loss > max(fine.loss, floats.loss)
        assert min(fine.loss, floats.loss) > 0
        assert exact.loss < 1e-8
        assert {e.how for e in (coarse, fine, floats, exact)} == {"measured"}


def test_loss_of_one_group_is_that_of_the_whole_model_with_only_this_group_stored_so(case: Case) -> None:
    table = SensitivityTable()
    measure(case.func, case.products, case.read, case.tokens, CANDIDATES[:1], table)
    whole = WholeModel(case.func, case.products, case.read, case.tokens)
    everywhere = {group.name: EXACT for _, group in case.products}
    assert whole.loss(everywhere) < 1e-9
    for _, group in case.products[::3]:
        entry = table.get(group, CANDIDATES[0])
        assert entry is not None
        assert whole.loss({**everywhere, group.name: CANDIDATES[0]}) == pytest.approx(entry.loss, rel=1e-3)


def test_few_runs_of_the_model_are_enough_where_many_take_too_long(case: Case) -> None:
    direct, quick = SensitivityTable(), SensitivityTable()
    measure(case.func, case.products, case.read, case.tokens, CANDIDATES, direct)
    measure(case.func, case.products, case.read, case.tokens, CANDIDATES, quick, max_direct_flops=0)
    for _, group in case.products:
        entries = [quick.get(group, c) for c in CANDIDATES]
        assert [e.how for e in entries if e is not None] == ["scaled", "measured", "scaled"]
        for entry in entries:
            assert entry is not None
            full = direct.entries[entry.group, entry.candidate]
            assert entry.error == pytest.approx(full.error, rel=1e-5)
    # The routing of a token changes by jumps; of what has none before it, the loss is nearly linear in the error.
    head = case.products[-1][1]
    scaled, full = quick.get(head, CANDIDATES[0]), direct.get(head, CANDIDATES[0])
    assert scaled is not None and full is not None
    assert scaled.loss == pytest.approx(full.loss, rel=0.5)


def test_what_is_known_is_not_measured_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "table.jsonl"
    table = SensitivityTable(path)
    told: list[tuple[int, int]] = []
    args = (case.func, case.products, case.read, case.tokens)
    measure(*args, CANDIDATES[:2], table, tell=lambda done, total: told.append((done, total)))
    pairs = 2 * len(case.products)
    assert told[-1] == (pairs, pairs) and len(told) == pairs
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed while it wrote
    again = SensitivityTable(path)
    assert len(again.entries) == pairs - 1
    told.clear()
    measure(*args, CANDIDATES[:2], again, tell=lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]
    assert SensitivityTable(path).entries == table.entries
    monkeypatch.setattr(sensitivity, "Forward", None)  # nothing is left to run
    measure(*args, CANDIDATES[:2], SensitivityTable(path))


def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    entry = {"group": "a", "candidate": "b", "error": 0.5, "loss": 0.25, "how": "measured"}
    bad = [
        "",
        "{",
        "[]",
        "1",
        '{"group": 1}',
        json.dumps(entry | {"loss": float("nan")}),
        json.dumps(entry | {"error": -1}),
    ]
    path.write_text("\n".join([*bad, json.dumps(entry), "\x00"]))
    assert [(e.group, e.loss) for e in SensitivityTable(path).entries.values()] == [("a", 0.25)]


def test_a_table_that_cannot_be_kept_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = SensitivityTable(tmp_path / "file" / "table.jsonl")
    with pytest.raises(DiagnosticError, match="cannot be kept"):
        table.add([Entry("a", "b", 0.0, 0.0, "measured")])


def test_without_text_the_error_of_the_weights_is_weighed_by_the_norm_in_front(case: Case) -> None:
    table = SensitivityTable()
    estimate(case.products, case.read, CANDIDATES, table)
    _, group = case.products[0]
    weights = np.concatenate([case.read(t) for t in group.tensors]).astype(np.float32)
    gains = case.read("model.layers.0.input_layernorm.weight").astype(np.float64)
    kept = CANDIDATES[0].weights.unpack(CANDIDATES[0].weights.pack(weights))
    wanted = float((((kept - weights) * gains) ** 2).sum() / ((weights * gains) ** 2).sum())
    entry = table.get(group, CANDIDATES[0])
    assert entry is not None and entry.how == "estimated"
    assert entry.error == pytest.approx(wanted, rel=1e-5)
    exact = table.get(group, CANDIDATES[2])
    assert exact is not None and exact.loss == 0  # the checkpoint is bf16


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.q_proj+k_proj+v_proj"),
        ("model.layers.0.post_attention_layernorm.weight", "mlp.gate"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(case: Case, value: float, tensor: str, named: str) -> None:
    def read(name: str) -> np.ndarray:
        found = case.read(name)
        if name == tensor:
            found.reshape(-1)[5] = value
        return found

    with pytest.raises(DiagnosticError) as caught:
        measure(case.func, case.products, read, case.tokens, CANDIDATES, SensitivityTable())
    assert named in caught.value.diagnostics[0].render()
    if "k_proj" in tensor:
        with pytest.raises(DiagnosticError, match="hold NaN"):
            estimate(case.products, read, CANDIDATES, SensitivityTable())


def test_large_models_are_measured_with_fewer_sequences(case: Case) -> None:
    assert affordable_sequences(case.products, 256) > 12
    assert affordable_sequences(case.products, 256, limit=1e9) < affordable_sequences(case.products, 128, limit=1e9)
    assert affordable_sequences(case.products, 256, limit=1.0) == 1


def test_divergence_of_equal_logits_is_zero_and_of_known_ones_is_known() -> None:
    logits = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    assert divergence(log_softmax(logits), logits) < 1e-9
    assert divergence(log_softmax(logits), logits + 64) < 1e-7
    sure = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    other = np.log(np.array([[0.25, 0.75], [0.25, 0.75]], np.float32))
    wanted = 0.5 * (0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75))
    assert divergence(log_softmax(sure), other) == pytest.approx(wanted, rel=1e-5)


def test_activations_have_the_groups_that_a_build_gives_them(case: Case) -> None:
    wide = Candidate(GroupedIntFormat(4, 32), GroupedIntFormat(8, 128, False, F32), "nearest")
    assert [wide.activations_for(k).group for k in (256, 128, 192, 96, 48)] == [128, 128, 64, 32, 0]
    table = SensitivityTable()
    measure(case.func, case.products, case.read, case.tokens, (wide,), table)
    assert len(table.entries) == len(case.products)


def test_formats_whose_groups_do_not_fill_a_row_are_left_out(case: Case) -> None:
    wide = Candidate(GroupedIntFormat(4, 128, False, F16), Q8)
    table = SensitivityTable()
    measure(case.func, case.products, case.read, case.tokens, (wide,), table)
    assert not table.entries
