"""What streaming did so far, in numbers: bytes read, how fast, how often experts were there, how long steps waited."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StreamReport:
    """Counts since the session was opened. `disk_s`: time with a read in flight; `stall_s`: time steps waited.

    `guesses_read`: experts read because the next layer would probably want them, `guesses_right`: those it did want.
    `stand_ins`: experts computed from copies in fewer bits because they had less than `stand_in_share` of the routing
    weight, `stand_in_hits`: those of them that were in memory; both are among the lookups and hits.
    `resident_bytes`: dense pieces that stay. `direct` is False where the file system refuses O_DIRECT.
    """

    budget_bytes: int
    resident_bytes: int
    window_bytes: int
    expert_bytes: int
    other_bytes: int
    read_bytes: int
    disk_s: float
    stall_s: float
    retries: int
    expert_lookups: int
    expert_hits: int
    direct: bool
    guesses_read: int = 0
    guesses_right: int = 0
    stand_in_share: float = 0.0
    stand_ins: int = 0
    stand_in_hits: int = 0

    @property
    def gigabytes_per_s(self) -> float:
        """While reading."""
        return self.read_bytes / self.disk_s / 1e9 if self.disk_s > 0 else 0.0

    @property
    def hit_rate(self) -> float:
        """Of experts; 0 where none were asked for."""
        return self.expert_hits / self.expert_lookups if self.expert_lookups else 0.0

    def since(self, earlier: StreamReport) -> StreamReport:
        """The counts of the time between two reports."""
        counts = ("read_bytes", "disk_s", "stall_s", "retries", "expert_lookups", "expert_hits", "guesses_read",
                  "guesses_right", "stand_ins", "stand_in_hits")  # fmt: skip
        values = asdict(self)
        return StreamReport(**{n: v - getattr(earlier, n) if n in counts else v for n, v in values.items()})

    def __str__(self) -> str:
        parts = [f"read {_size(self.read_bytes)} at {self.gigabytes_per_s:.2f} GB/s"]
        if self.expert_lookups:
            parts.append(f"{self.hit_rate * 100:.1f} % of {self.expert_lookups} experts were in memory")
        if self.guesses_read:
            missing = self.expert_lookups - self.expert_hits
            parts.append(
                f"{self.guesses_right / max(1, missing) * 100:.1f} % of the others were on their way "
                f"({self.guesses_right / self.guesses_read * 100:.1f} % of guesses were right)"
            )
        if self.stand_in_share:
            parts.append(self.about_stand_ins())
        parts.append(f"waited {self.stall_s:.2f} s for reads")
        if self.retries:
            parts.append(f"{self.retries} reads tried again")
        if not self.direct:
            parts.append("through the page cache, as this file system refuses O_DIRECT")
        return ", ".join(parts)

    @property
    def full_model(self) -> bool:
        """Whether the output is that of the full model: no expert was computed from a stand-in."""
        return self.stand_ins == 0

    def about_stand_ins(self) -> str:
        """How many were used, in words, and what that means for the output."""
        if self.full_model:
            return "no stand-in was used: the output is that of the full model"
        return (
            f"{self.stand_ins} experts of less than {self.stand_in_share:g} of a token's weight were computed from "
            f"stand-ins ({self.stand_in_hits} of them in memory): the output is not that of the full model"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
