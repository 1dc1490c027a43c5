"""Why a pattern did not apply: the reason is told for every near miss of the text tests, and for some more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ir
from passes import PassManager
from stratum.opt_driver import pipeline_of

FOLDER = Path(__file__).parent.parent / "text" / "passes"


def function_text(file: str, name: str) -> tuple[str, str]:
    """(pipeline, text of one function) of a text test."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    found = re.search(rf"^func @{name}\(.*?^}}$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{file} has no function @{name}"
    return pipeline_of(text) or "", found[0]


def reasons(pipeline: str, text: str) -> list[str]:
    report = PassManager(pipeline).run(ir.parse(text))
    return [r.reason for record in report.records for r in record.refusals]


@pytest.mark.parametrize(
    ("file", "name", "reason"),
    [
        ("canonicalize.ir", "keep_cast_that_rounds", "the inner cast from f32 to bf16 rounds"),
        ("canonicalize.ir", "keep_cast_between_halves", "the inner cast from f16 to bf16 rounds"),
        ("canonicalize.ir", "slice_across_operands", "elements 3 .. 4 cut through an operand of the concat"),
        ("fuse_attention.ir", "scores_with_two_readers", "the scores have other readers"),
        ("fuse_attention.ir", "two_caches", "keys and values are read from different caches or slots"),
        ("fuse_attention.ir", "append_in_between", "a cache is written between the reads of keys and values"),
        ("fuse_qkv.ir", "different_activations", "the projections read different activations"),
        ("fuse_qkv.ir", "computed_weight", "a weight is computed from step inputs"),
        ("fuse_gate_up.ir", "different_activations", "gate and up read different activations"),
        ("fuse_gate_up.ir", "gate_with_two_readers", "a projection has other readers"),
        ("fuse_gate_up.ir", "computed_weight", "a weight is computed from step inputs"),
        ("fuse_gate_up.ir", "bias_on_one_side", "only one of gate and up has a bias"),
        ("fuse_norm_gemm.ir", "norm_with_two_readers", "norm.rms has 2 readers"),
        ("fuse_norm_gemm.ir", "cast_with_two_readers", "tensor.cast has 2 readers"),
        ("fuse_norm_gemm.ir", "grouped", "rows are gathered: the norm would be computed for every expert of a token"),
        ("fuse_epilogue.ir", "two_readers", "its result has 2 readers"),
        ("fuse_epilogue.ir", "nothing_after_a_cast", "tensor.silu follows a cast, which ends an epilogue"),
        (
            "fuse_epilogue.ir",
            "broadcast_of_the_product",
            "tensor.add of tensor<2 x 4 x f32> and tensor<3 x 2 x 4 x f32> is neither a bias nor a residual",
        ),
        ("fuse_rope_append.ir", "keys_first", "the queries do not begin at column 0 of the joint projection"),
        ("fuse_rope_append.ir", "one_clip", "queries, keys and values are clipped differently"),
        ("fuse_rope_append.ir", "keys_with_two_readers", "attn.rope of the keys has 2 readers"),
        ("fuse_rope_append.ir", "queries_read_early", "the rotated queries are read before the append"),
        ("fuse_elementwise.ir", "no_place", "tensor.add needs what is computed after a reader of the group"),
        ("choose_layouts.ir", "computed_weight", "the weight is computed from step inputs"),
    ],
)
def test_near_misses_of_the_text_tests(file, name, reason):
    assert reason in reasons(*function_text(file, name))


