"""Parser: named errors, carets, hostile text. The messages about names are in tests/text/ir."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ir
from ir.diagnostics import DiagnosticError
from ir.formats import F16, F32, GroupedIntFormat
from ir.parse_value import parse_format, parse_layout, parse_type
from ir.syntax_errors import EXAMPLES, describe_terminals
from ir.types import INDEX, BufferType, Layout, ScalarType, TensorType


def error_of(text: str) -> DiagnosticError:
    with pytest.raises(DiagnosticError) as caught:
        ir.parse(text, "x.ir")
    return caught.value


@pytest.mark.parametrize(
    ("message", "text"), [(m, t) for m, texts in EXAMPLES.items() for t in texts], ids=lambda text: repr(text)[:50]
)
def test_slip_has_its_name(message: str, text: str) -> None:
    assert error_of(text).diagnostics[0].message == message


def test_error_in_nested_regions_has_its_name_too() -> None:
    """lark's own matching of examples would depend on how deep the fault is nested."""
    text = "func @f() { a.b ({ a.b ({ a.b x : (f32) -> () }) : () -> () }) : () -> () }"
    assert error_of(text).diagnostics[0].message == "expected '%' before the name of a value"


def test_carets_point_at_the_token() -> None:
    text = "func @f(%x: tensor<4 x f32>) {\n\t%y = tensor.sylu %x : (tensor<4 x f32>) -> tensor<4 x f32>\n  return\n}\n"
    assert str(error_of(text)).splitlines() == [
        "x.ir:2:7: error: unknown op 'tensor.sylu'; did you mean 'tensor.silu'?",
        " %y = tensor.sylu %x : (tensor<4 x f32>) -> tensor<4 x f32>",
        "      ^^^^^^^^^^^",
    ]


def test_fault_inside_a_type_on_several_lines() -> None:
    error = error_of("func @f(%x: tensor<4 x\n    f31>) {\n  return\n}")
    assert str(error).splitlines()[0].startswith("x.ir:2:5: error: expected a number format, got 'f31'")
    assert str(error).splitlines()[1:] == ["    f31>) {", "    ^^^"]


def test_end_of_text_is_the_place_of_what_is_missing() -> None:
    location = error_of("func @f() {\n  return\n").diagnostics[0].location
    assert (location.line, location.column) == (3, 1)


@pytest.mark.parametrize("text", ["", "\n", "// only a comment", "// x\n\n  // y\n"])
def test_empty_module(text: str) -> None:
    assert ir.parse(text).functions == ()
    assert ir.print_module(ir.parse(text)) == "\n"


def test_crlf_is_whitespace() -> None:
    module = ir.parse("func @f() {\r\n  // comment\r\n  return\r\n}\r\n")
    assert ir.print_module(module) == "func @f() {\n  return\n}\n"


def test_unmatched_terminals_are_described() -> None:
    assert describe_terminals([]) == "something else"
    assert describe_terminals(["VALUE"]) == "a value like %x"
    assert describe_terminals(["__ANON_0", "RPAR", "LPAR"]) == "'(', ')' or '->'"


def test_regions_nest_only_so_deep() -> None:
    depth = 100
    text = "func @f(%m: i1) { " + "tile.if %m ({ " * depth + "}) : (i1) -> () " * depth + "return }"
    assert error_of(text).diagnostics[0].message == "regions are nested more than 64 deep"


def test_lists_nest_only_so_deep() -> None:
    text = (
        "func @f() { plan.launch {kernel = @k, reads = "
        + "[" * 2000
        + "]" * 2000
        + ", writes = []} : () -> () return }"
    )
    assert error_of(text).diagnostics[0].message == "lists are nested more than 32 deep"


@pytest.mark.parametrize(
    "text",
    [
        "tensor<" * 20_000,
        "func @f(%x: " + "tensor<" * 20_000,
        "func @f(%x: tensor<" + '"' * 20_000,
        "func @f(%x: tensor<" + "a<b<c<" * 8_000,
        "func @f(%x: tensor<" + "a<b<c>>" * 8_000,
        "func @f(%x: tensor<" + 'a<"b">' * 8_000,
        "{" * 20_000,
        "%" * 20_000,
        "func @f() { plan.input {which = " + '"a\\' * 10_000,
        "func @f(%x: tensor<" + "1" * 50_000 + " x f32>) { return }",
    ],
)
def test_hostile_text_is_refused_quickly(text: str) -> None:
    started = time.process_time()
    error_of(text)
    assert time.process_time() - started < 5


