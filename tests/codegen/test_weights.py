"""Stored weights: bytes equal what the ops' references say, places are aligned, memory is bounded."""

import io
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen.constant_reader import ConstantReader
from codegen.strips import pack_strips
from codegen.weights import PAGE_BYTES, load_stored, plan_weights, stored_pieces, write_weights
from ir.attributes import SymbolRef
from ir.core import Block, Value
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, PlainFormat
from ir.ops.tensor import AddOp, CastOp, ConcatOp, ReshapeOp, SliceOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.ops.tensor_layout import LayoutOp
from ir.types import Layout, SymbolicDim, TensorType
from tests.codegen.models import WholeTensors


class Checkpoint:
    """Tensors by name, in memory; counts the rows that were read and the largest single read."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.largest = 0

    def add(self, name: str, shape: tuple[int, ...], format: PlainFormat, seed: int = 0) -> Value:
        values = np.random.default_rng([seed, len(self.tensors)]).standard_normal(shape)
        self.tensors[name] = values.astype(np.float32).astype(format.dtype)
        return ConstantOp(symbol=SymbolRef(name), result_types=[TensorType(shape, format)], origin=name).result

    def stack(self, name: str, count: int, shape: tuple[int, ...], format: PlainFormat) -> Value:
        for i in range(count):
            self.add(name.replace("*", str(i)), shape, format)
        found = TensorType((count, *shape), format)
        return ConstantStackOp(symbol=SymbolRef(name), count=count, result_types=[found]).result

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        rows = self.tensors[name][first:last] if self.tensors[name].ndim else self.tensors[name]
        self.largest = max(self.largest, rows.nbytes)
        return rows

    def weight(self, name: str) -> np.ndarray:
        """The interpreter's view of a checkpoint."""
        return self.tensors[name]


def meaning(value: Value, checkpoint: Checkpoint) -> np.ndarray:
    """The value by the ops' references."""
    op = value.defining_op()
    if isinstance(op, ConstantOp | ConstantStackOp):
        return op.interpret((), checkpoint)[0]
    return type(op).reference(*[meaning(v, checkpoint) for v in op.operands], **op.attributes)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@st.composite
def expressions(draw):
    """(checkpoint, root value): a tree of concats, slices, reshapes and casts over constants, perhaps laid out."""
    checkpoint = Checkpoint()
    formats = st.sampled_from([F32, BF16, F16])

    def leaf(shape):
        name = f"t{len(checkpoint.tensors)}"
        if len(shape) == 3 and draw(st.booleans()):
            return checkpoint.stack(f"{name}.*.weight", shape[0], shape[1:], draw(formats))
        return checkpoint.add(name, shape, draw(formats))

    def tree(shape, depth):
        kind = draw(st.sampled_from(["leaf", "cast", "concat", "slice", "reshape"])) if depth else "leaf"
        if kind == "cast":
            return CastOp(tree(shape, depth - 1), to=draw(formats)).result
        if kind == "concat":
            axis = draw(st.integers(0, len(shape) - 1))
            if shape[axis] >= 2:
                cut = draw(st.integers(1, shape[axis] - 1))
                sizes = (cut, shape[axis] - cut)
                parts = [tree((*shape[:axis], size, *shape[axis + 1 :]), depth - 1) for size in sizes]
                to = draw(formats)
                return ConcatOp(*[CastOp(part, to=to).result for part in parts], axis=axis).result
        if kind == "slice":
            axis = draw(st.integers(0, len(shape) - 1))
            before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
            larger = (*shape[:axis], before + shape[axis] + after, *shape[axis + 1 :])
            return SliceOp(tree(larger, depth - 1), axis=axis, start=before, size=shape[axis]).result
        if kind == "reshape":
            count = int(np.prod(shape))
            other = draw(st.sampled_from([(count,), (1, count), (count, 1), shape[::-1], (*shape, 1)]))
            return ReshapeOp(tree(other, depth - 1), shape=shape).result
        return leaf(shape)

    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    root = tree(shape, draw(st.integers(0, 4)))
    if len(shape) >= 2 and draw(st.booleans()):
        interleave = 2 if shape[-2] % 2 == 0 else 1
        layout = Layout(draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3])), interleave)
        root = LayoutOp(root, layout=layout).result
    return checkpoint, root


