"""What passed over a GPU's link since a store of weights was made, and what was found on the device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HybridReport:
    """What went over the link since the store was made, beside what was found on the device."""

    steps: int = 0
    dense_bytes: int = 0
    expert_bytes: int = 0
    dense_copies: int = 0
    lookups: int = 0
    hits: int = 0
    computed: int = 0  # experts that the CPU computed, of those that were not there
    later: int = 0  # of these, brought all the same
    host_wait_s: float = 0.0  # for the CPU, behind the GPU's own experts
    host_threads: int = 0  # of the CPU that computes experts
    prices: tuple[float, float] | None = None  # bytes of experts a second: by the link, by the CPU
    router_wait_s: float = 0.0  # the host's, for the tiles of experts
    decisions: int = 0  # about a layer's experts
    decide_s: float = 0.0  # what they took the host, without waiting for routers and reads
    resident_bytes: int = 0
    host_bytes: int = 0  # of pinned memory: what lies there whole, and places for what comes from the disk
    slots: tuple[int, ...] = ()
    disk_bytes: int = 0  # of pieces of which not everything is in memory
    host_slots: int = 0  # of experts, in pinned memory
    reads: int = 0  # requests to the disk, since everything was loaded
    read_bytes: int = 0
    read_s: float = 0.0  # with a read under way
    retries: int = 0
    read_wait_s: float = 0.0  # the host's, for reads
    host_lookups: int = 0  # of experts that were not on the device
    host_hits: int = 0
    launches: int = 0  # of kernels, one by one
    graphs: int = 0  # launches of captured ones

    @property
    def link_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes

    def summary(self) -> str:
        """One line for the end of a run."""
        steps = max(1, self.steps)
        parts = [f"GPU: {self.resident_bytes / 2**20:.0f} MiB of weights stay there, {self.host_bytes / 2**20:.0f} MiB "
                 f"are in pinned host memory; {self.link_bytes / steps / 1e6:.1f} MB a step over the link"]  # fmt: skip
        if self.lookups:
            parts.append(f"{self.hits / self.lookups:.1%} of {self.lookups} experts were there, {self._of_missing()}")
        parts.append(f"{self.launches / steps:.0f} kernels and {self.graphs / steps:.0f} graphs launched a step")
        if self.disk_bytes:
            parts.append(self._of_disk(steps))
        return ", ".join(parts)

    @property
    def same_bits(self) -> bool:
        """Whether outputs are those of a device that has room for everything, to the last bit."""
        return self.computed == 0

    def _of_missing(self) -> str:
        if not self.computed:
            return "missing ones were fetched"
        fetched = self.lookups - self.hits - self.computed
        text = f"{fetched} were fetched, {self.computed} computed by the CPU ({self.host_threads} threads"
        if self.prices is not None:
            text += f", {self.prices[1] / 1e9:.1f} GB/s, link {self.prices[0] / 1e9:.1f} GB/s"
        return text + "), so that the last bits depend on what was there"

    def _of_disk(self, steps: int) -> str:
        """What came from the disk behind the pinned memory."""
        rate = self.read_bytes / self.read_s / 1e9 if self.read_s > 0 else 0.0
        text = (
            f"{self.disk_bytes / 2**20:.0f} MiB lie on the disk only: {self.read_bytes / steps / 1e6:.1f} MB a step "
            f"in {self.reads} reads at {rate:.2f} GB/s, waited {self.read_wait_s:.2f} s for them"
        )
        if self.host_lookups:
            text += f", {self.host_hits / self.host_lookups:.1%} of {self.host_lookups} experts were in pinned memory"
        return text + (f", {self.retries} reads tried again" if self.retries else "")
