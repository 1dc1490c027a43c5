"""The random checkpoints of examples/make_model.py: their files agree with each other, and with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from bench.peers.child import TOPIC_TOKENS, token_ids
from examples.filler_tokenizer import SMALLEST_VOCABULARY, tokenizer_json
from examples.make_model import main, tensor_values, write_model
from examples.model_presets import (
    FAMILIES,
    PRESETS,
    ModelRequestError,
    TensorShape,
    config_fields,
    spelled,
    tensor_shapes,
)
from examples.session_router import TOPICS
from hw_targets.expert_cache import replay
from hw_targets.routing import Router, locality, synthetic_trace
from tests.hw_targets.routing_samples import small_trace


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, read independently of the writer and of the safetensors library."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    kinds = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
    body, end, tensors = data[8 + size :], 0, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        assert start == end  # no holes and no overlaps
        end = stop
        tensors[name] = np.frombuffer(body[start:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
    assert end == len(body)
    return tensors


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in read_shard(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_the_config_asks_for_is_written(family: str, tmp_path: Path) -> None:
    write_model(f"tiny-{family}", tmp_path)
    wanted = {tensor.name: tensor.shape for tensor in tensor_shapes(config_fields(f"tiny-{family}"))}
    assert {name: tensor.shape for name, tensor in read_all(tmp_path).items()} == wanted


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_sizes_are_consistent(preset: str) -> None:
    fields = config_fields(preset)
    names = [tensor.name for tensor in tensor_shapes(fields)]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) != fields["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama-1.1b", 1_100_048_384),
        ("olmoe-1b-7b", 6_919_161_856),
        ("qwen2-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mistral-7b", 7_241_732_096),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_named_presets_have_the_published_parameter_count(preset: str, parameters: int) -> None:
    fields = config_fields(preset)
    assert sum(int(np.prod(tensor.shape)) for tensor in tensor_shapes(fields)) == parameters


def test_same_seed_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    first, again, other = (
        write_model("tiny-qwen3_moe", tmp_path / name, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_shards_hold_the_same_values_and_the_index_names_each_tensor_once(tmp_path: Path) -> None:
    whole = write_model("tiny-olmoe", tmp_path / "a")
    parts = write_model("tiny-olmoe", tmp_path / "b", shard_size=100_000)
    expected, index = read_all(whole), json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for path in files:
        stored = read_shard(path)
        assert sum(tensor.nbytes for tensor in stored.values()) <= 100_000
        for name, tensor in stored.items():
            assert index["weight_map"][name] == path.name
            np.testing.assert_array_equal(tensor, expected.pop(name))
    assert not expected


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_low_precision_is_the_rounded_f32_checkpoint(dtype: str, tmp_path: Path) -> None:
    exact = read_all(write_model("tiny-llama", tmp_path / "f32"))
    rounded = read_all(write_model("tiny-llama", tmp_path / dtype, dtype=dtype))
    for name, tensor in rounded.items():
        np.testing.assert_array_equal(tensor, exact[name].astype(tensor.dtype))
    config = json.loads((tmp_path / dtype / "config.json").read_text())
    assert config["dtype"] == {"f16": "float16", "bf16": "bfloat16"}[dtype]


def test_values_are_normal_and_do_not_repeat() -> None:
    tensor = TensorShape("a.weight", (1500, 400), "matrix")
    values = np.concatenate(list(tensor_values(tensor, 0, None, 1.0))).reshape(tensor.shape) * 20  # times sqrt(fan-in)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
    assert np.mean(np.abs(values) < 0.6744898) == pytest.approx(0.5, abs=0.005)
    assert len(np.unique(values)) > 0.98 * values.size
    for shift in (1, 400, 65536, 131072):  # neighbours, rows, the table's size, the block's size
        flat = values.ravel()
        assert abs(np.mean(flat[shift:] * flat[:-shift])) < 0.01


def test_scales(tmp_path: Path) -> None:
    plain = read_all(write_model("tiny-qwen2", tmp_path / "a"))
    scaled = read_all(write_model("tiny-qwen2", tmp_path / "b", init_std=0.5, embedding_scale=4.0))
    matrix, embedding = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"
    assert plain[matrix].std() == pytest.approx(128**-0.5, rel=0.05)
    assert scaled[matrix].std() == pytest.approx(0.5, rel=0.05)
    assert scaled[embedding].std() == pytest.approx(2.0, rel=0.05)
    assert plain["model.norm.weight"].mean() == pytest.approx(1.0, abs=0.05)
    assert plain["model.layers.0.self_attn.q_proj.bias"].std() > 0.05


def test_config_spellings() -> None:
    fields = config_fields("llama-8b")
    old, new = spelled(fields, "v4", "bfloat16"), spelled(fields, "v5", "bfloat16")
    assert (old["torch_dtype"], old["rope_theta"], old["rope_scaling"]["factor"]) == ("bfloat16", 500000.0, 8.0)
    assert new["rope_parameters"] == {**old["rope_scaling"], "rope_theta": 500000.0}
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & set(new)
    assert spelled(config_fields("qwen3_moe"), "v5", "float32")["num_local_experts"] == 8
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert spelled(config_fields("qwen3", windows), "v5", "float32")["layer_types"] == [
        "full_attention",
        "sliding_attention",
    ]


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("preset", ["llama-8b", "tiny-qwen3_moe", "tiny-mixtral"])
def test_a_written_config_gives_its_own_fields_back(preset: str, style: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(spelled(config_fields(preset), style, "float32")))
    assert tensor_shapes(config_fields(str(path))) == tensor_shapes(config_fields(preset))


def test_overrides_change_shapes(tmp_path: Path) -> None:
    overrides = {"num_local_experts": 4, "decoder_sparse_step": 2, "hidden_size": 32, "tie_word_embeddings": True}
    tensors = read_all(write_model("tiny-qwen3_moe", tmp_path, overrides=overrides))
    assert tensors["model.layers.1.mlp.gate.weight"].shape == (4, 32)
    assert "model.layers.0.mlp.gate_proj.weight" in tensors
    assert tensors["model.layers.0.self_attn.q_norm.weight"].shape == (8,)
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("size", [SMALLEST_VOCABULARY, 259, 384, 1000, 32000, 151936])
def test_every_id_of_the_tokenizer_decodes(size: int) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(size, add_bos=True)))
    assert tokenizer.get_vocab_size() == size
    assert all(tokenizer.id_to_token(index) is not None for index in range(size))
    text = "the 2 cats\n\tand 'dogs' {x: [1, 2]}" if size >= 259 else "the 2 cats\nand 'dogs' {x: [1, 2]}"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    assert isinstance(tokenizer.decode(list(range(size))), str)


def test_tokenizer_encodes_any_bytes_and_uses_its_merges() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(32000, add_bos=False)))
    text = "naïve 東京 🙂 \x00\x7f\u00ad"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the").ids) < 3
    assert tokenizer.encode("</s>").ids == [2]


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("lama-1.1b", {}, "did you mean 'llama-1.1b'"),
        ("tiny-llama", {"overrides": {"hidden_sise": 3}}, "did you mean 'hidden_size'"),
        ("tiny-llama", {"overrides": {"model_type": "qwen2"}}, "model_type"),
        ("tiny-llama", {"overrides": {"torch_dtype": "float16"}}, "dtype option"),
        ("tiny-llama", {"overrides": {"num_attention_heads": 3}}, "not a multiple of num_key_value_heads 2"),
        ("tiny-llama", {"overrides": {"num_hidden_layers": "two"}}, "positive whole number"),
        ("tiny-llama", {"overrides": {"head_dim": 7}}, "head_dim must be even"),
        ("tiny-llama", {"overrides": {"vocab_size": 50}}, "vocab_size"),
        ("tiny-llama", {"overrides": {"vocab_size": 10**6}}, "vocab_size"),
        ("tiny-olmoe", {"overrides": {"head_dim": 8}}, "hidden_size"),
        ("tiny-mixtral", {"overrides": {"num_experts_per_tok": 9}}, "more than the 8 experts"),
        ("tiny-llama", {"dtype": "int8"}, "f32, f16, bf16"),
        ("tiny-llama", {"shard_size": 0}, "shard_size"),
        ("tiny-llama", {"seed": -1}, "seed"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(preset: str, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRequestError, match=message):
        write_model(preset, tmp_path / "out", **options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_existing_checkpoint_is_overwritten_only_when_forced(tmp_path: Path) -> None:
    write_model("tiny-llama", tmp_path, shard_size=100_000)
    with pytest.raises(ModelRequestError, match="already holds"):
        write_model("tiny-llama", tmp_path)
    write_model("tiny-llama", tmp_path, force=True)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    assert (
        main(
            [
                "tiny-mistral",
                str(out),
                "--dtype",
                "bf16",
                "--config-style",
                "v4",
                "--shard-size",
                "100KB",
                "--set",
                "sliding_window=16",
                "--set",
                "hidden_act=silu",
            ]
        )
        == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["sliding_window"], config["torch_dtype"]) == (16, "bfloat16")
    assert "bytes of weights in" in capsys.readouterr().out
    assert main(["tiny-mistrl", str(out)]) == 2
    assert "did you mean 'tiny-mistral'" in capsys.readouterr().err
    assert main(["--list"]) == 0
    assert "olmoe-1b-7b" in capsys.readouterr().out


def test_a_session_router_routes_as_a_session(tmp_path: Path) -> None:
    """Routing of the written embedding through each layer's norm and router: popularities, hits, topics."""
    sizes: dict[str, object] = {
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 4,
        "intermediate_size": 8,
    }
    write_model("tiny-olmoe", tmp_path, embedding_scale=64.0, router="session", overrides=sizes)
    tensors = {name: tensor.astype(np.float32) for name, tensor in read_all(tmp_path).items()}
    table, count = tensors["model.embed_tokens.weight"], 192
    ids = np.array(token_ids(count, len(table), topics=TOPICS))
    assert np.unique(ids[:TOPIC_TOKENS] % TOPICS).tolist() == [0]
    rows = table[ids] / np.sqrt((table[ids] ** 2).mean(axis=1, keepdims=True))
    layers = [f"model.layers.{layer}" for layer in range(4)]
    logits = [
        (rows * tensors[f"{layer}.post_attention_layernorm.weight"]) @ tensors[f"{layer}.mlp.gate.weight"].T
        for layer in layers
    ]
    trace = small_trace(np.stack([np.argsort(-found, axis=1)[:, :8] for found in logits], axis=1), experts=64)
    drawn = synthetic_trace(Router(1.4, drift=0.12), experts=64, top_k=8, layers=4, tokens=count)
    for slots in (4 * 8, 4 * 16, 4 * 25):
        for policy in ("lru", "lrfu"):
            rates = [replay(t, slots=slots, policy=policy).decode_hit_rate for t in (trace, drawn)]
            assert rates[0] == pytest.approx(rates[1], abs=0.03)
    overlap = locality(trace, lags=(1, 64), lengths=(4,)).overlap
    assert 0.40 < overlap[1] < 0.50 and overlap[64] < overlap[1] - 0.03  # the session drifts


def test_only_the_embedding_and_the_routers_of_a_session_model_differ(tmp_path: Path) -> None:
    write_model("tiny-qwen3_moe", tmp_path / "random", embedding_scale=64.0)
    write_model("tiny-qwen3_moe", tmp_path / "session", embedding_scale=64.0, router="session")
    random, session = read_all(tmp_path / "random"), read_all(tmp_path / "session")
    differing = [name for name in random if not np.array_equal(random[name], session[name])]
    assert differing == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
    ]
    tables = [found["model.embed_tokens.weight"][:, TOPICS:] for found in (random, session)]
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize(
    ("preset", "scale", "message"),
    [("tiny-llama", 64.0, "no router"), ("tiny-olmoe", 1.0, "an embedding scale of 32 or more")],
)
def test_session_routers_that_cannot_be_made(preset: str, scale: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRequestError, match=message):
        write_model(preset, tmp_path, embedding_scale=scale, router="session")
    with pytest.raises(ModelRequestError, match="router must be one of random, session"):
        write_model(preset, tmp_path, router="other")
