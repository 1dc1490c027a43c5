"""Rows of the table that are not computed, each with the reason: what its source does not say, or we do not have."""

from __future__ import annotations

REASONS: dict[str, tuple[str, ...]] = {
    "a policy, not a result: what its authors set by hand; the rates it gives are P003, P023 and P031":
        ("P019", "P021"),
    "sequences at once only in an image of the source. (By bytes, eight drives of a DGX-2 outrun its link, so that the "
    "model has no difference between the host and the drives, and no gain from prefetching from either)":
        ("P067", "P068", "P069", "P070"),
    "quantization, cache sizes or batches are not stated. (16 bits that do not fit 24 GB need 2.3 s at the peak of the "
    "link; two of these are below that, so that not all of it moves)":
        ("P195", "P196", "P197", "P198", "P199"),
    "the batch is not stated, and decides between moving weights and computing by the CPU":
        ("P204", "P205"),
    "the drive or flash of the machine under a limit of memory is not named":
        ("P213", "P214"),
    "speculative decoding: acceptance depends on two models and texts":
        ("P219",),
    "the model's shape is not published, or not stored here":
        ("P260", "P338"),
    "an abstract's figure; the routing behind it is not published":
        ("P261", "P262"),
    "the accuracy of somebody's model over machines and models that the abstract does not name":
        ("P264",),
    "a range from a summary page for machines of many kinds, experts of two to three bits":
        ("P265",),
    "devices, their number and the window of layers are not stated in the abstract":
        ("P268",),
    "a format we do not have: entropy-coded ternary experts, entropy-coded 16-bit floats":
        ("P271", "P272"),
    "batch and lengths behind the share are not stated in the abstract":
        ("P273",),
    "does not follow from the page's own figures: of 80 GB, 68 are weights, which leaves room for 12 caches of 4000 "
    "tokens (0.98 GB each) and one of 50 000 at most":
        ("P279",),
    "an average over a day of a service whose load, batches and share of cached prompts move":
        ("P285", "P286", "P287"),
    "constants of a program, not a result":
        ("P342",),
    "sums over request traces that are not published with the figures":
        ("P352", "P354"),
}  # fmt: skip


def reasons() -> dict[str, str]:
    """Row to reason."""
    return {i: reason for reason, ids in REASONS.items() for i in ids}
