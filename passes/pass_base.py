"""What a pass is, and how it becomes known by name.

A pass is a frozen dataclass in a file of its own; its options are its fields, its name a class variable:

    @register_pass
    @dataclass(frozen=True)
    class FuseNormGemmPass(FunctionPass):
        '''Folds an RMS norm into the GEMM that reads it.'''
        name: ClassVar[str] = "fuse-norm-gemm"
        max_k: int = 8192                                  # `max-k` in pipeline text

        def run(self, func: FuncOp, ctx: PassContext) -> None:
            apply_greedily(func, [FoldNormIntoGemm(self.max_k)], ctx.rewriter())

Passes of other packages join by the decorator (when their module is imported) or by an entry point in the group
`stratum.passes`, which names the pass class and is read when a name is looked up that nobody has registered.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ir.core import Op
from ir.diagnostics import DiagnosticError
from ir.rewriter import PatternRewriter, Refusal
from passes.option_text import print_options

ENTRY_POINT_GROUP = "stratum.passes"
A = TypeVar("A")


@dataclass(frozen=True)
class Remark:
    """Something a pass found worth telling: a count, a choice. Shown by `--explain` beside the refusals."""

    origin: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}" if self.origin else self.message


@dataclass
class PassContext:
    """What passes know besides the IR, and where they leave what is no IR.

    `target` is the hardware description or None (passes then choose what every machine can do); `options` holds what
    the caller wants passes to know under agreed keys. Analyses asked for by `analysis` are kept until a pass changes
    the IR; the pass manager drops them.
    """

    target: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    _rewriters: list[PatternRewriter] = field(default_factory=list)
    _analyses: dict[Hashable, Any] = field(default_factory=dict)

    def rewriter(self) -> PatternRewriter:
        """A new rewriter whose refusals reach the report of the running pass."""
        rewriter = PatternRewriter()
        self._rewriters.append(rewriter)
        return rewriter

    def remark(self, op: Op | None, message: str) -> None:
        """Tells something about `op` (None: about the whole module) to whoever asks for explanations."""
        self.remarks.append(Remark(op.location.origin if op is not None else "", message))

    def analysis(self, kind: Callable[[Op], A], op: Op) -> A:
        """`kind(op)`, computed once until the IR changes. `kind` is a class or a function that only reads."""
        key = (kind, op)
        if key not in self._analyses:
            self._analyses[key] = kind(op)
        return self._analyses[key]

    def drop_analyses(self) -> None:
        """Forgets every analysis: for passes that go on asking after changing the IR themselves."""
        self._analyses.clear()

    def take_notes(self) -> tuple[tuple[Refusal, ...], tuple[Remark, ...]]:
        """The refusals and remarks since the last call, and an empty slate."""
        refusals = tuple(r for rewriter in self._rewriters for r in rewriter.refusals)
        remarks = tuple(self.remarks)
        self._rewriters.clear()
        self.remarks.clear()
        return refusals, remarks


@dataclass(frozen=True)
class Pass:
    """Base of passes over a whole module. Subclasses are frozen dataclasses with a `name` and a `run`."""

    name: ClassVar[str] = ""

    def run(self, module: Op, ctx: PassContext, /) -> None:
        """Changes `module` in place through a `PatternRewriter` or `Builder`. Valid IR in, valid IR out."""
        raise TypeError(f"pass {self.name or type(self).__name__} does not say what it does")

    def run_on_module(self, module: Op, ctx: PassContext) -> None:
        """What the pass manager calls."""
        self.run(module, ctx)

    def __str__(self) -> str:
        """As in pipeline text."""
        return print_options(self.name, self)


@dataclass(frozen=True)
class FunctionPass(Pass):
    """Base of passes that look at one function at a time: `run` gets every `func.func` of the module in turn."""

    def run_on_module(self, module: Op, ctx: PassContext) -> None:
        if module.name == "func.func":
            self.run(module, ctx)
            return
        for op in [op for region in module.regions for block in region.blocks for op in block.ops]:
            if op.name == "func.func":
                self.run(op, ctx)


PASSES: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])
load_failures: dict[str, tuple[str, str]] = {}  # entry point -> (what it names, why it cannot be loaded)
_loaded = {"built-in": False, "entry points": False}


def register_pass(cls: P) -> P:
    """Class decorator: makes the pass known to pipeline text. A second pass of the name is an error."""
    if not cls.name:
        raise ValueError(f"pass {cls.__name__} has no name")
    other = PASSES.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"pass {cls.name} is registered by {other.__module__} already")
    PASSES[cls.name] = cls
    return cls


def find_pass(name: str) -> type[Pass] | None:
    """The pass of this name, or None. Entry points of other packages are only read for names not found here.

    Raises DiagnosticError when another package promises the pass and cannot be loaded.
    """
    _load_builtin()
    if name not in PASSES:
        _load_entry_points()
    if name not in PASSES and name in load_failures:
        value, reason = load_failures[name]
        raise DiagnosticError(
            f"the pass {name!r} of another package cannot be loaded: {reason}",
            where=value,
            hint="update or uninstall that package",
        )
    return PASSES.get(name)


def registered_passes() -> dict[str, type[Pass]]:
    """Every known pass, those of other packages included, sorted by name."""
    _load_builtin()
    _load_entry_points()
    return dict(sorted(PASSES.items()))


def _load_builtin() -> None:
    """Imports every module of this package once: importing a pass module registers its passes."""
    if _loaded["built-in"]:
        return
    _loaded["built-in"] = True
    package = importlib.import_module("passes")
    for module in sorted(m.name for m in pkgutil.walk_packages(package.__path__, "passes.")):
        importlib.import_module(module)


def _load_entry_points() -> None:
    if _loaded["entry points"]:
        return
    _loaded["entry points"] = True
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value)):
        try:
            loaded = entry.load()
            if isinstance(loaded, type) and issubclass(loaded, Pass):
                register_pass(loaded)
            elif entry.name not in PASSES:  # a module, whose import registers its passes, would have done so
                raise TypeError(f"{entry.value} is no pass")
        except Exception as error:  # noqa: BLE001  # code of another package may fail in any way; who asks is told
            load_failures[entry.name] = (entry.value, f"{type(error).__name__}: {error}")