@given(expressions(), st.sampled_from([1, 16, 64, 1 << 20]))
def test_stored_bytes_mean_the_expression(expression, piece_bytes):
    checkpoint, root = expression
    ((tensor,), _) = plan_weights([("w", root)])
    data = b"".join(bytes(piece) for piece in stored_pieces(root, checkpoint, piece_bytes=piece_bytes))
    assert len(data) == tensor.nbytes
    assert same_bits(load_stored(data, tensor), meaning(root, checkpoint))


@given(expressions(), st.data())
def test_any_box_of_an_expression(expression, data):
    checkpoint, root = expression
    reader = ConstantReader(root, checkpoint)
    full = meaning(root, checkpoint)
    box = []
    for size in full.shape:
        low = data.draw(st.integers(0, size))
        box.append((low, data.draw(st.integers(low, size))))
    assert same_bits(np.ascontiguousarray(reader.read(tuple(box))), full[tuple(slice(a, b) for a, b in box)].copy())


def test_widened_joined_and_narrowed_weight_is_not_converted():
    checkpoint = Checkpoint()
    parts = [CastOp(checkpoint.add(f"w{i}", (4, 6), BF16), to=F32).result for i in range(3)]
    root = CastOp(ConcatOp(*parts, axis=0).result, to=BF16).result
    reader = ConstantReader(root, checkpoint)
    assert all(child.casts == () for child in reader.children)
    assert same_bits(reader.read_all(), np.concatenate(list(checkpoint.tensors.values())))


def test_narrowing_then_widening_still_rounds():
    checkpoint = Checkpoint()
    root = CastOp(CastOp(checkpoint.add("w", (3, 5), F32), to=BF16).result, to=F32).result
    expected = checkpoint.tensors["w"].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert same_bits(ConstantReader(root, checkpoint).read_all(), expected)
    assert not np.array_equal(expected, checkpoint.tensors["w"])


def test_round_trip_through_a_narrow_format_still_rounds():
    """f16 -> bf16 -> f16 loses three bits; only a detour through f32 changes nothing."""
    checkpoint = Checkpoint()
    root = CastOp(CastOp(checkpoint.add("w", (3, 5), F16), to=BF16).result, to=F16).result
    expected = checkpoint.tensors["w"].astype(ml_dtypes.bfloat16).astype(np.float16)
    assert same_bits(ConstantReader(root, checkpoint).read_all(), expected)
    assert not np.array_equal(expected, checkpoint.tensors["w"])


def test_symbols_in_reading_order():
    checkpoint = Checkpoint()
    stack = checkpoint.stack("e.*.w", 2, (2, 3), F32)
    root = ConcatOp(stack, checkpoint.add("z", (2, 2, 3), F32), axis=1).result
    assert ConstantReader(root, checkpoint).symbols() == ["e.0.w", "e.1.w", "z"]


