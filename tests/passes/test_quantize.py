"""The pass `quantize`: what it keeps of a product, within which bound; whole models; who gets which format, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ir
from frontends.config_reader import ConfigReader
from frontends.huggingface import read_model_config
from frontends.step import StepBuilder
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.formats import BF16, F16, F32, I32, U8, NumberFormat
from ir.interpreter import interpret
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.gemm import MatmulOp
from ir.ops.moe import DispatchOp, GroupedGemmOp
from ir.ops.quant import AssembleOp, DequantizeOp, RotateOp
from ir.ops.quant_columns import ClearColumnsOp, OutlierColumnsOp
from ir.ops.tensor import MulOp, SiluOp
from ir.ops.tensor_constant import ConstantOp
from ir.parse_value import parse_format
from ir.types import SymbolicDim, TensorType
from passes import PassContext, PassManager
from passes.clone import clone
from passes.fuse.forms import describe_gemm
from passes.pass_manager import PipelineReport
from passes.pipelines import cpu_pipeline, fuse_across_kernels, simplify
from passes.quantize.quantize import QuantizePass
from passes.quantize.recipe_formats import is_int8
from passes.quantize.roles import weight_parts
from tests.passes.step_graphs import build_step, random_weights, run_step
from tests.passes.test_families import SMALL

TOKENS = SymbolicDim("tokens")
FLOATS = (F32, BF16, F16)
INT8, INT8_ROW = "q8_sym<group=32, scale=f32>", "q8_sym<group=row, scale=f32>"
PAIRS = [  # weights, activations
    ("q4_sym<group=32, scale=f16>", INT8),
    ("q8_sym<group=row, scale=bf16>", INT8_ROW),
    ("q3_zp<group=8, scale=f32>", "bf16"),
    ("q5_zp<group=32, scale=u8, channel=f16>", INT8),
    ("q2_sym<group=64, scale=f16>", "f32"),
    ("q1_sym<group=32, scale=f16>", INT8),
    ("f8e4m3<block=row, scale=f32>", "f32"),
    ("f8e4m3<block=1x64, scale=f32>", "f8e4m3<block=row, scale=f32>"),
    ("ternary<group=32, scale=f16>", INT8),
    ("nf4<group=32, scale=f16>", INT8),
    ("mxfp4", "bf16"),
    ("k3<group=32, scale=f16>", INT8),
    ("pq<dim=4, bits=8, scale=f16>", INT8),
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe for each pair, rounding to nearest."""
    folder = tmp_path_factory.mktemp("recipes")
    for number, (weights, activations) in enumerate(PAIRS):
        text = f'[weights]\nformat = "{weights}"\nactivations = "{activations}"\nrounding = "nearest"\n'
        (folder / f"{number}.toml").write_text(text)
        (folder / f"{number}-rotated.toml").write_text(text + "rotate = 32\n")
        (folder / f"{number}-outliers.toml").write_text(text + "outliers = 3\n")
    return folder


def product(n: int, k: int, experts: int = 0) -> ModuleOp:
    """@main(x [tokens, k]) = x @ w.T; with experts @main(x, ids [tokens, 1]), one expert a token."""
    types = [TensorType((TOKENS, k), F32)] + [TensorType((TOKENS, 1), I32)] * bool(experts)
    func = FuncOp.create("main", types)
    b = Builder.at_end(func.block)
    shape = (experts, n, k) if experts else (n, k)
    w = b(ConstantOp(symbol=SymbolRef("mlp.up_proj.weight"), result_types=[TensorType(shape, F32)]))
    if experts:
        order, offsets = b(DispatchOp(func.arguments[1], num_experts=experts))
        y = b(GroupedGemmOp(func.arguments[0], w, order, offsets, gather=1))
    else:
        y = b(MatmulOp(func.arguments[0], w))
    b(ReturnOp(y))
    return ModuleOp.create(func)


def quantized(module: Any, *recipe: object, floats: str = "f32", roles: dict[str, str] | None = None) -> Any:
    """(a copy after quantize and canonicalize, the report)"""
    copy = clone(module)
    passes = ["canonicalize", QuantizePass(tuple(map(str, recipe)), floats), "canonicalize"]  # type: ignore[arg-type]
    report = PipelineReport()
    for one in passes:
        context = PassContext(options={"roles": roles or {}})
        report.records += PassManager([one] if not isinstance(one, str) else one, context=context).run(copy).records
    return copy, report


