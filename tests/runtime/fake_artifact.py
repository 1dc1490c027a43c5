"""A complete artifact without the compiler: hand-written step functions, made to show what reached native code.

The functions follow the step's calling convention and the real thread team. Each token writes its id and position into
the KV cache at its own (slot, position); after a barrier the logits of a row are a hash of everything its sequence has
in the cache up to its position, and of the first weight. So logits are wrong whenever an id, a position, a slot, a row,
the cache or a weight is: `expected_logits` says in plain Python what they must be.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from codegen.llvm import team
from runtime import host
from runtime.manifest_reader import manifest_digest

VOCAB = 50
LAYERS = 2
BYTES_PER_POSITION = 2 * 1 * 2 * 2 * 4  # two layers, one head, head_dim 2, keys and values, f32
DECODE_TOKENS = 4
PREFILL_TOKENS = 16
MAX_CONTEXT = 200
FIRST_WEIGHT = 0x1234567
WEIGHT_BYTES = 8192
DEAD_WORKER_ID = 47  # a step whose first token is this: thread 1 never arrives at the barrier
STUCK_WORKER_ID = 48  # a step whose first token is this: thread 1 sleeps for three seconds
_MASK = (1 << 64) - 1

_PRELUDE = """
declare i64 @llvm.readcyclecounter()
declare i32 @sleep(i32)

