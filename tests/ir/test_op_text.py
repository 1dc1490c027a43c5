"""Every op through its text: samples survive it, and faults are reported at the line of the op."""

from __future__ import annotations

from typing import Any

import pytest

import ir
from ir.core import Block, Op, Region
from ir.diagnostics import DiagnosticError
from ir.op_def import OPS
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.types import INDEX
from tests.samples import all_faults, all_samples
from tests.samples.base import Fault, Sample


def module_of(sample: Sample | Fault, *, infer: bool) -> ModuleOp:
    """A function whose arguments are the operands of the op. Without inference its results are of type index."""
    block = Block(sample.types)
    cls = OPS[sample.op]
    if infer:
        op: Op = cls(*block.arguments, regions=sample.regions(), result_types=sample.result_types, **sample.attributes)
    else:
        defaults = {f.name: f.default for f in cls.attr_fields if not f.required}
        types = sample.result_types or [INDEX] * sum(not f.variadic for f in cls.result_fields)
        op = cls.__new__(cls)
        attributes: dict[str, Any] = {f.name: (defaults | sample.attributes)[f.name] for f in cls.attr_fields}
        Op.__init__(op, block.arguments, types, attributes, sample.regions())
    block._insert(0, op)
    if sample.op != "func.return":
        block._insert(1, ReturnOp(*op.results))
    return ModuleOp.create(FuncOp(sym_name="sample", regions=[Region(block)]))


# Faults that the parser or the general rules of the verifier name before the op is asked.
SAID_EARLIER = {
    "to end in tensor.yield, got nothing": "is empty; expected a terminator",
    "one region of one block, got 0 regions": "expected 1 regions (body), got 0",
    "positive rows": "expected rows of strips to be a number of 1 or more",
    "expected numbers that i64 holds": "expected an integer of at most 64 bits",
    "expected its body to yield (), got no tile.yield": "expected to be inside of func.func, is inside of tile.for",
    "expected two bodies, got 1": "expected 2 regions (then, otherwise), got 1",
}


REGION_ENDS = ("tensor.yield", "tile.yield")  # other samples hold them
IN_FUNCTIONS = [s for s in all_samples() if s.op not in REGION_ENDS]


@pytest.mark.parametrize("sample", IN_FUNCTIONS, ids=str)
def test_sample_survives_text(sample: Sample) -> None:
    module = module_of(sample, infer=True)
    ir.verify(module)
    text = ir.print_module(module)
    again = ir.parse(text)
    ir.verify(again)
    assert ir.print_module(again) == text
    assert ir.structural_equal(module, again) is None


@pytest.mark.parametrize("fault", all_faults(), ids=str)
def test_fault_is_reported_at_its_line(fault: Fault) -> None:
    """Verifier or parser says what the op objects to."""
    text = ir.print_module(module_of(fault, infer=False))
    line = next(i for i, row in enumerate(text.splitlines(), 1) if fault.op in row)
    with pytest.raises(DiagnosticError) as caught:
        ir.verify(ir.parse(text, "fault.ir"))
    message = SAID_EARLIER.get(fault.message, fault.message)
    found = [d for d in caught.value.diagnostics if message in d.message]
    assert found, str(caught.value)
    assert found[0].location.file == "fault.ir"
    assert found[0].location.line >= line
    assert fault.op in found[0].message or fault.op in found[0].location.source
