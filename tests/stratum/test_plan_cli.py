"""`compile-model plan`: reports, JSON that can be given back, exit codes, and that no weight is read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from frontends.shape_library import load_shape
from passes.place.placement import SCHEMA, Placement
from passes.place.solve import NoFit
from passes.quantize.recipe import load_recipe
from stratum.cli import main
from stratum.plan_report import plan_text, seconds_text, shortened
from stratum.plan_request import parse_slo
from stratum.planning import PlanRequest, make_plan
from tests.frontends.model_files import config_of, write_model

OLMOE = ["OLMoE-1B-7B-0924", "--target", "ddr5-laptop", "--recipe", "w4a8-g32", "--ctx", "2048"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_report_names_bounds_and_places(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "Qwen3-30B-A3B", "--target", "rtx-4090", "--recipe", "w4a8-g32")
    assert code == 0
    for words in ("30.53 B parameters", "tok/s, bound by vram read", "J a token", "experts", "vram, resident", "kv"):
        assert words in text, words
    assert "what would help" in text and "+10 GB/s of vram read" in text and "--recipe w3" in text
    assert text.count("(as it is)") == 1


def test_json_can_be_edited_and_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    arguments = ["Llama-3.1-8B", "--target", "rtx-4090", "--quick", "--ctx", "2048"]
    code, text, _ = run(capsys, *arguments, "--json", "-o", str(file))
    assert code == 0 and file.read_text() == text and json.loads(text)["schema"] == SCHEMA
    assert run(capsys, *arguments, "--json")[1] == text  # the same answer again
    plan = Placement.from_json(text)
    code, again, _ = run(capsys, *arguments, "--plan", str(file), "--json")
    assert code == 0 and Placement.from_json(again).decode == plan.decode
    edited = json.loads(text)
    for group in edited["groups"]:
        if group["group"] == "mlp":
            group |= {"tier": "dram", "unit": "cores"}
    file.write_text(json.dumps(edited))
    code, slower, _ = run(capsys, *arguments, "--plan", str(file), "--json")
    assert code == 0 and Placement.from_json(slower).decode.seconds > 2 * plan.decode.seconds
    assert run(capsys, "Llama-2-7b-hf", "--target", "rtx-4090", "--plan", str(file))[0] == 2


def test_a_budget_makes_a_cache_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, *OLMOE, "--memory", "2GiB", "--pin", "experts=cached", "--pin", "kv=dram")
    assert code == 0 and "expert cache:" in text and "(Belady)" in text and "+1 GiB of dram" in text
    code, text, _ = run(capsys, *OLMOE, "--memory", "2GiB", "--pin", "experts=cached", "--json", "--quick")
    plan = Placement.from_json(text)
    dram = next(t for t in plan.tiers if t.name == "dram")
    assert dram.peak <= 2 << 30 == dram.capacity and plan.expert_cache is not None
    assert plan.expert_cache.belady is not None and plan.expert_cache.hit_rate <= plan.expert_cache.belady


def test_formats_are_chosen_and_can_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, recipe = tmp_path / "plan.json", tmp_path / "chosen.toml"
    short = [*OLMOE[:3], "--ctx", "2048", "--memory", "2GiB", "--quick", "--formats", "w4a8-g32,w3,w8a8"]
    code, text, _ = run(capsys, *short, "-o", str(plan), "--save-recipe", str(recipe))
    assert code == 0 and "formats chosen among w4a8-g32, w3, w8a8: loss" in text and "estimated from bits" in text
    made = Placement.from_json(plan.read_text())
    assert made.quality is not None and made.quality.loss <= made.quality.asked
    assert {g.recipe for g in made.groups if g.group == "experts"} == {"w3"}
    assert str(load_recipe(str(recipe)).choice("model.layers.0.mlp.experts.0.up_proj.weight", "experts.up").format) == (
        "q3_sym<group=32, scale=f16>"
    )
    code, again, _ = run(capsys, *short[:-2], "--plan", str(plan), "--json")
    assert code == 0 and Placement.from_json(again).decode == made.decode
    for wrong, words in (
        (["--max-loss", "1"], "--formats w4a8-g32,w3,w8a8 as well"),
        (["--formats", "w3", "--bits-per-weight", "9"], "has 9 bits a weight"),
        (["--formats", "w3", "--sensitivity", str(plan)], "has no measured losses"),
        (["--save-recipe", str(recipe)], "no recipe to write"),
    ):
        code, _, err = run(capsys, *short[:7], "--quick", *wrong)
        assert code == 2 and words in err, err


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["Llama-3.1-8B", "--target", "ddr5-laptop", "--disk", "1GiB", "--memory", "16GiB", "--ctx", "32768"]
    code, out, err = run(capsys, *short)
    assert code == 3 and out == "" and "does not fit" in err and "of dram it fits" in err
    assert "the largest context that fits is" in err
    code, out, _ = run(capsys, *short, "--json")
    facts = json.loads(out)
    assert code == 3 and facts["least_bytes"]["dram"] > 16 << 30 and 0 < facts["largest_context"] < 32768
    fits = [*short[:-1], str(facts["largest_context"])]
    assert run(capsys, *fits, "--prompt-tokens", "8", "--quick")[0] == 0
    code, _, err = run(capsys, *short, "--pin", "weights=dram", "--ctx", "1024", "--memory", "3GiB", "--disk", "1TB")
    assert code == 3 and "without --pin 'weights=dram' it fits" in err


def test_the_least_of_a_drive_and_what_the_machine_has_are_named() -> None:
    small = (("vram", "8GiB"), ("memory", "16GiB"), ("disk", "10GiB"))
    asked = PlanRequest("Llama-3.1-70B", "rtx-4090", context=2, budgets=small, what_if=False, simulate=False)
    with pytest.raises(NoFit) as refused:
        make_plan(asked)
    least, said = dict(refused.value.least), str(refused.value)
    assert set(least) == {"vram", "dram", "nvme"}
    assert "of vram it would fit; rtx-4090 has 21.4 GiB" in said and "of nvme it fits" in said
    for share, fits in ((1.0, True), (0.99, False)):
        asked = dataclasses.replace(asked, budgets=(*small[:2], ("disk", str(int(least["nvme"] * share)))))
        if fits:
            assert make_plan(asked).placement.tiers
        else:
            with pytest.raises(NoFit):
                make_plan(asked)


def test_bounds_of_time_are_kept_as_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    olmoe = [*OLMOE[:3], "--recipe", "w4a8-g32", "--memory", "2GiB", "--quick"]
    assert run(capsys, *olmoe, "-o", str(plan))[0] == 0
    made = Placement.from_json(plan.read_text())
    assert made.simulated_step is not None and made.simulated_step > 1.02 * made.decode.seconds
    between = (made.simulated_step + made.decode.seconds) / 2  # what the closed form alone would promise
    code, text, err = run(capsys, *olmoe, "--slo", f"tpot={between:.6f}s", "--json")
    assert code == 3 and "(as simulated)" in json.loads(text)["error"] and err == ""
    code, text, _ = run(capsys, *olmoe, "--slo", f"tpot={made.simulated_step * 1.01:.6f}s", "--json")
    kept = Placement.from_json(text)
    assert code == 0 and kept.simulated_step is not None and kept.simulated_step <= made.simulated_step * 1.01
    given = [*OLMOE[:3], "--memory", "2GiB", "--plan", str(plan)]
    assert "this plan of" in run(capsys, *given, "--slo", f"tpot={between:.6f}s")[2]
    code, _, err = run(capsys, "Llama-3.1-8B", "--target", "ddr5-laptop", "--slo", "tpot=1ms")
    assert code == 3 and "as fast as asked for" in err
    code, _, err = run(capsys, "Llama-3.1-8B", "--target", "8xh100", "--slo", "tpot=1us")
    assert code == 3 and "(in closed form)" in err
    for option, value in (("--ctx", "64"), ("--batch", "7"), ("--recipe", "w3"), ("--pin", "kv=dram")):
        code, _, err = run(capsys, *given, option, value)
        assert code == 2 and f"{option} {value}: the plan" in err, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Lama-3.1-8B"], "did you mean"),
        (["Llama-3.1-8B", "--target", "x86-64-v4"], "describes instructions"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--pin", "mlp=moon"], "nothing named 'moon'"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--slo", "speed=1"], "is not a bound"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--ctx", "999999999"], "at most 131072"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--batch", "many"], "a whole number of sequences or auto"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--memory", "much"], "not a number with a unit"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--budget", "vram"], "expected TIER=SIZE"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--plan", "/no/such"], "the plan cannot be read"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--plan", "/dev/zero"], "the plan is too large"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--pin", "experts=disk"], "has no such part"),
        (["DeepSeek-V3", "--target", "8xh100", "--pin", "layers.0-2.experts=disk"], "has no such part"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--formats", "w3,"], "names of recipes by commas"),
        (["Llama-3.1-8B", "--target", "rtx-4090", "--formats", "w3", "--max-loss", "nan"], "expected a number"),
    ],
)
def test_faults_are_one_diagnostic(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and words in err and out == "" and "Traceback" not in err


def test_many_devices(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "DeepSeek-V3", "--target", "64xh100", "--recipe", "fp8", "--batch", "256")
    assert code == 0 and "64 devices: products cut" in text and "of each device" in text
    code, text, _ = run(
        capsys,
        "DeepSeek-V3",
        "--target",
        "64xh100",
        "--recipe",
        "fp8",
        "--batch",
        "auto",
        "--slo",
        "tpot=40ms",
        "--json",
    )
    plan = Placement.from_json(text)
    assert code == 0 and plan.decode.seconds <= 0.04 and plan.session.batch > 256 and plan.degrees.devices == 64


def test_a_directory_is_planned_from_its_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path, config_of("llama"))
    code, text, _ = run(capsys, str(tmp_path), "--target", "ddr5-laptop", "--ctx", "64")
    assert code == 0 and "dram, resident" in text
    assert run(capsys, str(tmp_path / "config.json"), "--target", "ddr5-laptop", "--ctx", "64")[0] == 0


def test_layers_and_devices_are_told_shortly() -> None:
    text = plan_text(make_plan(PlanRequest("DeepSeek-V3", "8xh100", "w4a8-g32")))
    assert "8 devices: products cut 8 ways, 1 stage, 1 copy, experts on 8, vocabulary cut 8 ways" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("attention")] == [["attention", "0-60"]]
    tiers = (("dram", "40GiB"),)
    some = PlanRequest("Llama-3.1-8B", "64xh100", budgets=tiers, what_if=False, simulate=False)
    assert "warning: this plan is for one of the 8 nodes" in plan_text(make_plan(some))


def test_a_plan_loads_what_it_needs() -> None:
    """Whole devices are planned without arrays; the tiers of a machine without the runtime; nothing with a compiler.

    This is what keeps a plan short: its own work is a tenth of the time that the libraries would take to load.
    """
    compiler = ["codegen", "llvmlite", "numba", "torch", "transformers", "lark", "rich"]
    runtime = [f"runtime.{name}" for name in ("artifact", "manifest", "native", "weight_streamer", "cuda.program")]
    arrays = ["numpy", "ml_dtypes", "highspy", "ir.ops", "ir.types", "hw_targets.expert_cache", "hw_targets.routing"]
    code = (
        "import sys\n"
        "from stratum.cli import main\n"
        "def loaded(*names): print([name for name in names if name in sys.modules], file=sys.stderr)\n"
        "assert main(['plan', 'DeepSeek-V3', '--target', '64xh100']) == 0\n"
        f"loaded(*{compiler + runtime + arrays!r})\n"
        "assert main(['plan', 'Llama-3.1-8B', '--target', 'rtx-4090', '--recipe', 'w4a8-g32', '--quick']) == 0\n"
        f"loaded(*{compiler + runtime!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["[]", "[]"]


def test_more_of_what_bounds_helps_most() -> None:
    planned = make_plan(PlanRequest("Llama-3.1-70B", "a100-80gb", "w8a8", context=2048))
    assert planned.gains and list(planned.gains) == sorted(planned.gains, key=lambda g: (-g.saved, g.what))
    assert all(0.0 <= g.saved < 1.0 for g in planned.gains)
    assert planned.placement.model == load_shape("Llama-3.1-70B").name


def test_texts() -> None:
    assert [seconds_text(s) for s in (2.5, 0.0123, 4e-5, 3e-9)] == ["2.5 s", "12.3 ms", "40 us", "3 ns"]
    assert shortened("0-3") == "0-3" and shortened(",".join(map(str, range(0, 60, 2)))).endswith("… (30)")
    assert (parse_slo("ttft=2s, tpot=50ms").ttft, parse_slo("tpot=50ms").tpot) == (2.0, 0.05)


def test_faults_are_objects_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "llama-3.1", "--json")
    found = json.loads(out)
    assert code == 2 == found["exit_code"] and found["event"] == "error" and found["message"] == err.rstrip("\n")
    assert "did you mean 'Llama-3.1-8B'" in err  # what begins so, not what is spelled alike
    code, out, _ = run(capsys, "Llama-3.1-8B", "--json", "--batch", "none")
    assert json.loads(out)["exit_code"] == code == 2 and run(capsys, "llama-3.1")[1] == ""


def test_what_is_written_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    file.write_text("before")
    arguments = ("Llama-3.1-8B", "--target", "rtx-4090", "--quick", "-o")

    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert run(capsys, *arguments, str(file))[0] == 2
    assert file.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    link = tmp_path / "device"
    link.symlink_to(os.devnull)
    assert run(capsys, *arguments, str(link))[0] == 0 and link.is_symlink()
    assert "Is a directory" in run(capsys, *arguments, str(tmp_path))[2]
