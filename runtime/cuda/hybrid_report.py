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
    router_wait_s: float = 0.0  # the host's, for the tiles of experts
    resident_bytes: int = 0
    host_bytes: int = 0
    slots: tuple[int, ...] = ()

    @property
    def link_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes

    def summary(self) -> str:
        """One line for the end of a run."""
        steps = max(1, self.steps)
        parts = [f"GPU: {self.resident_bytes / 2**20:.0f} MiB of weights stay there, {self.host_bytes / 2**20:.0f} MiB "
                 f"are in pinned host memory; {self.link_bytes / steps / 1e6:.1f} MB a step over the link"]  # fmt: skip
        if self.lookups:
            parts.append(
                f"{self.hits / self.lookups:.1%} of {self.lookups} experts were there, missing ones were fetched"
            )
        return ", ".join(parts)