@given(st.text(alphabet='%@#<>(){}[]^=:,.*-"\\ \nx1fabn_', max_size=60))
@example("func @f() { return } from")
@example('@"')
def test_any_text_parses_or_is_diagnosed(text: str) -> None:
    try:
        module = ir.parse(text)
    except DiagnosticError as error:
        assert error.diagnostics[0].location.line >= 1
    else:
        assert ir.print_module(ir.parse(ir.print_module(module))) == ir.print_module(module)


TOKENS = [
    *"(){}[]^=:,", "->", "<", ">", "func", "return", "from", "@f", "%x", "%y", "f32", "tensor<4 x f32>", "tensor.silu",
    "a.b", '"s"', "1", "-2.5", "axis", "#rope<dim = 4>", "strips<rows=4>", "tokens", "*",
    "tensor<tokens x q4_sym<group=2, scale=f16>>",
]  # fmt: skip


@given(st.lists(st.sampled_from(TOKENS), max_size=25))
def test_any_tokens_parse_or_are_diagnosed(tokens: list[str]) -> None:
    try:
        ir.parse("func @f(%x: f32) { " + " ".join(tokens))
    except DiagnosticError as error:
        assert str(error)


@given(st.data())
def test_damaged_text_parses_or_is_diagnosed(data: st.DataObject) -> None:
    text = (
        "func @step(%x: tensor<4 x f32>, %m: i1) -> tensor<4 x f32> {\n"
        '  %y = tensor.fused %x {kind = "elementwise"} ({\n    ^(%a: tensor<4 x f32>):\n'
        "      %b = tensor.clip %a {low = -1.0, high = 1.5} : (tensor<4 x f32>) -> tensor<4 x f32>\n"
        "      tensor.yield %b : (tensor<4 x f32>) -> ()\n  }) : (tensor<4 x f32>) -> tensor<4 x f32>\n"
        '  return %y : tensor<4 x f32> from "x"\n}\n'
    )
    start = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 6))
    inserted = data.draw(st.text(alphabet='%@<>(){}:,"= x4', max_size=4))
    try:
        ir.verify(ir.parse(text[:start] + inserted + text[start + length :]))
    except DiagnosticError as error:
        assert error.diagnostics[0].severity == "error"


def test_words_on_their_own() -> None:
    assert parse_type(" tensor<4 x f32> ") == TensorType((4,), F32)
    assert parse_type("f16") == ScalarType(F16)
    assert parse_type("index") == INDEX
    assert parse_type("buffer<f32, private>") == BufferType(F32, "private")
    assert parse_format("q4_sym<group=32, scale=f16>") == GroupedIntFormat(4, 32)
    assert parse_layout("strips<rows=16, pack=2>") == Layout(16, 2)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (parse_type, "strips<rows=16>", "expected a type"),
        (
            parse_type,
            "tensor<4 x f31>",
            "expected a number format, got 'f31'; did you mean 'f32'? in 'tensor<4 x f31>'",
        ),
        (parse_type, "", "unknown type ''"),
        (parse_type, "tensor<4 x f32", "cannot read this at 'the end'"),
        (parse_format, "tensor<4 x f32>", "expected a number format, got"),
        (parse_format, "f23", "unknown type 'f23'; did you mean 'f32'?"),
        (parse_layout, "f32", "expected a layout, got"),
    ],
)
def test_words_on_their_own_are_refused(read, text: str, message: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read(text)
    assert message in str(caught.value)


def test_importing_the_ir_loads_no_parser() -> None:
    """`import ir` is cheap; lark is loaded by the first parse, numpy by the first use of a type."""
    code = "import sys, ir; print([m for m in ('lark', 'numpy', 'ir.core') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = "import sys, ir; ir.print_module(ir.ModuleOp.create()); print('lark' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="module 'ir' has no attribute 'parze'"):
        ir.parze  # noqa: B018
    assert sorted(ir.__all__) == sorted(ir._HOMES)
    for name in ir.__all__:
        assert getattr(ir, name) is not None
