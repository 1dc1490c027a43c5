"""A Hugging Face directory of random weights as GGUF, and llama.cpp's own quantization of it. Runs in the peers' venv.

    python -m bench.peers.write_gguf DIR OUT.gguf [q4_0|q8_0|OTHER.gguf]

Writes bf16 (norms f32) one tensor at a time, then lets `llama_model_quantize` make its default mix: for Q4_0 the head
becomes Q6_K. With another GGUF file, of the same model but for its embedding and its routers, it copies that and puts
those in, in the types that it has for them. Families: llama (rows of Q and K are put in llama.cpp's order of rotation)
and olmoe (experts stacked).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_F32_PARTS = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm", "ffn_gate_inp", "output_norm")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the GGUF file: its shape, whether it is f32, and its bf16 bits when they are wanted."""

    name: str
    shape: tuple[int, ...]
    is_f32: bool
    bits: Callable[[], np.ndarray]

    @property
    def type(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType.F32 if self.is_f32 else gguf.GGMLQuantizationType.BF16

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * (4 if self.is_f32 else 2)

    def data(self) -> np.ndarray:
        """The bytes as they are stored: float32, or uint8 [..., 2k]."""
        bits = self.bits()
        if self.is_f32:
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(bits).view(np.uint8)


class _Checkpoint:
    """The tensors of `model.safetensors` as mapped uint16 arrays."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._start = 8 + size
        self._map = np.memmap(path, np.uint8, "r")
        self.names = list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def bits(self, name: str) -> np.ndarray:
        entry = self._header[name]
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}, but BF16 was expected")
        first, last = entry["data_offsets"]
        return self._map[self._start + first : self._start + last].view(np.uint16).reshape(entry["shape"])


def _interleaved(bits: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first halves, second halves) to pairs: the order of llama.cpp's rotation for llama."""
    rows, columns = bits.shape
    return bits.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(checkpoint: _Checkpoint, config: dict[str, Any]) -> Iterator[_Tensor]:
    """Every tensor of the GGUF file."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def plain(name: str, new: str, part: str) -> _Tensor:
        count = heads.get(part) if config["model_type"] == "llama" else None

        def bits() -> np.ndarray:
            found = checkpoint.bits(name)
            return _interleaved(found, count) if count else found

        return _Tensor(f"{new}.weight", checkpoint.shape(name), part in _F32_PARTS, bits)

    yield plain("model.embed_tokens.weight", "token_embd", "token_embd")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for old, part in _PARTS.items():
            name = f"{prefix}{old}.weight"
            if name in checkpoint.names:
                yield plain(name, f"blk.{layer}.{part}", part)
        for old, part in _EXPERTS.items():
            names = [f"{prefix}mlp.experts.{e}.{old}.weight" for e in range(config.get("num_experts") or 0)]
            if names and names[0] in checkpoint.names:
                shape = (len(names), *checkpoint.shape(names[0]))

                def stacked(names: list[str] = names) -> np.ndarray:
                    return np.stack([checkpoint.bits(name) for name in names])

                yield _Tensor(f"blk.{layer}.{part}.weight", shape, False, stacked)
    yield plain("model.norm.weight", "output_norm", "output_norm")
    yield plain("lm_head.weight", "output", "output")


def write(directory: Path, out: Path) -> None:
    """The bf16 GGUF file."""
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] not in ("llama", "olmoe"):
        raise SystemExit(f"model_type {config['model_type']!r}: only llama and olmoe are written")
    checkpoint = _Checkpoint(directory / "model.safetensors")
    writer = gguf.GGUFWriter(str(out), config["model_type"])
    writer.add_name(directory.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if config.get("num_experts"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    _add_tokenizer(writer, directory)
    found = list(tensors(checkpoint, config))
    for tensor in found:
        dtype = np.dtype(np.float32 if tensor.is_f32 else np.uint8)
        shape = tensor.shape if tensor.is_f32 else (*tensor.shape[:-1], 2 * tensor.shape[-1])
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in found:
        writer.write_tensor_data(tensor.data())
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])


def quantize(source: Path, out: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantization with its default mix for `kind`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[kind]
    params.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params) != 0:
        raise SystemExit(f"llama_model_quantize refused {source}")


def put_routers(directory: Path, other: Path, out: Path) -> None:
    """`out`: the file `other` with the embedding and the routers of the checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    wanted = {
        tensor.name: tensor
        for tensor in tensors(_Checkpoint(directory / "model.safetensors"), config)
        if tensor.name == "token_embd.weight" or tensor.name.endswith("ffn_gate_inp.weight")
    }
    shutil.copyfile(other, out)
    for place in gguf.GGUFReader(out, "r+").tensors:
        tensor = wanted.pop(place.name, None)
        if tensor is None:
            continue
        values = tensor.bits()
        for start in range(0, len(values), 4096):
            rows = (values[start : start + 4096].astype(np.uint32) << 16).view(np.float32)
            place.data[start : start + 4096] = gguf.quants.quantize(rows, place.tensor_type)
    if wanted:
        raise SystemExit(f"{other} has no {next(iter(wanted))}")


def main() -> None:
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    directory, out = Path(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) == 3:
        write(directory, out)
        return
    if sys.argv[3].endswith(".gguf"):
        put_routers(directory, Path(sys.argv[3]), out)
        return
    full = out.with_name(f"{out.name}.bf16")
    try:
        write(directory, full)
        quantize(full, out, sys.argv[3], threads=2)
    finally:
        full.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
