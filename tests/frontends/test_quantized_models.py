"""Models imported from quantized checkpoints: equal logits as from the floats, and every fault as one diagnostic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ir
from frontends.huggingface import ImportedModel, import_model
from frontends.quantized import QuantizedCheckpoint
from ir.diagnostics import DiagnosticError
from ir.interpreter import zero_states
from ir.ops.gemm import MatmulOp
from ir.ops.quant import AssembleOp
from ir.ops.quant_columns import SelectColumnsOp
from ir.ops.tensor_constant import ConstantOp
from tests.frontends import quantized_files as files
from tests.frontends.model_files import config_of, write_model
from tests.frontends.test_quantized_weights import AWQ, FP8, GPTQ, NAME, open_layer

WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
MODERATE = range(118, 124)  # exponents of scales near one
MODELS: list[tuple[str, dict[str, Any], Any, files.Maker]] = [
    ("llama", {}, GPTQ, files.gptq()),
    ("qwen2", {}, {**GPTQ, "sym": True, "bits": 8}, files.gptq(bits=8, symmetric=True)),
    ("olmoe", {}, {**GPTQ, "sym": True}, files.gptq(symmetric=True)),
    ("mistral", {}, AWQ, files.awq()),
    ("mixtral", {}, AWQ, files.awq()),
    ("qwen3_moe", {"moe_intermediate_size": 32}, files.compressed_settings(), files.compressed_integers()),
    ("qwen3", {}, files.compressed_settings(symmetric=False), files.compressed_integers(symmetric=False)),
    ("qwen3_moe", {"moe_intermediate_size": 40}, {**FP8, "weight_block_size": [16, 32]},
     files.fp8(block=(16, 32), leaf="weight_scale_inv")),
    ("llama", {}, {"quant_method": "mxfp4"}, files.mxfp4(exponents=MODERATE)),
    ("mixtral", {}, {"quant_method": "mxfp4"}, files.mxfp4(exponents=MODERATE)),
]  # fmt: skip


def _logits(imported: ImportedModel) -> np.ndarray:
    ids = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)
    count = np.arange(7, dtype=np.int32)
    func = imported.module.function("step")
    ir.verify(imported.module)
    with imported.checkpoint as checkpoint:
        states = zero_states(func, slots=1, ctx=8)
        (logits,) = ir.interpret(func, [ids, count, count * 0, count], weights=checkpoint.read, states=states)
    return logits


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize(("family", "changes", "settings", "make"), MODELS)
def test_logits_are_those_of_the_floats(
    family: str, changes: dict[str, Any], settings: Any, make: files.Maker, tables: bool, tmp_path: Path
) -> None:
    config = config_of(family, **{**WIDE, **changes})
    model = files.write_quantized(tmp_path, config, make, settings, tables=tables)
    packed, plain = import_model(model.packed), import_model(model.plain)
    assert isinstance(packed.checkpoint, QuantizedCheckpoint)
    assert packed.weights == plain.weights and packed.num_parameters == plain.num_parameters
    assert set(packed.checkpoint.quantized) == set(model.floats)
    low_bit = any(weight.low_bit for weight in packed.checkpoint.quantized.values())
    assert low_bit == any(isinstance(op, AssembleOp) for op in packed.module.walk())
    found = _logits(packed)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, _logits(plain))


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({**GPTQ, "desc_act": True}, files.gptq(act_order=True)),
        (files.compressed_settings(actorder="group"), files.compressed_integers(act_order=True)),
    ],
)
def test_columns_in_another_order(settings: Any, make: files.Maker, tables: bool, tmp_path: Path) -> None:
    """The codes stay packed and the activations are put in their order: the same sums, added up in another order."""
    model = files.write_quantized(tmp_path, config_of("llama", **WIDE), make, settings, tables=tables)
    packed, plain = import_model(model.packed), import_model(model.plain)
    checkpoint = packed.checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint) and packed.warnings == ()
    assert packed.weights == plain.weights
    ops = list(packed.module.walk())
    products = [op for op in ops if isinstance(op, MatmulOp)]
    assert sum(isinstance(op.x.defining_op(), SelectColumnsOp) for op in products) == len(products) - (not tables)
    assert sum(isinstance(op, AssembleOp) for op in ops) == len(products) - (not tables)
    orders = {op.symbol.name for op in ops if isinstance(op, ConstantOp) and "columns" in op.symbol.name}
    assert len(orders) == 2  # of the layers that read 64 columns, and of those that read 96
    for name in orders:
        columns = checkpoint.read(name)
        assert checkpoint.info(name).shape == columns.shape and checkpoint.info(name).dtype == "I32"
        assert sorted(columns) == list(range(len(columns))) and list(columns) != sorted(columns)
        np.testing.assert_array_equal(checkpoint.read_rows(name, 3, 7), columns[3:7])
        with pytest.raises(ValueError, match="packed in the file"):
            checkpoint.byte_view(name)
    np.testing.assert_allclose(_logits(packed), _logits(plain), rtol=1e-3, atol=1e-5)


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    config = config_of("llama", **WIDE)
    experts = config_of("mixtral", **WIDE)
    model = files.write_quantized(tmp_path, experts, files.gptq(act_order=True), {**GPTQ, "desc_act": True})
    ordered = import_model(model.packed)
    ordered.checkpoint.close()
    count = sum(".experts." in name for name in model.floats)
    assert any(f"{count} weights, model.layers.0." in w and "act-order" in w for w in ordered.warnings)

    def make(rng: np.random.Generator, n: int, k: int) -> files.Layer:
        layer = files.fp8()(rng, n, k)
        return files.Layer({**layer.tensors, "input_scale": np.ones(1, "<f4")}, layer.floats)

    scaled = import_model(files.write_quantized(tmp_path / "fp8", config, make, FP8).packed)
    scaled.checkpoint.close()
    assert any("14 tensors, model.layers.0." in w and "not used" in w for w in scaled.warnings)
    assert not any("not known" in w for w in scaled.warnings)


def test_biases_of_zero_are_left_out(tmp_path: Path) -> None:
    """Older quantizers gave every linear layer a bias; one that is zero changes nothing, any other does."""

    def with_bias(value: float) -> files.Maker:
        def make(rng: np.random.Generator, n: int, k: int) -> files.Layer:
            layer = files.gptq()(rng, n, k)
            return files.Layer({**layer.tensors, "bias": np.full(n, value, "<f2")}, layer.floats)

        return make

    config = config_of("llama", **WIDE)
    zero = files.write_quantized(tmp_path / "zero", config, with_bias(0), GPTQ)
    np.testing.assert_array_equal(_logits(import_model(zero.packed)), _logits(import_model(zero.plain)))
    other = files.write_quantized(tmp_path / "other", config, with_bias(0.5), GPTQ)
    with pytest.raises(DiagnosticError, match="14 of no known use"):
        import_model(other.packed)


def test_sizes_that_the_config_does_not_have(tmp_path: Path) -> None:
    config = config_of("llama", **WIDE)
    model = files.write_quantized(tmp_path, config, files.awq(), AWQ)
    write_config = {**config, "intermediate_size": 128, "quantization_config": AWQ}
    weights = (model.packed / "model.safetensors").read_bytes()
    other = write_model(tmp_path / "other", write_config, {})
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(DiagnosticError) as caught:
        import_model(other)
    assert "wrong shape: model.layers.*.mlp.down_proj.weight (2 tensors): [64, 96], expected [64, 128]" in str(
        caught.value
    )


def test_experts_of_different_formats(tmp_path: Path) -> None:
    made = 0

    def make(rng: np.random.Generator, n: int, k: int) -> files.Layer:
        nonlocal made
        made += 1
        return files.compressed_integers(group=8 if made % 2 else 16)(rng, n, k)

    settings = files.compressed_settings()
    groups = settings["config_groups"]
    groups["group_1"] = files.compressed_settings(group_size=16)["config_groups"]["group_0"]
    model = files.write_quantized(tmp_path, config_of("mixtral", **WIDE), make, settings)
    with pytest.raises(DiagnosticError, match="of a wrong dtype") as caught:
        import_model(model.packed)
    assert "q4_sym<group=16, scale=bf16>, expected q4_sym<group=8, scale=bf16> like model.layers.0" in str(caught.value)


def test_a_cut_file(tmp_path: Path) -> None:
    model = files.write_quantized(tmp_path, config_of("llama", **WIDE), files.gptq(), GPTQ)
    file = model.packed / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(DiagnosticError, match="the file ends at byte"):
        import_model(model.packed)
    file.write_bytes(data)
    with import_model(model.packed).checkpoint as checkpoint:
        file.write_bytes(data[: len(data) // 2])  # while it is open
        with pytest.raises(DiagnosticError, match="the file ends within tensor"):
            for name in checkpoint.tensors:
                checkpoint.read(name)


# -- faults of one layer -----------------------------------------------------------------------------------------------

INT8 = files.compressed_settings("int-quantized", num_bits=8, strategy="channel", group_size=None)
Change = Callable[[dict[str, Any]], object]


def _put(leaf: str, value: Any) -> Change:
    return lambda tensors: tensors.__setitem__(leaf, value)


def _drop(leaf: str) -> Change:
    return lambda tensors: tensors.pop(leaf)


def _set(leaf: str, index: Any, value: Any) -> Change:
    return lambda tensors: tensors[leaf].__setitem__(index, value)


FAULTS: list[tuple[str, Any, files.Maker, Change, str]] = [
    ("scales", GPTQ, files.gptq(), _drop("scales"), r"q_proj.qweight', but no '.*q_proj.scales'"),
    ("zeros", GPTQ, files.gptq(), _drop("qzeros"), r"but no '.*q_proj.qzeros'"),
    ("qweight", GPTQ, files.gptq(), _drop("qweight"), r"but no '.*q_proj.qweight'"),
    ("dtype", GPTQ, files.gptq(), _put("qweight", np.zeros((12, 64), "<i8")), "qweight' has dtype I64.*\n.*I32"),
    ("scale dtype", GPTQ, files.gptq(), _put("scales", np.zeros((12, 64), "<i4")), "scales' has dtype I32"),
    ("rank", GPTQ, files.gptq(), _put("qweight", np.zeros(12, "<i4")), r"qweight' has shape \[12\]"),
    ("empty", GPTQ, files.gptq(), _put("qweight", np.zeros((0, 64), "<i4")), r"qweight' has shape \[0, 64\]"),
    ("label of 8 bits", {**GPTQ, "bits": 8}, files.gptq(), _drop("g_idx"), "64 zero points, which is 4 bits each"),
    ("label of 4 bits", GPTQ, files.gptq(bits=8), _drop("g_idx"), "64 zero points, which is 8 bits each"),
    ("words of 8 bits", GPTQ, files.gptq(), _put("qweight", np.zeros((24, 64), "<i4")), "which is 8 bits each"),
    ("group", {**GPTQ, "group_size": 16}, files.gptq(), _drop("g_idx"), "has 12 groups for 96 columns.*\n.*6, since"),
    ("columns", GPTQ, files.gptq(), _put("scales", np.zeros((12, 63), "<f2")), r"scales' has shape \[12, 63\]"),
    ("zero groups", GPTQ, files.gptq(), _put("qzeros", np.zeros((11, 8), "<i4")), r"qzeros' has shape \[11, 8\]"),
    ("order beyond", GPTQ, files.gptq(), _set("g_idx", 5, 12), r"g_idx' puts column 5 into group 12\n.*0 \.\. 11"),
    ("order below", GPTQ, files.gptq(), _set("g_idx", 7, -2), "puts column 7 into group -2"),
    ("AWQ as GPTQ", GPTQ, files.awq(), lambda t: None, "packed as AWQ packs it, but the settings say GPTQ"),
    ("GPTQ as AWQ", AWQ, files.gptq(g_idx=False), lambda t: None, "packed as GPTQ packs it, but the settings say AWQ"),
    ("AWQ group", {**AWQ, "group_size": 40}, files.awq(), lambda t: None, "has 12 groups for 96 columns.*\n.*2.4"),
    ("AWQ zeros", AWQ, files.awq(), _drop("qzeros"), "but no '.*qzeros'"),
    ("AWQ columns", AWQ, files.awq(), _put("scales", np.zeros((12, 56), "<f2")), "one scale for each of the 64"),
    ("bits", files.compressed_settings(num_bits=8), files.compressed_integers(), lambda t: None,
     "12 words for 96 columns, which is 4 bits each\n.*8 bits, as the settings say"),
    ("bits of 4", files.compressed_settings(), files.compressed_integers(bits=8), lambda t: None,
     "24 words for 96 columns, which is 8 bits each\n.*4 bits, as the settings say"),
    ("shape", files.compressed_settings(), files.compressed_integers(), _drop("weight_shape"), "no '.*weight_shape'"),
    ("stated rows", files.compressed_settings(), files.compressed_integers(), _set("weight_shape", 0, 1 << 60),
     r"weight_shape' says \[1152921504606846976, 96\]"),
    ("stated columns", files.compressed_settings(), files.compressed_integers(), _set("weight_shape", 1, -1),
     r"weight_shape' says \[64, -1\]"),
    ("scale", files.compressed_settings(), files.compressed_integers(), _drop("weight_scale"), "no '.*weight_scale'"),
    ("strategy", files.compressed_settings(strategy="channel", group_size=-1), files.compressed_integers(),
     lambda t: None, r"weight_scale' has shape \[64, 12\]\n.*\[64, 1\], for \[64, 96\] with 4 bit"),
    ("zero points", files.compressed_settings(symmetric=False), files.compressed_integers(), lambda t: None,
     "no '.*weight_zero_point'"),
    ("symmetric", files.compressed_settings(), files.compressed_integers(symmetric=False), lambda t: None,
     "weight_zero_point' is there, but the settings say 'symmetric'"),
    ("g_idx", files.compressed_settings(), files.compressed_integers(act_order=True), _set("weight_g_idx", 0, 99),
     "puts column 0 into group 99"),
    ("two levels", files.compressed_settings(type="float", group_size=32), files.mxfp4(blocks=False),
     _put("weight_global_scale", np.ones(1, "<f4")), "two levels \\(NVFP4\\)"),
    ("kind", files.compressed_settings(), files.mxfp4(blocks=False), lambda t: None,
     "holds 4 bit floats, group 32 .U8.\n.*4 bit integers, group 8"),
    ("not compressed", INT8, files.compressed_integers(bits=8, packed=False, strategy="channel"),
     _put("weight", np.zeros((64, 96), "<f4")), "weight' has dtype F32 beside '.*weight_scale'"),
    ("block scales", {**FP8, "weight_block_size": [32, 32]}, files.fp8(block=(32, 16), leaf="weight_scale_inv"),
     lambda t: None, r"weight_scale_inv' has shape \[2, 6\]\n.*\[2, 3\], one for each block of 32 rows"),
    ("no blocks", FP8, files.fp8(block=(32, 16), leaf="weight_scale_inv"), lambda t: None, "no 'weight_block_size'"),
    ("no scale", FP8, files.fp8(), _drop("weight_scale"), "has '.*weight', but no '.*weight_scale'"),
    ("scale shape", FP8, files.fp8(), _put("weight_scale", np.ones(63, "<f4")), r"weight_scale' has shape \[63\]"),
    ("fp8 dtype", FP8, files.fp8(), _put("weight", np.zeros((64, 96), np.int8)), "weight' has dtype I8"),
    ("mxfp4 scales", {"quant_method": "mxfp4"}, files.mxfp4(), _drop("weight_scales"), "no '.*weight_scales'"),
    ("mxfp4 scale shape", {"quant_method": "mxfp4"}, files.mxfp4(), _put("weight_scales", np.zeros((64, 2), np.uint8)),
     r"weight_scales' has shape \[64, 2\]\n.*\[64, 3\]"),
    ("mxfp4 blocks", {"quant_method": "mxfp4"}, files.mxfp4(), _put("weight_blocks", np.zeros((64, 3, 8), np.uint8)),
     r"weight_blocks' has shape \[64, 3, 8\]"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "make", "change", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_tensors_that_contradict_the_settings(
    settings: Any, make: files.Maker, change: Change, message: str, tmp_path: Path
) -> None:
    tensors = make(np.random.default_rng(5), 64, 96).tensors
    change(tensors)
    with pytest.raises(DiagnosticError, match=message) as caught:
        open_layer(tmp_path, settings, tensors)
    assert len(caught.value.diagnostics) == 1
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "make", "change", "message"),
    [
        (GPTQ, files.gptq(), _set("scales", (3, 7), np.inf), r"scale of row 7, group 3 is inf"),
        (AWQ, files.awq(), _set("scales", (0, 63), np.nan), "scale of row 63, group 0 is nan"),
        (GPTQ, files.gptq(act_order=True), _set("scales", (3, 7), np.nan), "scale of row 7, group 3 is nan"),
        (
            files.compressed_settings(),
            files.compressed_integers(),
            _set("weight_scale", (5, 2), np.nan),
            "row 5, group 2",
        ),
        (FP8, files.fp8(), _set("weight", (40, 2), np.nan), "row 40, column 2 is no finite number"),
        (FP8, files.fp8(dtype=ml_dtypes.float8_e5m2), _set("weight", (40, 2), -np.inf), "row 40, column 2 is no"),
        (FP8, files.fp8(scale_dtype=np.uint8), _set("weight_scale", (1, 0), 255), "scale of row 1, group 0 is nan"),
        (
            {"quant_method": "mxfp4"},
            files.mxfp4(),
            _set("weight_scales", (9, 1), 255),
            "scale of row 9, group 1 is nan",
        ),
        (
            files.compressed_settings("int-quantized"),
            files.compressed_integers(packed=False),
            _set("weight", (6, 4), 8),
            "row 6, column 4 holds 8\n.*an integer of 4 bits",
        ),
    ],
)
def test_numbers_that_mean_nothing(
    settings: Any, make: files.Maker, change: Change, message: str, tmp_path: Path
) -> None:
    tensors = make(np.random.default_rng(5), 64, 96).tensors
    change(tensors)
    with open_layer(tmp_path, settings, tensors) as checkpoint:
        with pytest.raises(DiagnosticError, match=message) as caught:
            checkpoint.read(NAME)
        assert "model.layers.0.self_attn.q_proj." in str(caught.value)


def test_many_faults_are_one_diagnostic(tmp_path: Path) -> None:
    config = config_of("llama", **WIDE)
    model = files.write_quantized(tmp_path, config, files.gptq(), {**GPTQ, "bits": 8})
    with pytest.raises(DiagnosticError) as caught:
        import_model(model.packed)
    text = str(caught.value)
    assert "note: 14 weights are wrong in all" in text
    assert "also wrong: model.layers.*.mlp.down_proj.weight" in text
    assert len(text.splitlines()) < 14


def test_names_that_are_taken(tmp_path: Path) -> None:
    layer = files.gptq()(np.random.default_rng(5), 64, 96)
    for name, shape in (("weight.codes", (2, 2)), ("weight.zeros", (2, 2)), ("weight", (64, 96))):
        with pytest.raises(DiagnosticError, match=f"q_proj.{name}' both packed and as floats"):
            open_layer(tmp_path, GPTQ, {**layer.tensors, name: np.zeros(shape, "<f4")})
