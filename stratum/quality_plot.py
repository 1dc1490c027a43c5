"""A picture of an evaluation: how the divergence is spread over positions, and how errors grow from layer to layer.

Drawn by matplotlib (the extra `plot`), imported when first needed. The same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ir.diagnostics import DiagnosticError

if TYPE_CHECKING:
    from stratum.layer_errors import LayerError

SUFFIXES = (".png", ".svg", ".pdf")
SMALLEST = 1e-9  # nats: what is less, exact zeros too, is drawn there, for the axis is logarithmic
_BINS = 60


def check_plot(path: Path) -> None:
    """Refuses, before any work is done, a file that could not be drawn at its end."""
    if path.suffix.lower() not in SUFFIXES:
        raise DiagnosticError(
            f"cannot draw a picture in a file named '{path.name}'", expected=f"a name ending in {', '.join(SUFFIXES)}"
        )
    if not path.absolute().parent.is_dir():
        raise DiagnosticError("the folder of the picture does not exist", where=str(path))
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise DiagnosticError(
            "drawing needs matplotlib, which is not installed",
            hint="pip install 'stratum[plot]', or leave --plot out: --json gives all the numbers",
        ) from None
    return matplotlib


def draw(path: Path, divergence: np.ndarray, layers: Sequence[LayerError], *, title: str) -> None:
    """Writes the picture: `divergence` [positions] nats, and the errors of the layers if there are any."""
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]  # an extra
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # an extra

    panels = 2 if layers else 1
    with matplotlib.rc_context({"svg.hashsalt": "stratum", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4 * panels, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_divergence(axes[0], divergence)
        if layers:
            _draw_layers(axes[1], layers)
        figure.savefig(path, metadata=_metadata(path))


def _metadata(path: Path) -> dict[str, None]:
    """Leaves out the date of the day."""
    names = {".png": ("Software",), ".svg": ("Date",), ".pdf": ("CreationDate", "ModDate")}
    return dict.fromkeys(names[path.suffix.lower()])


def _draw_divergence(axes: Any, divergence: np.ndarray) -> None:
    shown = np.maximum(divergence, SMALLEST)
    low, high = np.log10(shown.min()), np.log10(shown.max())
    axes.hist(shown, bins=np.logspace(low, max(high, low + 0.1), _BINS), color="tab:blue")
    mean, p99 = divergence.mean(), np.quantile(divergence, 0.99)
    for value, name, style in ((mean, "mean", "-"), (p99, "99 %", "--")):
        axes.axvline(max(value, SMALLEST), color="black", linestyle=style, label=f"{name} {value:.4g}")
    axes.set_xscale("log")
    axes.set_xlabel("KL divergence of a position, nats")
    axes.set_ylabel("positions")
    axes.legend()


def _draw_layers(axes: Any, layers: Sequence[LayerError]) -> None:
    axes.plot(range(len(layers)), [layer.error for layer in layers], marker="o", markersize=3)
    axes.set_xlabel("place in the model")
    axes.set_ylabel("relative error of the residual stream")
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step))
    axes.set_xticklabels([layers[i].name for i in range(0, len(layers), step)], rotation=45, ha="right", fontsize=7)
    axes.set_ylim(bottom=0)