define internal void @mark(ptr %profile, i64 %word) {
  %off = icmp eq ptr %profile, null
  br i1 %off, label %done, label %write
write:
  %now = call i64 @llvm.readcyclecounter()
  %at = getelementptr i64, ptr %profile, i64 %word
  store i64 %now, ptr %at
  br label %done
done:
  ret void
}
"""

_STEP = """
define i64 @stratum_step_{name}(ptr %args, i64 %tid) {{
entry:
  {loads}
  %layer1 = mul i64 %ctx, %slots_count
  %arena_at = getelementptr i64, ptr %arena, i64 %tid
  store i64 %tokens, ptr %arena_at
  %two_tid = shl i64 %tid, 1
  %p00 = add i64 %two_tid, 0
  %p01 = add i64 %two_tid, 1
  %per_launch = shl i64 %threads, 1
  %p10 = add i64 %per_launch, %p00
  %p11 = add i64 %per_launch, %p01
  %first_id = load i32, ptr %ids
  %is_worker = icmp eq i64 %tid, 1
  %dead_id = icmp eq i32 %first_id, {dead}
  %dead = and i1 %dead_id, %is_worker
  br i1 %dead, label %die, label %maybe_stuck
die:
  ret i64 0
maybe_stuck:
  %stuck_id = icmp eq i32 %first_id, {stuck}
  %stuck = and i1 %stuck_id, %is_worker
  br i1 %stuck, label %sleep, label %store_start
sleep:
  %unslept = call i32 @sleep(i32 3)
  br label %store_start
store_start:
  call void @mark(ptr %profile, i64 %p00)
  br label %store
store:
  %t = phi i64 [ %tid, %store_start ], [ %t_next, %store_body ]
  %t_in = icmp slt i64 %t, %tokens
  br i1 %t_in, label %store_body, label %store_end
store_body:
  %id_at = getelementptr i32, ptr %ids, i64 %t
  %id = load i32, ptr %id_at
  %pos_at = getelementptr i32, ptr %positions, i64 %t
  %pos = load i32, ptr %pos_at
  %slot_at = getelementptr i32, ptr %slots, i64 %t
  %slot = load i32, ptr %slot_at
  %pos64 = zext i32 %pos to i64
  %slot64 = zext i32 %slot to i64
  %base = mul i64 %slot64, %ctx
  %cell = add i64 %base, %pos64
  %cell_bytes = mul i64 %cell, 16
  %kv0 = getelementptr i8, ptr %kv, i64 %cell_bytes
  %id64 = zext i32 %id to i64
  %id1 = add i64 %id64, 1
  store i64 %id1, ptr %kv0
  %cell1 = add i64 %cell, %layer1
  %cell1_bytes = mul i64 %cell1, 16
  %kv1 = getelementptr i8, ptr %kv, i64 %cell1_bytes
  %pos1 = add i64 %pos64, 1
  store i64 %pos1, ptr %kv1
  %t_next = add i64 %t, %threads
  br label %store
store_end:
  call void @mark(ptr %profile, i64 %p01)
  call void @stratum_barrier(ptr %team, i64 %threads)
  call void @mark(ptr %profile, i64 %p10)
  br label %row
row:
  %r = phi i64 [ %tid, %store_end ], [ %r_next, %row_done ]
  %r_in = icmp slt i64 %r, %rows_count
  br i1 %r_in, label %row_body, label %row_end
row_body:
  %row_at = getelementptr i32, ptr %rows, i64 %r
  %row_token = load i32, ptr %row_at
  %row64 = zext i32 %row_token to i64
  %rpos_at = getelementptr i32, ptr %positions, i64 %row64
  %rpos = load i32, ptr %rpos_at
  %rpos64 = zext i32 %rpos to i64
  %rslot_at = getelementptr i32, ptr %slots, i64 %row64
  %rslot = load i32, ptr %rslot_at
  %rslot64 = zext i32 %rslot to i64
  %rbase = mul i64 %rslot64, %ctx
  %seed = load i64, ptr %weights
  br label %hash
hash:
  %p = phi i64 [ 0, %row_body ], [ %p_next, %hash ]
  %h = phi i64 [ %seed, %row_body ], [ %h_next, %hash ]
  %hcell = add i64 %rbase, %p
  %hbytes = mul i64 %hcell, 16
  %hkv0 = getelementptr i8, ptr %kv, i64 %hbytes
  %a = load i64, ptr %hkv0
  %hcell1 = add i64 %hcell, %layer1
  %hbytes1 = mul i64 %hcell1, 16
  %hkv1 = getelementptr i8, ptr %kv, i64 %hbytes1
  %b = load i64, ptr %hkv1
  %h31 = mul i64 %h, 6364136223846793005
  %ha = add i64 %h31, %a
  %bb = mul i64 %b, 1442695040888963407
  %h_next = add i64 %ha, %bb
  %p_next = add i64 %p, 1
  %more = icmp sle i64 %p_next, %rpos64
  br i1 %more, label %hash, label %logits_start
logits_start:
  %out = mul i64 %r, {vocab}
  br label %logit
logit:
  %v = phi i64 [ 0, %logits_start ], [ %v_next, %logit ]
  %odd0 = shl i64 %v, 1
  %odd = or i64 %odd0, 1
  %scaled = mul i64 %h_next, %odd
  %bits = lshr i64 %scaled, 44
  %number = uitofp i64 %bits to float
  %value = fmul float %number, 0x3EE0000000000000
  %at = add i64 %out, %v
  %logit_at = getelementptr float, ptr %logits, i64 %at
  store float %value, ptr %logit_at
  %v_next = add i64 %v, 1
  %v_more = icmp slt i64 %v_next, {vocab}
  br i1 %v_more, label %logit, label %row_done
row_done:
  %r_next = add i64 %r, %threads
  br label %row
row_end:
  call void @mark(ptr %profile, i64 %p11)
  call void @stratum_barrier(ptr %team, i64 %threads)
  ret i64 0
}}
"""
_WORDS = (
    ("ids", "ptr"), ("positions", "ptr"), ("slots", "ptr"), ("rows", "ptr"), ("logits", "ptr"), ("weights", "ptr"),
    ("arena", "ptr"), ("kv", "ptr"), ("tokens", "i64"), ("rows_count", "i64"), ("threads", "i64"), ("team", "ptr"),
    ("profile", "ptr"), ("ctx", "i64"), ("slots_count", "i64"),
)  # fmt: skip


def sequence_logits(ids: Sequence[int]) -> np.ndarray:
    """Float32 [VOCAB]: the logits after a sequence of token ids at positions 0, 1, ..."""
    state = FIRST_WEIGHT
    for position, token in enumerate(ids):
        state = (state * 6364136223846793005 + token + 1 + (position + 1) * 1442695040888963407) & _MASK
    # 20 bits, then a scale of 2^-17: numbers in 0..8 that float32 holds exactly
    bits = [((state * (2 * v + 1)) & _MASK) >> 44 for v in range(VOCAB)]
    return np.array(bits, dtype=np.float32) * np.float32(2**-17)


def greedy_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that greedy generation must give."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(sequence_logits(ids))))
    return ids[len(prompt) :]


@functools.cache
def fake_object(wait_limit_s: int = 60, only_team: bool = False) -> bytes:
    """The object code, for the machine the tests run on."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic", codemodel="small", opt=1)
    with patch.object(team, "BARRIER_SECONDS", wait_limit_s):
        text = team.team_text(llvm.get_default_triple()) + _PRELUDE
    loads = "\n  ".join(
        f"%{name}_at = getelementptr i64, ptr %args, i64 {word}\n  %{name} = load {kind}, ptr %{name}_at"
        for word, (name, kind) in enumerate(_WORDS)
    ).replace("%rows_at", "%rows_word").replace("%arena_at", "%arena_word")  # fmt: skip
    for name in () if only_team else ("decode", "prefill"):
        text += _STEP.format(name=name, loads=loads, vocab=VOCAB, dead=DEAD_WORKER_ID, stuck=STUCK_WORKER_ID)
    module = llvm.parse_assembly(text)
    module.verify()
    return machine.emit_object(module)


