"""The pieces of a weights file: what is read from disk at once when the whole does not fit into memory.

Takes the weights of a step and where they lie; gives pieces that cover the file in its order, each of one kind:

    rows      a table of which a token reads one row (the embedding)
    experts   the experts of one layer: every matrix of expert 0, then of expert 1, ...; experts begin on a page.
              Where they differ in format, those of one format after another: the classes of the piece
    stand_ins the same experts in fewer bits, for those that are missing
    dense     what every token reads: a large matrix and the small tensors before it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from codegen.weights import PAGE_BYTES, StoredTensor, matrix_extent
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.ops.builtin import FuncOp
from ir.ops.fused import FusedOp
from ir.ops.moe import DispatchOp, GroupedGemmOp
from ir.ops.tensor import EmbedOp
from ir.types import TensorType
from passes.fuse.forms import FormError, describe_gemm

DENSE_BYTES = 1 << 20  # a dense piece ends behind the tensor that makes it this large


@dataclass(frozen=True)
class ExpertBundle:
    """The stacks [E, n, k] of one layer's experts, in the order they are read, and the router's choice, i32.

    `stand_in`: whether these are copies in fewer bits, which stand in for missing ones. `members`: the numbers of the
    experts, where these are some of the layer's only.
    """

    weights: tuple[Value, ...]
    ids: Value
    stand_in: bool = False
    members: tuple[int, ...] = ()

    @property
    def stride(self) -> int:
        """Bytes from one expert to the next."""
        return sum(matrix_extent(value) for value in self.weights)


@dataclass(frozen=True)
class WeightPiece:
    """Bytes [offset, offset + nbytes) of the file, whole pages. `unit` is the bytes of a row or of an expert, or 0.

    `classes`: where experts differ in size, the bytes of one and the numbers of the experts, for each format in the
    order of the file; `unit` is then that of the largest.
    """

    kind: str
    offset: int
    nbytes: int
    origin: str
    unit: int = 0
    classes: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def manifest_entry(self) -> dict[str, object]:
        """The form in `manifest.json`."""
        entry: dict[str, object] = {
            "kind": self.kind, "offset": self.offset, "bytes": self.nbytes, "origin": self.origin, "unit": self.unit,
        }  # fmt: skip
        classes = [{"unit": unit, "experts": list(experts)} for unit, experts in self.classes]
        return entry | ({"classes": classes} if classes else {})


def expert_bundles(step: FuncOp, weights: Mapping[Value, str]) -> tuple[ExpertBundle, ...]:
    """The layers' experts, and their stand-ins: products of tokens grouped by the same dispatch.

    Raises DiagnosticError for stand-ins that are not smaller than what they stand in for.
    """
    found: dict[tuple[Value, int], ExpertBundle] = {}  # by offsets and first group
    for op in step.block.ops:
        if not isinstance(op, GroupedGemmOp) and not (isinstance(op, FusedOp) and op.kind == "gemm"):
            continue
        try:
            form = describe_gemm(op)
        except FormError:
            continue  # its emitter says what is wrong with it
        if form.offsets is None:
            continue
        offsets, stack = op.operands[form.offsets], op.operands[form.weight]
        dispatch = offsets.defining_op()
        product = form.product
        assert isinstance(product, GroupedGemmOp)  # others have no offsets
        first, copies = product.first, product.stand_ins
        if copies and len(stack.users) > 1:
            raise _too_large(op)
        if isinstance(dispatch, DispatchOp) and stack in weights and len(stack.users) == 1:
            known = found.get((offsets, first))
            stacks = (*(known.weights if known is not None else ()), stack)
            found[offsets, first] = ExpertBundle(stacks, dispatch.ids, copies, _members(product, dispatch))
            whole = [bundle for (at, _), bundle in found.items() if at is offsets and not bundle.stand_in]
            if copies and (not whole or found[offsets, first].stride >= min(bundle.stride for bundle in whole)):
                raise _too_large(op)
    return tuple(found.values())


def _members(product: GroupedGemmOp, dispatch: DispatchOp) -> tuple[int, ...]:
    """The numbers of the experts of a product by some of them."""
    if not product.of:
        return ()
    shape = product.w.type.shape
    return tuple(dispatch.places.index(product.first + i) for i in range(shape[0]))


def in_file_order(roots: Iterable[tuple[str, Value]], bundles: Sequence[ExpertBundle]) -> tuple[tuple[str, Value], ...]:
    """The weights as they are read, all experts of a layer together, at the place of the first."""
    layer_of = {value: bundle.ids for bundle in bundles if bundle.members for value in bundle.weights}
    together: dict[Value, list[tuple[str, Value]]] = {}
    for name, value in roots:
        together.setdefault(layer_of.get(value, value), []).append((name, value))
    return tuple(root for found in together.values() for root in found)


def _too_large(op: Op) -> DiagnosticError:
    hint = Diagnostic("hint", "choose a recipe of fewer bits for the stand-ins")
    message = "the stand-ins of these experts are no smaller than the experts themselves"
    return DiagnosticError.of(Diagnostic("error", message, op.location, notes=(hint,)))


def row_tables(weights: Iterable[Value]) -> tuple[Value, ...]:
    """Weights of which every reader takes single rows. What makes another weight of it when the file is written (the
    head of a tied model has its own layout) is no reader."""
    stored = dict.fromkeys(weights)
    found = []
    for value in stored:
        uses = [(op, at) for op, at in value.uses if not any(result in stored for result in op.results)]
        if uses and all(_takes_rows(value, op, at) for op, at in uses):
            found.append(value)
    return tuple(found)


def _takes_rows(value: Value, op: Op, index: int) -> bool:
    if not isinstance(value.type, TensorType) or value.type.layout is not None:
        return False
    if isinstance(op, EmbedOp):
        return op.operands[index] is op.table and op.ids is not value
    if not isinstance(op, FusedOp):
        return False
    inner = op.region.block.arguments[index]
    return bool(inner.uses) and all(isinstance(o, EmbedOp) and o.operands[i] is o.table for o, i in inner.uses)


def plan_pieces(
    roots: Sequence[tuple[str, Value]], stored: Sequence[StoredTensor], bundles: Sequence[ExpertBundle]
) -> tuple[tuple[WeightPiece, ...], dict[str, int]]:
    """(the pieces in file order, the piece of each weight by name)."""
    names = {value: name for name, value in roots}
    tensors = {tensor.name: tensor for tensor in stored}
    bundle_of = {names[value]: bundle for bundle in bundles for value in bundle.weights}
    tables = {names[value] for value in row_tables(names)}
    pieces: list[WeightPiece] = []
    piece_of: dict[str, int] = {}
    run: list[StoredTensor] = []

    def end_run() -> None:
        if run:
            piece_of.update((tensor.name, len(pieces)) for tensor in run)
            first, last = run[0].offset, _page_end(run[-1])
            pieces.append(WeightPiece("dense", first, last - first, run[-1].name))
            run.clear()

    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.name in piece_of:
            continue
        if tensor.name not in bundle_of and tensor.name not in tables:
            run.append(tensor)
            if sum(t.nbytes for t in run) >= DENSE_BYTES:
                end_run()
            continue
        end_run()
        if tensor.name in tables:
            piece_of[tensor.name] = len(pieces)
            nbytes = _page_end(tensor) - tensor.offset
            pieces.append(WeightPiece("rows", tensor.offset, nbytes, tensor.name, tensor.nbytes // tensor.shape[0]))
            continue
        bundle = bundle_of[tensor.name]
        origin = tensor.name.rsplit(".", 1)[0]
        if bundle.members:
            parts = [b for b in bundles if b.ids is bundle.ids and b.members]
            piece_of.update((names[value], len(pieces)) for part in parts for value in part.weights)
            pieces.append(_of_classes(parts, tensor.offset, origin))
            continue
        piece_of.update((names[value], len(pieces)) for value in bundle.weights)
        nbytes = bundle.stride * tensor.shape[0]
        if bundle.stand_in and pieces and pieces[-1].kind == "experts":
            origin = f"{pieces[-1].origin}.stand_ins"
        kind = "stand_ins" if bundle.stand_in else "experts"
        pieces.append(WeightPiece(kind, tensor.offset, nbytes, origin, bundle.stride))
    end_run()
    return tuple(pieces), piece_of


def _of_classes(bundles: Sequence[ExpertBundle], offset: int, origin: str) -> WeightPiece:
    """The piece of a layer whose experts differ in format; the bundles are in the order of the file."""
    classes = tuple((bundle.stride, bundle.members) for bundle in bundles)
    nbytes = sum(unit * len(experts) for unit, experts in classes)
    return WeightPiece("experts", offset, nbytes, origin, max(unit for unit, _ in classes), classes)


def _page_end(tensor: StoredTensor) -> int:
    return tensor.offset + -(-tensor.nbytes // PAGE_BYTES) * PAGE_BYTES
