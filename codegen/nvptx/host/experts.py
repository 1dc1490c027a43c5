"""Experts on the CPU beside a GPU: which layers' experts have code there, that code, and what the manifest says of it.

    step = host_experts(calls, file)                  # of the launches of a program
    step.objects(cache)                               # instruction set -> object code
    step.entry()                                      # the manifest's `gpu.experts`

A function computes both products of some experts of a layer, whose weights lie as the GPU has them:

    i64 NAME(args*, i64 tid)

`args` are words of 64 bits: 0 threads, 1 team*, 2 jobs*, 3 number of jobs. A job has ten: 0 codes, 1 scales of gate and
up, 2 codes, 3 scales of down, 4 x (bf16 or f32, rows of tokens), 5 sources (i32, the row of x for each row), 6 room for
the gated rows (bf16 or f32), 7 y (f32, rows), 8 number of rows, 9 unused. All threads of the team run it.

There is an object for each instruction set in `LEVELS`: an artifact for GPUs runs whatever CPU is beside one. Where a
GPU rounds rows to int8 before a product, the CPU gets the rows that are rounded, and rounds them itself. Experts that
have no product on CPUs (f8e4m3, odd sizes) have no entry and are always brought to the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codegen.llvm.instructions import InstructionSet
from codegen.llvm.lower_kernel import lower_kernel
from codegen.nvptx.host.objects import compiled, entries, module_text
from codegen.nvptx.host.product import HostProduct, host_product
from codegen.nvptx.kernels.moe_products import Experts
from codegen.nvptx.launches import GridLaunch, WeightPart
from codegen.object_cache import ObjectCache
from codegen.programs import WeightsFile
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I8, PlainFormat

STEM = "experts"  # of the names of its objects
LEVELS = ("x86-64-v3", "x86-64-v4", "aarch64")
JOB_WORDS = 10
_JOB_BYTES = 8 * JOB_WORDS


@dataclass(frozen=True)
class HostLayer:
    """Experts of a piece: rows of x have `columns`, of which each token has `choices`; places of codes and scales of
    gate|up and of down in an expert's bytes (-1: no scales). Numbers of x take `x_bytes`, those between the
    products `hidden_bytes`; with `rounds` x is what the launch before the first product rounds."""

    piece: int
    function: str
    columns: int
    hidden: int
    out: int
    choices: int
    places: tuple[int, int, int, int]
    x_bytes: int = 2
    hidden_bytes: int = 2
    rounds: bool = False


@dataclass(frozen=True)
class HostStep:
    """Layers whose experts have code for CPUs; of each function its products, gate|up and down."""

    layers: tuple[HostLayer, ...]
    functions: Mapping[str, tuple[HostProduct, HostProduct]]

    def text(self, triple: str, features: frozenset[str], attributes: str) -> str:
        """LLVM IR of the kernels, the team and the functions."""
        kernels = [
            host_product(product, f"{name}_{part}")
            for name, products in self.functions.items()
            for part, product in zip(("up", "down"), products, strict=True)
        ]
        declarations: dict[str, str] = {}
        instructions = InstructionSet(features)
        bodies = [lower_kernel(kernel, instructions, declarations, "#0") for kernel in kernels]
        functions = [_function_text(name, products) for name, products in self.functions.items()]
        return module_text(triple, declarations.values(), bodies, functions, attributes)

    def objects(self, cache: ObjectCache | None = None, levels: Sequence[str] = LEVELS) -> dict[str, bytes]:
        """Level -> object code."""
        return compiled(STEM, self.text, levels, cache) if self.functions else {}

    def entry(self, levels: Sequence[str] = LEVELS) -> dict[str, Any]:
        """The manifest's `gpu.experts`, of an artifact with objects for `levels`."""
        return {
            "code": entries(STEM, levels),
            "layers": [
                {
                    "piece": layer.piece, "function": layer.function, "columns": layer.columns,
                    "hidden": layer.hidden, "out": layer.out, "choices": layer.choices, "places": list(layer.places),
                    "x_bytes": layer.x_bytes, "hidden_bytes": layer.hidden_bytes, "rounds": int(layer.rounds),
                }
                for layer in self.layers
            ],
        }  # fmt: skip


def host_experts(launches: Sequence[GridLaunch], file: WeightsFile, name_of: Callable[[Value], str | None]) -> HostStep:
    """The layers whose two products of experts follow each other in a program: gate|up from rows of tokens, then down
    from what that wrote. `name_of` gives the name of a weight in the file."""
    functions: dict[tuple[HostProduct, HostProduct], str] = {}
    layers: list[HostLayer] = []
    before = [None, *launches]
    products = [(before[n], launch) for n, launch in enumerate(launches) if _experts_of(launch) is not None]
    for up, down in itertools.pairwise(products):
        layer = _layer(up, down, file, name_of, functions)
        if layer is not None:
            layers.append(layer)
    return HostStep(tuple(layers), {name: pair for pair, name in functions.items()})


def _experts_of(launch: GridLaunch) -> Experts | None:
    key = launch.key
    return key[1] if isinstance(key, tuple) and len(key) > 1 and isinstance(key[1], Experts) else None


