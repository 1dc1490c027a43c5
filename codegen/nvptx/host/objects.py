"""Object code for the CPU beside a GPU: one object for each instruction set, whatever CPU that will be.

object_path("experts", "x86-64-v4")               # where an artifact has it
compiled("experts", text, levels, cache)          # level -> object code, of `text(triple, features, attributes)`
entries("experts", levels)                        # what the manifest says of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from codegen.compile_worker import CompileRequest, compile_many
from codegen.llvm.team import team_text
from codegen.object_cache import ObjectCache
from hw_targets import load

TextOf = Callable[[str, frozenset[str], str], str]  # triple, features, attributes of functions -> LLVM IR


def object_path(stem: str, level: str) -> str:
    """Where an artifact has the object for an instruction set."""
    return f"code/{stem}.{level}.o"


def module_text(
    triple: str, declarations: Iterable[str], kernels: Iterable[str], functions: Iterable[str], attributes: str
) -> str:
    """LLVM IR of kernels, the team that runs them, and the functions that the runtime calls."""
    ends = [f"attributes #0 = {{ {attributes} }}"]
    return "\n".join([*sorted(declarations), team_text(triple), *kernels, *functions, *ends]) + "\n"


def compiled(stem: str, text: TextOf, levels: Sequence[str], cache: ObjectCache | None) -> dict[str, bytes]:
    """Level -> object code."""
    requests = []
    for target in map(load, levels):
        features = frozenset(target.llvm_features)
        width = '"prefer-vector-width"="512" ' if "avx512f" in features else ""
        named = f'"target-cpu"="{target.llvm_cpu}" "target-features"="{target.feature_string()}"'
        machine = (target.llvm_triple, target.llvm_cpu, target.feature_string())
        source = text(target.llvm_triple, features, f"nounwind {width}{named}")
        requests.append(CompileRequest(source, *machine, 1, stem))
    made = compile_many(requests, cache=cache) if requests else []
    return dict(zip(levels, made, strict=True))


def entries(stem: str, levels: Sequence[str]) -> list[dict[str, Any]]:
    """File, triple and features of each object."""
    return [
        {"file": object_path(stem, level), "triple": t.llvm_triple, "features": list(t.required_features())}
        for level, t in ((level, load(level)) for level in levels)
    ]
