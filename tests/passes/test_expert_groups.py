"""Formats by expert out of a budget: what a stack loses is divided by error and use, and the recipe keeps its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontends.huggingface import ImportedModel, import_model
from ir.formats import F16, F32, GroupedIntFormat
from ir.ops.gemm import MatmulOp
from ir.ops.moe import DispatchOp, GroupedGemmOp
from passes.analysis.value_types import tensor_type
from passes.clone import clone
from passes.pass_base import PassContext
from passes.pass_manager import PassManager
from passes.pipelines import fuse_across_kernels, simplify
from passes.quantize.bit_choice import BitProblem, choose
from passes.quantize.bit_recipe import recipe_of
from passes.quantize.expert_groups import by_expert
from passes.quantize.quantize import QuantizePass
from passes.quantize.recipe import read_recipe
from passes.quantize.sensitivity import WholeModel, estimate, measure
from passes.quantize.sensitivity_table import Candidate, Entry, SensitivityTable
from passes.quantize.weight_groups import WeightGroup, expert_name, joined_products
from tests.stratum.tiny_model import QWEN3_MOE, VOCAB, write_model

CANDIDATES = tuple(Candidate(GroupedIntFormat(bits, 32, False, F16), F32) for bits in (2, 4, 8))


class Case(NamedTuple):
    imported: ImportedModel
    func: Any
    products: list
    roles: dict[str, str]
    tokens: np.ndarray


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    imported = import_model(write_model(tmp_path_factory.mktemp("experts") / "model", QWEN3_MOE))
    roles = {name: spec.role for name, spec in imported.weights.items()}
    tokens = np.random.default_rng(5).integers(0, VOCAB, (2, 10)).astype(np.int32)
    with imported.checkpoint:
        func, products = joined_products(imported.module, roles)
        yield Case(imported, func, products, roles, tokens)


@given(
    loss=st.floats(0, 10),
    pairs=st.lists(st.tuples(st.floats(1e-6, 10), st.integers(0, 50)), min_size=1, max_size=8),
    data=st.data(),
)
def test_what_a_stack_loses_is_divided_by_error_and_use(loss: float, pairs: list, data: st.DataObject) -> None:
    count = len(pairs)
    tensors = tuple(f"layers.0.experts.{e}.{p}_proj" for p in ("gate", "up") for e in range(count))
    stack = WeightGroup("layers.0.gate_up", "experts", ("experts.gate", "experts.up"), tensors, (count, 4, 32))
    table = SensitivityTable()
    errors, uses = tuple(e for e, _ in pairs), tuple(float(u) for _, u in pairs)
    table.add([Entry(stack.name, str(CANDIDATES[0]), 0.1, loss, "measured", errors, uses)])
    groups, entries = by_expert([stack], CANDIDATES[:1], table, {})
    assert [g.tensors for g in groups] == [(tensors[e], tensors[count + e]) for e in range(count)]
    assert all(g.of is stack and g.shape == (1, 4, 32) and g.layer == 0 for g in groups)
    losses = [entries.entries[g.name, str(CANDIDATES[0])].loss for g in groups]
    assert math.isclose(sum(losses), loss, rel_tol=1e-9, abs_tol=1e-12)
    # A trace in which one expert is picked more often makes that one weigh more, and the others less.
    often = data.draw(st.integers(0, count - 1))
    trace = [u + (1000 if e == often else 0) for e, u in enumerate(uses)]
    groups, entries = by_expert([stack], CANDIDATES[:1], table, {0: trace})
    for e, group in enumerate(groups):
        changed = entries.entries[group.name, str(CANDIDATES[0])].loss
        assert changed >= losses[e] * (1 - 1e-9) if e == often else changed <= losses[e] * (1 + 1e-9)


def test_experts_add_up_to_their_stack(case: Case) -> None:
    """Measured: shares of the squared error; the whole model with equal experts is that with their stack."""
    table = SensitivityTable()
    read = case.imported.checkpoint.read
    measure(case.func, case.products, read, case.tokens, CANDIDATES[:1], table, by_expert=True)
    stacks = [group for _, group in case.products if len(group.shape) == 3]
    for stack in stacks:
        entry = table.get(stack, CANDIDATES[0])
        assert entry is not None and sum(entry.uses) == case.tokens.size * 2
        assert all((error > 0) == (use > 0) for error, use in zip(entry.experts, entry.uses, strict=True))
    whole = WholeModel(case.func, case.products, read, case.tokens)
    plain = {group.name: CANDIDATES[0] for _, group in case.products}
    apart = {name: c for name, c in plain.items() if name not in {s.name for s in stacks}}
    apart |= {expert_name(s.name, e): CANDIDATES[0] for s in stacks for e in range(4)}
    assert whole.loss(plain) == whole.loss(apart) > 0


def test_the_recipe_keeps_the_bytes_that_were_chosen(case: Case, tmp_path: Path) -> None:
    table, groups = SensitivityTable(), [group for _, group in case.products]
    estimate(case.products, case.imported.checkpoint.read, CANDIDATES, table)
    trace = {layer: [1.0, 50.0, 3.0, 400.0] for layer in (0, 1)}
    apart, entries = by_expert(groups, CANDIDATES, table, trace)
    problem = BitProblem.of(apart, CANDIDATES, entries)
    choice = choose(problem, problem.count * 9 // 16)
    text = recipe_of(choice).to_toml()
    assert read_recipe(text, "again").rules == recipe_of(choice).rules and 'experts = "' in text
    path = tmp_path / "chosen.toml"
    path.write_text(text)
    module = clone(case.imported.module)
    passes = [*simplify(), *fuse_across_kernels(), QuantizePass((str(path),), "f32")]
    PassManager(passes, context=PassContext(options={"roles": case.roles})).run(module)  # type: ignore[arg-type]
    nbytes = sum(
        tensor_type(op.w).element.nbytes(tuple(d for d in tensor_type(op.w).shape if isinstance(d, int)))
        for op in module.walk()
        if isinstance(op, (MatmulOp, GroupedGemmOp)) and tensor_type(op.w).element != F32
    )
    assert nbytes == choice.winner.solution.nbytes
    assert any(isinstance(op, DispatchOp) and op.places for op in module.walk())
    picked = choice.assignment
    for stack in groups:  # what the router picks most has no fewer bits than what it picks least
        if len(stack.shape) == 3:
            bits = [picked[expert_name(stack.name, e)].weights.bits for e in range(4)]
            assert bits[3] >= bits[0] and bits[3] >= bits[2]
    assert sum(isinstance(op, GroupedGemmOp) for op in module.walk()) > 4
