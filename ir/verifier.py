"""Verifier: whether IR obeys the rules that every pass and printer relies on. Reports every fault it finds.

Checked for every op: the links between ops, blocks and values; operands are defined before they are used and visible
(regions of an op that is isolated from above see nothing outside); every region has one block, ended by a terminator
and holding none before; operands, results, attributes and regions are those the op declares; result types are those
that `inferred_types` gives; a KV cache is not used once a newer version of it exists; and what `verify` of the op says.
"""

from __future__ import annotations

from typing import Any

from ir.attributes import Attribute, SymbolRef
from ir.core import Block, BlockArgument, Op, OpResult, Value
from ir.diagnostics import Diagnostic, DiagnosticSink
from ir.formats import NumberFormat
from ir.op_def import Field, InferenceError
from ir.op_def import Op as DeclaredOp
from ir.traits import (
    HasRecursiveEffects,
    IsolatedFromAbove,
    NoTerminator,
    Terminator,
    WritesKVCache,
    has_trait,
)
from ir.types import KVCacheType, Layout, SymbolicDim, Type

_MAX_ERRORS = 50  # one wrong pass can break thousands of ops; nobody reads more
_NEIGHBOURS = 2
_CACHE_LIMIT = 20_000


def verify(root: Op) -> None:
    """Raises DiagnosticError that lists every fault inside `root`, each with the ops around it."""
    sink = DiagnosticSink()
    verify_into(root, sink)
    sink.raise_if_errors()


def verify_into(root: Op, sink: DiagnosticSink) -> None:
    """Adds every fault inside `root` to `sink`."""
    _Verifier(root, sink).run()