@given(
    pair=st.integers(0, len(PAIRS) - 1),
    n=st.integers(1, 7),
    groups=st.integers(1, 3),
    experts=st.sampled_from([0, 0, 1, 3]),
    tokens=st.integers(1, 4),
    kind=st.sampled_from(["", "-outliers"]),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_products_stay_within_the_bounds_of_their_formats(recipes, pair, n, groups, experts, tokens, kind, size, seed):
    """|y - x w^T| <= |x| ew + |w| ex + ew ex, with the proven bounds ew and ex of what was rounded."""
    k = 64 * groups
    module = product(n, k, experts)
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, k)) * size).astype(np.float32)
    w = rng.standard_normal((experts, n, k) if experts else (n, k)).astype(np.float32)
    inputs = [x] + ([rng.integers(0, experts, (tokens, 1)).astype(np.int32)] if experts else [])
    weights = {"mlp.up_proj.weight": w}
    changed, _ = quantized(module, recipes / f"{pair}{kind}.toml")
    (exact,) = interpret(module.functions[0], inputs, weights=weights)
    (found,) = interpret(changed.functions[0], inputs, weights=weights)
    if kind == "-outliers":  # those columns are multiplied as they are
        columns = OutlierColumnsOp.reference(w, count=3)
        w, x = (ClearColumnsOp.reference(a, columns) for a in (w, x))
    weight_format, activation_format = map(parse_format, PAIRS[pair])
    ew, ex = bound_of(weight_format, w), bound_of(activation_format, x)
    aw, ax = np.abs(w.astype(np.float64)), np.abs(x.astype(np.float64))
    if experts:
        ids = inputs[1][:, 0]
        order, _ = DispatchOp.reference(inputs[1], num_experts=experts)
        aw, ew, ax, ex = aw[ids[order]], ew[ids[order]], ax[order], ex[order]
    else:
        aw, ew = (np.broadcast_to(a, (tokens, n, k)) for a in (aw, ew))
    bound = np.einsum("tk,tnk->tn", ax, ew) + np.einsum("tk,tnk->tn", ex, aw + ew)
    rounding = np.einsum("tk,tnk->tn", ax + ex, aw + ew) * 2.0**-22 + 1e-6 * size  # sums and results in f32
    assert (np.abs(found.astype(np.float64) - exact) <= bound + rounding).all()


def bound_of(format: NumberFormat, values: np.ndarray) -> np.ndarray:
    """f64: how far each value may move when it is stored in the format, rounded to nearest."""
    made: Any = format
    return made.error_bound(made.pack(values) if made not in FLOATS else values)


