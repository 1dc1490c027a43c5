"""Experts of one layer in several formats: each token gets what a build in its experts' formats alone would give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ir import interpret
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.diagnostics import DiagnosticError
from ir.formats import F32
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.moe import CombineOp, DispatchOp, GroupedGemmOp, RouteOp
from ir.ops.tensor import MulOp, SiluOp, SliceOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.types import SymbolicDim, TensorType
from passes.clone import clone
from passes.pass_base import PassContext
from passes.pass_manager import PassManager
from passes.quantize.add_stand_ins import AddStandInsPass
from passes.quantize.expert_ranges import ranges_text
from passes.quantize.quantize import QuantizePass
from passes.quantize.recipe import read_recipe

TOKENS = SymbolicDim("tokens")
FORMATS: tuple[str, ...] = tuple(f"q{bits}_sym<group=32, scale=f16>" for bits in (4, 8, 2))
WIDTH, INNER = 32, 64


def layer(experts: int, top_k: int, stacked: bool, doubled: bool = False) -> ModuleOp:
    """@main(x, logits): gate and up, as one tensor of the checkpoint or a tensor for each expert, then down."""
    func = FuncOp.create("main", [TensorType((TOKENS, WIDTH), F32), TensorType((TOKENS, experts), F32)])
    b = Builder.at_end(func.block)
    x, logits = func.arguments

    def weight(name: str, *shape: int):
        symbol = SymbolRef(f"experts.*.{name}" if stacked else name)
        type = TensorType((experts, *shape), F32)
        if stacked:
            return b(ConstantStackOp(symbol=symbol, count=experts, result_types=[type]))
        return b(ConstantOp(symbol=symbol, result_types=[type]))

    ids, share = b(RouteOp(logits, top_k=top_k, normalize=True))
    order, offsets = b(DispatchOp(ids, num_experts=experts))
    both = b(GroupedGemmOp(x, weight("up_proj", 2 * INNER, WIDTH), order, offsets, gather=top_k))
    gate, up = (b(SliceOp(both, axis=1, start=at, size=INNER)) for at in (0, INNER))
    y = b(GroupedGemmOp(b(MulOp(b(SiluOp(gate)), up)), weight("down_proj", WIDTH, INNER), order, offsets, gather=0))
    z = b(CombineOp(b(SiluOp(y)) if doubled else y, share, order))
    b(ReturnOp(z))
    return ModuleOp.create(func)


def weights_of(experts: int, stacked: bool, random: np.random.Generator) -> dict[str, np.ndarray]:
    up = random.standard_normal((experts, 2 * INNER, WIDTH)).astype(np.float32)
    down = random.standard_normal((experts, WIDTH, INNER)).astype(np.float32)
    if not stacked:
        return {"up_proj": up, "down_proj": down}
    return {f"experts.{e}.{n}": w[e] for n, w in (("up_proj", up), ("down_proj", down)) for e in range(experts)}


def quantized(module: ModuleOp, path: Path, text: str) -> ModuleOp:
    path.write_text(text)
    made = clone(module)
    assert isinstance(made, ModuleOp)
    PassManager([QuantizePass((str(path),), "f32")]).run(made)
    return made


def recipe(formats: list[str]) -> str:
    """The formats of experts 0, 1, ..."""
    rules = [
        f'[[rule]]\nexperts = "{ranges_text([(e, e)])}"\nformat = "{format}"\n' for e, format in enumerate(formats)
    ]
    return f'[weights]\nformat = "{formats[0]}"\nactivations = "f32"\nrounding = "nearest"\n' + "".join(rules)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), experts=st.integers(1, 6), tokens=st.integers(1, 5), stacked=st.booleans())
def test_every_expert_is_computed_in_its_own_format(
    tmp_path: Path, data: st.DataObject, experts: int, tokens: int, stacked: bool
) -> None:
    formats = data.draw(st.lists(st.sampled_from(FORMATS), min_size=experts, max_size=experts))
    top_k = data.draw(st.integers(1, experts))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    module, weights = layer(experts, top_k, stacked), weights_of(experts, stacked, random)
    x = random.standard_normal((tokens, WIDTH)).astype(np.float32)
    logits = random.standard_normal((tokens, experts)).astype(np.float32)
    mixed = quantized(module, tmp_path / "mixed.toml", recipe(formats))
    (found,) = interpret(mixed.functions[0], [x, logits], weights=weights)
    # One expert at a time, in its format: what it answers, weighted as the router says.
    ids, share = RouteOp.reference(logits, top_k=top_k, normalize=True)
    want = np.zeros((tokens, WIDTH))
    for format in dict.fromkeys(formats):
        alone = quantized(layer(experts, 1, stacked), tmp_path / "one.toml", recipe([format] * experts))
        for s in range(top_k):
            one_hot = np.full((tokens, experts), -1e4, np.float32)
            one_hot[np.arange(tokens), ids[:, s]] = 0
            (answer,) = interpret(alone.functions[0], [x, one_hot], weights=weights)
            mine = np.array([formats[e] == format for e in ids[:, s]])
            want += np.where(mine[:, None], share[:, s : s + 1] * answer.astype(np.float64), 0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)
    products = [op for op in mixed.walk() if isinstance(op, GroupedGemmOp)]
    assert len(products) == 2 * len(set(formats))
    assert sum(op.w.type.shape[0] for op in products) == 2 * experts


def test_names_tell_experts_apart_where_the_checkpoint_has_them(tmp_path: Path) -> None:
    text = recipe([FORMATS[0]] * 4).split("[[rule]]", maxsplit=1)[0]
    text += f"[[rule]]\nmatch = 'experts\\.(1|2)\\.up_proj'\nformat = \"{FORMATS[1]}\"\n"
    made = quantized(layer(4, 2, stacked=True), tmp_path / "a.toml", text)
    (dispatch,) = (op for op in made.walk() if isinstance(op, DispatchOp))
    assert dispatch.places == (0, 2, 3, 1)
    whole = quantized(layer(4, 2, stacked=False), tmp_path / "a.toml", text)  # one tensor holds them all
    assert not any(isinstance(op, DispatchOp) and op.places for op in whole.walk())


def test_stand_ins_stay_behind_experts_of_several_formats(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(recipe([FORMATS[1], FORMATS[0], FORMATS[1]]))
    module = layer(3, 2, stacked=True)
    PassManager([AddStandInsPass(), QuantizePass((str(path),), "f32", ("w2a8",))]).run(module)
    products = [op for op in module.walk() if isinstance(op, GroupedGemmOp)]
    assert [(op.first, op.of, op.stand_ins) for op in products] == [
        (0, 3, False), (0, 3, False), (2, 3, False), (2, 3, False), (3, 0, True), (3, 0, True),
    ]  # fmt: skip
    (dispatch,) = (op for op in module.walk() if isinstance(op, DispatchOp))
    assert dispatch.places == (0, 2, 1, 3, 4, 5)


def test_experts_that_cannot_be_told_apart_share_the_most_precise_format(tmp_path: Path) -> None:
    """A layer whose answers are not simply added up stays one stack."""
    module = layer(3, 1, stacked=False, doubled=True)
    combine = next(op for op in module.walk() if isinstance(op, CombineOp))
    gate = next(op for op in module.walk() if isinstance(op, GroupedGemmOp))
    combine._set_operand(0, gate.operands[0])  # the sum is of something else
    path = tmp_path / "mixed.toml"
    path.write_text(recipe([FORMATS[0], FORMATS[1], FORMATS[0]]))
    QuantizePass((str(path),), "f32").run(module.functions[0], PassContext())
    products = [op for op in module.walk() if isinstance(op, GroupedGemmOp)]
    assert len(products) == 2 and {str(op.w.type.element) for op in products} == {FORMATS[1]}


@pytest.mark.parametrize("text", ["", "x", "3-1", "1,,2", "-1", "1-", "1 2", "99999999"])
def test_experts_that_are_no_ranges_are_refused(text: str) -> None:
    words = f'[[rule]]\nexperts = "{text}"\nformat = "bf16"\n'
    with pytest.raises(DiagnosticError, match=r"rule 1: (experts = |it says not what it is about)"):
        read_recipe(words, "mine.toml")


def test_rules_of_experts_read_as_they_were_written() -> None:
    made = read_recipe('[[rule]]\nexperts = "0-3, 8"\nrole = "experts.up"\nformat = "bf16"\n', "mine.toml")
    assert read_recipe(made.to_toml(), "again.toml").rules == made.rules
    said = [made.choice("any", "experts.up", e).format is not None for e in (0, 3, 4, 8, None)]
    assert said == [True, True, False, True, False]
    assert made.choice("any", "experts.down", 0).format is None
    with pytest.raises(DiagnosticError, match="role 'mlp' has no experts"):
        read_recipe('[[rule]]\nexperts = "0"\nrole = "mlp"\nformat = "bf16"\n', "mine.toml")
