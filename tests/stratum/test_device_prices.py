"""What `--device auto` compares: plans of the GPU that was found and of the CPU, and whose prices a GPU has."""

from __future__ import annotations

from pathlib import Path

import pytest

from hw_targets import calibrate
from hw_targets.calibrate import Calibration
from stratum.device_prices import Gpu, Offer, Offers, device_offers, machine_like

GIB = 1 << 30
HOST = Calibration(8, 4e10, 1e12, bf16_peak=2e12, i8_peak=4e12)
MODEL = Path("Llama-3.1-8B")


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H200", "h200-sxm"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA GeForce RTX 4070", "a6000"), ("something", "a6000"),
    ],
)  # fmt: skip
def test_whose_prices_a_gpu_has(name: str, machine: str) -> None:
    assert machine_like(Gpu(name, GIB)).name == machine


def test_all_weights_weights_that_pass_through_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 90 % of memory that decided once do not: a model of twice the memory still goes to the GPU."""
    monkeypatch.setattr(calibrate, "cached", lambda threads: HOST)

    def offers(free: int, recipe: str | None = None) -> Offers:
        return device_offers(MODEL, Gpu("NVIDIA H100 80GB HBM3", free), recipe=recipe, dtype="bf16")

    whole, part, little = offers(79 * GIB), offers(8 * GIB), offers(GIB // 4)
    assert whole.on_gpu is not None and whole.on_gpu.resident and whole.best == "gpu"
    assert part.on_gpu is not None and not part.on_gpu.resident and part.on_gpu.seconds > 4 * whole.on_gpu.seconds
    assert "with weights that pass through its 8 GiB, the CPU" in part.line() and part.line().endswith("of h100-sxm")
    assert little.on_gpu is None and little.best == "cpu"
    assert "does not fit into 256 MiB of NVIDIA H100 80GB HBM3, even when its weights pass through" in little.line()
    small = offers(8 * GIB, "w4a16-g32")
    assert small.on_gpu is not None and small.on_gpu.resident and small.on_gpu.seconds < part.on_gpu.seconds


def test_the_sooner_one_is_best() -> None:
    gpu = Gpu("NVIDIA H100", GIB)
    assert Offers(gpu, "m", Offer(0.2, False), Offer(0.1)).best == "cpu"
    assert Offers(gpu, "m", Offer(0.1, False), Offer(0.1)).best == "gpu"
    assert Offers(gpu, "m", None, None).best == "cpu"
    line = Offers(gpu, "m", Offer(0.25, False), None).line()
    assert line == (
        "NVIDIA H100 would make 4 tokens/s with weights that pass through its 1 GiB, the CPU has no room for them, "
        "by the prices of m"
    )
