"""Stand-ins for missing experts: none unless asked for, the bits of the low-bit model where all are used, and as many
as a replay of the same routing counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stratum
from hw_targets.expert_cache import StandIns, replay
from runtime import Session, open_artifact
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_reader import manifest_digest, parse_manifest
from runtime.stand_ins import in_program, largest_shares, stand_in, stand_in_pieces
from runtime.stream_plan import StreamPlan, least_expert_bytes, live_bytes
from stratum.routing_recorder import RoutingRecorder
from tests.plain_code import plain_code
from tests.stratum.tiny_model import QWEN3_MOE, VOCAB, write_model

pytestmark = pytest.mark.slow
LOW = """name = "low"
[weights]
format = "float"
[[rule]]
role = "experts"
format = "q2_sym<group=32, scale=f16>"
activations = "q8_sym<group=128, scale=f32>"
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as it is, with stand-ins beside the experts, and with experts in their formats."""
    folder = tmp_path_factory.mktemp("stand_ins")
    (folder / "low.toml").write_text(LOW)
    model = write_model(folder / "model", QWEN3_MOE)
    options = {"full": {}, "both": {"stand_ins": "w2a8"}, "low": {"recipe": str(folder / "low.toml")}}
    with plain_code():
        return {name: stratum.build(model, folder / name, **more) for name, more in options.items()}


def plan_of(path: Path, times: int = 1, **changes: object) -> StreamPlan:
    """Dense weights stay; a cache of so many tokens' experts."""
    manifest = open_artifact(path).manifest
    dense = tuple(n for n, piece in enumerate(manifest.weights.pieces) if piece.kind in ("dense", "rows"))
    window = max(live_bytes(manifest, program, frozenset(dense)) for program in manifest.programs)
    plan = StreamPlan(1 << 30, dense, window, times * least_expert_bytes(manifest), threads=2)
    return StreamPlan(**vars(plan) | changes)  # type: ignore[arg-type]


def told(path: Path, plan: StreamPlan | None, recorder: RoutingRecorder | None = None) -> tuple[np.ndarray, object]:
    """Logits of a prompt of 5 tokens and of 12 more one by one; and the report."""
    ids = np.random.default_rng(3).integers(0, VOCAB, 17)
    with Session(path, threads=1, max_context=64, stream=plan, routing=recorder) as session:
        found = [session.step(ids[:5], range(5), [0] * 5, [4])]
        found += [session.step([ids[at]], [at], [0], [0]) for at in range(5, 17)]
        return np.concatenate(found), session.streamer.report() if session.streamer is not None else None


def test_nothing_changes_unless_it_is_asked_for(artifacts: dict[str, Path]) -> None:
    expected, _ = told(artifacts["full"], None)
    for path, plan in (
        (artifacts["both"], None),
        (artifacts["both"], plan_of(artifacts["both"])),
        (artifacts["full"], plan_of(artifacts["full"])),
        (artifacts["both"], plan_of(artifacts["both"], stand_ins=1e-9)),  # no expert is that light
    ):
        found, report = told(path, plan)
        np.testing.assert_array_equal(found, expected)
        assert report is None or (report.stand_ins, report.full_model) == (0, True)  # pyright: ignore
    assert "the output is that of the full model" in str(report)
    formats = [json.loads((artifacts[name] / "manifest.json").read_text())["weights"] for name in ("full", "both")]
    assert all(formats[0][key] == formats[1][key] for key in ("formats", "bits_per_weight"))


def test_where_all_are_replaced_the_model_is_the_low_bit_one(artifacts: dict[str, Path]) -> None:
    """Every share is below 1, so nothing is ever read in full."""
    expected, _ = told(artifacts["low"], None)
    found, report = told(artifacts["both"], plan_of(artifacts["both"], stand_ins=1.0))
    np.testing.assert_array_equal(found, expected)
    assert report.stand_ins == report.expert_lookups > 0 and not report.full_model  # pyright: ignore
    assert "is not that of the full model" in str(report)


