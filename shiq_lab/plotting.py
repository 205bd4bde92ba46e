"""What all pictures share: one style, figures that need no display, files of the same bytes every time; and the selftest's.

Draw inside `style()`, with `figure` and `save`. White page with a margin, so that a picture reads on light and dark pages.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shiq_lab.selftest import Report

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = {
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "pink": "#CC79A7",
    "blue": "#0072B2",
    "black": "#000000",
    "yellow": "#F0E442",
}
COLORS = {
    "naive": PALETTE["orange"],
    "easy": PALETTE["sky"],
    "shifted": PALETTE["green"],
    "shiq": PALETTE["vermilion"],
    "sequence": PALETTE["pink"],
    "semi-gradient": PALETTE["blue"],
    "turn-cut": PALETTE["black"],
}
MARKERS = {"naive": "s", "easy": "D", "shifted": "^", "shiq": "o", "sequence": "X", "semi-gradient": "P", "turn-cut": "*"}
INK, GREY, PALE = "#222222", "#555555", "#dddddd"  # text, notes, grid; INK and GREY keep a contrast of at least 7 on white
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that every machine sets the same letters
    "mathtext.fontset": "dejavusans",
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "figure.facecolor": "white",
    "savefig.facecolor": "auto",
    "figure.constrained_layout.w_pad": 0.08,  # inches: the margin
    "figure.constrained_layout.h_pad": 0.08,
    "svg.fonttype": "path",
    "svg.hashsalt": "shiq_lab",  # else the names inside an SVG are drawn at random
}
# What a file would say about the day and the program, by kind of file.
_METADATA = {"png": ("Software",), "svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}


@contextmanager
def style(**changes: Any) -> Iterator[None]:
    """The style of all pictures, for a `with` block or as a decorator `@style()`; `changes` are further matplotlib settings.

    Inside it matplotlib's defaults and these settings hold, whatever the reader's own matplotlibrc says; outside all stays.
    """
    import matplotlib
    from cycler import cycler

    colors = [PALETTE[name] for name in ("blue", "vermilion", "green", "orange", "sky", "pink", "black")]
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in ("backend", "backend_fallback")}
    settings: Any = {**defaults, **_STYLE, "axes.prop_cycle": cycler(color=colors), **changes}
    with matplotlib.rc_context(settings):
        yield


def figure(**options: Any) -> "Figure":
    """A figure that needs no display and touches no global state of pyplot; options are those of matplotlib's Figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(**{"layout": "constrained", "facecolor": "white", **options})
    FigureCanvasAgg(made)
    return made


@style()
def selftest_figure(report: "Report") -> "Figure":
    """Max Q error of every method on every environment, on a logarithmic axis from rounding to failure."""
    names = list(dict.fromkeys(t.environment for t in report.trained))
    page = figure(figsize=(9, 0.5 * len(names) + 2.4), dpi=150)
    axes = page.add_subplot()
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
        xscale="log", xlim=(1e-17, 30), ylim=(len(names) - 0.45, -0.85), xlabel="max |q̂ − q*| over reachable states and tokens"
    )
    axes.set_yticks(range(len(names)), names)
    axes.hlines([i + 0.5 for i in range(len(names) - 1)], 1e-17, 30, color="#eeeeee", lw=0.6, zorder=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    note: dict[str, Any] = {"y": -0.78, "fontsize": 9, "color": "#555555", "va": "top"}
    axes.text(1e-8 / 3, s="recovered: at most 1e-8", ha="right", **note)
    axes.text(3e-8, s="missed", **note)
    axes.set_title("Trained from the reference, read out, compared with the exact q*", loc="left", fontsize=11)
    page.legend(loc="outside lower center", ncols=len(present), frameon=False, fontsize=9)
    return page


def save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure (.png, .svg, .pdf) whole or not at all; the same figure gives the same bytes, without date or version."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    kind = path.suffix.lstrip(".")
    nothing: dict[str, None] = dict.fromkeys(_METADATA.get(kind, ()))
    try:
        with style():
            figure.savefig(partial, format=kind, metadata=nothing or None)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
