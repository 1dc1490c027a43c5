"""Routing traces: the recorded file, writing and reading back, and every fault of a file that must be refused."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_targets.routing import read_trace, write_trace
from hw_targets.routing.trace_file import format_trace, parse_trace
from ir.diagnostics import DiagnosticError
from tests.hw_targets.routing_samples import DATA, qwen_trace, small_trace

HEAD = """# route_trace v1
# model=m arch=a n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=200
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
ROWS = """0,0,0,0,0,3,0.5,0,100
0,0,0,0,1,1,0.25,0,100
0,0,1,0,0,1,0.5,1,0
0,0,1,0,1,2,nan,0,100
0,0,1,1,0,0,0.5,0,200
0,0,1,1,1,2,0.5,0,200
0,1,2,0,0,1,0.5,1,0
0,1,2,0,1,3,0.5,1,0
"""


def test_the_recorded_trace() -> None:
    trace = qwen_trace()
    assert (trace.tokens, trace.decode_tokens, trace.layer_count, trace.top_k) == (156, 128, 48, 6)
    assert trace.cycle_bytes == 822_804_480  # 784.7 MiB, of two sizes of expert
    assert set(trace.expert_bytes) == {3_059_712, 2_654_208}
    # Only the last token of a prompt goes through the last layer's experts.
    assert (trace.experts[:27, 47] == -1).all() and (trace.experts[27:] >= 0).all()
    batches = list(trace.batches())
    assert len(batches) == 48 + 128 * 48
    assert [b.layer for b in batches[:49]] == [*range(48), 0]
    assert not batches[47].decode and batches[48].decode
    assert len(batches[0].experts) == 70


def test_what_a_cache_sees() -> None:
    trace = parse_trace(HEAD + ROWS)
    assert trace.expert_bytes == (100, 200) and trace.dense_bytes == (7, 0)
    first, second, third = trace.batches()
    assert (first.layer, first.decode, first.step) == (0, False, 0)
    assert first.experts == (3, 1, 2)  # by first appearance, token by token
    assert first.recency == (3, 1, 2)
    # Weights are shares of the batch's; the one that is not known counts as 1.
    assert first.weights == pytest.approx((0.5 / 2.25, 0.75 / 2.25, 1 / 2.25))
    assert (second.layer, second.experts) == (1, (0, 2))
    assert (third.layer, third.decode, third.step, third.experts) == (0, True, 1, (1, 3))


def test_an_expert_chosen_again_is_the_most_recent() -> None:
    batch = next(small_trace([[[1, 2]], [[3, 1]]], prompt=2).batches())
    assert batch.experts == (1, 2, 3)
    assert batch.recency == (2, 3, 1)


def test_columns_are_found_by_name_and_others_ignored() -> None:
    head, names = HEAD.rsplit("\n", 2)[0], "more,expert,layer,phase,slot,step,turn,weight,batch"
    trace = parse_trace(f"{head}\n{names}\nx,3,1,1,0,9,0,0.5,4\nx,2,1,1,0,9,1,0.5,4\n")
    assert trace.experts.tolist() == [[[3, -1]], [[2, -1]]]
    assert trace.batch.tolist() == [4, 4]  # two sequences in one batch
    assert [b.experts for b in trace.batches()] == [(3, 2)]


def test_gzip_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.gz").write_bytes(gzip.compress((HEAD + ROWS).encode()))
    assert read_trace(tmp_path / "t.gz").tokens == 3


def test_the_recorded_trace_written_and_read_back(tmp_path: Path) -> None:
    trace = qwen_trace()
    write_trace(trace, tmp_path / "t.csv")
    again = read_trace(tmp_path / "t.csv")
    assert (again.experts == trace.experts).all()
    assert np.allclose(again.weights, trace.weights, rtol=1e-5, equal_nan=True)
    for name in ("decode", "position", "turn", "batch"):
        assert (getattr(again, name) == getattr(trace, name)).all()
    assert (again.layers, again.expert_bytes, again.dense_bytes) == (
        trace.layers,
        trace.expert_bytes,
        trace.dense_bytes,
    )


@given(st.lists(st.lists(st.permutations(range(4)), min_size=2, max_size=2), min_size=1, max_size=9), st.integers(0, 9))
def test_any_choices_written_and_read_back(choices: list[list[list[int]]], prompt: int) -> None:
    trace = small_trace([[ids[:2] for ids in token] for token in choices], prompt=min(prompt, len(choices)), experts=4)
    again = parse_trace(format_trace(trace))
    assert (again.experts == trace.experts).all()
    assert list(again.batches()) == list(trace.batches())