class _Verifier:
    def __init__(self, root: Op, sink: DiagnosticSink) -> None:
        self.root = root
        self.sink = sink
        self.visible: set[Value] = set()
        self.slots: dict[Value, int] = {}  # how many operand slots read a value, by what the ops say
        self.names: dict[Value, str] | None = None
        self.errors = 0

    def run(self) -> None:
        self.visible.update(self.root._operands)  # a root on its own reads values nobody here defines
        self.check_op(self.root)
        self.check_uses()

    def error(self, op: Op, message: str, *notes: Diagnostic) -> None:
        self.errors += 1
        if self.errors == _MAX_ERRORS:
            self.sink.error(op.location, f"{message} (and there may be more: stopped after {_MAX_ERRORS} errors)")
        elif self.errors < _MAX_ERRORS:
            self.sink.error(op.location, message, *notes, *self.neighbourhood(op))

    def neighbourhood(self, op: Op) -> tuple[Diagnostic, ...]:
        """The op among the ops around it, as a note."""
        from ir.printer import name_values, op_head  # only needed when something is wrong

        if self.names is None:
            self.names = name_values(self.root)
        around = op.parent.ops if op.parent is not None else [op]
        at = next((i for i, other in enumerate(around) if other is op), None)
        if at is None:
            return ()
        first, last = max(0, at - _NEIGHBOURS), min(len(around), at + _NEIGHBOURS + 1)
        lines = [("> " if i == at else "  ") + op_head(around[i], self.names) for i in range(first, last)]
        return (Diagnostic("note", "in\n" + "\n".join(lines)),)

    # -- one op ------------------------------------------------------------------------------------------------------

    def check_op(self, op: Op) -> None:
        """Checks `op`, makes its results visible, and checks what is inside of it. Recursion follows nesting only."""
        before = self.errors
        for index, value in enumerate(op._operands):
            if value not in self.visible:
                self.error(op, f"'{op.name}' {self.why_invisible(op, index, value)}")
            self.slots[value] = self.slots.get(value, 0) + 1
        declared = isinstance(op, DeclaredOp)
        if declared:
            self.check_fields(op)
        if op.regions:
            self.check_regions(op)
        if declared and self.errors == before:
            if self.check_types(op):  # `verify` may count on what inference has checked
                known = len(self.sink.diagnostics)
                op.verify(self.sink)
                self.adopt(op, known)
        self.visible.update(op.results)

    def adopt(self, op: Op, known: int) -> None:
        """Lets the errors that the op itself reported count, and shows the ops around them."""
        found = self.sink.diagnostics[known:]
        del self.sink.diagnostics[known:]
        for diagnostic in found:
            if diagnostic.severity != "error":
                self.sink.diagnostics.append(diagnostic)
                continue
            self.errors += 1
            if self.errors <= _MAX_ERRORS:
                notes = (*diagnostic.notes, *self.neighbourhood(op))
                self.sink.error(diagnostic.location, diagnostic.message, *notes)

    def why_invisible(self, op: Op, index: int, value: Value) -> str:
        where = f"operand {index}"
        if isinstance(value, OpResult):
            definer = value.op
            if definer.parent is not None and definer.parent is op.parent:
                return f"uses {where} before '{definer.name}' defines it"
            block = definer.parent
            what = f"a result of '{definer.name}'"
        else:
            assert isinstance(value, BlockArgument)
            block = value.block
            what = f"argument {value.index} of a block"
        if block is None or not self.inside_root(block):
            return f"uses {where}, {what} that is not part of this IR"
        if self.encloses(block, op):
            wall = self.wall_between(block, op)
            if wall is not None:
                return f"uses {where}, {what} outside of '{wall.name}', whose regions are isolated from above"
            return f"uses {where} before {what} is defined"
        return f"uses {where}, {what} inside of a region that does not contain this op"

    def inside_root(self, block: Block) -> bool:
        current: Block | None = block
        while current is not None:
            owner = current.parent_op
            if owner is None:
                return False
            if owner is self.root:
                return True
            current = owner.parent
        return False

    def encloses(self, block: Block, op: Op) -> bool:
        current = op.parent
        while current is not None:
            if current is block:
                return True
            owner = current.parent_op
            current = owner.parent if owner is not None else None
        return False

    def wall_between(self, block: Block, op: Op) -> Op | None:
        """The isolated op that stands between `op` and the enclosing `block`."""
        current = op.parent
        while current is not None and current is not block:
            owner = current.parent_op
            if owner is None:
                return None
            if has_trait(owner, IsolatedFromAbove):
                return owner
            current = owner.parent
        return None

    # -- declared fields ---------------------------------------------------------------------------------------------

    def check_fields(self, op: DeclaredOp) -> None:
        self.check_count(op, "operands", len(op._operands), op.operand_fields)
        self.check_count(op, "results", len(op.results), op.result_fields)
        self.check_count(op, "regions", len(op.regions), op.region_fields)
        fields = op.attr_fields
        given = op.attributes
        for field in fields:
            if field.name not in given:
                self.error(op, f"'{op.name}' lacks attribute '{field.name}' ({field.doc})")
            elif not attribute_fits(field, given[field.name]):
                from ir.printer import attribute_text

                value = given[field.name]
                shown = f"{attribute_text(value)} ({type(value).__name__})"
                self.error(op, f"'{op.name}' expected {type_words(field)} as '{field.name}', got {shown}")
        if len(given) != len(fields):
            names = [field.name for field in fields]
            for name in given:
                if name not in names:
                    self.error(op, f"'{op.name}' has no attribute '{name}'; it has {', '.join(names) or 'none'}")

    def check_count(self, op: Op, what: str, found: int, fields: tuple[Field, ...]) -> None:
        if fields and fields[-1].variadic:
            if found < len(fields) - 1:
                self.error(op, f"'{op.name}' expected {len(fields) - 1} {what} or more, got {found}")
        elif found != len(fields):
            listed = f" ({', '.join(f.name for f in fields)})" if fields else ""
            self.error(op, f"'{op.name}' expected {len(fields)} {what}{listed}, got {found}")

    def check_types(self, op: DeclaredOp) -> bool:
        """Whether the op takes operands of these types. Reports it, and results declared otherwise than inferred."""
        if not op.infers():
            return True
        try:
            inferred = _inferred(op)
        except InferenceError as error:
            self.error(op, f"'{op.name}' {error}")
            return False
        declared = tuple([r.type for r in op.results])
        if inferred != declared:
            self.error(op, f"'{op.name}' gives {_listed(inferred)}, but its results are declared {_listed(declared)}")
        return True

    # -- regions -----------------------------------------------------------------------------------------------------

    def check_regions(self, op: Op) -> None:
        isolated = has_trait(op, IsolatedFromAbove)
        for index, region in enumerate(op.regions):
            if region.parent is not op:
                self.error(op, f"region {index} of '{op.name}' has another op as parent")
            if len(region.blocks) != 1:
                self.error(op, f"'{op.name}' expected one block in region {index}, got {len(region.blocks)}")
                continue
            block = region.blocks[0]
            if block.parent is not region:
                self.error(op, f"the block of region {index} of '{op.name}' has another region as parent")
            outer = self.visible
            self.visible = set() if isolated else set(outer)
            self.visible.update(block.arguments)
            self.check_block(op, index, block)
            self.visible = outer

    def check_block(self, op: Op, index: int, block: Block) -> None:
        for i, argument in enumerate(block.arguments):
            if argument.block is not block or argument.index != i:
                self.error(op, f"argument {i} of region {index} of '{op.name}' is numbered or owned wrongly")
        last = len(block.ops) - 1
        caches = False
        for position, inner in enumerate(block.ops):
            if inner.parent is not block:
                self.error(inner, f"'{inner.name}' stands in a block that is not its parent")
            if position != last and has_trait(inner, Terminator):
                self.error(inner, f"'{inner.name}' ends a block but is followed by '{block.ops[position + 1].name}'")
            self.check_op(inner)
            caches = caches or any(isinstance(r.type, KVCacheType) for r in inner.results)
        if not has_trait(op, NoTerminator):
            end = block.terminator
            if end is None:
                self.error(op, f"region {index} of '{op.name}' is empty; expected a terminator")
            elif not has_trait(end, Terminator):
                self.error(end, f"region {index} of '{op.name}' ends in '{end.name}'; expected a terminator")
        if caches or any(isinstance(a.type, KVCacheType) for a in block.arguments):
            self.check_cache_versions(block)

    def check_cache_versions(self, block: Block) -> None:
        """A cache is memory: it has one name, and once an op has written a newer version, the old one is gone."""
        replaced: dict[Value, Op] = {}
        named: dict[Any, Op] = {}
        for op in block.ops:
            symbol = op.attributes.get("symbol")
            if symbol is not None and any(isinstance(r.type, KVCacheType) for r in op.results):
                first = named.setdefault(symbol, op)
                if first is not op:
                    note = Diagnostic("note", "first named here", first.location)
                    self.error(op, f"'{op.name}' names the state {symbol} a second time; use the first value", note)
            for value in op._operands:
                if isinstance(value.type, KVCacheType) and value in replaced:
                    writer = replaced[value]
                    note = Diagnostic("note", f"'{writer.name}' wrote the newer version here", writer.location)
                    self.error(op, f"'{op.name}' uses a kv cache of which a newer version exists", note)
            for value in op._operands:
                if isinstance(value.type, KVCacheType) and writes_cache(op, value):
                    if op._operands.count(value) > 1:
                        self.error(op, f"'{op.name}' takes a kv cache twice and writes it")
                        break
                    replaced[value] = op

    # -- use-def links -----------------------------------------------------------------------------------------------

    def check_uses(self) -> None:
        """Every value lists exactly the operand slots that read it."""
        inner = [v for op in self.root.walk() for v in op.results]
        inner += [a for op in self.root.walk() for r in op.regions for b in r.blocks for a in b.arguments]
        own_results = set(self.root.results) if self.root.parent is not None else ()
        for value in inner:
            uses = value.uses
            if len(uses) != self.slots.get(value, 0) and value not in own_results:
                owner = value.owner
                at = owner if isinstance(owner, Op) else owner.parent_op
                at = at or self.root
                self.error(at, f"a value of '{at.name}' lists {len(uses)} uses, has {self.slots.get(value, 0)}")
            for user, index in uses:
                if index >= len(user._operands) or user._operands[index] is not value:
                    message = f"is listed as a user through operand {index}, but reads another value"
                    self.error(user, f"'{user.name}' {message}")


