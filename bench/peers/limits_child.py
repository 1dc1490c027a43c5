"""What the machine can do right now, behind the requests of `bench.peers.child`.

    python -m bench.peers.limits_child --threads 2

The kernels of `hw_targets.calibrate`, kept loaded with their memory mapped, so that a measurement takes a quarter of a
second and can stand between any two rows. Rates are sustained ones (all work over all time), like those of the rows
they are set beside, not the best of many short runs.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.peers.child import Answer, serve
from hw_targets import calibrate_child
from hw_targets.calibrate import kernel_request

BYTES = 512 << 20
READ_RUNS = 8
PEAK_SECONDS, PEAK_RUNS = 0.02, 2


class Limits:
    """Loaded kernels."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.request = kernel_request(options.threads, BYTES, PEAK_SECONDS, PEAK_RUNS)
        self.functions = calibrate_child.load(self.request)
        self.address = calibrate_child.reserve(self.request["bytes"])
        self.measured_before = False

    def about(self, request: dict[str, Any]) -> Answer:
        """What is measured."""
        return {"version": "limits", "bytes": self.request["bytes"], "kernels": sorted(self.functions)}

    def measure(self, request: dict[str, Any]) -> Answer:
        """bytes/s of reading memory, operations/s of i8 and bf16 products with all threads; 0 without such products."""
        share = self.request["bytes"] // self.request["threads"] // 4096 * 4096
        spans = [(self.address + i * share, share) for i in range(self.request["threads"])]
        if not self.measured_before:  # memory is touched for the first time, by the threads that will read it
            calibrate_child.measure_read(self.functions["read"], self.address, {**self.request, "repeats": 1})
            self.measured_before = True
        seconds = sum(calibrate_child.run_threads(self.functions["read"], spans) for _ in range(READ_RUNS))
        rates = {"read": READ_RUNS * share * len(spans) / seconds, "i8": 0.0, "bf16": 0.0}
        for name in ("i8", "bf16"):
            if name in self.functions:
                operations = self.request["kernels"][name]
                runs = calibrate_child.measure_peak(self.functions[name], self.address, operations, self.request)
                rates[name] = max(runs)
        return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    engine = Limits(parser.parse_args())
    serve({"about": engine.about, "measure": engine.measure})


if __name__ == "__main__":
    main()
