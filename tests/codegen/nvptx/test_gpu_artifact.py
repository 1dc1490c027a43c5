"""Artifacts for GPUs: what is in them, the same bytes each time, what the CPU says to them, for which targets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hw_targets
from codegen.build import build_artifact
from codegen.nvptx import gpu_code
from codegen.nvptx.compile import ARCHITECTURES
from codegen.nvptx.ptxas import Assembled
from codegen.object_cache import ObjectCache
from frontends.huggingface import import_model
from ir.diagnostics import DiagnosticError
from runtime import host
from runtime.artifact import open_artifact
from runtime.cuda.host_attention import AttentionProgram
from runtime.cuda.step_memory import scratch_bytes
from runtime.errors import RuntimeDiagnostic
from runtime.session import Session
from stratum.checkpoint_report import artifact_text, describe_artifact
from stratum.host_kv_choice import layers_on_host
from tests.codegen.nvptx.kernel_list import fp8_kernels
from tests.goldens import GOLDENS

LEVEL = host.best_portable_target(host.host_features()) if host.host_architecture() == "x86_64" else "aarch64"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same build twice: without an assembler, and with one that knows little."""
    folder = tmp_path_factory.mktemp("gpu")
    cache = ObjectCache(folder / "cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gpu_code, "LEVELS", (LEVEL,))  # code for one kind of CPU is enough here
        for name, program in (("plain", None), ("assembled", Path(__file__))):
            patched.setattr(gpu_code, "find_ptxas", lambda program=program: program)
            patched.setattr(gpu_code, "assemble", lambda ptx, architecture, program: Assembled(b"machine code", {}))
            imported = import_model(GOLDENS / "llama")
            with imported.checkpoint:
                build_artifact(imported, folder / name, target=hw_targets.load("h100-sxm"), cache=cache)
    return folder / "plain", folder / "assembled"


def test_what_is_in_it(built: tuple[Path, Path]) -> None:
    plain, assembled = (open_artifact(path) for path in built)
    assert (plain.manifest.target.triple, plain.manifest.target.cpu) == ("nvptx64-nvidia-cuda", "sm_90a")
    assert plain.gpu is not None and assembled.gpu is not None
    assert [(c.architecture, c.ptx, c.cubin) for c in plain.gpu.code] == [("sm_90a", "code/sm_90a.ptx", "")]
    assert assembled.read_bytes(assembled.gpu.code[0].cubin) == b"machine code"
    ptx = plain.read_bytes("code/sm_90a.ptx").decode()
    assert ".target sm_90a" in ptx and "wgmma.mma_async" in ptx
    assert all(f".entry {kernel.name}(" in ptx for kernel in plain.gpu.kernels)
    for ours, theirs in zip(plain.gpu.programs, plain.manifest.programs, strict=True):
        assert (ours.name, len(ours.launches)) == (theirs.name, len(theirs.launches))
    assert plain.gpu.kv.bytes_per_position == plain.manifest.kv.bytes_per_position
    attention = AttentionProgram.of(plain)
    assert sorted(attention.layers) == list(range(plain.gpu.kv.layers)) and attention.kv_info(1).format == "bf16"
    assert plain.read_bytes(attention.code.files[0][0]).startswith(b"\x7fELF")


def test_a_plan_says_which_keys_and_values_lie_on_the_host(built: tuple[Path, Path]) -> None:
    """Of an artifact as it is built; more room, fewer layers."""
    artifact = open_artifact(built[0])
    assert artifact.gpu is not None
    slots, count = 16, artifact.gpu.kv.layers
    others = artifact.manifest.weights.bytes + scratch_bytes(artifact.gpu, artifact.manifest.vocab_size)
    found = []
    for share in (0.1, 0.7, 1.1):
        free = round((others + share * artifact.gpu.kv.nbytes(slots, 64)) * 16 / 15)
        device: Any = SimpleNamespace(name="NVIDIA H100 80GB HBM3", free_bytes=lambda free=free: free)
        found.append(len(layers_on_host(artifact, device, context=64, slots=slots, host_bytes=1 << 30)))
    assert found[0] == count and 0 < found[1] < count and found[2] == 0


def test_the_bytes_depend_on_the_model_alone(built: tuple[Path, Path]) -> None:
    files = [{p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()} for path in built]
    own = {Path("manifest.json"), Path("code/sm_90a.cubin")}
    assert {k: v for k, v in files[0].items() if k not in own} == {k: v for k, v in files[1].items() if k not in own}
    assert set(files[1]) - set(files[0]) == {Path("code/sm_90a.cubin")}


def test_the_cpu_says_what_it_is(built: tuple[Path, Path]) -> None:
    with pytest.raises(RuntimeDiagnostic) as caught:
        Session(built[0])
    assert "was built for a GPU (target h100-sxm)" in str(caught.value) and "--device cuda" in str(caught.value)
    text = artifact_text(describe_artifact(built[1]))
    assert (
        "GPU code    sm_90a (PTX and machine code); no other GPUs run it" in text
        and "decode_16   up to 16 tokens" in text
    )
    by_program = [line.split("products by ")[1] for line in text.splitlines() if "products by" in line]
    assert by_program == ["decode", "decode", "wgmma", "wgmma"]


@pytest.mark.parametrize(
    ("target", "architectures"),
    [
        ("cuda", ("sm_80", "sm_89", "sm_90")), ("h200-sxm", ("sm_90a",)), ("cuda-sm90a", ("sm_90a",)),
        ("a100-40gb", ("sm_80",)), ("rtx-3090", ("sm_80",)), ("rtx-4090", ("sm_89",)), ("b200", ("sm_90",)),
        ("x86-64-v3", ()), ("m2-ultra", ()),
    ],
)  # fmt: skip
def test_which_gpus_code_is_for(target: str, architectures: tuple[str, ...]) -> None:
    assert gpu_code.gpu_architectures(hw_targets.load(target)) == architectures


def test_what_a_build_chooses_for_a_gpu() -> None:
    """Multiprocessors as the machine has them, products of warpgroups where all code is for them."""
    chosen = [gpu_code.grid_options(hw_targets.load(name)) for name in ("cuda", "h200-sxm", "rtx-4090", "b200")]
    assert [(o.multiprocessors, o.hopper) for o in chosen] == [(108, False), (132, True), (128, False), (148, False)]


def test_architectures_that_lack_an_instruction_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations in f8e4m3: code for any GPU is for those that multiply them; one that does not is refused by name."""
    lowered: Any = SimpleNamespace(kernels=fp8_kernels()[:1], host=SimpleNamespace(objects=lambda cache: {}))
    lowered.attention = SimpleNamespace(objects=lambda cache, levels: {})
    with pytest.raises(DiagnosticError, match="@decode_fp8 has instructions that sm_80 lacks") as caught:
        gpu_code.compile_gpu_step(lowered, ("sm_80",))
    assert "sm_89 or sm_90" in str(caught.value) and "recipe fp8" in str(caught.value)
    monkeypatch.setattr(gpu_code, "compile_ptx_for", lambda kernels, names, cache: dict.fromkeys(names, ""))
    monkeypatch.setattr(gpu_code, "find_ptxas", lambda: None)
    assert list(gpu_code.compile_gpu_step(lowered, ARCHITECTURES).ptx) == ["sm_89", "sm_90"]


@pytest.mark.parametrize(("target", "architecture"), [("t4-gcp", "sm_75"), ("mi300x", "gfx942")])
def test_old_gpus_and_those_of_others_are_refused(target: str, architecture: str) -> None:
    with pytest.raises(DiagnosticError, match=rf"no model can be built for the GPU of {target} \({architecture}\)"):
        gpu_code.gpu_architectures(hw_targets.load(target))