def writes_cache(op: Op, cache: Value) -> bool:
    """Whether running `op` gives a newer version of `cache`, which is one of its operands."""
    if has_trait(op, WritesKVCache):
        return True
    if not has_trait(op, HasRecursiveEffects):
        return False
    for region in op.regions:
        for block in region.blocks:
            for index, value in enumerate(op._operands):
                if value is not cache:
                    continue
                # isolated regions see the cache as the argument of the same number
                seen = block.arguments[index] if index < len(block.arguments) else cache
                if any(writes_cache(user, seen) for user, _ in seen.uses if user is not op):
                    return True
    return False


def attribute_fits(field: Field, value: Any) -> bool:
    """Whether `value` is of the declared type of `field` (bool is no int, int is no float), or its default."""
    kinds = field.type if isinstance(field.type, tuple) else (field.type,)
    for kind in kinds:
        if kind in (bool, int, float, str):
            if type(value) is kind:
                return True
        elif kind is tuple:
            if type(value) is tuple and all(map(is_attribute, value)):
                return True
        elif isinstance(value, kind):
            return True
    return not field.required and value is field.default


def is_attribute(value: Any) -> bool:
    """Whether `value` may be held by an op, and printed."""
    if type(value) in (bool, int, float, str):
        return True
    if type(value) is tuple:
        return all(map(is_attribute, value))
    return isinstance(value, Attribute | SymbolRef | NumberFormat | Type | Layout | SymbolicDim)


def type_words(field: Field) -> str:
    """What kind of attribute a field wants: `an int`, `a PlainFormat`."""
    kinds = field.type if isinstance(field.type, tuple) else (field.type,)
    names = [kind.__name__ for kind in kinds]
    words = ["true or false" if n == "bool" else ("an " if n[0] in "aeiou" else "a ") + n for n in names]
    return " or ".join(words)


def _listed(types: tuple[Type, ...]) -> str:
    return str(types[0]) if len(types) == 1 else "(" + ", ".join(map(str, types)) + ")"


_INFERRED: dict[tuple[Any, ...], tuple[Type, ...]] = {}


def _inferred(op: DeclaredOp) -> tuple[Type, ...]:
    """`op.inferred_types` remembered by op, operand types and attributes: the layers of a model are alike."""
    types = [v.type for v in op._operands]
    if op.regions:
        return op.inferred_types(types, op.attributes, op.regions)
    attributes = tuple(op.attributes.values())
    # 1, 1.0 and True are equal keys, so the types of numbers are part of the key
    key = (type(op), tuple(types), attributes, tuple([_kinds(a) for a in attributes]))
    known = _INFERRED.get(key)
    if known is None:
        known = op.inferred_types(types, op.attributes, op.regions)
        if len(_INFERRED) >= _CACHE_LIMIT:
            _INFERRED.clear()
        _INFERRED[key] = known
    return known


def _kinds(value: Any) -> Any:
    return tuple(map(_kinds, value)) if type(value) is tuple else type(value)