def default_files() -> dict[str, bytes]:
    """Path -> content of everything but the manifest."""
    weights = FIRST_WEIGHT.to_bytes(8, "little") + bytes(range(256)) * (WEIGHT_BYTES // 256)
    return {
        "graph.ir": b"func @step() {}\n",
        "plan.ir": b"plan\n",
        "tile.ir": b"tile\n",
        "tokenizer.json": b'{"model": {}}',
        "config.json": b"{}",
        "code/step.host.o": fake_object(),
        "weights/weights.bin": weights[:WEIGHT_BYTES],
    }


def _program(name: str, max_tokens: int) -> dict:
    launches = [
        {"name": "append", "origin": "layers.0.self_attn", "bytes": 1000, "flops_per_token": 0},
        {"name": "gemm", "origin": "layers.1.mlp", "bytes": 2000, "flops_per_token": 500},
    ]
    return {"symbol": f"stratum_step_{name}", "max_tokens": max_tokens, "arena_bytes": 4096, "launches": launches}


def default_manifest(files: dict[str, bytes]) -> dict:
    """The manifest of these files, without its own hash."""
    import llvmlite.binding as llvm

    weights = files["weights/weights.bin"]
    return {
        "format_version": 2,
        "stratum_version": "0.1.0",
        "model": {"family": "fake", "name": "fake", "vocab_size": VOCAB, "num_layers": LAYERS,
                  "max_context": MAX_CONTEXT},
        "dtype": "f32",
        "target": {"name": "host", "triple": llvm.get_default_triple(), "cpu": "generic",
                   "features": sorted(host.host_features())[:3]},
        "pipeline": "canonicalize",
        "programs": {"decode": _program("decode", DECODE_TOKENS), "prefill": _program("prefill", PREFILL_TOKENS)},
        "kv": {"layers": LAYERS, "num_kv_heads": 1, "head_dim": 2, "format": "f32",
               "bytes_per_position": BYTES_PER_POSITION, "block": 16},
        "weights": {
            "file": "weights/weights.bin",
            "bytes": len(weights),
            "tensors": [{"name": "w", "offset": 0, "bytes": len(weights), "format": "i8", "shape": [len(weights)],
                         "layout": ""}],
        },
        "files": {path: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                  for path, content in sorted(files.items())},
    }  # fmt: skip


def write_artifact(
    root: Path, *, files: dict[str, bytes] | None = None, change: Callable[[dict], None] | None = None
) -> Path:
    """Writes an artifact whose hashes are right; `change` edits the manifest before it is hashed."""
    files = default_files() if files is None else files
    manifest = default_manifest(files)
    if change is not None:
        change(manifest)
    manifest["manifest_sha256"] = manifest_digest(manifest)
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return root