@given(
    n=st.integers(1, 5), k=st.sampled_from([32, 64, 96]), tokens=st.integers(1, 3),
    block=st.sampled_from([1, 2, 32]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_rotating_both_sides_changes_nothing(n, k, tokens, block, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((tokens, k)).astype(np.float32), rng.standard_normal((n, k)).astype(np.float32)
    turned_x, turned_w = (RotateOp.reference(a, block=block) for a in (x, w))
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    assert (np.abs(MatmulOp.reference(turned_x, turned_w) - MatmulOp.reference(x, w)) <= 1e-5 * scale).all()
    np.testing.assert_allclose(RotateOp.reference(turned_x, block=block), x, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned_x, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


def test_a_rotated_product_rotates_both_sides(recipes):
    changed, _ = quantized(product(4, 96), recipes / "0-rotated.toml")
    rotations = [op for op in changed.walk() if isinstance(op, RotateOp)]
    assert [op.block for op in rotations] == [32, 32]
    assert sorted(op.x.type.static for op in rotations) == [False, True]


MODELS = [{"experts": 4}, {"tied": True, "bias": True, "qk_norm": "head"}]


@pytest.mark.parametrize("changes", MODELS, ids=lambda c: "-".join(c) or "dense")
def test_whole_models_stay_near_and_no_low_bit_activation_leaves_a_kernel(changes):
    module = build_step(hidden=64, ffn=96, **changes)
    weights = random_weights(module)
    expected = run_step(module, weights)
    for recipe in ("w8a8", "w8a8,rotate64", "w8a8,outliers16"):
        changed = clone(module)
        PassManager(cpu_pipeline("f32", "f32", "f32", recipe=recipe.split(","))).run(changed)
        found = run_step(changed, weights)
        assert np.sqrt(np.mean((found - expected) ** 2)) < 0.1 * expected.std(), recipe
        dynamic = [op for op in changed.walk() if op.name == "quant.quantize" and not op.results[0].type.static]
        assert dynamic and all(op.parent_op.name == "tensor.fused" for op in dynamic)
        for op in dynamic:
            form = describe_gemm(op.parent_op)
            assert form.quantize is op and form.product.x is op.y


def stored_weight(b: Builder, name: str, codes: np.ndarray, scales: np.ndarray, weights: dict[str, np.ndarray]) -> Any:
    """dequantize(assemble(...)) of 4-bit codes, as a quantized checkpoint is imported."""
    weights |= {f"{name}.codes": codes, f"{name}.scales": scales}
    parts = [
        b(ConstantOp(symbol=SymbolRef(f"{name}.{part}"), result_types=[TensorType(array.shape, element)]))
        for part, array, element in (("codes", codes, U8), ("scales", scales, F16))
    ]
    format = parse_format(f"q4_sym<group={codes.shape[-1] // scales.shape[-1]}, scale=f16>")
    return b(DequantizeOp(b(AssembleOp(*parts, format=format))))


def stored_product(n: int = 6, groups: tuple[int, ...] = (32,)) -> tuple[ModuleOp, dict[str, np.ndarray]]:
    """silu(x @ gate.T) * (x @ up.T) of stored weights; `groups` of gate and of up, one for both when alone."""
    func = FuncOp.create("main", [TensorType((TOKENS, 64), F32)])
    b, rng, weights = Builder.at_end(func.block), np.random.default_rng(4), {}
    ys = []
    for name, group in (("mlp.gate_proj", groups[0]), ("mlp.up_proj", groups[-1])):
        codes = rng.integers(0, 16, (n, 64)).astype(np.uint8)
        scales = rng.standard_normal((n, 64 // group)).astype(np.float16)
        ys.append(b(MatmulOp(func.arguments[0], stored_weight(b, name, codes, scales, weights))))
    b(ReturnOp(b(MulOp(b(SiluOp(ys[0])), ys[1]))))
    return ModuleOp.create(func), weights


def test_a_quantized_checkpoint_is_multiplied_as_it_is_stored(tmp_path):
    module, weights = stored_product()
    (tmp_path / "f32.toml").write_text('[weights]\nactivations = "f32"\n')
    changed = clone(module)
    PassManager(cpu_pipeline("f32", recipe=("as-stored", str(tmp_path / "f32.toml")))).run(changed)
    assert not [op for op in changed.walk() if op.name in ("quant.dequantize", "quant.quantize")]
    (fused,) = (op for op in changed.walk() if op.name == "tensor.fused")
    assert describe_gemm(fused).has_swiglu and str(describe_gemm(fused).product.w.type.element).startswith("q4_sym")
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    (expected,) = interpret(module.functions[0], [x], weights=weights)
    (found,) = interpret(changed.functions[0], [x], weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    default = clone(module)
    PassManager(cpu_pipeline(recipe=("as-stored",))).run(default)
    (activations,) = (op for op in default.walk() if op.name == "quant.quantize")
    assert is_int8(activations.format)


def test_weights_that_are_stored_differently_are_not_joined():
    module, _ = stored_product(groups=(32, 64))
    changed = clone(module)
    report = PassManager(cpu_pipeline(recipe=("as-stored",))).run(changed)
    assert sorted(str(p.w.type.element) for p in changed.walk() if isinstance(p, MatmulOp)) == [
        "q4_sym<group=32, scale=f16>",
        "q4_sym<group=64, scale=f16>",
    ]
    assert "stored in the formats q4_sym<group=32, scale=f16>, q4_sym<group=64, scale=f16>" in report.explain()


def test_another_recipe_quantizes_again_and_says_so():
    module, weights = stored_product()
    changed, report = quantized(module, "w8a8")
    assert "stored as q4_sym<group=32, scale=f16>, quantized again to q8_sym<group=32, scale=f16>" in report.explain()
    changed, report = quantized(module, "none", floats="f32")
    assert {str(p.w.type.element) for p in changed.walk() if isinstance(p, MatmulOp)} == {"f32"}
    x = np.ones((1, 64), np.float32)
    np.testing.assert_array_equal(
        interpret(changed.functions[0], [x], weights=weights), interpret(module.functions[0], [x], weights=weights)
    )
    changed, report = quantized(module, "w4a8-g32")
    assert not [op for op in changed.walk() if op.name == "quant.quantize" and op.results[0].type.static]


def test_parts_of_a_product_get_the_most_precise_format_among_them(tmp_path):
    path = tmp_path / "k.toml"
    path.write_text('[[rule]]\nrole = "attention.k"\nformat = "q8_sym<group=32, scale=f16>"\n')
    module = build_step(hidden=64, ffn=96)
    roles = {"model.layers.0.self_attn.k_proj.weight": "attention.k"}
    changed = clone(module)
    report = PassManager(
        cpu_pipeline(recipe=("w4a8-g32", str(path))), context=PassContext(options={"roles": roles})
    ).run(changed)
    formats = [str(op.format) for op in changed.walk() if op.name == "quant.quantize" and op.results[0].type.static]
    assert formats == [f"q{bits}_sym<group=32, scale=f16>" for bits in (8, 4, 4, 4, 6)]  # qkv, o, gate|up, down, head
    assert "its parts share one format, the most precise: q8_sym<group=32, scale=f16>" in report.explain()


def test_groups_that_do_not_fill_the_rows_give_way(tmp_path):
    _, report = quantized(product(4, 96), "w4a8-g128", roles={"mlp.up_proj.weight": "mlp.up"})
    assert "rows of 96 are not whole groups of q4_sym<group=128, scale=f16>" in report.explain()
    assert "q4_sym<group=32, scale=f16> instead" in report.explain()
    changed, report = quantized(product(4, 48), "w4a8-g32", roles={"mlp.up_proj.weight": "mlp.up"})
    assert "rows of 48 are not whole groups of q4_sym<group=32, scale=f16>: f32 instead" in report.explain()
    assert not [op for op in changed.walk() if op.name == "quant.quantize"]
    path = tmp_path / "row.toml"
    path.write_text(f'[weights]\nformat = "q8_sym<group=row, scale=f16>"\nactivations = "{INT8}"\n')
    changed, _ = quantized(product(4, 48), path)
    formats = [str(op.format) for op in changed.walk() if op.name == "quant.quantize"]
    assert formats == ["q8_sym<group=row, scale=f16>", INT8_ROW]
    for k, kept in ((48, "row"), (64, "1x32")):
        path.write_text(
            '[weights]\nformat = "f8e4m3<block=row, scale=f32>"\nactivations = "f8e4m3<block=1x32, scale=f32>"\n'
        )
        changed, _ = quantized(product(4, k), path)
        formats = [str(op.format) for op in changed.walk() if op.name == "quant.quantize"]
        assert formats == ["f8e4m3<block=row, scale=f32>", f"f8e4m3<block={kept}, scale=f32>"]


def test_routers_and_tables_follow_only_rules_that_name_them(tmp_path):
    path = tmp_path / "r.toml"
    rules = [("router", "q8_sym<group=32, scale=f16>"), ("embedding", "f32")]
    path.write_text("".join(f'[[rule]]\nrole = "{role}"\nformat = "{format}"\n' for role, format in rules))
    module = build_step(hidden=64, ffn=96, experts=4)
    for recipe, router, table in (
        ("w4a8-g32", "f32", "bf16"),
        (f"w4a8-g32,{path}", "q8_sym<group=32, scale=f16>", "f32"),
    ):
        changed = clone(module)
        PassManager(cpu_pipeline(recipe=recipe.split(","))).run(changed)
        (route,) = (op for op in changed.walk() if op.name == "moe.route")
        maker = route.operands[0].defining_op()
        assert str(describe_gemm(maker).product.w.type.element) == router
        (embed,) = (op for op in changed.walk() if op.name == "tensor.embed")
        assert str(embed.table.type.element) == table


def test_products_in_regions_and_of_inputs_are_left_alone():
    x, w = TensorType((TOKENS, 64), F32), TensorType((4, 64), F32)
    func = FuncOp.create("main", [x, w])
    b = Builder.at_end(func.block)
    b(ReturnOp(b(MatmulOp(*func.arguments))))
    module = ModuleOp.create(func)
    changed, report = quantized(module, "w8a8")
    assert ir.structural_equal(module, changed) is None
    assert "the weight is computed from step inputs" in report.explain()
    module = product(4, 64)
    PassManager("quantize{recipe=w8a8},fuse-norm-gemm").run(module)
    before = clone(module)
    report = PassManager("quantize{recipe=w4a8-g32}").run(module)
    assert ir.structural_equal(before, module) is None
    assert "quantize before fusing" in report.explain()


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe"])
def test_roles_are_those_of_the_frontend_and_can_be_read_off_the_graph(family):
    """What the frontend says of a tensor and what the graph and its name tell agree, up to parts that names hide."""
    module, given = imported_with_roles(family)
    PassManager([*simplify(), *fuse_across_kernels()]).run(module)
    found: dict[str, str] = {}
    for op in module.walk():
        if isinstance(op, (MatmulOp, GroupedGemmOp)):
            told, read = dict(weight_parts(op, given)), dict(weight_parts(op, {}))
            assert [r.partition(".")[0] for r in told.values()] == [r.partition(".")[0] for r in read.values()]
            found |= told
    expected = {"attention.q", "attention.k", "attention.v", "attention.o", "head"}
    kind = "mlp" if family == "llama" else "experts"
    expected |= {f"{kind}.{part}" for part in ("gate", "up", "down")} | ({"router"} if kind == "experts" else set())
    assert set(found.values()) == expected


def imported_with_roles(name: str) -> tuple[ModuleOp, dict[str, str]]:
    """The step function of a family as its frontend builds it, and the role of every tensor."""
    counts = {"mixtral": "num_local_experts", "olmoe": "num_experts"}
    experts = {counts[name]: 4, "num_experts_per_tok": 2} if name in counts else {}
    fields = {**SMALL, **experts, "model_type": name}
    family, config = read_model_config(ConfigReader(fields, "config.json"))
    step = StepBuilder(config)
    module = family.build(step)
    return module, {w.name: w.role for w in step.weights.values()}