LINE = "0,1,2,0,0,1,0.5,1,0\n"
# name -> (text, what the message must say)
HOSTILE: dict[str, tuple[str, str]] = {
    "empty": ("", "not a routing trace"),
    "another file": ("step,steps\n1,2\n", "not a routing trace"),
    "no column names": ("# route_trace v1\n", "no line of column names"),
    "no facts": ("# route_trace v1\nturn,phase,step,layer,slot,expert,weight\n", "n_expert is not given"),
    "no rows": (HEAD, "no lines of routed experts"),
    "no column": (HEAD.replace(",slot", ",slots") + ROWS, "no column 'slot'"),
    "column twice": (HEAD.replace(",residency", ",slot") + ROWS, "a column stands twice"),
    "too few fields": (HEAD + ROWS + "0,1,2\n", ":14: error: 3 fields"),
    "not a number": (HEAD + ROWS + LINE.replace("0,1,2", "0,one,2"), ":14: error: phase is 'one'"),
    "half an expert": (HEAD + ROWS + LINE.replace(",1,0.5", ",1.5,0.5"), "expert is 1.5"),
    "expert beyond the count": (HEAD + ROWS + LINE.replace(",1,0.5", ",4,0.5"), "expected: a whole number from 0 to 3"),
    "negative step": (HEAD + ROWS + LINE.replace("1,2,", "1,-2,"), "step is -2"),
    "infinite step": (HEAD + ROWS + LINE.replace("1,2,", "1,inf,"), "step is inf"),
    "step is no number": (HEAD + ROWS + LINE.replace("1,2,", "1,nan,"), "step is nan"),
    "phase of 2": (HEAD + ROWS + LINE.replace("0,1,2", "0,2,2"), "phase is 2"),
    "slot beyond top k": (HEAD + ROWS + LINE.replace("2,0,0,", "2,0,2,"), "slot is 2"),
    "slot twice": (HEAD + ROWS + LINE, "slot 0 of layer 0 at step 2 is given twice"),
    "layer without size": (HEAD + ROWS + LINE.replace("2,0,0,", "2,3,0,"), "layer 3 has routed experts, but no size"),
    "layer of size 0": (HEAD.replace("=200", "=0") + ROWS, "layer 1 has routed experts, but no size"),
    "layer described twice": (HEAD.replace("layer=1", "layer=0") + ROWS, "layer 0 is described twice"),
    "huge layer": (HEAD + ROWS + LINE.replace("2,0,0,", "2,99999999,0,"), "layer is 1e+08"),
    "experts beyond reason": (HEAD.replace("n_expert=4", "n_expert=99999999") + ROWS, "n_expert is '99999999'"),
    "more used than there are": (HEAD.replace("used=2", "used=5") + ROWS, "n_expert_used is '5'"),
    "a very long number": (HEAD.replace("bytes=100", "bytes=" + "9" * 400) + ROWS, "expert_bytes is '999"),
    "a very long line": ("# route_trace v1\n#" + "x" * 5000, "a line of 5001 characters"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_file_is_refused(name: str) -> None:
    text, message = HOSTILE[name]
    with pytest.raises(DiagnosticError) as caught:
        parse_trace(text, where="t.csv")
    assert message in str(caught.value)
    assert str(caught.value).startswith("t.csv")


def test_holes_do_not_take_memory() -> None:
    """A few lines that name many tokens and layers must not make an array of all of them."""
    layers = "".join(f"# layer={n} expert_bytes=1\n" for n in range(4000))
    rows = "".join(f"0,1,{n},{n},0,0,1,0,0\n" for n in range(4000))
    head = HEAD.split("# layer")[0] + layers + HEAD.splitlines()[-1] + "\n"
    with pytest.raises(DiagnosticError, match="nearly all are missing"):
        parse_trace(head + rows)


@pytest.mark.parametrize("cut", [5, 1000])
def test_damaged_gzip_is_refused(tmp_path: Path, cut: int) -> None:
    data = (DATA / "qwen.route.csv.gz").read_bytes()
    (tmp_path / "t.gz").write_bytes(data[:cut])
    with pytest.raises(DiagnosticError, match="gzip data end too early"):
        read_trace(tmp_path / "t.gz")
    (tmp_path / "t.gz").write_bytes(data[:1000] + b"\0" * 1000 + data[2000:])
    with pytest.raises(DiagnosticError, match=r"damaged gzip data|not UTF-8"):
        read_trace(tmp_path / "t.gz")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(DiagnosticError, match="cannot be read"):
        read_trace("/nowhere/t.csv")


def test_the_example_of_the_documentation_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "routing_traces.md"
    example = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    exec(compile(example[1], page.name, "exec", dont_inherit=True), {})
