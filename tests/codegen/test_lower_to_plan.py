"""Lowering of a step to plans: what is shared, what is named how, where things lie, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from codegen.build_pipeline import default_pipeline
from codegen.compile_step import LoweredStep, lower_step, program_specs
from codegen.lower_to_plan import lower_program
from codegen.lowering import Lowering
from codegen.programs import WeightsFile
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.formats import F32, I32
from ir.ops import plan, tensor
from ir.ops.attention import ScoresOp
from ir.ops.builtin import FuncOp, ReturnOp
from ir.ops.kv_cache import KVStateOp
from ir.ops.tensor_constant import ConstantOp
from ir.types import KVCacheType, SymbolicDim, TensorType
from passes.pass_manager import PassManager
from tests.codegen.harness import host_target
from tests.codegen.models import Shape, build_model

TOKENS, ROWS = SymbolicDim("tokens"), SymbolicDim("rows")
INPUTS = [TensorType((TOKENS,), I32)] * 3 + [TensorType((ROWS,), I32)]


def lowered(shape: Shape) -> LoweredStep:
    model = build_model(shape)
    target = host_target()
    PassManager(default_pipeline(target, "f32")).run(model.module)
    return lower_step(model.step, target.llvm_features)


@pytest.fixture(scope="module")
def two_layers() -> LoweredStep:
    return lowered(Shape(layers=2))


def launches(program: FuncOp) -> list[str]:
    return [op.kernel.name for op in program.block.ops if isinstance(op, plan.LaunchOp)]


def test_layers_share_their_kernels(two_layers: LoweredStep) -> None:
    """The second layer launches the kernels of the first in the same order; each kernel is there once."""
    for program in two_layers.programs:
        names = launches(program.func)
        first = names.index(next(n for n in names if n.startswith("gemm")))
        layer = names[first : first + 6]  # qkv, rope and append, attention, its projection, gate and up, down
        assert names[first + 6 : first + 12] == layer
    names = [kernel.sym_name for kernel in two_layers.kernels]
    assert len(names) == len(set(names))
    used = {name for program in two_layers.programs for name in launches(program.func)}
    assert used == set(names)


def test_weights_are_named_once_and_lie_apart(two_layers: LoweredStep) -> None:
    ends = 0
    for stored in two_layers.stored:
        assert stored.offset >= ends and stored.offset % 4096 == 0
        ends = stored.offset + stored.nbytes
    assert ends <= two_layers.weights_bytes
    names = [stored.name for stored in two_layers.stored]
    assert len(names) == len(set(names)) and "embed" in names
    places = {op.symbol.name: (op.offset, op.bytes) for program in two_layers.programs for op in program.func.block.ops
              if isinstance(op, plan.WeightOp)}  # fmt: skip
    assert places == {stored.name: (stored.offset, stored.nbytes) for stored in two_layers.stored}


def test_layers_have_caches_of_their_own(two_layers: LoweredStep) -> None:
    for program in two_layers.programs:
        caches = [op for op in program.func.block.ops if isinstance(op, plan.KVOp)]
        assert [op.layer for op in caches] == [0, 1]
    assert (
        two_layers.num_layers == 2 and two_layers.kv is not None and two_layers.kv.bytes_per_position == 2 * 2 * 16 * 4
    )


def test_an_arena_grows_with_the_tokens_only(two_layers: LoweredStep) -> None:
    decode, prefill = two_layers.programs
    assert decode.max_tokens < prefill.max_tokens and decode.arena_bytes < prefill.arena_bytes
    assert prefill.arena_bytes <= decode.arena_bytes * prefill.max_tokens // decode.max_tokens


def test_costs_of_launches(two_layers: LoweredStep) -> None:
    """Every stored byte is read by some launch, except of the table, of which a token reads a row."""
    for program in two_layers.programs:
        assert len(program.launches) == len(launches(program.func))
        fixed = sum(launch.fixed_bytes for launch in program.launches)
        table = next(stored for stored in two_layers.stored if stored.name == "embed")
        whole = sum(stored.nbytes for stored in two_layers.stored) - table.nbytes
        assert whole <= fixed <= whole + table.nbytes // 50
        assert all(launch.token_flops >= 0 and launch.token_bytes >= 0 for launch in program.launches)


def step(body: Sequence[object], result: Value | None = None) -> FuncOp:
    """A step of three inputs and `rows` that ends in its second input, or in what the last op gives."""
    func = FuncOp.create("step", INPUTS, ["ids", "positions", "slots", "rows"])
    builder = Builder.at_end(func.block)
    last: Value = func.arguments[0]
    for make in body:
        last = builder(make(func))  # type: ignore[operator]
    builder(ReturnOp(last))
    return func


def refused(func: FuncOp) -> str:
    with pytest.raises(DiagnosticError) as caught:
        lowering = Lowering(func)
        lower_program(lowering, program_specs(frozenset())[0], WeightsFile.empty())
    return str(caught.value)


def test_an_op_without_a_kernel() -> None:
    def scores(func: FuncOp) -> object:
        cache = KVStateOp(symbol=SymbolRef("layers.0"), result_types=[KVCacheType(1, 16, F32)])
        table = ConstantOp(symbol=SymbolRef("t"), result_types=[TensorType((8, 16), F32)])
        builder = Builder.at_end(func.block)
        embedded = builder(tensor.EmbedOp(func.arguments[0], builder(table)))
        q = builder(tensor.ReshapeOp(embedded, shape=(TOKENS, 1, 16)))
        return ScoresOp(q, builder(cache), *func.arguments[1:3], scale=1.0, origin="layers.0.attn")

    message = refused(step([scores]))
    assert "layers.0.attn: error: no kernel for 'attn.scores'" in message
    assert "attention is lowered after fuse-attention, rope and the cache after fuse-rope-append" in message


def test_layers_of_different_caches() -> None:
    def state(name: str, heads: int) -> object:
        return lambda func: KVStateOp(symbol=SymbolRef(name), result_types=[KVCacheType(heads, 16, F32)], origin=name)

    message = refused(step([state("layers.0", 1), state("layers.1", 2)]))
    assert message.startswith("layers.1: error: layers with different KV shapes are not supported")
