"""GeneratedModule: a module together with inputs, weights and KV states that fit it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ir.interpreter import interpret
from ir.kv_state import KVState
from ir.ops.builtin import FuncOp, ModuleOp
from ir.printer import print_module
from ir.types import KVCacheType


@dataclass
class GeneratedModule:
    """`module` has one function; `inputs` are its arguments, `states` the KV caches it begins with."""

    module: ModuleOp
    inputs: list[np.ndarray]
    weights: dict[str, np.ndarray]
    states: dict[str, KVState] = field(default_factory=dict)

    @property
    def func(self) -> FuncOp:
        return self.module.functions[0]

    def run(self, module: ModuleOp | None = None) -> tuple[list[Any], dict[str, KVState]]:
        """(results, KV states afterwards) of the function of `module`, or of a changed version of it.

        A pass may have changed the element of the caches; the states given to the run are converted to it.
        """
        func = (module or self.module).functions[0]
        states = self.states_for(func)
        results = interpret(func, [np.copy(x) for x in self.inputs], weights=self.weights, states=states)
        return results, states

    def states_for(self, func: FuncOp) -> dict[str, KVState]:
        """Copies of the states in the elements that `func` declares."""
        elements = {
            op.attributes["symbol"].name: op.results[0].type.element.dtype
            for op in func.walk()
            if op.name == "kv.state" and isinstance(op.results[0].type, KVCacheType)
        }
        converted = {}
        for name, state in self.states.items():
            element = elements.get(name, state.dtype)
            converted[name] = KVState(state.keys.astype(element), state.values.astype(element))
        return converted

    def __repr__(self) -> str:
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in self.inputs)
        return f"inputs: {shapes}; states: {sorted(self.states)}\n{print_module(self.module)}"
