"""Whole model directories in, step functions out; and every way in which tensors do not fit, in one report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ir
from frontends import family as family_module
from frontends.config import ModelConfig, read_decoder
from frontends.config_reader import ConfigReader
from frontends.family import Family, family_names, find_family, register_family
from frontends.huggingface import ImportedModel, expected_weights, import_model
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.interpreter import zero_states
from ir.ops.attention import ScoresOp
from ir.ops.tensor import CastOp, ClipOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from tests.frontends.model_files import FAMILIES, config_of, random_tensors, safetensors_bytes, write_model
from tests.goldens import GOLDEN_CASES, GOLDENS, Golden

IDS = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)


def _logits(imported: ImportedModel, chunks: tuple[tuple[int, int], ...] = ((0, 7),)) -> np.ndarray:
    func = imported.module.function("step")
    states = zero_states(func, slots=1, ctx=8)
    found = []
    for first, last in chunks:
        count = np.arange(last - first, dtype=np.int32)
        inputs = [IDS[first:last], count + first, np.zeros_like(count), count]
        found += ir.interpret(func, inputs, weights=imported.checkpoint.read, states=states)
    return np.concatenate(found)


def _refused(directory: Path) -> str:
    with pytest.raises(DiagnosticError) as caught:
        import_model(directory)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_family_is_imported(family: str, dtype: str, tmp_path: Path) -> None:
    config = config_of(family)
    imported = import_model(write_model(tmp_path / "m", config, dtype=dtype))
    ir.verify(imported.module)
    text = ir.print_module(imported.module)
    assert ir.structural_equal(ir.parse(text), imported.module) is None
    assert list(imported.weights) == list(expected_weights(config))
    assert imported.num_parameters == sum(t.size for t in random_tensors(config).values())
    assert (imported.name, list(imported.files)) == ("m", ["config.json"])
    logits = _logits(imported)
    assert logits.shape == (7, 40)
    assert logits.std() > 0.1
    assert _logits(imported, ((0, 3), (3, 4), (4, 7))) == pytest.approx(logits, rel=1e-4, abs=1e-5)
    element = {"F32": "f32", "BF16": "bf16", "F16": "f16"}[dtype]
    for op in imported.module.walk():
        if isinstance(op, (ConstantOp, ConstantStackOp)):
            assert str(op.result.type.element) == element
            casts = [isinstance(user, CastOp) for user in op.result.users]
            assert op.symbol.name == "model.embed_tokens.weight" or casts == [dtype != "F32"]
    imported.checkpoint.close()


@pytest.mark.parametrize("name", sorted(GOLDEN_CASES))
def test_the_graph_means_what_transformers_computes(name: str) -> None:
    """The interpreter on the imported graph gives the logits of the committed goldens."""
    golden = Golden.load(GOLDENS / name)
    imported = import_model(GOLDENS / name)
    func = imported.module.function("step")
    with imported.checkpoint as checkpoint:
        rows = np.arange(len(golden.ids), dtype=np.int32)
        states = zero_states(func, slots=1, ctx=len(rows))
        inputs = [golden.ids.astype(np.int32), rows, np.zeros_like(rows), rows]
        (logits,) = ir.interpret(func, inputs, weights=checkpoint.read, states=states)
    assert np.abs(logits - golden.logits).max() < 1e-5 * np.abs(golden.logits).max()


def test_origins_are_the_paths_of_the_checkpoint(tmp_path: Path) -> None:
    imported = import_model(write_model(tmp_path, config_of("qwen3_moe", mlp_only_layers=[0])))
    origins = list(dict.fromkeys(op.location.origin for op in imported.module.function("step").ops))
    assert origins == [
        "embed_tokens", "rotary_emb",
        *(f"layers.{i}.{part}" for i, mlp in ((0, "dense"), (1, "moe")) for part in (
            "input_layernorm", "self_attn.q_proj", "self_attn", "self_attn.q_norm", "self_attn.k_proj",
            "self_attn.k_norm", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
            *(("mlp.gate_proj", "mlp.up_proj", "mlp", "mlp.down_proj") if mlp == "dense" else
              ("mlp.gate", "mlp", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts",
               "mlp.experts.down_proj")))),
        "norm", "lm_head", "",
    ]  # fmt: skip


def test_windows_clipping_and_roles_reach_the_graph(tmp_path: Path) -> None:
    config = config_of("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    imported = import_model(write_model(tmp_path / "a", config))
    assert [op.window for op in imported.module.walk() if isinstance(op, ScoresOp)] == [0, 3]
    imported = import_model(write_model(tmp_path / "b", config_of("olmoe", clip_qkv=0.5)))
    clips = [(op.low, op.high) for op in imported.module.walk() if isinstance(op, ClipOp)]
    assert clips == [(-0.5, 0.5)] * 6  # q, k and v of two layers
    roles = {spec.role for spec in imported.weights.values()}
    assert roles == {"embedding", "norm", "attention.q", "attention.k", "attention.v", "attention.o", "moe.router",
                     "moe.gate", "moe.up", "moe.down", "head"}  # fmt: skip


def test_mixtral_names(tmp_path: Path) -> None:
    imported = import_model(write_model(tmp_path, config_of("mixtral")))
    stacks = [op.symbol.name for op in imported.module.walk() if isinstance(op, ConstantStackOp)]
    assert stacks[:3] == [f"model.layers.0.block_sparse_moe.experts.*.{w}.weight" for w in ("w1", "w3", "w2")]


def test_tied_models(tmp_path: Path) -> None:
    config = config_of("llama", tie_word_embeddings=True)
    tensors = random_tensors(config)
    table = tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in tensors
    plain = import_model(write_model(tmp_path / "plain", config, tensors))
    wanted = _logits(plain)
    assert plain.config.tied

    twice = import_model(write_model(tmp_path / "twice", config, {**tensors, "lm_head.weight": table}))
    assert np.array_equal(_logits(twice), wanted)
    assert twice.config.tied
    assert not twice.warnings

    renamed = {("lm_head.weight" if n == "model.embed_tokens.weight" else n): t for n, t in tensors.items()}
    assert np.array_equal(_logits(import_model(write_model(tmp_path / "renamed", config, renamed))), wanted)

    other = import_model(write_model(tmp_path / "other", config, {**tensors, "lm_head.weight": -table}))
    assert not other.config.tied
    assert "'tie_word_embeddings' is true, but lm_head.weight differs" in other.warnings[0]
    assert np.array_equal(_logits(other), -wanted)


def test_left_over_inverse_frequencies_are_ignored(tmp_path: Path) -> None:
    config = config_of("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32) for i in range(2)}
    imported = import_model(write_model(tmp_path, config, {**random_tensors(config), **extra}))
    assert not imported.warnings


def test_all_differences_are_reported_at_once(tmp_path: Path) -> None:
    config = config_of("llama", num_hidden_layers=4)
    tensors: dict[str, Any] = dict(random_tensors(config))
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.query_proj.weight"] = tensors.pop(
            f"model.layers.{layer}.self_attn.q_proj.weight"
        )
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = ("F64", (24, 16))
    tensors["visual.patch.weight"] = np.zeros(3, np.float32)
    del tensors["lm_head.weight"]
    text = _refused(write_model(tmp_path, config, tensors))
    assert text.splitlines() == [
        f"{tmp_path}: error: the tensors do not fit the model that config.json describes: 5 missing, 5 of no known use,"
        " 1 of a wrong shape, 1 of a wrong dtype",
        "missing: model.layers.*.self_attn.q_proj.weight (4 tensors); did you mean"
        " model.layers.*.self_attn.query_proj.weight?",
        "missing: lm_head.weight",
        "unmapped: model.layers.*.self_attn.query_proj.weight (4 tensors)",
        "unmapped: visual.patch.weight",
        "wrong shape: model.norm.weight: [17], expected [16]",
        "wrong dtype: model.layers.1.mlp.up_proj.weight: F64, expected F32 or F16 or BF16",
    ]


def test_hints_for_known_causes(tmp_path: Path) -> None:
    config = config_of("llama")
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    text = _refused(write_model(tmp_path / "a", config, tensors))
    assert "hint: a model whose head is its embedding table has 'tie_word_embeddings': true" in text

    config = config_of("qwen3_moe")
    fused = {n: t for n, t in random_tensors(config).items() if ".experts." not in n}
    for layer in range(2):
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.zeros((4, 24, 16), np.float32)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = np.zeros((4, 16, 12), np.float32)
    text = _refused(write_model(tmp_path / "b", config, fused))
    assert "missing: model.layers.*.mlp.experts.*.gate_proj.weight (8 tensors)" in text
    assert "hint: the experts of a layer are fused in one tensor" in text


def test_experts_of_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    config = config_of("mixtral")
    tensors: dict[str, Any] = dict(random_tensors(config))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name].astype(np.float16)
    text = _refused(write_model(tmp_path, config, tensors))
    first = name.replace("experts.2", "experts.0")
    assert f"wrong dtype: {name}: F16, expected F32 like {first}" in text


def test_mixed_dtypes_elsewhere_are_fine(tmp_path: Path) -> None:
    config = config_of("llama")
    tensors: dict[str, Any] = dict(random_tensors(config))
    wanted = _logits(import_model(write_model(tmp_path / "a", config, tensors)))
    norm = tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    imported = import_model(write_model(tmp_path / "b", config, tensors))
    assert _logits(imported) == pytest.approx(wanted, rel=1e-2, abs=1e-2)
    assert imported.checkpoint.read("model.norm.weight").dtype == norm.dtype


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_hidden_layers": 4096}),
        ("qwen3_moe", {"num_local_experts": 8192, "num_hidden_layers": 4096}),
        ("olmoe", {"num_experts": 8192, "num_hidden_layers": 4096}),
    ],
)
def test_a_config_cannot_make_the_import_large(family: str, changes: dict[str, int], tmp_path: Path) -> None:
    directory = write_model(tmp_path, config_of(family, **changes), {"model.norm.weight": np.zeros(16, np.float32)})
    assert "config.json describes a model of more than 10002 tensors" in _refused(directory)


def test_many_strange_tensors_take_little_time(tmp_path: Path) -> None:
    strange = {f"{chr(97 + i % 26) * 300}{i}x": np.zeros(0, np.float32) for i in range(5000)}
    directory = write_model(tmp_path, config_of("llama"), strange)
    text = _refused(directory)
    assert "5000 of no known use" in text
    assert "unmapped: and 4976 more kinds of names" in text
    assert len(text) < 20_000


def test_the_report_is_about_the_directory_when_there_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert f"{tmp_path}/config.json: error: field 'hidden_size' is missing" in _refused(tmp_path)
    assert "has no config.json" in _refused(write_nothing(tmp_path / "empty"))


def write_nothing(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_license_of_the_model_card(tmp_path: Path) -> None:
    write_model(tmp_path, config_of("llama"))
    for card, wanted in (
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlicense: 'mit'\n---", "mit"),
        ("---\nlanguage: en\n---\nlicense: gpl", ""),
        ("license: mit", ""),
        ("", ""),
    ):
        (tmp_path / "README.md").write_text(card)
        assert import_model(tmp_path).license == wanted


def test_companion_files_are_found(tmp_path: Path) -> None:
    write_model(tmp_path, config_of("llama"))
    for name in ("tokenizer.json", "generation_config.json", "vocab.json"):
        (tmp_path / name).write_text("{}")
    assert list(import_model(tmp_path).files) == ["config.json", "tokenizer.json", "generation_config.json"]


@pytest.fixture
def _own_families(monkeypatch: pytest.MonkeyPatch) -> None:
    find_family("llama")
    monkeypatch.setattr(family_module, "_FAMILIES", dict(family_module._FAMILIES))


class _Scaled(Family):
    """A family of somebody else: like llama with heads of width 2."""

    model_type = "scaled"
    architectures = ("ScaledForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        return read_decoder(fields, self.model_type, head_dim=2)


@pytest.mark.usefixtures("_own_families")
def test_a_family_is_added_by_decorator(tmp_path: Path) -> None:
    register_family(_Scaled)
    imported = import_model(write_model(tmp_path, config_of("scaled")))
    assert imported.config.head_dim == 2
    assert _logits(imported).shape == (7, 40)
    with pytest.raises(ValueError, match="family 'scaled' is registered by"):
        register_family(_Scaled)


class _Point:
    def __init__(self, loaded: Any) -> None:
        self.name, self.value, self._loaded = "scaled", "package:Scaled", loaded

    def load(self) -> Any:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


@pytest.mark.usefixtures("_own_families")
def test_a_family_is_added_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(family_module, "entry_points", lambda group: asked.append(group) or [_Point(_Scaled)])
    assert isinstance(find_family("scaled"), _Scaled)
    assert asked == ["stratum.families"]
    assert "scaled" in family_names()


@pytest.mark.usefixtures("_own_families")
def test_a_broken_entry_point_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_module, "entry_points", lambda group: [_Point(ImportError("no module named package"))])
    assert find_family("llama").model_type == "llama"  # nothing of the package is needed
    with pytest.raises(DiagnosticError, match="'package:Scaled' cannot be loaded: no module named package"):
        find_family("other")


def test_the_layer_of_a_family_may_be_its_own(tmp_path: Path) -> None:
    """The base class serves llama-shaped models; the builder gives what others need."""
    seen = []

    class Recorder(_Scaled):
        def layer(self, step: Any, x: Value, layer: int, rope: tuple[Value, Value]) -> Value:
            seen.append(layer)
            return super().layer(step, x, layer, rope)

    from frontends.step import StepBuilder

    config = read_decoder(ConfigReader(config_of("scaled"), "config.json"), "scaled")
    ir.verify(Recorder().build(StepBuilder(config)))
    assert seen == [0, 1]


def test_importing_the_frontends_loads_nothing_heavy() -> None:
    code = (
        "import sys, frontends.huggingface, frontends.tokenizer, frontends.chat_template, frontends.generation_config\n"
        "heavy = {'torch', 'transformers', 'llvmlite', 'numba', 'tokenizers', 'jinja2', 'safetensors', 'lark'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_directory_of_random_bytes_never_crashes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = safetensors_bytes(random_tensors(config_of("llama")))
    write_model(tmp_path, config_of("llama"))
    for _ in range(30):
        damaged = bytearray(good)
        for at in rng.integers(0, 4000, 3):
            damaged[at] = rng.integers(0, 256)
        (tmp_path / "model.safetensors").write_bytes(damaged)
        try:
            import_model(tmp_path).checkpoint.close()
        except DiagnosticError as error:
            assert str(tmp_path) in str(error)
