"""This machine as a `Target`, the one named `host`.

`detect()` measures nothing: bandwidth and peaks are filled in when `hw_targets.calibrate` has measured this machine
before, drives when `hw_targets.calibrate_disk` has.
"""

from __future__ import annotations

from hw_targets import calibrate, calibrate_disk
from hw_targets.host import caches, cpu_model, host_isa, usable_cores, usable_memory
from hw_targets.target import ComputeUnit, MemoryTier, Target

# What generated kernels reach of calibrated figures; docs/prediction.md tells how they were found.
EFFICIENCY = {"bf16": 0.79, "f32": 0.79, "i8": 0.68}
FEW_ROWS_EFFICIENCY = {"bf16": 0.50, "i8": 0.60}
BANDWIDTH_EFFICIENCY = 0.86
EFFICIENCY_SOURCE = "shares that kernels reach: bench.prediction, AMD EPYC Zen 4, 2 cores"


def detect() -> Target:
    """The target named `host`."""
    triple, cpu, features, absent = host_isa()
    cores = usable_cores()
    found = calibrate.cached(cores)
    unit = ComputeUnit(
        name="cores",
        kind="cpu",
        tier="dram",
        cores=cores,
        peak=found.peaks_of_one_thread() if found else (),
        source=f"{found.source()}; {EFFICIENCY_SOURCE}" if found else "",
        barrier_seconds=found.barrier_seconds if found else None,
        efficiency=tuple((e, EFFICIENCY[e]) for e, _ in found.peaks_of_one_thread()) if found else (),
        bandwidth_efficiency=BANDWIDTH_EFFICIENCY if found else None,
        few_rows_efficiency=tuple(FEW_ROWS_EFFICIENCY.items()) if found else (),
    )
    tier = MemoryTier(
        name="dram",
        capacity_bytes=usable_memory(),
        read_bandwidth=found.read_bandwidth if found else None,
        source=found.source() if found else "",
        read_by_threads=found.read_by_threads if found else (),
        page_fault_seconds=found.page_fault_seconds if found else None,
    )
    return Target(
        name="host",
        description=cpu_model(),
        llvm_triple=triple,
        llvm_cpu=cpu,
        llvm_features=features,
        llvm_disabled=absent,
        units=(unit,),
        caches=caches(),
        tiers=(tier,),
        storage=tuple(drive.as_storage(tier.name) for drive in calibrate_disk.stored()),
        origin="detected",
    )
