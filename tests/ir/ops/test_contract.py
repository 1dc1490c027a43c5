"""What every op owes its readers: docs with an example that is text of the IR, samples, and inference that agrees with
the values its meaning gives. Ops are found in the registry; nothing here lists them. The text of samples is
`tests/ir/test_op_text.py`'s.
"""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from typing import Any

import numpy as np
import pytest

import ir.ops  # noqa: F401  # registers every op
from ir import parse, print_module, verify
from ir.diagnostics import DiagnosticSink
from ir.grid_memory_model import GridBuffer
from ir.kv_state import KVState
from ir.op_def import OPS, InferenceError, Op
from ir.tile_memory_model import BufferView
from ir.traits import ReadsKVCache, Terminator, WritesKVCache
from ir.types import KVCacheType, SymbolicDim, TensorType, Type
from tests.samples import all_faults, all_samples
from tests.samples.base import Fault, Sample, parts_of, run_sample, type_like, type_of

SAMPLES = all_samples()
FAULTS = all_faults()
OP_NAMES = sorted(OPS)


def has_values(name: str) -> bool:
    """`builtin` and `func` ops are structure."""
    return name.split(".")[0] not in ("builtin", "func")


# any type, any values; or no operand and no attribute
NEVER_REFUSES = {"tensor.constant", "tensor.yield", "tile.yield"}
NEVER_REFUSES |= {"tile.thread_id", "tile.ticket", "tile.num_threads", "tile.barrier", "plan.barrier"}
NEVER_REFUSES |= {"grid.block_id", "grid.num_blocks", "grid.async_commit", "grid.fence_async"}


def example_of(cls: type[Op]) -> str:
    """The paragraph of the docstring that uses the op, without the word "Example:"; "" when there is none."""
    use = re.compile(rf"^\s*(%.* = )?{re.escape(cls.name)}\b", re.MULTILINE)
    for paragraph in inspect.cleandoc(cls.__doc__ or "").split("\n\n")[1:]:
        if use.search(paragraph):
            return textwrap.dedent(paragraph.removeprefix("Example:\n"))
    return ""


@pytest.mark.parametrize("name", OP_NAMES)
def test_op_is_documented(name: str) -> None:
    cls = OPS[name]
    assert cls.__doc__ and cls.__doc__.strip()[0].isprintable()
    fields = (*cls.operand_fields, *cls.attr_fields, *cls.result_fields, *cls.region_fields)
    assert all(field.doc for field in fields), f"a field of {name} has no description"
    assert example_of(cls), f"the docstring of {name} has no example"


@pytest.mark.parametrize("name", [name for name in OP_NAMES if has_values(name)])
def test_op_has_a_meaning(name: str) -> None:
    """Ops have `reference` or `interpret`, not both."""
    assert hasattr(OPS[name], "reference") != hasattr(OPS[name], "interpret")


def test_every_op_has_samples() -> None:
    sampled = {s.op for s in SAMPLES}
    assert [name for name in OP_NAMES if has_values(name) and name not in sampled] == []


def test_every_op_has_a_fault() -> None:
    refused = {f.op for f in FAULTS}
    assert [name for name in OP_NAMES if has_values(name) and (name in refused) == (name in NEVER_REFUSES)] == []


