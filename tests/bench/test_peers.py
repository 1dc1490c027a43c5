"""The comparison with peers: how engines answer, and how bars are judged. The peers themselves are not needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.peers import measurement, report
from bench.peers.child import Engine, EngineError, token_ids
from bench.peers.measurement import Measured, Quantized, Samples
from bench.peers.models import Models
from bench.peers.sections import BATCHES, DENSE, KEYS, SECTIONS, Bar, Section, product_operations
from examples.model_presets import config_fields, tensor_shapes

CHILD = """
from bench.peers.child import serve
def decode(request):
    print("a library prints this")
    if request["tokens"] == 0:
        raise ValueError("no tokens")
    if request["tokens"] == 13:
        import os
        os.write(2, b"out of luck\\n")
        os._exit(3)
    return {"seconds": request["tokens"] / 2}
serve({"about": lambda request: {"version": "toy 1", "bytes": 8}, "decode": decode})
"""


def section(*bars: Bar, action: str = "decode", each: bool = False) -> Section:
    return Section("key", "title", DENSE, ("stratum:a", "llama.cpp:b", "openvino:g32"), action, 10, 0, bars, each)


def samples(engine: str, *rates: float, **work: float) -> Samples:
    found = Samples(engine, list(rates), [10 / r for r in rates], [100.0] * len(rates), [1000.0] * len(rates))
    found.bytes, found.operations = work.get("bytes", 0.0), work.get("operations", 0.0)
    return found


def test_an_engine_answers_until_it_is_closed() -> None:
    with Engine("toy", [sys.executable, "-c", CHILD]) as engine:
        assert engine.about == {"version": "toy 1", "bytes": 8}
        assert engine.ask({"do": "decode", "tokens": 4}) == {"seconds": 2.0}
        with pytest.raises(EngineError, match="toy: ValueError: no tokens"):
            engine.ask({"do": "decode", "tokens": 0})
        assert engine.ask({"do": "decode", "tokens": 6}) == {"seconds": 3.0}
        with pytest.raises(EngineError, match="toy ended with 3: out of luck"):
            engine.ask({"do": "decode", "tokens": 13})


def test_tokens_are_the_same_and_spread() -> None:
    ids = token_ids(512, 32000)
    assert ids[:100] == token_ids(100, 32000)
    assert all(0 <= i < 32000 for i in ids) and len(set(ids)) > 450 and max(ids) > 31000 and min(ids) < 1000


def test_bars_against_peers_are_judged_round_by_round() -> None:
    bars = (Bar("best peer", 1.25), Bar("llama.cpp", 2.5), Bar("openvino", 1.3))
    rows = [samples("stratum:a", 60, 30, 90), samples("llama.cpp:b", 20, 10, 30), samples("openvino:g32", 40, 25, 70)]
    found = report.verdicts([Measured(section(*bars), rows)], None)
    assert [v.passed for v in found] == [True, True, False]
    assert "1.29 x openvino:g32" in found[0].found and "3.00 x llama.cpp:b" in found[1].found


def test_a_ratio_says_what_the_bandwidth_allows() -> None:
    rows = [samples("stratum:a", 10, 10, bytes=80.0), samples("llama.cpp:b", 8, 8)]  # 80 of the machine's 100 bytes/s
    (verdict,) = report.verdicts([Measured(section(Bar("llama.cpp", 1.25)), rows)], None)
    assert verdict.found == "10.0 tok/s, 1.25 x llama.cpp:b (8.0); 1.56 x would be all of the bandwidth"


def test_bars_against_the_machine() -> None:
    bars = (Bar("bandwidth", 0.9), Bar("vnni", 0.62))
    rows = [samples("stratum:a", 10, 10, bytes=91.0, operations=600.0)]
    found = report.verdicts([Measured(section(*bars), rows)], None)
    assert [(v.found, v.passed) for v in found] == [("91.0 %", True), ("60.0 %", False)]


def test_each_width_has_its_own_verdict_and_a_failed_build_none() -> None:
    rows = [
        samples("stratum:a", 10, bytes=85.0),
        samples("stratum:b", 10, bytes=70.0),
        Samples("stratum:c", fault="no"),
    ]
    found = report.verdicts([Measured(section(Bar("bandwidth", 0.8), each=True), rows)], None)
    assert [(v.row, v.passed) for v in found] == [
        ("title: stratum:a", True), ("title: stratum:b", False), ("title: stratum:c", None),
    ]  # fmt: skip
    assert found[2].found == "no"


def test_no_peer_is_no_verdict() -> None:
    (found,) = report.verdicts([Measured(section(Bar("best peer", 1.25)), [samples("stratum:a", 10)])], None)
    assert found.passed is None and "no peer" in found.found


def test_batches_are_set_against_one_sequence() -> None:
    rates = {1: 10.0, 2: 19.0, 4: 36.0, 8: 56.0, 16: 80.0}
    rows = [samples(f"batch {n}", rates[n], rates[n]) for n in BATCHES]
    (found,) = report.verdicts([Measured(section(Bar("linear", 0.7), action="batch"), rows)], None)
    assert found.passed and found.found == "56.0 tok/s, 0.70 x linear"


def test_a_batch_says_what_the_products_allow() -> None:
    rates = {1: 10.0, 2: 19.0, 4: 36.0, 8: 50.0, 16: 80.0}
    rows = [samples(f"batch {n}", rates[n], rates[n], operations=150.0) for n in BATCHES]
    item = Measured(section(Bar("linear", 0.7), action="batch"), rows)
    (found,) = report.verdicts([item], None)
    # 150 operations for ten tokens of one sequence: at 1000 a second 66.7 tokens/s, where eight times one are 80.
    assert found.found == "50.0 tok/s, 0.62 x linear; 0.83 x would be all of the VNNI peak" and not found.passed


def test_quantizing_has_a_rate_and_a_peak() -> None:
    found = report.verdicts([], Quantized(3 * 10**9, (10.0, 20.0, 12.0), 900 << 20))
    assert [(v.found, v.passed) for v in found] == [("250 MB/s of source", True), ("900 MiB", True)]


def test_a_report_holds_every_engine() -> None:
    rows = [samples("stratum:a", 10, bytes=85.0), Samples("llama.cpp:b", fault="it broke")]
    text = report.markdown([Measured(section(Bar("bandwidth", 0.8)), rows)], None, ["A note."])
    assert "85.0 % of bandwidth" in text and "it broke" in text and text.endswith("A note.")


def test_operations_of_products_are_two_a_weight_and_token() -> None:
    fields = config_fields(DENSE)
    weights = {t.name: t.shape for t in tensor_shapes(fields) if t.role == "matrix"}
    layers = sum(a * b for name, (a, b) in weights.items() if name != "lm_head.weight")
    head = weights["lm_head.weight"][0] * weights["lm_head.weight"][1]
    assert product_operations(fields, 512) == 2 * (512 * layers + head)


def test_sections_are_told_apart_and_their_engines_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(KEYS)) == len(KEYS)
    for kind in ("artifact", "gguf", "openvino"):
        monkeypatch.setattr(Models, kind, lambda self, *what: tmp_path / "-".join(str(w) for w in what))
    models = Models(tmp_path, None, print)
    for item in SECTIONS:
        for engine in item.engines:
            command = measurement.engine_command(engine, item, models, Path("python"), 2)
            assert command[1] == "-m" and command[2].startswith("bench.peers.") and "--threads" in command
            assert item.model in command[3]


def test_a_depth_is_straddled_by_an_engine_that_cannot_go_back() -> None:
    deep = Section("d", "d", DENSE, (), "decode", 30, 2048)
    assert deep.request("stratum:x", 5) == {"do": "decode", "tokens": 30, "warm": 2, "depth": 2048}
    assert deep.request("openvino:g128", 5)["ahead"] == 96  # six requests of 32 tokens, half of them before the depth
