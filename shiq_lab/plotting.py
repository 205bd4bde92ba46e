"""Every picture."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shiq_lab.selftest import Report

# Okabe and Ito's palette, which colour-blind readers can tell apart, on a background that reads on light and dark pages.
COLORS = {
    "naive": "#E69F00",
    "easy": "#56B4E9",
    "shifted": "#009E73",
    "shiq": "#D55E00",
    "sequence": "#CC79A7",
    "semi-gradient": "#0072B2",
    "turn-cut": "#000000",
}
MARKERS = {"naive": "s", "easy": "D", "shifted": "^", "shiq": "o", "sequence": "X", "semi-gradient": "P", "turn-cut": "*"}


def _figure(**options: Any) -> "Figure":
    """A figure that needs no display and touches no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def selftest_figure(report: "Report") -> "Figure":
    """Max Q error of every method on every environment, on a logarithmic axis from rounding to failure."""
    names = list(dict.fromkeys(t.environment for t in report.trained))
    figure = _figure(figsize=(9, 0.5 * len(names) + 2.2), dpi=150)
    axes = figure.add_subplot()
    axes.axvspan(1e-17, 1e-8, color="#009E73", alpha=0.10, lw=0)
    axes.axvline(1e-8, color="#555555", lw=1, ls="--")
    present = [m for m in COLORS if any(t.method == m for t in report.trained)]
    for k, method in enumerate(present):
        lines = [t for t in report.trained if t.method == method]
        x = [max(t.metrics.q_error, 1e-17) for t in lines]
        y = [names.index(t.environment) + 0.125 * (k - (len(present) - 1) / 2) for t in lines]
        axes.scatter(
            x, y, s=42, color=COLORS[method], marker=MARKERS[method], label=method, edgecolor="white", lw=0.5, zorder=3
        )
    axes.set(
        xscale="log", xlim=(1e-17, 30), ylim=(len(names) - 0.45, -0.55), xlabel="max |q̂ − q*| over reachable states and tokens"
    )
    axes.set_yticks(range(len(names)), names)
    axes.hlines([i + 0.5 for i in range(len(names) - 1)], 1e-17, 30, color="#eeeeee", lw=0.6, zorder=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    note: dict[str, Any] = {"y": -0.42, "fontsize": 9, "color": "#555555", "va": "top"}
    axes.text(1e-8 / 3, s="recovered: at most 1e-8", ha="right", **note)
    axes.text(3e-8, s="missed", **note)
    axes.set_title("Trained from the reference, read out, compared with the exact q*", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(present), frameon=False, fontsize=9)
    return figure


def save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    metadata = {"Software": None} if path.suffix == ".png" else None
    try:
        figure.savefig(partial, format=path.suffix.lstrip("."), metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
