"""What to say about text that the grammar refuses: names for the slips people make, words for terminals.

`EXAMPLES` maps a message to bad texts; an error in the same parser state at the same terminal gets that message.
"""

from __future__ import annotations

from collections.abc import Iterable

_OP = "func @f(%x: f32) {\n  %y = a.b %x {n = 1} : (f32) -> f32\n  return %y : f32\n}"
_RETURN = "return\n}"

EXAMPLES: dict[str, list[str]] = {
    "expected '%' before the name of a value": [
        _OP.replace("a.b %x", "a.b x"),
        _OP.replace("a.b %x", "a.b %x, y"),
        _OP.replace("return %y", "return y"),
        _OP.replace("(%x: f32)", "(x: f32)"),
        _OP.replace("%y = a.b", "%y, z = a.b"),
        _OP.replace("a.b %x {n = 1}", "a.b {n = 1} ({ ^(x: f32): }) "),
    ],
    "expected an op name with its family, like gemm.matmul": [
        _OP.replace("a.b", "b"),
    ],
    "expected an op: '%y = family.op ...' (a value begins with '%', an op name has its family before a dot)": [
        _OP.replace("%y = a.b", "b"),
        _OP.replace("%y =", "y ="),
    ],
    "expected ':' and the types: '%y = family.op %x : (f32) -> f32' or 'return %y : f32'": [
        _OP.replace(" : (f32) -> f32", ""),
        _OP.replace(" {n = 1} : (f32) -> f32", ""),
        _OP.replace(" %x {n = 1} : (f32) -> f32", ""),
        "func @f() { %x = a.b ({ }) %y = a.b : () -> () }",
        "func @f() { a.b ({ }) }",
        "func @f() { a.b }",
        "func @f() { a.b %x }",
        "func @f() { a.b %x {n = 1} }",
        _OP.replace("return %y : f32", "return %y"),
    ],
    "expected '->' and the result types": [
        _OP.replace(" -> f32", ""),
        "func @f() { a.b : () }",
        "func @f() { a.b : () return }",
        "func @f() { a.b : () a.b : () -> () }",
        'func @f() { a.b : () from "x" }',
    ],
    "expected the operand types in parentheses: '(f32, f32) -> f32'": [
        _OP.replace(" : (f32) -> f32", " : f32 -> f32"),
        _OP.replace(" : (f32) -> f32", " : tensor<4 x f32> -> f32"),
        _OP.replace(" : (f32) -> f32", " : -> f32"),
    ],
    "expected a result type, or () for none, behind '->'": [
        "func @f() { a.b : () -> }",
        "func @f() { a.b : () -> %x = a.b : () -> () }",
        "func @f() -> { return }",
    ],
    "expected an attribute as 'name = value' (regions stand in parentheses: '({ ... })')": [
        _OP.replace("{n = 1}", "{n: 1}"),
        _OP.replace("{n = 1}", "{n 1}"),
        _OP.replace("{n = 1}", "{n}"),
        _OP.replace("{n = 1}", "{m = 1, n: 1}"),
        _OP.replace("{n = 1}", "{m = 1, n}"),
    ],
    "expected ',' between attributes": [
        _OP.replace("{n = 1}", "{n = 1 m = 1}"),
        _OP.replace("{n = 1}", "{n = 1; m = 1}"),
        _OP.replace("{n = 1}", '{n = "a" m = 1}'),
        _OP.replace("{n = 1}", "{n = @a m = 1}"),
        _OP.replace("{n = 1}", "{n = a m = 1}"),
        _OP.replace("{n = 1}", "{n = [1] m = 1}"),
        _OP.replace("{n = 1}", "{n = a<b> m = 1}"),
    ],
    "expected the name of an attribute (regions stand in parentheses: '({ ... })')": [
        "func @f() { a.b { %x = a.b : () -> () } : () -> () }",
        _OP.replace("{n = 1}", '{"n" = 1}'),
        _OP.replace("{n = 1}", "{%n = 1}"),
        _OP.replace("{n = 1}", "{n = 1,}"),
    ],
    "expected a value of an attribute: a number, a string in double quotes, @symbol, [list], a format or a type": [
        _OP.replace("{n = 1}", "{n = }"),
        _OP.replace("{n = 1}", "{n = 'a'}"),
        _OP.replace("{n = 1}", "{n = %x}"),
        _OP.replace("{n = 1}", "{n = (1)}"),
        _OP.replace("{n = 1}", "{n = [1,]}"),
        _OP.replace("{n = 1}", "{n = , m = 1}"),
    ],
    "the list of an attribute is never closed; expected ',' or ']'": [
        _OP.replace("{n = 1}", "{n = [1}"),
        _OP.replace("{n = 1}", "{n = [1 2]}"),
        _OP.replace("{n = 1}", '{n = ["a"}'),
        _OP.replace("{n = 1}", "{n = [a}"),
        _OP.replace("{n = 1}", "{n = [a<b>}"),
    ],
    "the string is never closed; expected '\"' on the same line": [
        _OP.replace("{n = 1}", '{n = "a}'),
        _OP.replace("-> f32\n  return", '-> f32 from "a\n  return'),
        _OP.replace("-> f32\n  return", '-> () from "a\n  return'),
    ],
    "'<' is never closed, or closed only behind something that no type holds": [
        _OP.replace(" : (f32)", " : (tensor<4 x f32)"),
        _OP.replace(" : (f32)", " : (f32, tensor<4 x f32)"),
        _OP.replace("-> f32\n", "-> tensor<4 x f32\n"),
        _OP.replace("-> f32\n", "-> (tensor<4 x f32)\n"),
        _OP.replace("(%x: f32)", "(%x: tensor<4 x f32)"),
        _OP.replace("return %y : f32", "return %y : tensor<f32"),
        _OP.replace("{n = 1}", "{n = strips<rows=1}"),
        "func @f() -> tensor<4 x f32 { return }",
    ],
    "expected ',' between operands, or ':' and the types": [
        _OP.replace("a.b %x {n = 1}", "a.b %x %x"),
        _OP.replace("return %y :", "return %y %y :"),
    ],
    "expected another value behind ','": [
        _OP.replace("a.b %x {n = 1}", "a.b %x, {n = 1}"),
        _OP.replace("a.b %x {n = 1} :", "a.b %x, :"),
        _OP.replace("return %y :", "return %y, :"),
    ],
    "expected ',' between types": [
        _OP.replace(" : (f32)", " : (f32 f32)"),
        _OP.replace(" : (f32)", " : (tensor<f32> tensor<f32>)"),
    ],
    "expected a type": [
        _OP.replace(" : (f32)", " : (%x)"),
        _OP.replace(" : (f32)", " : (f32, )"),
        _OP.replace(" : (f32)", " : (f32, %x)"),
        _OP.replace(" : (f32)", " : (4)"),
        _OP.replace("(%x: f32)", "(%x: )"),
        _OP.replace("(%x: f32)", "(%x: %y)"),
        _OP.replace("return %y : f32", "return %y : "),
        _OP.replace("return %y : f32", "return %y : (f32)"),
        _OP.replace("-> f32\n", "-> (%x)\n"),
    ],
    "expected '@' before the name of a function": [
        "func f() { return }",
        'func "f"() { return }',
        "func %f() { return }",
        "func () { return }",
    ],
    "expected '(' and the parameters of the function": [
        "func @f { return }",
        "func @f -> f32 { return }",
    ],
    "expected ':' and a type behind the parameter": [
        "func @f(%x) { return }",
        "func @f(%x, %y: f32) { return }",
        "func @f(%x f32) { return }",
        "func @f(%x: f32, %y) { return }",
        "func @f() { a.b ({ ^(%x): }) : () -> () }",
    ],
    "expected '{' and the body of the function": [
        "func @f()\n" + _RETURN,
        "func @f() -> f32\n" + _RETURN,
        "func @f() -> (f32)\n" + _RETURN,
        "func @f()",
        "func @f() -> f32",
        "func @f();",
    ],
    "expected ':' behind the arguments of the block": [
        "func @f() { a.b ({ ^() a.b : () -> () }) : () -> () }",
        "func @f() { a.b ({ ^(%x: f32) a.b : () -> () }) : () -> () }",
        "func @f() { a.b ({ ^() %x = a.b : () -> () }) : () -> () }",
        "func @f() { a.b ({ ^() return }) : () -> () }",
        "func @f() { a.b ({ ^() }) : () -> () }",
    ],
    "expected '(' and the arguments of the block behind '^'": [
        "func @f() { a.b ({ ^bb0(%x: f32): }) : () -> () }",
        "func @f() { a.b ({ ^: }) : () -> () }",
        "func @f() { a.b ({ ^%x: }) : () -> () }",
    ],
    "expected 'func' or an op": [
        "}",
        "func @f() { return } }",
        "5",
        "(",
    ],
    "a body is never closed; expected '}'": [
        "func @f() { ",
        "func @f() { a.b : () -> ()",
        "func @f() { a.b : () -> f32",
        'func @f() { a.b : () -> f32 from "x"',
        "func @f() { return",
        "func @f() { return %x : f32",
        'func @f() { return from "x"',
        "func @f() { a.b ({ ",
        "func @f() { a.b ({ ^():",
        "func @f() { a.b ({ a.b : () -> ()",
    ],
    "expected a string in double quotes behind 'from'": [
        "func @f() { return from x }",
        "func @f() { return from 'x' }",
        "func @f() { return from @x }",
        "func @f() { return from }",
    ],
    "expected the regions of an op in parentheses: '({ ... })'": [
        "func @f() { a.b { a.b : () -> () } : () -> () }",
        "func @f() { a.b { ^(): } : () -> () }",
        "func @f() { a.b {n = 1} { return } : () -> () }",
    ],
    "expected ')' or ',' behind a region": [
        "func @f() { a.b ({ } : () -> () }",
        "func @f() { a.b ({ } { }) : () -> () }",
        "func @f() { a.b ({ }",
    ],
}

