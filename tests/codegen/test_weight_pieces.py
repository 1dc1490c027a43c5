"""Pieces of the weights file: kinds, order, experts on pages of their own, and the bytes that a bundle stores."""

from __future__ import annotations

import io

import numpy as np
import pytest

from codegen.build_pipeline import default_pipeline
from codegen.compile_step import LoweredStep, lower_step
from codegen.weights import PAGE_BYTES, load_stored, stored_pieces, write_weights
from passes.pass_manager import PassManager
from passes.pipelines import cpu_pipeline
from tests.codegen.harness import host_target
from tests.codegen.models import Model, Shape, build_model

EXPERTS = Shape(layers=2, experts=5, hidden=64, ffn=48)


def lowered(shape: Shape, recipe: tuple[str, ...] = ()) -> tuple[Model, LoweredStep]:
    model = build_model(shape)
    passes = cpu_pipeline("f32", "f32", "f32", recipe=recipe) if recipe else default_pipeline(host_target(), "f32")
    PassManager(passes).run(model.module)
    return model, lower_step(model.step, host_target().llvm_features)


@pytest.mark.parametrize("recipe", [(), ("w4a8-g32",)])
def test_a_bundle_stores_expert_after_expert(recipe: tuple[str, ...]) -> None:
    model, step = lowered(EXPERTS, recipe)
    file = io.BytesIO()
    tensors, total = write_weights(step.weight_roots, model, file, bundles=step.file.stacks)
    data = file.getvalue()
    assert len(data) == total == step.weights_bytes and tuple(tensors) == step.stored
    stacks = [t for t in tensors if t.stride]
    assert len(stacks) == 4  # gate and up, down, of two layers
    for tensor, (_, value) in zip(tensors, step.weight_roots, strict=True):
        alone = b"".join(bytes(piece) for piece in stored_pieces(value, model))
        count = tensor.shape[0] if tensor.stride else 1
        size = tensor.nbytes // count
        for matrix in range(count):
            start = tensor.offset + matrix * tensor.stride
            assert start % PAGE_BYTES == 0
            assert data[start : start + size] == alone[matrix * size : (matrix + 1) * size]
        flat = load_stored(data, tensor)
        assert flat.shape == tensor.shape
    first, second = stacks[:2]
    assert second.offset == first.offset + -(-first.nbytes // 5 // PAGE_BYTES) * PAGE_BYTES
    assert first.stride == second.stride and first.extent == first.nbytes // 5 + 4 * first.stride


def test_pieces_cover_the_file_in_its_order() -> None:
    _, step = lowered(EXPERTS)
    pieces = step.file.pieces
    assert [piece.kind for piece in pieces] == ["rows", "dense", "experts", "dense", "experts", "dense"]
    ends = np.cumsum([piece.nbytes for piece in pieces]).tolist()
    assert [piece.offset for piece in pieces] == [0, *ends[:-1]] and ends[-1] == step.weights_bytes
    assert pieces[0].unit == 64 * 4 and pieces[0].origin == "embed"
    assert pieces[2].nbytes == 5 * pieces[2].unit and "experts" in pieces[2].origin
    for tensor in step.stored:
        piece = pieces[step.file.piece_of[tensor.name]]
        assert piece.offset <= tensor.offset and tensor.offset + tensor.extent <= piece.offset + piece.nbytes


def test_large_matrices_end_their_piece() -> None:
    _, step = lowered(Shape(layers=1, hidden=512, ffn=1024, q_heads=8, kv_heads=8, dim=64, vocab=600))
    origins = [piece.origin for piece in step.file.pieces]
    assert len(origins) == 6 and origins[0] == "embed" and origins[-1] == "lm_head"
    assert all(piece.nbytes >= 1 << 20 for piece in step.file.pieces)


def test_kernels_step_from_expert_to_expert_by_the_stride() -> None:
    """The same stack with and without others between its matrices is two kernels."""
    _, step = lowered(EXPERTS)
    names = [kernel.sym_name for kernel in step.kernels if kernel.sym_name.startswith("experts")]
    assert len(names) == 4  # gate and up, down, for two programs
