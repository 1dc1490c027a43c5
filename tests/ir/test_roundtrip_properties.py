"""Properties of text, verifier and interpreter on IR that nobody wrote by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given

import ir
from ir.kv_state import KVState
from tests.strategies import GeneratedModule, graph_modules, step_modules


def check_text(generated: GeneratedModule) -> None:
    text = ir.print_module(generated.module)
    assert ir.print_module(generated.module) == text
    again = ir.parse(text)
    ir.verify(again)
    assert ir.print_module(again) == text
    assert ir.structural_equal(generated.module, again, locations=True) is None


@given(graph_modules())
def test_generated_graphs_verify_and_survive_text(generated: GeneratedModule) -> None:
    ir.verify(generated.module)
    check_text(generated)


@given(step_modules())
def test_generated_steps_verify_and_survive_text(generated: GeneratedModule) -> None:
    ir.verify(generated.module)
    check_text(generated)


@given(graph_modules(max_steps=5))
def test_text_means_the_same(generated: GeneratedModule) -> None:
    """The parsed module computes the same bits, and interpretation leaves inputs and given states alone."""
    inputs = [np.copy(x) for x in generated.inputs]
    states = dict(generated.states)
    first, first_states = generated.run()
    second, second_states = generated.run(ir.parse(ir.print_module(generated.module)))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert list(first_states) == list(second_states) == list(states)
    for name, state in first_states.items():
        np.testing.assert_array_equal(state.keys, second_states[name].keys)
        assert isinstance(state, KVState) and generated.states[name] is states[name]
    for before, after in zip(inputs, generated.inputs, strict=True):
        np.testing.assert_array_equal(before, after)


@given(graph_modules())
def test_generated_results_are_numbers(generated: GeneratedModule) -> None:
    """The strategy keeps magnitudes moderate, or comparing results would show nothing."""
    for result, value in zip(generated.run()[0], generated.func.block.ops[-1].operands, strict=True):
        assert np.isfinite(result.astype(np.float64)).all()
        assert np.abs(result.astype(np.float64)).max(initial=0) < 1e5
        assert result.dtype == value.type.element.dtype
