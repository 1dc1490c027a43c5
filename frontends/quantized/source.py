"""Reads the packed tensors of a checkpoint by rows and, where they are stored with rows and columns exchanged, by
columns.

A matrix that is stored as [k, n] and wanted by rows of n is read in panels of columns, of which the last few are kept:
memory is bounded (`KEPT_BYTES` and one panel), whatever the size of the tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from frontends.checkpoint import Checkpoint, stored_dtype

KEPT_BYTES = 32 << 20
_PANEL_BYTES = 4 << 20
_SEGMENT_BYTES = 2048  # at least so many bytes of every row are read at once


class Source:
    """The packed tensors of `checkpoint`, in the dtypes of `Checkpoint.read_stored`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._kept: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last); all of them when nothing is said."""
        return self.checkpoint.read_stored(name, first, last)

    def columns(self, name: str, first: int, last: int) -> np.ndarray:
        """Columns [first, last) of a matrix: [rows, columns]."""
        info = self.checkpoint.info(name)
        itemsize = stored_dtype(info).itemsize
        width = max(_SEGMENT_BYTES // itemsize, _PANEL_BYTES // (itemsize * max(1, info.shape[0])))
        out = np.empty((info.shape[0], last - first), stored_dtype(info))
        for panel in range(first // width, -(-last // width)):
            start = panel * width
            values = self._panel(name, panel, start, min(start + width, info.shape[1]))
            low, high = max(first, start), min(last, start + values.shape[1])
            out[:, low - first : high - first] = values[:, low - start : high - start]
        return out

    def _panel(self, name: str, panel: int, first: int, last: int) -> np.ndarray:
        with self._lock:
            key = (name, panel)
            if key not in self._kept:
                self._kept[key] = self.checkpoint.read_columns(name, first, last)
                kept = sum(values.nbytes for values in self._kept.values())
                while kept > KEPT_BYTES and len(self._kept) > 1:
                    kept -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end(key)
            return self._kept[key]
