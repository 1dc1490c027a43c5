"""Cluster schedules: pipelines take the time they must, collectives too, every plan is sound."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.cost_model import Work
from hw_targets.memory import Fabric, MemoryTier
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import simulate
from hw_targets.target import ComputeUnit, Target
from ir.ops.builtin import ModuleOp
from ir.stream_interpreter import interpret_stream
from passes.schedule.check_stream import check_stream
from passes.schedule.cluster_schedule import ClusterProblem, Part, emit_cluster

CLUSTER = Target(
    "cluster",
    "devices of 10 operations a second, 10 bytes a second between them",
    "x86_64-unknown-linux-gnu",
    "x86-64",
    frozenset(),
    units=(ComputeUnit("gpu", "gpu", "hbm", 1, peak=(("f32", 10.0),), count=8),),
    tiers=(MemoryTier("hbm", 1 << 20, count=8),),
    fabrics=(Fabric("nvlink", "hbm", bandwidth=10.0), Fabric("infiniband", "hbm", "cluster", bandwidth=10.0)),
    nodes=2,
)


def pipeline(stages: int, batches: int, hidden: int = 0, **changes: object) -> ClusterProblem:
    """Stages of 2 s a micro-batch."""
    parts = tuple((Part(f"stage.{s}", Work(20.0, "f32")),) for s in range(stages))
    made = ClusterProblem("gpu", "hbm", parts, 1, hidden, batches=batches, across="infiniband")
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stages", "batches"), [(1, 1), (2, 1), (4, 1), (4, 8), (3, 5)])
def test_a_pipeline_takes_batches_plus_stages_less_one(stages: int, batches: int) -> None:
    timeline = simulate(emit_cluster(pipeline(stages, batches)), CLUSTER)
    assert timeline.seconds == pytest.approx(2.0 * (batches + stages - 1))
    assert timeline.utilisation("gpu[0]") == pytest.approx(batches / (batches + stages - 1))


def test_messages_run_under_the_next_batch() -> None:
    """Messages of 1 s: only those of the first micro-batch, one between each two stages, are seen."""
    timeline = simulate(emit_cluster(pipeline(3, 4, hidden=10)), CLUSTER)
    assert timeline.seconds == pytest.approx(2.0 * 6 + 2 * 1.0)
    assert timeline.critical == pytest.approx({"gpu f32": 12.0, "infiniband": 2.0})


def test_tokens_come_back_before_the_next_step() -> None:
    """One batch: the stages take turns, 2 x 4 s and the tokens (0.5 s) between the steps. As many batches as stages:
    every device is at work from its first batch on, but for the way of the tokens."""
    one = simulate(emit_cluster(pipeline(2, 1, steps=2, token_bytes=5)), CLUSTER)
    assert one.seconds == pytest.approx(8.5)
    two = simulate(emit_cluster(pipeline(2, 2, steps=3, token_bytes=0)), CLUSTER)
    assert two.seconds == pytest.approx(2.0 * (3 * 2 + 1))


def test_tensor_parallel_collectives() -> None:
    """Four devices: an all-reduce of 20 bytes moves 2 * 3/4 * 20 bytes each way: 3 s; an all-to-all 3/4: 1.5 s."""
    parts = (
        (Part("attention", Work(10.0, "f32"), "all_reduce", 20), Part("mlp", Work(20.0, "f32"), "all_to_all", 20)),
    )
    timeline = simulate(emit_cluster(ClusterProblem("gpu", "hbm", parts, 4, 20, within="nvlink")), CLUSTER)
    assert timeline.seconds == pytest.approx(1 + 3 + 2 + 1.5)
    assert timeline.critical == pytest.approx({"nvlink": 4.5, "gpu f32": 3.0})
    alone = simulate(emit_cluster(ClusterProblem("gpu", "hbm", parts, 1, 20)), CLUSTER)
    assert alone.seconds == pytest.approx(3.0)


@st.composite
def clusters(draw: st.DrawFn) -> ClusterProblem:
    stages, tensor = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (3, 2), (4, 4)]))
    kinds = st.sampled_from(["", "all_reduce", "all_gather", "all_to_all", "reduce_scatter"])
    hidden = draw(st.integers(0, 40))
    parts = []
    for s in range(stages):
        own = []
        for n in range(draw(st.integers(1, 3))):
            work = Work(float(draw(st.integers(0, 40))), "f32", (("hbm", 8.0),))
            own.append(Part(f"{s}.{n}", work, draw(kinds), draw(st.integers(0, hidden))))
        parts.append(tuple(own))
    return ClusterProblem(
        "gpu", "hbm", tuple(parts), tensor, hidden, tuple(100 * (s + 1) for s in range(stages)),
        draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 8)), "nvlink", "infiniband",
    )  # fmt: skip


MEASURED = dataclasses.replace(CLUSTER, tiers=(MemoryTier("hbm", 1 << 20, read_bandwidth=100.0, count=8),))


@settings(max_examples=15, deadline=None)
@given(clusters())
def test_every_cluster_plan_is_sound(problem: ClusterProblem) -> None:
    """And holds, besides what is resident, no more than three hidden states and the tokens of each batch."""
    program = emit_cluster(problem)
    ir.verify(ModuleOp.create(program))
    assert [d.message for d in check_stream(program, MEASURED)] == []
    timeline = simulate(program, MEASURED)
    assert timeline.seconds >= plan_bound(program, MEASURED).seconds * (1 - 1e-9)
    most = 3 * problem.hidden_bytes + (problem.batches + 1) * problem.token_bytes
    trace = interpret_stream(program)
    for number in range(problem.devices):
        home = problem.resident_bytes[number // problem.tensor]
        assert home <= trace.peak_bytes[f"hbm[{number}]"] <= home + most
    parts = [kernel for _, kernel, _ in trace.computed if kernel != "sample"]
    assert len(parts) == problem.steps * problem.batches * problem.tensor * sum(map(len, problem.stages))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"across": ""}, "stages need `across`"),
        ({"tensor": 2}, "several devices of a stage `within`"),
        ({"batches": 0}, "one stage, device, micro-batch and step"),
        ({"resident_bytes": (1,)}, "resident bytes of 2 stages, got 1"),
    ],
)
def test_problems_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emit_cluster(dataclasses.replace(pipeline(2, 1), **changes))  # type: ignore[arg-type]
