"""How often threads of a warp get in each other's way in shared memory.

Shared memory has 32 banks of 4 bytes; a pass serves one word of each. A warp's access of up to 4 bytes a thread is one
group; of 8 bytes its halves are, of 16 its quarters. A group takes as many passes as one bank has different words to
give (NVIDIA, "CUDA C++ Programming Guide", shared memory).
"""

from __future__ import annotations

import numpy as np

BANKS, WORD, WARP = 32, 4, 32


def extra_passes(start: np.ndarray, width: int, who: np.ndarray) -> int:
    """Passes beyond one for each group, when threads `who` touch `width` bytes from `start` on."""
    members = WARP if width <= WORD else max(1, BANKS * WORD // width)
    words = start[:, None] // WORD + np.arange(max(1, width // WORD))
    if not words.size:
        return 0
    group = (who // members)[:, None]
    # One number for each word that a group touches; a word that several threads touch comes once.
    first, span = int(words.min()), int(words.max()) - int(words.min()) + 1
    touched = np.unique(group * span + (words - first))
    _, compact = np.unique(touched // span, return_inverse=True)
    banks = (touched % span + first) % BANKS
    counts = np.bincount(compact * BANKS + banks, minlength=(int(compact.max()) + 1) * BANKS)
    return int((counts.reshape(-1, BANKS).max(axis=1) - 1).sum())