def test_file_is_page_aligned_in_order_with_zero_padding():
    checkpoint = Checkpoint()
    big = LayoutOp(checkpoint.add("b", (70, 50), BF16), layout=Layout(64, 2)).result
    roots = [("norm", checkpoint.add("n", (50,), F32)), ("proj", big), ("scalar", checkpoint.add("s", (), F32))]
    out = io.BytesIO()
    calls = []
    tensors, total = write_weights(roots, checkpoint, out, progress=lambda done, whole: calls.append((done, whole)))
    data = out.getvalue()
    assert len(data) == total and total % PAGE_BYTES == 0
    assert [t.offset for t in tensors] == [0, 4096, 4096 + 16384]
    assert [t.nbytes for t in tensors] == [200, 128 * 50 * 2, 4]
    covered = bytearray(data)
    for tensor, (_, value) in zip(tensors, roots, strict=True):
        assert same_bits(load_stored(data, tensor), meaning(value, checkpoint))
        covered[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
    assert not any(covered)
    assert calls[-1] == (total, total) and calls == sorted(calls)
    assert tensors[1].manifest_entry() == {
        "name": "proj",
        "offset": 4096,
        "bytes": 12800,
        "format": "bf16",
        "shape": [70, 50],
        "layout": "strips<rows=64, pack=2>",
    }


@pytest.mark.parametrize("element", [F32, BF16, F16])
@pytest.mark.parametrize("fault", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(element, fault):
    for number in (fault, np.finfo(element.dtype).max if element is not BF16 else 3e38):
        checkpoint = Checkpoint()
        weight = checkpoint.add("norm", (50,), element)
        checkpoint.tensors["norm"][7], checkpoint.tensors["norm"][9] = number, -number
        if np.isfinite(number):
            write_weights([("norm", weight)], checkpoint, io.BytesIO())
        else:
            with pytest.raises(DiagnosticError, match="norm: error: the tensor holds NaN or infinite numbers"):
                write_weights([("norm", weight)], checkpoint, io.BytesIO())


def test_stacked_experts_are_laid_out_one_by_one():
    checkpoint = Checkpoint()
    gate, up = (checkpoint.stack(f"e.*.{name}", 3, (6, 4), F32) for name in ("gate", "up"))
    layout = Layout(4, 1, 2)
    root = LayoutOp(ConcatOp(gate, up, axis=1).result, layout=layout).result
    data = b"".join(bytes(p) for p in stored_pieces(root, checkpoint))
    one = [np.concatenate([checkpoint.tensors[f"e.{e}.gate"], checkpoint.tensors[f"e.{e}.up"]]) for e in range(3)]
    assert data == b"".join(pack_strips(matrix, layout).tobytes() for matrix in one)


def test_memory_and_reads_are_bounded():
    checkpoint = Checkpoint()
    root = LayoutOp(checkpoint.add("w", (8192, 2048), BF16), layout=Layout(64, 2)).result  # 32 MiB
    tracemalloc.start()
    total = sum(len(piece) for piece in stored_pieces(root, checkpoint, piece_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 32 << 20
    assert checkpoint.largest <= 1 << 20
    assert peak < 3 << 20


def test_whole_tensor_source_reads_each_once():
    checkpoint = Checkpoint()
    root = LayoutOp(checkpoint.add("w", (64, 16), F32), layout=Layout(4)).result
    reads = []
    source = WholeTensors(lambda name: reads.append(name) or checkpoint.tensors[name])
    data = b"".join(bytes(p) for p in stored_pieces(root, source, piece_bytes=256))
    assert reads == ["w"]
    assert data == b"".join(bytes(p) for p in stored_pieces(root, checkpoint))


def test_value_that_is_no_constant_is_refused():
    checkpoint = Checkpoint()
    constant = checkpoint.add("w", (2, 2), F32)
    with pytest.raises(DiagnosticError, match=r"depends on tensor\.add, which cannot be evaluated"):
        ConstantReader(AddOp(constant, constant, origin="layers.0").result, checkpoint)
    argument = Block([TensorType((2, 2), F32)]).arguments[0]
    with pytest.raises(DiagnosticError, match="depends on a function argument"):
        ConstantReader(argument, checkpoint)


def test_symbolic_size_is_refused():
    value = ConstantOp(symbol=SymbolRef("w"), result_types=[TensorType((SymbolicDim("tokens"), 4), F32)]).result
    with pytest.raises(DiagnosticError, match="has no fixed size"):
        plan_weights([("w", value)])


@pytest.mark.parametrize("change", [lambda t: t.astype(np.float64), lambda t: t[:, :3], lambda t: t[:5]])
def test_source_that_gives_something_else_is_refused(change):
    checkpoint = Checkpoint()
    root = checkpoint.add("layers.3.w", (8, 4), F32)
    checkpoint.tensors["layers.3.w"] = change(checkpoint.tensors["layers.3.w"])
    with pytest.raises(DiagnosticError, match=r"layers\.3\.w: error: rows 0\.\.8 of the tensor came as"):
        ConstantReader(root, checkpoint).read_all()


def test_two_weights_of_one_name_are_an_error():
    checkpoint = Checkpoint()
    value = checkpoint.add("w", (2,), F32)
    with pytest.raises(ValueError, match="two weights are named 'a'"):
        plan_weights([("a", value), ("a", value)])


def test_layout_that_does_not_fit_is_refused():
    checkpoint = Checkpoint()
    value = LayoutOp(checkpoint.add("w", (4, 4), F32), layout=Layout(2)).result
    value.type = TensorType((3, 4), F32, Layout(2, 1, 2))
    with pytest.raises(DiagnosticError, match=r"\[3, 4\] cannot be laid out as strips<rows=2, pack=1, interleave=2>"):
        plan_weights([("w", value)])