def test_labels_are_distinct() -> None:
    names = [str(s) for s in SAMPLES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_inference_agrees_with_the_reference(sample: Sample) -> None:
    _, op = sample.build()
    sizes = bind(sample)
    made = run_sample(sample)
    assert len(made) == len(op.results)
    for result, value in zip(op.results, made, strict=True):
        assert type_like(value, result.type) == concrete(result.type, sizes)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_reference_is_a_function(sample: Sample) -> None:
    """Twice the same results, bit by bit, none of them undefined (NaN), and inputs left alone."""
    before = copy.deepcopy(sample.inputs)
    first, second = run_sample(sample), run_sample(sample)
    for a, b in [*zip(first, second, strict=True), *zip(before, sample.inputs, strict=True)]:
        for left, right in zip(arrays(a), arrays(b), strict=True):
            np.testing.assert_array_equal(left, right)
    for value in first:
        for array in arrays(value):
            assert not np.isnan(array.astype(np.float64)).any()


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_costs_grow_with_sizes(sample: Sample) -> None:
    _, op = sample.build()
    names = ("tokens", "rows", "ctx", "block")
    costs = [(op.flops(sizes), op.bytes_moved(sizes)) for sizes in (dict.fromkeys(names, 4), dict.fromkeys(names, 64))]
    assert all(0 <= small <= large for small, large in zip(*costs, strict=True))
    touches_memory = any(isinstance(v.type, TensorType | KVCacheType) for v in op.operands)
    assert costs[0][1] > 0 or not touches_memory


@pytest.mark.parametrize("name", OP_NAMES)
def test_cache_traits_match_operands(name: str) -> None:
    """An op that takes a cache says what it does with it."""
    traits = OPS[name].traits
    takes_cache = any(f.name == "cache" for f in OPS[name].operand_fields)
    assert takes_cache == (ReadsKVCache in traits or WritesKVCache in traits)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_refused(fault: Fault) -> None:
    sink = DiagnosticSink()
    try:
        _, op = fault.build()
    except InferenceError as error:
        messages = [str(error)]
    else:
        op.verify(sink)
        messages = [d.message for d in sink]
    assert any(fault.message in m for m in messages), messages
    for message in messages:
        assert message[0].islower() or message[0] == "'"
        assert not message.endswith(".")


@pytest.mark.parametrize("name", OP_NAMES)
def test_example_is_text_of_the_ir(name: str) -> None:
    example = example_of(OPS[name])
    stands_alone = example.startswith(("func ", "func.func", "builtin."))
    module = parse(example if stands_alone else function_around(example))
    if Terminator not in OPS[name].traits:
        verify(module)
    printed = print_module(module)
    assert any(op.name == name for op in module.walk())
    assert print_module(parse(printed)) == printed


def function_around(example: str) -> str:
    """A function whose arguments are the values that the example reads and does not make."""
    signature = re.search(r":\s*\(((?:[^()]|\n)*)\)\s*->\s*((?:[^()]|\n)+|\([^()]*\))\s*$", example)
    assert signature, f"the example does not end in a signature:\n{example}"
    head = re.match(r"\s*(?:(?P<results>%[^=]*?) = )?[\w.]+(?P<operands>[^{:(]*)", example)
    assert head
    operands = re.findall(r"%\w+", head["operands"])
    types = split_types(signature[1])
    assert len(operands) == len(types), f"{operands} of types {types}"
    arguments = ", ".join(dict.fromkeys(f"{o}: {t}" for o, t in zip(operands, types, strict=True)))
    results = head["results"] or ""
    results_types = split_types(signature[2].strip().removeprefix("(").removesuffix(")"))
    returned = f"return {results} : {', '.join(results_types)}" if results else "return"
    return (
        f"func @example({arguments}) -> ({', '.join(results_types)}) {{\n"
        f"{textwrap.indent(example, '  ')}\n  {returned}\n}}\n"
    )


def split_types(text: str) -> list[str]:
    """The types of a comma-separated list; commas inside <> do not separate."""
    parts, depth = [""], 0
    for c in " ".join(text.split()):
        depth += (c == "<") - (c == ">")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def arrays(value: Any) -> tuple[np.ndarray, ...]:
    if isinstance(value, BufferView):
        return value.memory.bytes, np.array([value.start, *value.bounds])
    if isinstance(value, GridBuffer):
        return value.memory.bytes, value.start
    return parts_of(value)


def bind(sample: Sample) -> dict[str, int]:
    """What the symbols of the operand types stand for in the sample's arrays."""
    sizes: dict[str, int] = {}
    for type, value in zip(sample.types, sample.inputs, strict=True):
        if isinstance(value, KVState):
            assert type == type_of(value)
            assert sizes.setdefault("ctx", value.ctx) == value.ctx
        elif isinstance(type, TensorType):
            assert len(type.shape) == len(value.shape)
            for dim, size in zip(type.shape, value.shape, strict=True):
                if isinstance(dim, SymbolicDim):
                    assert sizes.setdefault(dim.name, size // dim.scale) * dim.scale == size
                else:
                    assert dim == size
    return sizes


def concrete(type: Type, sizes: dict[str, int]) -> Type:
    """The type with its symbols replaced by numbers, without the layout (which arrays do not show)."""
    if not isinstance(type, TensorType):
        return type
    shape = tuple(sizes[d.name] * d.scale if isinstance(d, SymbolicDim) else d for d in type.shape)
    return TensorType(shape, type.element)
