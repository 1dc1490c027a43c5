"""What the machine can do right now, behind the requests of `bench.peers.child`.

    python -m bench.peers.limits_child --threads 2

The kernels of `hw_targets.calibrate`, kept loaded with their memory mapped, so that a measurement takes a quarter of a
second and can stand between any two rows. Rates are sustained ones (all work over all time), like those of the rows
they are set beside, not the best of many short runs.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from bench.peers.child import Answer, serve
from hw_targets import calibrate_child
from hw_targets.calibrate import kernel_request

BYTES = 512 << 20
READ_RUNS = 8
RATE_RUNS = 4
RATE_PEAKS = {"seconds": 0.01, "repeats": 5}  # short and many: the best of them counts
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

    def _spans(self) -> list[tuple[int, int]]:
        """What each thread reads: (address, bytes)."""
        share = self.request["bytes"] // self.request["threads"] // 4096 * 4096
        if not self.measured_before:  # memory is touched for the first time, by the threads that will read it
            calibrate_child.measure_read(self.functions["read"], self.address, {**self.request, "repeats": 1})
            self.measured_before = True
        return [(self.address + i * share, share) for i in range(self.request["threads"])]

    def rates(self, request: dict[str, Any]) -> Answer:
        """bytes/s of every run of reading memory, operations/s of every run of products, by element."""
        spans = self._spans()
        nbytes = sum(size for _, size in spans)
        read = [nbytes / calibrate_child.run_threads(self.functions["read"], spans) for _ in range(RATE_RUNS)]
        asked = {**self.request, **RATE_PEAKS}
        peaks = {
            name: calibrate_child.measure_peak(self.functions[name], self.address, operations, asked)
            for name, operations in self.request["kernels"].items()
            if name != "read"
        }
        return {"read": read, **peaks}

    def huge(self, request: dict[str, Any]) -> Answer:
        """The share of the memory that lies in huge pages, as the system tells; 0 where it does not."""
        found, inside = 0, False
        with contextlib.suppress(OSError), open("/proc/self/smaps", encoding="ascii", errors="replace") as lines:
            for line in lines:
                first, _, rest = line.partition(" ")
                if not first.endswith(":"):
                    start, _, end = first.partition("-")
                    inside = int(start, 16) <= self.address < int(end, 16)
                elif inside and first == "AnonHugePages:":
                    found += int(rest.split()[0]) << 10
        return {"share": min(1.0, found / self.request["bytes"])}

    def measure(self, request: dict[str, Any]) -> Answer:
        """bytes/s of reading memory, operations/s of i8 and bf16 products with all threads; 0 without such products."""
        spans = self._spans()
        share = spans[0][1]
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
    serve({"about": engine.about, "measure": engine.measure, "rates": engine.rates, "huge": engine.huge})


if __name__ == "__main__":
    main()
