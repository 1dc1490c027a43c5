"""Models in the shape of real ones whose weights are all zero, made in seconds, and how fast their steps are on a GPU.

    path = write_model(folder, LLAMA_8B, recipe="w4a16-g32", target=hw_targets.load("cuda-sm90a"))
    rows = decode_rows("decode_8b_w4a16", path, open_device, bandwidth=4.3e12)

The graph, the passes, the kernels and the manifest are those of `compile-model build`; the file of weights has no
bytes but those of the program's tables, and takes no room on the disk. What a step takes does not depend on numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import hw_targets
from bench.gpu_rows import Row
from codegen.artifact import ArtifactWriter, FileRecord
from codegen.build import model_facts
from codegen.build_pipeline import default_pipeline
from codegen.nvptx.compile import TRIPLE
from codegen.nvptx.gpu_code import compile_gpu_step, gpu_architectures, grid_options
from codegen.nvptx.lower_to_grid import lower_grid_step
from codegen.object_cache import ObjectCache
from frontends.huggingface import import_model
from hw_targets.target import Target
from passes.pass_manager import PassContext, PassManager
from passes.pipeline_text import print_pipeline
from runtime.artifact import FULL_HASH_BELOW_BYTES
from runtime.cuda.device import CudaDevice
from runtime.cuda.session import CudaSession

WARM_STEPS, STEPS, CONTEXT = 4, 32, 64


@dataclass(frozen=True)
class ModelSize:
    """A dense model of the llama family."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 8192


LLAMA_8B = ModelSize(32, 4096, 14336, 32, 8, 128256)


def write_checkpoint(folder: Path, size: ModelSize) -> Path:
    """A Hugging Face directory in bf16 whose file of weights is one hole."""
    folder.mkdir(parents=True, exist_ok=True)
    width = size.hidden // size.heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.ffn, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads, "vocab_size": size.vocab, "max_position_embeddings": size.context,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [size.vocab, size.hidden]}
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", size.hidden, size.hidden), ("self_attn.k_proj", size.kv_heads * width, size.hidden),
            ("self_attn.v_proj", size.kv_heads * width, size.hidden), ("self_attn.o_proj", size.hidden, size.hidden),
            ("mlp.gate_proj", size.ffn, size.hidden), ("mlp.up_proj", size.ffn, size.hidden),
            ("mlp.down_proj", size.hidden, size.ffn),
        ):  # fmt: skip
            shapes[f"{at}{name}.weight"] = [rows, columns]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = [size.hidden]
    shapes |= {"model.norm.weight": [size.hidden], "lm_head.weight": [size.vocab, size.hidden]}
    header, end = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def write_model(folder: Path, size: ModelSize, recipe: str, target: Target) -> Path:
    """An artifact for GPUs of such a checkpoint; `recipe` "" for bf16. Raises DiagnosticError."""
    imported = import_model(write_checkpoint(folder / "checkpoint", size))
    passes = default_pipeline(target, "bf16", (recipe,) if recipe else ())
    roles = {name: spec.role for name, spec in imported.weights.items()}
    PassManager(passes, context=PassContext(options={"roles": roles})).run(imported.module)
    architectures = gpu_architectures(target)
    lowered = lower_grid_step(imported.module.function("step"), grid_options(target))
    code = compile_gpu_step(lowered, architectures, ObjectCache())
    out, weights = folder / "model.stratum", lowered.file
    imported.checkpoint.close()
    with ArtifactWriter(out) as writer:
        for name, content in code.files().items():
            writer.add(name, content)
        place = writer.directory / "weights" / "weights.bin"
        place.parent.mkdir()
        end = max(piece.offset + piece.nbytes for piece in weights.pieces)
        with open(place, "wb") as file:
            file.truncate(end)
            file.seek(end - len(lowered.tables))
            file.write(lowered.tables)
        nbytes = os.path.getsize(place)
        digest = hashlib.sha256(place.read_bytes()).hexdigest() if nbytes < FULL_HASH_BELOW_BYTES else "0" * 64
        writer.files["weights/weights.bin"] = FileRecord(nbytes, digest)
        writer.finish(
            {
                "stratum_version": "", "model": model_facts(imported), "dtype": "bf16", "recipe": recipe,
                "target": {"name": target.name, "triple": TRIPLE, "cpu": architectures[0], "features": []},
                "pipeline": print_pipeline(passes), **code.entries(),
                "weights": {
                    "file": "weights/weights.bin", "bytes": nbytes, "bits_per_weight": 0.0, "formats": [],
                    "tensors": [t.manifest_entry() for t in weights.tensors],
                    "pieces": [p.manifest_entry() for p in weights.pieces],
                },
            }
        )  # fmt: skip
    return out


def decode_rows(
    name: str, path: Path, device_of: Callable[[], CudaDevice], bandwidth: float, *, steps: int = STEPS
) -> list[Row]:
    """A decode step of one sequence: the share of the bandwidth of a copy that its weights take, and the share of its
    time in which no kernel runs (their own times are those of events, launched one by one)."""
    with CudaSession(path, device=device_of(), max_context=CONTEXT + WARM_STEPS + steps + 1) as session:
        session.step([1] * CONTEXT, range(CONTEXT), [0] * CONTEXT, [CONTEXT - 1])
        times, at = [], CONTEXT
        for _ in range(WARM_STEPS + steps):
            started = time.perf_counter()
            session.step([1], [at], [0], [0])
            times.append(time.perf_counter() - started)
            at += 1
        with session.profile() as profile:
            session.step([1], [at], [0], [0])
        seconds = median(times[WARM_STEPS:])
        kernels = sum(float((one.cycles[:, 0, 1] - one.cycles[:, 0, 0]).sum()) for one in profile.steps) / 1e9
        nbytes = sum(piece.bytes for piece in session.manifest.weights.pieces if piece.kind != "rows")
        replayed = session.executor.replayed
    share = nbytes / seconds / bandwidth
    said = f"{len(profile.steps[0].cycles)} kernels, {'one graph' if replayed else 'NO GRAPH'}"
    return [
        Row(name, seconds, share, 0.8, "bandwidth of a copy", nbytes=nbytes, said=said),
        Row(
            f"{name}_launching",
            seconds,
            max(0.0, 1 - kernels / seconds),
            0.03,
            "of the step without a kernel",
            most=True,
        ),
    ]


def gpu_target(architecture: str) -> Target:
    """What is built for a GPU of an architecture."""
    from stratum.device_choice import GPU_TARGET, GPU_TARGETS

    return hw_targets.load(GPU_TARGETS.get(architecture, GPU_TARGET))


def size_of(text: str) -> ModelSize:
    """From JSON, as a child gets it."""
    return ModelSize(**json.loads(text))


def text_of(size: ModelSize) -> str:
    return json.dumps(asdict(size))