_QUERIES = "tensor<tokens x 4 x 8 x f32>"
_CACHE = "kv<2 x 8 x f32>"
CHANGES: list[tuple[str, str, dict[str, str], str]] = [
    (
        "fuse_attention.ir",
        "one_pass",
        {"attn.combine %b": "attn.combine %a"},
        "the probabilities are not made by attn.softmax",
    ),
    (
        "fuse_attention.ir",
        "one_pass",
        {"attn.softmax %a": "attn.softmax %z", "(%q: ": "(%z: tensor<tokens x 2 x ctx x f32>, %q: "},
        "the softmax is not over attn.scores",
    ),
    (
        "fuse_attention.ir",
        "one_pass",
        {
            "x 2 x 8 x f32> {": "x 2 x 8 x f32>, tensor<tokens x 2 x ctx x f32>) {",
            "-> tensor<tokens x 2 x 8 x f32>, ": "-> (tensor<tokens x 2 x 8 x f32>, ",
            "return %o : tensor<tokens x 2 x 8 x f32>": (
                "return %o, %b : tensor<tokens x 2 x 8 x f32>, tensor<tokens x 2 x ctx x f32>"
            ),
        },
        "the probabilities have other readers",
    ),
    (
        "fuse_qkv.ir",
        "three_products",
        {
            "attn.scores %q3, %d": "attn.scores %q3, %e",
            "%c = kv.state": f"%e = kv.state {{symbol = @layers.1}} : () -> {_CACHE}\n  %c = kv.state",
        },
        "no queries read the new cache",
    ),
    (
        "fuse_qkv.ir",
        "three_products",
        {
            "%v = gemm.matmul %x, %wv : (tensor<tokens x 8 x f32>, tensor<16 x 8 x f32>)": (
                "%v = tensor.swiglu %q : (tensor<tokens x 32 x f32>)"
            )
        },
        "queries, keys and values are not all made by gemm.matmul",
    ),
    (
        "fuse_qkv.ir",
        "three_products",
        {
            "{symbol = @v} : () -> tensor<16 x 8 x f32>": "{symbol = @v} : () -> tensor<16 x 8 x bf16>",
            "%x, %wv : (tensor<tokens x 8 x f32>, tensor<16 x 8 x f32>": (
                "%x, %wv : (tensor<tokens x 8 x f32>, tensor<16 x 8 x bf16>"
            ),
        },
        "the weights have the elements f32, f32, bf16",
    ),
    (
        "fuse_gate_up.ir",
        "dense",
        {
            "{symbol = @up} : () -> tensor<4 x 8 x f32>": "{symbol = @up} : () -> tensor<4 x 8 x bf16>",
            "%x, %wu : (tensor<tokens x 8 x f32>, tensor<4 x 8 x f32>": (
                "%x, %wu : (tensor<tokens x 8 x f32>, tensor<4 x 8 x bf16>"
            ),
        },
        "the weights have the types tensor<4 x 8 x f32> and tensor<4 x 8 x bf16>",
    ),
    ("fuse_gate_up.ir", "dense", {"tensor.mul %s, %u": "tensor.mul %s, %s"}, "the activated gate has other readers"),
    (
        "fuse_rope_append.ir",
        "rope_append",
        {"attn.rope %k1, %cos, %sin": "attn.rope %k1, %sin, %cos"},
        "queries and keys are rotated by different tables",
    ),
    (
        "fuse_rope_append.ir",
        "rope_append",
        {"{axis = 1, start = 48": "{axis = 1, start = 40"},
        "the values do not begin at column 48 of the joint projection",
    ),
    (
        "fuse_rope_append.ir",
        "rope_append",
        {"%q3 = attn.rope %q1": f"%q2 = tensor.silu %q1 : ({_QUERIES}) -> {_QUERIES}\n  %q3 = attn.rope %q2"},
        "expected a slice of the joint projection, reshaped to heads; found tensor.silu",
    ),
    (
        "fuse_rope_append.ir",
        "head_norms",
        {"attn.rope %k2": "attn.rope %k1"},
        "only one of queries and keys is normalised",
    ),
    (
        "set_precision.ir",
        "products",
        {
            "%a = gemm.matmul %x, %w : (tensor<tokens x 8 x f32>, tensor<4 x 8 x f32>) -> tensor<tokens x 4 x f32>": (
                '%a = tensor.fused %x, %w {kind = "gemm"} ({ ^(%p: tensor<tokens x 8 x f32>, %q: tensor<4 x 8 x f32>): '
                "%y = gemm.matmul %p, %q : (tensor<tokens x 8 x f32>, tensor<4 x 8 x f32>) -> tensor<tokens x 4 x f32> "
                "tensor.yield %y : (tensor<tokens x 4 x f32>) -> () "
                "}) : (tensor<tokens x 8 x f32>, tensor<4 x 8 x f32>) -> tensor<tokens x 4 x f32>"
            )
        },
        "it is inside of a fused region: set the precision before fusing",
    ),
]


@pytest.mark.parametrize(("file", "name", "changes", "reason"), CHANGES, ids=[c[3] for c in CHANGES])
def test_near_misses_by_a_small_change(file, name, changes, reason):
    pipeline, text = function_text(file, name)
    assert reason not in reasons(pipeline, text)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    assert reason in reasons(pipeline, text)