@pytest.mark.parametrize(("policy", "scope"), [("lrfu", "global"), ("lru", "layer"), ("score", "global")])
def test_as_many_as_a_replay_counts(artifacts: dict[str, Path], policy: str, scope: str) -> None:
    path = artifacts["both"]
    manifest = open_artifact(path).manifest
    low = tuple(manifest.weights.pieces[n].unit for n in stand_in_pieces(manifest).values())
    plan = plan_of(path, 3, stand_ins=0.45, policy=policy, scope=scope)
    recorder = RoutingRecorder()
    found, report = told(path, plan, recorder)
    again, _ = told(path, plan)
    np.testing.assert_array_equal(found, again)
    trace = recorder.trace(manifest)
    assert np.isfinite(trace.weights).all() and (trace.experts < 4).all()
    counted = replay(trace, plan.expert_bytes, policy=policy, scope=scope, stand_ins=StandIns(0.45, low))
    assert 0 < counted.stand_ins < counted.lookups
    told_of = (report.stand_ins, report.expert_lookups, report.expert_hits)  # pyright: ignore
    assert told_of == (counted.stand_ins, counted.lookups, counted.hits)
    resident = sum(manifest.weights.pieces[n].bytes for n in plan.resident)
    assert report.read_bytes == resident + counted.read_bytes  # pyright: ignore


def test_guesses_of_light_experts_are_not_read(artifacts: dict[str, Path]) -> None:
    path = artifacts["both"]
    few, _ = told(path, plan_of(path, 3, stand_ins=0.45, guesses=2))
    again, report = told(path, plan_of(path, 3, stand_ins=0.45, guesses=2))
    np.testing.assert_array_equal(few, again)
    _, all_light = told(path, plan_of(path, 3, stand_ins=1.0, guesses=2))
    assert report.guesses_read > 0 and all_light.guesses_read == 0  # pyright: ignore


def test_stand_ins_that_cannot_be_had_are_refused(artifacts: dict[str, Path]) -> None:
    with pytest.raises(RuntimeDiagnostic, match="no second copies of its experts"):
        Session(artifacts["full"], threads=1, stream=plan_of(artifacts["full"], stand_ins=0.2))
    for share in (-0.1, 1.5, True, "x"):
        text = json.dumps({**json.loads(plan_of(artifacts["both"]).to_json()), "stand_ins": share})
        with pytest.raises(RuntimeDiagnostic, match="'stand_ins' of the stream plan"):
            StreamPlan.from_json(text)
    plan = plan_of(artifacts["both"], stand_ins=0.25)
    assert StreamPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"piece": 1 << 19}, r"stand_ins\.piece"),
        ({"piece": 0}, r"stand_ins\.piece"),
        ({"weights": 1 << 40}, r"stand_ins\.weights"),
        ({"weights": 2}, r"stand_ins\.weights"),
        ({"weights": "x"}, "weights"),
    ],
)
def test_stand_ins_outside_of_the_artifact_are_refused(artifacts: dict[str, Path], change: dict, message: str) -> None:
    raw = json.loads((artifacts["both"] / "manifest.json").read_text())
    wait = next(w for w in raw["programs"]["decode"]["awaits"] if "stand_ins" in w)
    wait["stand_ins"] |= change
    raw["manifest_sha256"] = manifest_digest(raw)
    with pytest.raises(RuntimeDiagnostic, match=message):
        parse_manifest(json.dumps(raw).encode(), "here")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_largest_share_of_any_token_counts(tokens: int, top_k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.uniform(0, 1, (tokens, top_k)).astype(np.float32)
    weights[random.uniform(size=weights.shape) < 0.2] = 0
    experts = np.stack([random.permutation(6)[:top_k] for _ in range(tokens)])
    found = largest_shares(experts.ravel().tolist(), weights)
    for expert in range(6):
        shares = [
            weights[t, s] / weights[t].sum(dtype=np.float64) if weights[t].sum() > 0 else 1 / top_k
            for t in range(tokens)
            for s in range(top_k)
            if experts[t, s] == expert
        ]
        assert found.get(expert, -1.0) == pytest.approx(max(shares, default=-1.0))
    bad = largest_shares([0, 1], np.array([[np.nan, 1.0]], np.float32))
    assert bad == {0: 0.5, 1: 0.5}


def test_numbers_of_stand_ins(artifacts: dict[str, Path]) -> None:
    assert [stand_in(stand_in(e)) for e in range(4)] == [0, 1, 2, 3] and stand_in(0) == -1
    manifest = open_artifact(artifacts["both"]).manifest
    piece = next(p for p in manifest.weights.pieces if p.kind == "experts")
    assert in_program([3, stand_in(0), stand_in(3)], piece) == [3, 4, 7]
