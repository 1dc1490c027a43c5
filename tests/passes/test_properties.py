"""Properties of every pass on modules nobody wrote: IR stays valid, results stay the same, pipelines compose.

Passes that only move or rename computation must give the very same bits. Those that compute in another order
(`fuse-attention`, the horizontal fusions) may differ in the last bits of f32; where a value is rounded to a narrow
format afterwards, a last bit can become one unit of that format.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ir
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Op
from ir.formats import BF16, F16, F32
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.tensor import CastOp, ConcatOp, ReshapeOp, SliceOp
from ir.ops.tensor_constant import ConstantOp
from ir.types import KVCacheType, TensorType
from passes import Pass, PassManager, print_pipeline
from passes.clone import clone
from passes.fuse.forms import describe
from passes.fuse.fuse_attention import FuseAttentionPass
from passes.pass_base import find_pass
from passes.pipelines import cpu_f32_pipeline, cpu_pipeline, fuse_across_kernels, fuse_within_kernels, simplify
from passes.quantize.set_precision import SetPrecisionPass
from tests.strategies import FEATURES, GeneratedModule, graph_modules, step_modules

EXACT = ("canonicalize", "cse", "dce", "fuse-norm-gemm", "fuse-epilogue", "fuse-rope-append", "fuse-elementwise")
EXACT_PASSES = (*EXACT, "choose-layouts")
REORDERING = ("fuse-attention", "fuse-qkv", "fuse-gate-up")
F32_TOLERANCE = 2e-5  # a few hundred f32 roundings of values below the largest one
NARROW_TOLERANCE = 4e-2  # some units of bf16 (2**-8), amplified by what follows
WITHOUT_ROUTING = tuple(f for f in FEATURES if f != "experts")  # a last bit can change which expert is chosen


def made(name: str) -> Pass:
    cls = find_pass(name)
    assert cls is not None
    return cls()


def transformed(generated: GeneratedModule, passes: list[Pass] | tuple[Pass, ...]) -> Op:
    """A copy of the module after `passes`, each of which was verified."""
    module = clone(generated.module)
    PassManager(passes).run(module)
    return module


def has_narrow_values(module: Op) -> bool:
    return any(
        isinstance(r.type, (TensorType, KVCacheType)) and r.type.element in (BF16, F16)
        for op in module.walk()
        for r in op.results
    )


def assert_same(generated: GeneratedModule, module: Op, tolerance: float) -> None:
    """Results and caches agree: to the bit for tolerance 0, else relative to the largest value."""
    expected, states = generated.run()
    found, found_states = generated.run(module)  # type: ignore[arg-type]
    assert states.keys() == found_states.keys()
    pairs = [*zip(expected, found, strict=True)]
    for name in states:
        pairs += [
            (states[name].keys, found_states[name].keys),
            (states[name].values, found_states[name].values),
        ]
    for want, got in pairs:
        assert want.shape == got.shape
        if not tolerance:
            assert want.dtype == got.dtype
            np.testing.assert_array_equal(want, got)
            continue
        want, got = want.astype(np.float64), got.astype(np.float64)
        scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0.0)))
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", EXACT_PASSES)
@given(generated=graph_modules())
def test_results_keep_every_bit(name, generated):
    assert_same(generated, transformed(generated, [made(name)]), 0)


@st.composite
def movement_chains(draw: st.DrawFn) -> GeneratedModule:
    """Slices, concats, reshapes and casts, each of the value before it and often of an older one: no dead code."""
    type = TensorType((draw(st.integers(1, 4)), draw(st.integers(2, 8))), F32)
    func = FuncOp.create("main", [type], ["x"])
    b = Builder.at_end(func.block)
    values = [func.arguments[0], b(ConstantOp(symbol=SymbolRef("w"), result_types=[type]))]
    for _ in range(draw(st.integers(1, 10))):
        x = values[-1] if draw(st.booleans()) else draw(st.sampled_from(values))
        shape = x.type.shape
        axis = draw(st.integers(0, len(shape) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                start = draw(st.integers(0, shape[axis] - 1))
                values.append(b(SliceOp(x, axis=axis, start=start, size=draw(st.integers(1, shape[axis] - start)))))
            case 1 if shape[axis] < 40:
                fits = [v for v in values if v.type.element == x.type.element and len(v.type.shape) == len(shape)]
                fits = [v for v in fits if all(v.type.shape[i] == n for i, n in enumerate(shape) if i != axis)]
                values.append(b(ConcatOp(*draw(st.lists(st.sampled_from(fits), min_size=1, max_size=3)), x, axis=axis)))
            case 2:
                count = int(np.prod(shape))
                rows = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
                values.append(b(ReshapeOp(x, shape=(rows, count // rows))))
            case 3:
                values.append(b(CastOp(x, to=draw(st.sampled_from([F32, BF16, F16])))))
    b(ReturnOp(*values[-2:]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x, w = (rng.standard_normal(type.shape).astype(np.float32) for _ in range(2))
    return GeneratedModule(ModuleOp.create(func), [x], {"w": w})


@settings(max_examples=200)
@given(generated=movement_chains())
def test_simplifying_keeps_every_bit_of_what_only_moves(generated):
    module = transformed(generated, [made("canonicalize"), made("cse"), made("canonicalize")])
    assert_same(generated, module, 0)
    assert not PassManager("canonicalize").run(module).records[0].changed


@pytest.mark.parametrize("name", EXACT_PASSES)
@given(generated=step_modules(max_layers=1))
def test_results_of_models_keep_every_bit(name, generated):
    before = transformed(generated, fuse_across_kernels())
    reference = copy.copy(generated)
    reference.module = before  # type: ignore[assignment]
    after = transformed(reference, [made(name)])
    assert_same(reference, after, 0)


@pytest.mark.parametrize("name", REORDERING)
@given(generated=graph_modules(features=WITHOUT_ROUTING))
def test_results_stay_when_the_order_changes(name, generated):
    module = transformed(generated, [made(name)])
    assert_same(generated, module, NARROW_TOLERANCE if has_narrow_values(generated.module) else F32_TOLERANCE)


@given(generated=step_modules(), passes=st.sampled_from([1, 2, 3]))
def test_attention_with_any_number_of_passes(generated, passes):
    module = transformed(generated, [FuseAttentionPass(passes=passes, block=5)])
    assert any(op.name == "attn.attention" for op in module.walk())
    assert_same(generated, module, F32_TOLERANCE)


@given(generated=graph_modules())
def test_simplifying_is_idempotent(generated):
    for name in ("canonicalize", "cse", "dce"):
        module = transformed(generated, [made(name)])
        report = PassManager([made(name)]).run(module)
        assert not report.records[0].changed, name


@given(generated=step_modules())
def test_the_whole_pipeline_is_idempotent_where_it_fuses(generated):
    module = transformed(generated, [*cpu_f32_pipeline(), made("cse")])
    text = ir.print_module(module)
    PassManager([*fuse_within_kernels(), *simplify(), *fuse_across_kernels()]).run(module)
    assert ir.print_module(module) == text


@given(
    generated=graph_modules(features=WITHOUT_ROUTING),
    names=st.lists(st.sampled_from((*EXACT_PASSES, *REORDERING)), max_size=8),
)
def test_random_pipelines(generated, names):
    passes = [made(name) for name in names]
    module = transformed(generated, passes)
    narrow = has_narrow_values(generated.module)
    exact = not any(name in REORDERING for name in names)
    assert_same(generated, module, 0 if exact else NARROW_TOLERANCE if narrow else F32_TOLERANCE)
    again = clone(generated.module)
    PassManager(print_pipeline(passes)).run(again)
    assert ir.structural_equal(module, again) is None


@given(generated=step_modules())
def test_the_f32_pipeline_means_the_same_model(generated):
    assert_same(generated, transformed(generated, cpu_f32_pipeline()), F32_TOLERANCE)


@given(generated=step_modules(elements=(F32,)))
def test_narrow_weights_stay_near_the_model(generated):
    assume(not any(op.name == "moe.route" for op in generated.module.walk()))
    module = transformed(generated, cpu_pipeline())
    expected, _ = generated.run()
    found, _ = generated.run(module)  # type: ignore[arg-type]
    scale = max(1.0, float(np.abs(expected[0]).max()))
    error = np.abs(expected[0] - found[0])
    assert error.max() < 0.25 * scale and np.sqrt(np.mean(error**2)) < 0.08 * scale


@given(generated=graph_modules(), data=st.data())
def test_precision_leaves_valid_ir(generated, data):
    formats = [data.draw(st.sampled_from(["f32", "bf16", "f16"])) for _ in range(3)]
    passes = [SetPrecisionPass(*formats), made("canonicalize"), *fuse_within_kernels(), made("choose-layouts")]
    module = transformed(generated, passes)
    for op in module.walk():
        if op.name == "kv.state":
            assert str(op.results[0].type.element) == formats[2]
    found, _ = generated.run(module)  # type: ignore[arg-type]
    expected, _ = generated.run()
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert [x.dtype for x in found] == [x.dtype for x in expected]


@given(generated=step_modules())
def test_fused_regions_have_normal_forms(generated):
    module = transformed(generated, cpu_pipeline())
    kinds = set()
    for op in module.walk():
        if op.name == "tensor.fused":
            describe(op)  # raises for anything that is not in docs/passes/fuse.md
            kinds.add(op.attributes["kind"])
    assert kinds >= {"gemm", "rope_append", "attention"}
    left = {op.name for op in module.function("step").block.ops}  # type: ignore[attr-defined]
    assert not left & {"attn.scores", "attn.softmax", "attn.rope", "kv.append", "tensor.slice", "tensor.add"}


@given(generated=graph_modules())
def test_every_fused_region_of_any_module_has_a_normal_form(generated):
    module = transformed(generated, cpu_f32_pipeline())
    for op in module.walk():
        if op.name == "tensor.fused":
            describe(op)
