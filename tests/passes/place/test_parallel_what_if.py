"""What more of something would buy for many devices."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.shape_library import load_shape
from hw_targets.target import Fabric, Target
from ir.diagnostics import DiagnosticError
from ir.formats.plain import NumberFormat
from passes.place.eight_bits import EightBits, formats_below_floats
from passes.place.formats import formats_of, next_down
from passes.place.gain import GIB, with_rate
from passes.place.parallel import Spread, best_of, search, spreads
from passes.place.parallel_what_if import Devices, device_gains
from passes.place.parts import parts_of
from passes.place.problem import Session, Slo
from stratum.plan_report import plan_text
from stratum.plan_request import PlanRequest
from stratum.planning import make_plan
from tests.passes.place.machines import MIB, dense, sparse, target

# Of H100s what 1 GiB, and 10 GB/s of each, come to; reserves and efficiencies stay.
MORE = {
    "+1 GiB of each hbm": "hbm.capacity=81073741824B",
    "+10 GB/s of each hbm": "hbm.read=3.36TB/s",
    "+10 GB/s of each nvlink": "nvlink=460GB/s",
    "+10 GB/s of each infiniband": "infiniband=60GB/s",
}


@pytest.mark.parametrize(
    ("model", "name", "batch", "slo"),
    [
        ("Llama-3.1-70B", "8xh100", 1, None),
        ("Llama-3.1-70B", "8xh100", 0, "tpot=40ms"),
        ("Qwen3-235B-A22B", "64xh100", 64, None),
    ],
)
def test_gains_are_plans_of_the_changed_machine(model: str, name: str, batch: int, slo: str | None) -> None:
    asked = PlanRequest(model, name, batch=batch, slo=slo)
    planned = make_plan(asked)
    named = {gain.what: gain for gain in planned.gains}
    changes = {what: more for what, more in MORE.items() if "infiniband" not in what or name == "64xh100"}
    assert set(named) == {*changes, "--recipe w8a8"}
    assert list(planned.gains) == sorted(planned.gains, key=lambda g: (-g.saved, g.what))
    for what, gain in named.items():
        changed = {"target": f"{name}{{{changes[what]}}}"} if what in changes else {"recipe": "w8a8"}
        after = make_plan(dataclasses.replace(asked, what_if=False, **changed)).placement
        assert (gain.decode, gain.prefill) == (after.decode.seconds, after.prefill.seconds)
        assert gain.batch == (after.session.batch if batch == 0 else None)
        assert 0.0 <= gain.saved < 1.0
    assert named["--recipe w8a8"].saved > 0.1


def test_gains_are_shown_and_can_be_left_out() -> None:
    text = plan_text(make_plan(PlanRequest("DeepSeek-V3", "64xh100")))
    rows = [line.split("  ")[0] for line in text[text.index("what would help") :].splitlines()]
    assert rows[:3] == ["what would help", "(as it is)", "--recipe w8a8"] and set(MORE) <= set(rows)
    assert "a session is shorter by" in text
    text = plan_text(make_plan(PlanRequest("Llama-3.1-70B", "8xh100", "fp8", batch=0)))
    assert "batch  a token takes less by" in text
    assert "what would help" not in plan_text(make_plan(PlanRequest("Llama-3.1-70B", "8xh100", what_if=False)))


def test_room_lets_other_ways_and_batches_fit() -> None:
    # Of 8 MiB a device everything has to be cut; with a GiB more each device has all, or takes more sequences.
    shape, machine, use = dense(8), target(gpus=4, vram=8 * MIB, link=3e6), Session(64, 4, 16, 16)
    for any_batch in (False, True):
        ways = tuple(spreads(shape, machine, formats_of(""), use, any_batch=any_batch))
        best = best_of(ways, any_batch=any_batch)
        assert best is not None
        found = Devices(shape, machine, formats_of(""), use, ways, best, any_batch=any_batch)
        gain = next(g for g in device_gains(found) if g.what == "+1 GiB of each vram")
        assert gain.saved > 0.0
        assert gain.batch is None if not any_batch else (gain.batch or 0) > best.batch


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_no_gain_is_negative_and_each_is_what_a_search_finds(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([dense(4), sparse(4, experts=8)]))
    vram, rate = data.draw(st.sampled_from([3, 6, 64])) * MIB, data.draw(st.sampled_from([1e9, 1e11]))
    machine = target(gpus=4, vram=vram, hbm_rate=rate, link=data.draw(st.sampled_from([3e7, 2e10])))
    speeds = st.sampled_from([1e9, 3e10, 9e11])
    fabrics = (
        [Fabric("inner", "vram", "node", data.draw(speeds), 1e-6, efficiency=0.5)] if data.draw(st.booleans()) else []
    )
    nodes = data.draw(st.sampled_from([1, 2]))
    if nodes > 1 and data.draw(st.booleans()):
        fabrics.append(Fabric("outer", "vram", "cluster", data.draw(speeds), 1e-5))
    machine = dataclasses.replace(machine, fabrics=tuple(fabrics), nodes=nodes)
    any_batch, formats = data.draw(st.booleans()), formats_of(data.draw(st.sampled_from(["", "w8a8"])))
    use = Session(64, data.draw(st.sampled_from([1, 8])), 16, 16)
    ways = tuple(spreads(shape, machine, formats, use, any_batch=any_batch))
    best = best_of(ways, any_batch=any_batch)
    if best is None:
        return
    slo = Slo(tpot=best.decode.seconds * 1.1) if data.draw(st.booleans()) else Slo()
    for gain in device_gains(Devices(shape, machine, formats, use, ways, best, slo, any_batch)):
        lower = next_down(formats) if gain.what.startswith("--recipe") else formats
        assert lower is not None
        after = search(shape, _changed(machine, gain.what), lower, use, slo, any_batch=any_batch)
        assert after is not None and (gain.decode, gain.prefill) == (after.decode.seconds, after.prefill.seconds)
        assert gain.batch == (after.batch if any_batch else None)
        saved = 1.0 - _score(after, any_batch) / _score(best, any_batch)
        assert 0.0 <= gain.saved < 1.0 and gain.saved == pytest.approx(max(0.0, saved), abs=1e-9)
        assert lower is not formats or saved >= -1e-12  # more of a resource never lengthens anything


def _score(way: Spread, any_batch: bool) -> float:
    return 1.0 / way.tokens_per_second if any_batch else way.objective


def _changed(machine: Target, what: str) -> Target:
    """The machine with what a gain names."""
    name = what.split()[-1]
    if what.startswith("+1 GiB"):
        tiers = [dataclasses.replace(t, capacity_bytes=(t.capacity_bytes or 0) + GIB) for t in machine.tiers]
        return dataclasses.replace(machine, tiers=tuple(tiers))
    if name in ("inner", "outer"):
        fabrics = [
            dataclasses.replace(f, bandwidth=(f.bandwidth or 0.0) + 10e9) if f.name == name else f
            for f in machine.fabrics
        ]
        return dataclasses.replace(machine, fabrics=tuple(fabrics))
    faster = with_rate(machine, "vram read" if name == "vram" else name) if what.startswith("+10 GB/s") else None
    return machine if faster is None else faster[0]


@given(st.lists(st.integers(0, 40), max_size=2), st.integers(0, 5000))
def test_eight_bits_are_as_large_as_their_format(outer: list[int], row: int) -> None:
    real, named = formats_of("w8a8").recipe.choice("", "mlp.gate").format, EightBits()
    assert isinstance(real, NumberFormat) and str(real) == str(named)
    for shape in ((*outer, row), (*outer, row // 32 * 32)):
        try:
            nbytes = real.nbytes(shape)
        except DiagnosticError:
            with pytest.raises(DiagnosticError, match="groups of 32"):
                named.nbytes(shape)
        else:
            assert named.nbytes(shape) == nbytes


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "DeepSeek-V3", "Qwen3-30B-A3B", "OLMoE-1B-7B-0924"])
def test_below_floats_is_the_recipe(name: str) -> None:
    shape = load_shape(name)
    for found, real in zip(
        parts_of(shape, formats_below_floats("bf16")), parts_of(shape, formats_of("w8a8")), strict=True
    ):
        assert found == real
