"""norm.*: one row, odd widths, three dimensions (per-head norms), zeros, bf16."""

from __future__ import annotations

import numpy as np

from tests.samples.base import BF16, I32, TOKENS, fault, normal, sample, t

SAMPLES = (
    sample("norm.rms", "rows", normal(3, 16), normal(16), types=(t(TOKENS, 16), t(16)), eps=1e-5),
    sample("norm.rms", "one_odd", normal(1, 7), normal(7), eps=1e-6),
    sample("norm.rms", "heads", normal(2, 3, 8), normal(8), eps=1e-6),
    sample("norm.rms", "zeros", np.zeros((2, 4), np.float32), normal(4), eps=1e-6),
    sample("norm.rms", "large", normal(2, 5, scale=1e15), normal(5), eps=1e-6),
    sample("norm.rms", "bf16", normal(2, 6, element=BF16), normal(6, element=BF16), eps=1e-6),
)
FAULTS = (
    fault("norm.rms", "n of x and gain to match, got 16 and 8", t(3, 16), t(8), eps=1e-6),
    fault("norm.rms", "gain of rank 1", t(3, 16), t(1, 16), eps=1e-6),
    fault("norm.rms", "eps >= 0, got -1.0", t(3, 16), t(16), eps=-1.0),
    fault("norm.rms", "expected x of f32, bf16 or f16", t(3, 16, element=I32), t(16), eps=1e-6),
)
