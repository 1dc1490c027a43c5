"""Quantized checkpoints that are written: what they hold, what they refuse, and runs that were interrupted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontends.huggingface import ImportedModel, import_model
from frontends.quantized import QuantizedCheckpoint
from ir.diagnostics import DiagnosticError
from ir.formats import GroupedIntFormat
from passes.quantize.calibrate.awq import find_folds, find_scaling
from passes.quantize.calibrate.compressed_layout import layout_parts, packed_of, part_shapes, quantization_config
from passes.quantize.calibrate.executor import LayerwiseForward
from passes.quantize.calibrate.quantize_checkpoint import METHODS, Result, quantize_checkpoint
from passes.quantize.calibrate.state import KeptTensors
from passes.quantize.calibrate.targets import find_targets
from passes.quantize.recipe import load_recipe, read_recipe
from passes.quantize.rounding import quantize_rows
from tests.frontends.model_files import config_of, random_tensors, write_model

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
MIXED = """
[weights]
format = "q4_sym<group=32, scale=f16>"
[[rule]]
role = "attention.o"
format = "q8_sym<group=row, scale=f32>"
[[rule]]
role = "experts.down"
format = "q3_zp<group=32, scale=bf16>"
[[rule]]
role = "head"
format = "q6_zp<group=32, scale=f16>"
"""


def model_directory(path: Path, family: str = "qwen3_moe", **changes: Any) -> Path:
    experts = {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    config = config_of(family, **{**SIZES, **experts, **changes})
    return write_model(path, config, random_tensors(config, "BF16"))


def sequences(count: int = 4, length: int = 24) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 40, (count, length)).astype(np.int32)


def quantized(model: Path, out: Path, method: str, recipe: str = MIXED, **options: Any) -> Result:
    imported = import_model(model)
    if method != "rtn":
        options.setdefault("sequences", sequences())
    with imported.checkpoint:
        return quantize_checkpoint(imported, read_recipe(recipe, "test.toml"), method, out, **options)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# -- the layout ------------------------------------------------------------------------------------------------------


@given(
    bits=st.integers(2, 8),
    zero_point=st.booleans(),
    group=st.sampled_from((32, 0)),
    n=st.integers(1, 40),
    k=st.sampled_from((32, 96)),
    seed=st.integers(0, 2**32),
)
def test_parts_are_the_matrix(bits: int, zero_point: bool, group: int, n: int, k: int, seed: int) -> None:
    format = GroupedIntFormat(bits, group, zero_point)
    packed = format.pack(np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32))
    parts = layout_parts(packed)
    assert {leaf: (part.dtype, part.shape) for leaf, part in parts.items()} == part_shapes(format, (n, k))
    assert packed_of(format, (n, k), parts).tobytes() == packed.tobytes()


def test_settings_name_each_module_once() -> None:
    q4, q8 = GroupedIntFormat(4, 32), GroupedIntFormat(8, 0)
    names = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("self_attn.o_proj", "mlp.up_proj")]
    formats = {name: q8 if "o_proj" in name else q4 for name in names if name != "model.layers.1.mlp.up_proj.weight"}
    settings = quantization_config(formats, [*names, "lm_head.weight"])
    assert settings["format"] == "mixed-precision"
    assert settings["ignore"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    for name in names:
        module = name.removesuffix(".weight")
        hits = [
            group["weights"]["num_bits"]
            for group in settings["config_groups"].values()
            for target in group["targets"]
            if re.match(target.removeprefix("re:"), module)
        ]
        assert hits == ([formats[name].bits] if name in formats else [])
    assert settings["config_groups"]["group_1"]["weights"]["group_size"] == 32


# -- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_directory_holds_what_was_rounded(method: str, tmp_path: Path) -> None:
    model, out = model_directory(tmp_path / "model"), tmp_path / "out"
    result = quantized(model, out, method)
    before, after = import_model(model), import_model(out)
    with before.checkpoint as floats, after.checkpoint as stored:
        assert isinstance(stored, QuantizedCheckpoint)
        targets = find_targets(before, read_recipe(MIXED, "test.toml"))
        assert {name: weight.format for name, weight in stored.quantized.items()} == targets.formats
        for name in floats.tensors:
            wanted = floats.read(name).astype(np.float32)
            found = stored.read(name).astype(np.float32)
            if name in targets.formats:
                if method == "rtn":
                    format = targets.formats[name]
                    assert np.array_equal(found, format.unpack(quantize_rows(format, wanted, "mse")))
                elif method == "gptq":
                    assert np.linalg.norm(found - wanted) < 0.5 * np.linalg.norm(wanted)
            elif method != "awq":
                assert np.array_equal(found, wanted)
    assert sum(result.report.formats.values()) == len(targets.formats)
    assert json.loads((out / "quantization_report.json").read_text())["method"] == method
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}  # nothing is left beside it


def test_calibrated_logits_are_nearer_than_rounded_ones(tmp_path: Path) -> None:
    recipe = '[weights]\nformat = "q3_sym<group=32, scale=f16>"'
    model = model_directory(tmp_path / "model", "llama")
    logits = {}
    for method in ("float", "rtn", "gptq"):
        directory = model if method == "float" else quantized(model, tmp_path / method, method, recipe).path
        imported = import_model(directory)
        with imported.checkpoint as checkpoint:
            logits[method] = LayerwiseForward(imported.module.function("step"), checkpoint.read, sequences(), {}).run()
    errors = {method: float(np.square(found - logits["float"]).mean()) for method, found in logits.items()}
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_shards_are_cut_and_found_again(tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model")
    whole = quantized(model, tmp_path / "whole", "rtn").path
    cut = quantized(model, tmp_path / "cut", "rtn", max_shard_bytes=4_000).path
    assert len(list(cut.glob("model-*.safetensors"))) > 2
    one, other = import_model(whole), import_model(cut)
    with one.checkpoint as first, other.checkpoint as second:
        assert list(first.tensors) == list(second.tensors)
        assert all(first.read(name).tobytes() == second.read(name).tobytes() for name in first.tensors)


def test_a_tied_head_and_rows_that_are_no_groups_keep_their_floats(tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model", "llama", tie_word_embeddings=True)
    imported = import_model(model)
    with imported.checkpoint:
        recipe = '[weights]\nformat = "q4_sym<group=128, scale=f16>"'
        targets = find_targets(imported, read_recipe(recipe, "test.toml"))
    assert not any("embed" in name for name in targets.formats)
    assert {format.group for format in targets.formats.values()} == {32, 64}
    assert any("tied" in note for note in targets.notes) and any("whole groups" in note for note in targets.notes)


def test_experts_of_a_product_share_a_format(tmp_path: Path) -> None:
    imported = import_model(model_directory(tmp_path / "model"))
    rule = '[[rule]]\nmatch = ".*experts.2.(up|down)_proj.weight"\nformat = "q{}_sym<group=32, scale=f16>"\n'
    with imported.checkpoint:
        targets = find_targets(imported, read_recipe(MIXED + rule.format(5), "test.toml"))
        # what the others keep as floats, all keep
        with pytest.raises(DiagnosticError, match="rounds no weight"):
            find_targets(imported, read_recipe(rule.format(5), "test.toml"))
    for part in ("gate", "up", "down"):
        formats = {str(f) for name, f in targets.formats.items() if f"{part}_proj" in name and "experts" in name}
        assert formats == {"q4_sym<group=32, scale=f16>" if part == "gate" else "q5_sym<group=32, scale=f16>"}
    assert any("share a format" in note for note in targets.notes)


def test_experts_with_few_rows_are_calibrated_with_help(tmp_path: Path) -> None:
    recipe = '[[rule]]\nrole = "experts"\nformat = "q4_sym<group=32, scale=f16>"'
    model = model_directory(tmp_path / "model")
    few = quantized(model, tmp_path / "few", "gptq", recipe, sequences=sequences(1, 2)).report
    many = quantized(model, tmp_path / "many", "gptq", recipe, sequences=sequences(8, 32)).report
    assert many.experts == {"own rows": 12}
    assert sum(few.experts.values()) == 12
    assert few.experts["rows of all tokens added"] == 8 and few.experts.get("own rows", 0) <= 4


# -- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "inputs"),
    [
        ("llama", {}, 5),  # two norms of the layer, o, down, and the norm in front of the head
        ("llama", {"attention_bias": True, "mlp_bias": True}, 5),
        ("qwen3_moe", {}, 8),  # down of four experts
        ("olmoe", {"head_dim": None}, 7),  # v is clipped: o cannot be scaled
    ],
)
def test_scaling_leaves_the_model_as_it_is(family: str, changes: dict[str, Any], inputs: int, tmp_path: Path) -> None:
    imported = import_model(model_directory(tmp_path / "model", family, **changes))
    with imported.checkpoint as checkpoint:
        func, roles = imported.module.function("step"), {n: s.role for n, s in imported.weights.items()}
        targets = find_targets(imported, read_recipe('[weights]\nformat = "q4_sym<group=32, scale=f16>"', "t.toml"))
        scaling = find_scaling(func, checkpoint.read, sequences(), roles, targets.formats)
        assert scaling.inputs == inputs
        assert sum(scaling.skipped.values()) == (1 if family == "olmoe" else 0)
        assert any(np.ptp(s) > 0.1 for s in scaling.columns.values())

        def scaled(name: str) -> np.ndarray:
            values = checkpoint.read(name)
            found = scaling.apply(name, values)
            return found if name in targets.formats else found.astype(values.dtype)  # floats are stored as they were

        wanted = LayerwiseForward(func, checkpoint.read, sequences(), roles).run()
        found = LayerwiseForward(func, scaled, sequences(), roles).run()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_a_router_is_multiplied_by_powers_of_two(tmp_path: Path) -> None:
    imported = import_model(model_directory(tmp_path / "model"))
    with imported.checkpoint as checkpoint:
        func, roles = imported.module.function("step"), {n: s.role for n, s in imported.weights.items()}
        targets = find_targets(imported, read_recipe(MIXED, "test.toml"))
        factors = find_scaling(func, checkpoint.read, sequences(), roles, targets.formats).columns
        router = factors["model.layers.0.mlp.gate.weight"]
        assert np.array_equal(np.exp2(np.rint(np.log2(router))), router)
        folds, _ = find_folds(func)
        assert sum(bool(fold.gain) for fold in folds.values()) == 3


# -- interrupted runs ------------------------------------------------------------------------------------------------


def interrupt_at(stage: str, fraction: float) -> Callable[..., None]:
    def tell(now: str, done: float, total: float, unit: str = "") -> None:
        if now == stage and done >= fraction * total:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_gives_the_same_bytes(method: str, tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model")
    whole = quantized(model, tmp_path / "whole", method)
    assert whole.reused == 0
    out = tmp_path / "out"
    for stage, fraction in (("round", 0.4), ("write", 0.5)):
        with pytest.raises(KeyboardInterrupt):
            quantized(model, out, method, tell=interrupt_at(stage, fraction))
        assert not out.exists()
        for left in tmp_path.glob(".out*"):  # what is left is no model
            with pytest.raises(DiagnosticError):
                import_model(left)
    resumed = quantized(model, out, method)
    assert resumed.reused == sum(whole.report.formats.values())
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_damaged_and_foreign_tensors_are_made_again(tmp_path: Path) -> None:
    model, out = model_directory(tmp_path / "model"), tmp_path / "out"
    whole = quantized(model, tmp_path / "whole", "rtn")
    with pytest.raises(KeyboardInterrupt):
        quantized(model, out, "rtn", tell=interrupt_at("write", 0))
    kept = sorted((tmp_path / ".out.quantize").glob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:-3])
    kept[1].write_bytes(kept[2].read_bytes())
    kept[3].write_bytes(b"")
    resumed = quantized(model, out, "rtn")
    assert resumed.reused == sum(whole.report.formats.values()) - 3
    assert files_of(out) == files_of(whole.path)
    # tensors of another method are not taken
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        quantized(model, other, "rtn", tell=interrupt_at("write", 0))
    assert quantized(model, other, "gptq").reused == 0


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model")
    (tmp_path / "out").mkdir()
    with pytest.raises(DiagnosticError, match="is there already"):
        quantized(model, tmp_path / "out", "rtn")
    with pytest.raises(DiagnosticError, match="inside of the model"):
        quantized(model, model / "out", "rtn")
    with pytest.raises(DiagnosticError, match="no such directory"):
        quantized(model, tmp_path / "none" / "out", "rtn")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_no_numbers_are_named(method: str, tmp_path: Path) -> None:
    config = config_of("llama", **SIZES)
    tensors = random_tensors(config, "BF16")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = ml_dtypes.bfloat16(np.nan)
    model = write_model(tmp_path / "model", config, tensors)
    with pytest.raises(DiagnosticError) as fault:
        quantized(model, tmp_path / "out", method)
    text = str(fault.value)
    assert "'model.layers.0.mlp.up_proj.weight' holds nan in row 3, column 5" in text and "model.safetensors" in text
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    out = quantized(model_directory(tmp_path / "model"), tmp_path / "out", "rtn").path
    with pytest.raises(DiagnosticError, match="quantized already"):
        quantized(out, tmp_path / "again", "rtn")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('[weights]\nformat = "nf4<group=32, scale=f16>"', r"nf4<.*'test' wants for model\.layers"),
        ('[weights]\nformat = "q1_sym<group=32, scale=f16>"', "cannot be calibrated"),
        ('[weights]\nformat = "q4_sym<group=32, scale=f16>"\nrotate = 32', "rotation"),
        ('[weights]\nformat = "q4_sym<group=32, scale=f16>"\noutliers = 2', "outlier columns"),
        ('[kv]\nformat = "bf16"', "rounds no weight"),
    ],
)
def test_recipes_that_a_checkpoint_cannot_hold_are_refused(recipe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError, match=message):
        quantized(model_directory(tmp_path / "model"), tmp_path / "out", "rtn", recipe)


def test_methods_and_their_text(tmp_path: Path) -> None:
    imported: ImportedModel = import_model(model_directory(tmp_path / "model"))
    recipe = load_recipe("w4a16-g32")
    with imported.checkpoint:
        with pytest.raises(DiagnosticError, match="unknown method 'best'"):
            quantize_checkpoint(imported, recipe, "best", tmp_path / "out")
        with pytest.raises(DiagnosticError, match="gptq is given no calibration text"):
            quantize_checkpoint(imported, recipe, "gptq", tmp_path / "out")
        with pytest.raises(DiagnosticError, match="rtn is given calibration text"):
            quantize_checkpoint(imported, recipe, "rtn", tmp_path / "out", sequences=sequences())


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with KeptTensors(tmp_path / "kept", "a"), pytest.raises(DiagnosticError, match="another run"):
        KeptTensors(tmp_path / "kept", "a")
    with KeptTensors(tmp_path / "kept", "a") as kept:
        assert kept.load("nothing") is None
