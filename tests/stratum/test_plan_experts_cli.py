"""`plan --by-expert`: printed, in the JSON, given back, saved as a recipe that builds those very bytes; refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from frontends.huggingface import import_model
from hw_targets.routing.synthetic import SESSION, synthetic_trace
from hw_targets.routing.trace_file import write_trace
from ir.ops.moe import GroupedGemmOp
from passes.analysis.value_types import tensor_type
from passes.pass_base import PassContext
from passes.pass_manager import PassManager
from passes.pipelines import fuse_across_kernels, simplify
from passes.place.placement import Placement, layer_numbers
from passes.quantize.quantize import QuantizePass
from stratum.cli import main

TINY = Path(__file__).parents[2] / "examples" / "tiny-moe"
ASKED = [
    "--target",
    "ddr4-desktop",
    "--memory",
    "2MiB",
    "--ctx",
    "64",
    "--prompt-tokens",
    "8",
    "--quick",
    "--formats",
    "w4a8-g32,w2a8",
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trace") / "routing.csv"
    write_trace(synthetic_trace(SESSION, experts=8, top_k=2, layers=5, tokens=64), path)
    return str(path)


def test_a_plan_by_expert_is_printed_saved_and_built(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, recipe = tmp_path / "plan.json", tmp_path / "chosen.toml"
    short = [str(TINY), *ASKED, "--trace", trace]
    bound = ["--by-expert", "--max-loss", "0.06", "--pin", "layers.0-2.experts=w4a8-g32:25%", "--pin", "kv=dram"]
    bound += ["--pin", "attention=dram", "--pin", "head=dram"]
    code, text, err = run(capsys, *short, *bound, "-o", str(plan), "--save-recipe", str(recipe))
    assert code == 0, err
    assert "experts by how often they are picked (routing.csv): 2 " in text and " of a layer in w4a8-g32, in " in text
    assert "2 of q4_sym<group=32, scale=f16> + 6 of q2_sym<group=32, scale=f16>" in text
    made = Placement.from_json(plan.read_text())
    assert made.quality is not None and made.quality.uses == "routing.csv" and made.quality.loss <= 0.06
    assert {entry.recipe for entry in made.expert_formats} == {"w4a8-g32"}
    assert {0, 1, 2} <= {layer for entry in made.expert_formats for layer in layer_numbers(entry.layers)}
    code, again, err = run(
        capsys, str(TINY), "--target", "ddr4-desktop", "--trace", trace, "--plan", str(plan), "--json"
    )
    given = Placement.from_json(again)
    assert code == 0 and given.quality is not None, err
    assert (given.decode, given.groups, given.expert_formats) == (made.decode, made.groups, made.expert_formats)
    assert given.quality.loss == made.quality.loss
    # The experts of the graph that a build makes with the recipe have the bytes that were planned.
    imported = import_model(TINY)
    with imported.checkpoint:
        passes = [*simplify(), *fuse_across_kernels(), QuantizePass((str(recipe),), "bf16")]
        roles = {name: spec.role for name, spec in imported.weights.items()}
        PassManager(passes, context=PassContext(options={"roles": roles})).run(imported.module)  # type: ignore[arg-type]
    found = [tensor_type(op.w) for op in imported.module.walk() if isinstance(op, GroupedGemmOp)]
    nbytes = sum(t.element.nbytes(tuple(d for d in t.shape if isinstance(d, int))) for t in found)
    assert nbytes == sum(g.nbytes for g in made.groups if g.group == "experts")
    assert np.unique([str(t.element) for t in found]).tolist() == [
        "q2_sym<group=32, scale=f16>",
        "q4_sym<group=32, scale=f16>",
    ]


def test_what_cannot_be_by_expert_is_said(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, str(TINY), *ASKED, "--by-expert")
    assert code == 0 and "nothing says which experts are picked more often" in text
    other = tmp_path / "other.csv"
    write_trace(synthetic_trace(SESSION, experts=8, top_k=2, layers=4, tokens=8), other)
    gpu = ["--target", "rtx-4090", "--formats", "w3", "--by-expert"]
    for arguments, words in (
        ([str(TINY), *gpu, "--trace", trace], "target rtx-4090 computes on gpu"),
        ([str(TINY), *ASKED, "--by-expert", "--trace", str(other)], "the routing trace is of 8 experts in layers"),
        ([str(TINY), *ASKED[:4], "--by-expert"], "experts of several formats without formats to choose among"),
        (["Llama-3.1-8B", "--target", "ddr4-desktop", "--formats", "w3", "--by-expert"], "has no experts"),
        ([str(TINY), *ASKED, "--pin", "experts=w2a8:0.5"], "without --by-expert the experts of a layer share"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and words in err and "Traceback" not in err, err