# Texts that differ from an example only in how long a list before the fault is.
_LONGER = (
    ("%x {", "%x, %x {"),
    ("%x :", "%x, %x :"),
    ("%x %x", "%x, %x %x"),
    ("(f32", "(f32, f32"),
    ("{n = 1", "{m = 1, n = 1"),
)


def with_longer_lists(example: str) -> list[str]:
    """The example, and the same slip behind lists of two."""
    return [example, *(example.replace(old, new) for old, new in _LONGER if old in example)]


_WORDS = {
    "VALUE": "a value like %x",
    "OP_NAME": "an op name like gemm.matmul",
    "NAME": "a name",
    "SYMBOL": "a symbol like @name",
    "STRING": "a string",
    "INT": "an integer",
    "FLOAT": "a number",
    "BRACKETED": "a type",
    "ATTRIBUTE": "an attribute like #rope<...>",
    "RETURN": "'return'",
    "FUNC": "'func'",
    "FROM": "'from'",
    "LPAR": "'('",
    "RPAR": "')'",
    "LBRACE": "'{'",
    "RBRACE": "'}'",
    "LSQB": "'['",
    "RSQB": "']'",
    "COLON": "':'",
    "COMMA": "','",
    "EQUAL": "'='",
    "CIRCUMFLEX": "'^'",
    "STAR": "'*'",
    "$END": "the end of the text",
}


def describe_terminals(names: Iterable[str]) -> str:
    """`a, b or c` for the terminals that could stand somewhere."""
    words = sorted({_WORDS.get(name, "'->'" if name.startswith("__ANON") else repr(name)) for name in names})
    if not words:
        return "something else"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
