"""What the pictures of automata share: a page in inches, states as shapes, numbers and tokens as they are printed."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_lab.bellman import Solution
from shiq_lab.pictures.graphs import Graph, Node
from shiq_lab.plotting import INK, PALETTE, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

FILL = {"policy": "#D8EAF6", "environment": "#FCE9C4", "end": INK}
EDGE = {"policy": PALETTE["blue"], "environment": "#B87A00"}  # the palette's orange, darkened: 3.5 to 1 on white
RADIUS = 0.21  # of a state, in inches, as all lengths below


def decimals(values: Iterable[float]) -> int:
    """Places behind the point for numbers that share a picture: two, more where all are small, none where some are large."""
    top = max((abs(x) for x in values), default=0.0)
    if top == 0 or 0.1 <= top < 100:
        return 2
    return int(np.clip(1 - np.floor(np.log10(top)), 0, 12))


def number(x: float, places: int = 2) -> str:
    """x to so many places, with a real minus sign and no minus zero; powers of ten from a million on."""
    said = f"{x:.{places}f}" if abs(x) < 1e6 and places <= 6 else f"{x:.1e}"
    said = said.lstrip("-") if float(said) == 0 else said
    return said.replace("-", "\N{MINUS SIGN}")


def share(p: float) -> str:
    """A probability to two places; one that these would show as none says so."""
    return "<0.01" if 0 < p < 0.005 else f"{p:.2f}"


@functools.cache
def _font() -> Any:
    from matplotlib.font_manager import findfont, get_font

    return get_font(findfont("DejaVu Sans"))


def spell(token: str, width: int = 8) -> str:
    """A token's string as it can be printed: white space made visible, letters the font lacks as their code, long ones cut."""
    visible = {" ": "\N{OPEN BOX}", "\n": "\\n", "\t": "\\t", "\r": "\\r", "": "\N{EMPTY SET}"}
    if token == "":
        return visible[token]
    letters = [visible.get(c) or (c if _font().get_char_index(ord(c)) else f"\\u{ord(c):04x}") for c in token]
    said = "".join(letters)
    return said if len(said) <= width else said[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A page whose coordinates are inches, so that every length above is what a reader sees."""
    page = figure(figsize=(width, height), layout="none")
    axes = page.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return page, axes


def draw_state(axes: "Axes", node: Node, at: Point, name: str, places: int) -> None:
    """A disc for the policy, a square for the environment, a dot for an end; v* inside."""
    from matplotlib.patches import Circle, Rectangle

    if node.owner == "end":
        axes.add_patch(Circle(at, 0.045, color=FILL["end"], zorder=4, gid=f"end-{name}"))
        return
    paint: dict[str, Any] = {"facecolor": FILL[node.owner], "edgecolor": EDGE[node.owner], "lw": 1.2, "zorder": 4}
    half = 0.9 * RADIUS
    corner = (at[0] - half, at[1] - half)
    shape = Circle(at, RADIUS, **paint) if node.owner == "policy" else Rectangle(corner, 2 * half, 2 * half, **paint)
    shape.set_gid(f"{node.owner}-{name}")
    axes.add_patch(shape)
    said = number(node.v, places)
    size = 7.5 if len(said) <= 5 else 6.2
    axes.text(*at, said, ha="center", va="center_baseline", fontsize=size, zorder=5, gid=f"v-{name}")


def line_width(chance: float) -> float:
    """Points: proportional to the probability, with a hair line left of what is never said."""
    return 0.4 + 4.4 * chance


def legend(axes: "Axes", owners: Iterable[str], notes: str) -> None:
    """One line along the foot: the shapes, then the line widths, then what the numbers are."""
    from matplotlib.lines import Line2D

    mark: dict[str, Any] = {"lw": 0, "markersize": 9, "markeredgewidth": 1.1}
    shapes = {"policy": ("o", "policy's state"), "environment": ("s", "environment's state")}
    handles = [
        Line2D([], [], marker=shapes[o][0], color=EDGE[o], markerfacecolor=FILL[o], label=shapes[o][1], **mark)
        for o in shapes
        if o in owners
    ]
    handles.append(Line2D([], [], lw=0, marker="o", markersize=4, color=INK, label="end"))
    handles += [Line2D([], [], color=EDGE["policy"], lw=line_width(p), label=f"π* = {p:g}") for p in (0.1, 0.5, 1.0)]
    box = axes.legend(
        handles=handles, title=notes, loc="lower center", ncols=len(handles), fontsize=7.5, title_fontsize=7.5,
        handlelength=1.4, columnspacing=1.1, handletextpad=0.7, borderaxespad=0.4,
    )  # fmt: skip
    box.set_zorder(6)


FOOT, HEAD = 0.62, 0.42  # of a page: the legend's lines, the title


@functools.cache
def inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text is printed."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", weight=weight)
    return float(TextPath((0, 0), text.replace("$", "S"), size=size, prop=font).get_extents().x1) / 72


def title_of(solution: Solution, what: str, t: int = 0) -> str:
    """'Bandit, prefix tree (beta = 0.5, gamma = 1)'."""
    name = f"{solution.mdp.name}, {what}" if solution.mdp.name else what.capitalize()
    limit = "" if solution.mdp.horizon is None else f", horizon {solution.mdp.horizon}"
    spent = f", {t} policy token{'s' * (t != 1)} spent" if t else ""
    return f"{name}{limit}{spent} (β = {solution.beta:g}, γ = {solution.gamma:g})"


def places_of(graph: Graph) -> int:
    """Places behind the point for all numbers of a graph."""
    return decimals([n.v for n in graph.nodes] + [q for e in graph.edges for q in e.q])