def _layer(
    up_behind: tuple[GridLaunch | None, GridLaunch],
    down_behind: tuple[GridLaunch | None, GridLaunch],
    file: WeightsFile,
    name_of: Callable[[Value], str | None],
    functions: dict[tuple[HostProduct, HostProduct], str],
) -> HostLayer | None:
    """Of two products, each with the launch before it."""
    up, down = up_behind[1], down_behind[1]
    first, second = _experts_of(up), _experts_of(down)
    assert first is not None and second is not None
    shaped = first.gate_up and first.gather > 0 and first.out in (BF16, F32)
    follows = not second.gate_up and second.gather == 0 and second.out == F32 and second.layout.k * 2 == first.layout.n
    # `arguments` are the matrices, x, order, tiles, ..., y, how many tiles: y of one is x of the other.
    matrices = [[a for a in launch.arguments if isinstance(a, WeightPart)] for launch in (up, down)]
    of_up, of_down = (_rows(*of, len(m)) for of, m in zip((up_behind, down_behind), matrices, strict=True))
    if of_up is None or of_down is None or not (shaped and follows and of_down[0] is up.arguments[up.writes[0]]):
        return None
    if (first.x_scales is None) != (second.x_scales is None) or of_down[1] != first.out:
        return None
    products = (
        HostProduct(first.layout, True, True, of_up[1], of_up[2], first.out),
        HostProduct(second.layout, element=of_down[1], rounded=of_down[2]),
    )
    try:
        for product in products:
            product.check()
    except DiagnosticError:
        return None  # they are brought to the GPU
    tensors = {tensor.name: tensor for tensor in file.tensors}
    places, pieces = [], []
    for parts in matrices:
        name = name_of(parts[0].weight)
        if name is None or file.pieces[file.piece_of[name]].kind != "experts":
            return None
        pieces.append(file.piece_of[name])
        begin = tensors[name].offset - file.pieces[pieces[-1]].offset
        places += [begin + part.offset for part in parts] + [-1] * (2 - len(parts))
    if pieces[0] != pieces[1]:
        return None
    function = functions.setdefault(products, f"stratum_experts_{len(functions)}")
    a, b, c, d = places
    return HostLayer(
        pieces[0], function, first.layout.k, first.layout.n // 2, second.layout.n, first.gather, (a, b, c, d),
        of_up[1].dtype.itemsize, first.out.dtype.itemsize, first.x_scales is not None,
    )  # fmt: skip


def _rows(before: GridLaunch | None, product: GridLaunch, matrices: int) -> tuple[Any, PlainFormat, int | None] | None:
    """(the rows that a product of experts is of, their element, the columns that are rounded together or None): its own
    argument, or what the launch before rounds to int8. None for what CPUs do not round so."""
    experts, x = _experts_of(product), product.arguments[matrices]
    assert experts is not None
    if experts.x_scales is None:
        return x, BF16, None
    key = before.key if before is not None else None
    if before is None or not isinstance(key, tuple) or key[0] != "quantize" or key[3] != I8:
        return None
    if before.arguments[1] is not x or key[2] not in (BF16, F32):
        return None
    return before.arguments[0], key[2], experts.x_scales.group


# -- the functions


def _function_text(name: str, products: tuple[HostProduct, HostProduct]) -> str:
    """Both products, all jobs of the one before those of the other. Thread 0 returns when all are done, since its
    caller then takes the results, and arguments and jobs away."""
    up, down = products
    return f"""define i64 @{name}(ptr %args, i64 %tid) {{
entry:
  %threads = load i64, ptr %args, align 8
  %team_at = getelementptr i64, ptr %args, i64 1
  %team = load ptr, ptr %team_at, align 8
  %jobs_at = getelementptr i64, ptr %args, i64 2
  %jobs = load ptr, ptr %jobs_at, align 8
  %count_at = getelementptr i64, ptr %args, i64 3
  %count = load i64, ptr %count_at, align 8
{_loop("up", "entry", name, up, (0, 1, 4, 5, 6))}
  call void @stratum_barrier(ptr %team, i64 %threads)
{_loop("down", "after_up", name, down, (2, 3, 6, 5, 7))}
  call void @stratum_barrier(ptr %team, i64 %threads)
  ret i64 0
}}
"""


def _loop(part: str, before: str, name: str, product: HostProduct, words: tuple[int, ...]) -> str:
    """A call of a product for each job; `words` of a job are its codes, scales, x, sources, y."""
    codes, scales, x, sources, y = words
    chosen = [codes, *([scales] if product.layout.group else []), x, *([sources] if product.gather else []), y]
    lines = [f"  br label %next_{part}", f"next_{part}:"]
    lines += [f"  %{part}_i = phi i64 [ 0, %{before} ], [ %{part}_after, %do_{part} ]"]
    lines += [f"  %{part}_more = icmp ult i64 %{part}_i, %count"]
    lines += [f"  br i1 %{part}_more, label %do_{part}, label %after_{part}", f"do_{part}:"]
    lines += [f"  %{part}_at = mul i64 %{part}_i, {_JOB_BYTES}"]
    lines += [f"  %{part}_job = getelementptr i8, ptr %jobs, i64 %{part}_at"]
    for word in (*chosen, 8):
        lines += [f"  %{part}_p{word} = getelementptr i64, ptr %{part}_job, i64 {word}"]
        lines += [f"  %{part}_w{word} = load {'i64' if word == 8 else 'ptr'}, ptr %{part}_p{word}, align 8"]
    arguments = [f"ptr %{part}_w{word}" for word in chosen] + [f"i64 %{part}_w8"]
    tail = "i64 %tid, i64 %threads, ptr %team"
    lines += [f"  call void @{name}_{part}({', '.join(arguments)}, {tail})"]
    lines += [f"  %{part}_after = add i64 %{part}_i, 1", f"  br label %next_{part}", f"after_{part}:"]
    return "\n".join(lines)
