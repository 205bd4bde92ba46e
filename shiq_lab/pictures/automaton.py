"""The automaton with its turns: states in columns, arcs where they meet again or loop."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_lab.bellman import Solution
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.pictures.drawing import (
    EDGE,
    FILL,
    FOOT,
    HEAD,
    RADIUS,
    Point,
    canvas,
    draw_state,
    inches,
    legend,
    line_width,
    places_of,
    share,
    spell,
    title_of,
)
from shiq_lab.pictures.graphs import Edge, Graph, automaton_graph
from shiq_lab.plotting import GREY, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]  # left, bottom, right, top

COLUMN, LANE = 1.45, (0.62, 1.05)  # between two columns of an automaton; inside one, where little or more stands between
MOST_BEND = 1.2  # of an arc's control point: twice what the arc bows out
STUB = 0.47  # from a state to the dot of an end beside it


def automaton_places(graph: Graph) -> list[Point]:
    """(x, y) of every node in inches, x from the start's column, y downwards from the middle; ends beside or below their state.

    Inside a column the states are ordered by the mean height of their predecessors, left to right, then of their successors
    back; a column with ends below its states, or with edges inside it, is spaced wider.
    """
    column = [n.column for n in graph.nodes]
    states = [i for i, n in enumerate(graph.nodes) if n.owner != "end"]
    inner = [e for e in graph.edges if graph.nodes[e.target].owner != "end"]
    onward = {e.source for e in inner if column[e.target] > column[e.source]}
    wide = {column[e.source] for e in inner if column[e.target] == column[e.source]}
    wide |= {column[e.source] for e in graph.edges if graph.nodes[e.target].owner == "end" and e.source in onward}
    near: dict[int, set[int]] = {i: set() for i in states}
    for e in inner:
        near[e.source].add(e.target)
        near[e.target].add(e.source)
    y = dict.fromkeys(states, 0.0)
    last = max(column[i] for i in states)
    for sweep in range(7):
        for c in range(last + 1) if sweep % 2 == 0 else range(last, -1, -1):
            keys = {}
            for i in states:
                if column[i] == c:
                    side = [y[j] for j in near[i] if (column[j] < c) == (sweep % 2 == 0) and column[j] != c]
                    keys[i] = (sum(side) / len(side) if side else y[i], i)
            for k, i in enumerate(sorted(keys, key=keys.__getitem__)):
                y[i] = (k - (len(keys) - 1) / 2) * LANE[c in wide]
    places = {i: (column[i] * COLUMN, y[i]) for i in states}
    for e in graph.edges:
        if e.target not in places:
            x, down = places[e.source]
            places[e.target] = (x, down + STUB) if e.source in onward else (x + STUB, down)
    return [places[i] for i in range(len(graph.nodes))]


@style()
def automaton_figure(solution: Solution, *, t: int = 0, max_states: int = 40, title: str = "") -> "Figure":
    """The automaton, turn by turn from left to right: v* in every state, tokens on the edges, widths pi*, ways back as arcs.

    Tokens with the same successor share an edge, whose width is their pi* together. t: policy tokens already spent, where a
    horizon makes values depend on it. Raises ValueError for more than max_states reachable states.
    """
    graph = automaton_graph(solution, t=t, max_states=max_states)
    places = automaton_places(graph)
    texts = [_edge_text(solution.mdp, graph, i) for i in range(len(graph.edges))]
    above, below = _reach(graph, places)
    right = max(_right_of(graph, places, texts), max(x for x, _ in places) + COLUMN / 2)
    needed = COLUMN / 2 + right + 0.24
    width, height = max(needed, 5.6), HEAD + 0.5 + above + below + 0.12 + FOOT
    page, axes = canvas(width, height)
    left, top = 0.12 + COLUMN / 2 + (width - needed) / 2, height - HEAD - 0.5 - above
    at = [(left + x, top - y) for x, y in places]
    _draw_bands(axes, graph, at, height, left + right)
    for i, node in enumerate(graph.nodes):
        draw_state(axes, node, at[i], str(i), places_of(graph))
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in at]
    for i in sorted(range(len(graph.edges)), key=lambda i: graph.nodes[graph.edges[i].target].owner != "end"):
        _draw_arrow(axes, graph, i, at, texts[i], taken)
    axes.text(0.12, height - 0.12, title or title_of(solution, "automaton", t), va="top", fontsize=10)
    notes = "in a state: v*     on an edge: the tokens that lead along it; its width: π* (the environment's: P)"
    legend(axes, {n.owner for n in graph.nodes}, notes)
    return page


def _edge_text(mdp: TokenMDP, graph: Graph, i: int) -> str:
    """'a b c', or '4 tokens' where that would be long; with its probability where the environment has a choice."""
    edge = graph.edges[i]
    names = [spell(mdp.show(a)) for a in edge.tokens]
    said = " ".join(names)
    if len(names) > 1 and len(said) > 12:
        said = f"{len(names)} tokens"
    random = graph.nodes[edge.source].owner == "environment" and edge.policy < 1 - 1e-12
    return f"{said}  P {share(edge.policy)}" if random else said


def _bend(graph: Graph, edge: Edge) -> float:
    """How far an edge bows out, as a share of its length: 0 for a step to the next column with no way back."""
    here, there = graph.nodes[edge.source], graph.nodes[edge.target]
    if there.owner == "end":
        return 0.0
    step = there.column - here.column
    back = any(e.source == edge.target and e.target == edge.source for e in graph.edges)
    if abs(step) == 1 and (back or step == 1):
        return -0.16 if back else 0.0
    return -0.3


def _curve(graph: Graph, edge: Edge, at: Sequence[Point]) -> Floats:
    """The control points of an edge, float[3 or 4, 2]: a quadratic Bezier curve, or a cubic loop above a state."""
    start, end = np.array(at[edge.source]), np.array(at[edge.target])
    if edge.source == edge.target:
        return start + np.array([(-0.06, 0.0), (-0.6, 0.85), (0.6, 0.85), (0.06, 0.0)])
    along = end - start
    side = np.array([along[1], -along[0]]) / np.hypot(*along)
    control = (start + end) / 2 + side * np.clip(_bend(graph, edge) * np.hypot(*along), -MOST_BEND, MOST_BEND)
    return np.stack([start, control, end])


def _bezier(points: Floats, u: Floats) -> Floats:
    """Points float[n, 2] of a Bezier curve at the parameters u float[n], by de Casteljau."""
    layer = [np.broadcast_to(point, (len(u), 2)) for point in points]
    while len(layer) > 1:
        layer = [(1 - u)[:, None] * a + u[:, None] * b for a, b in itertools.pairwise(layer)]
    return np.asarray(layer[0])


def _between(points: Floats, first: float, last: float) -> Floats:
    """The control points of the part of a Bezier curve from parameter `first` to `last`."""

    def head(points: Floats, u: float) -> Floats:
        layers = [points]
        while len(layers[-1]) > 1:
            layers.append((1 - u) * layers[-1][:-1] + u * layers[-1][1:])
        return np.stack([layer[0] for layer in layers])

    return head(head(points[::-1], 1 - first)[::-1], (last - first) / (1 - first))


def _reach(graph: Graph, places: Sequence[Point]) -> tuple[float, float]:
    """Inches that states, ends with their texts and arcs reach above and below the middle."""
    u = np.linspace(0, 1, 21)
    upward = [(x, -y) for x, y in places]
    lines = np.concatenate([_bezier(_curve(graph, e, upward), u) for e in graph.edges])[:, 1]
    states = [y for (_, y), n in zip(upward, graph.nodes, strict=True) if n.owner != "end"]
    ends = [upward[e.target][1] for e in graph.edges if upward[e.target][1] < upward[e.source][1]]
    ends = [y - 0.27 for y in ends] or [0.0]
    return max(max(states) + RADIUS, lines.max()), -min(min(states) - RADIUS, lines.min(), *ends)


def _right_of(graph: Graph, places: Sequence[Point], texts: Sequence[str]) -> float:
    """Where the texts beside the ends, and the arcs with half a text, stop."""
    reach = []
    for edge, text in zip(graph.edges, texts, strict=True):
        line = _bezier(_curve(graph, edge, places), np.linspace(0, 1, 21))[:, 0].max()
        wide = inches(text, 7.2, "bold")
        reach.append(line + (wide + 0.2 if graph.nodes[edge.target].owner == "end" else wide / 2 + 0.06))
    return max(reach)


def _draw_bands(axes: "Axes", graph: Graph, at: Sequence[Point], height: float, right_end: float) -> None:
    """A shaded band a turn, its name on top."""
    from matplotlib.patches import Rectangle

    x_of = {n.column: at[i][0] for i, n in enumerate(graph.nodes) if n.owner != "end"}
    for first, last, name in graph.bands:
        left = x_of[first] - COLUMN / 2 + 0.03
        right = right_end if last == max(x_of) else x_of[last] + COLUMN / 2 - 0.03
        kind = "policy" if name.endswith("policy") else "environment"
        low, high = FOOT + 0.03, height - HEAD
        axes.add_patch(Rectangle((left, low), right - left, high - low, color=FILL[kind], alpha=0.38, lw=0, zorder=0))
        axes.text((left + right) / 2, high - 0.06, name, ha="center", va="top", fontsize=8, color=GREY, gid=f"band-{first}")


def _draw_arrow(axes: "Axes", graph: Graph, i: int, at: Sequence[Point], text: str, taken: list[Box]) -> None:
    """An arrow from rim to rim, and its text at the first place along it where nothing else stands."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    edge = graph.edges[i]
    ends = graph.nodes[edge.target].owner == "end"
    curve = _curve(graph, edge, at)
    u = np.linspace(0, 1, 401)
    line = _bezier(curve, u)
    outside = np.hypot(*(line - at[edge.source]).T) >= RADIUS
    outside &= np.hypot(*(line - at[edge.target]).T) >= (0.02 if ends else RADIUS + 0.02)
    first, last = u[outside][[0, -1]]
    kind = {3: Path.CURVE3, 4: Path.CURVE4}[len(curve)]
    path = Path(_between(curve, first, last), [Path.MOVETO] + [kind] * (len(curve) - 1))
    lw = line_width(edge.policy)
    arrow = FancyArrowPatch(
        path=path, arrowstyle="-" if ends else "-|>", mutation_scale=5 + 1.1 * lw, lw=lw, shrinkA=0, shrinkB=0, zorder=2,
        color=EDGE[graph.nodes[edge.source].owner], joinstyle="miter", capstyle="butt", gid=f"edge-{i}",
    )  # fmt: skip
    axes.add_patch(arrow)
    _place_text(axes, text, line[outside], f"token-{i}", taken, ends)


def _place_text(axes: "Axes", text: str, line: Floats, name: str, taken: list[Box], ends: bool) -> None:
    """On the line at the first share of its length where the text covers no other; beside or below the dot of an end."""
    size = 7.2
    wide, high = inches(text, size, "bold") / 2 + 0.03, 0.075
    shares = (0.42, 0.5, 0.34, 0.58, 0.26, 0.66, 0.2, 0.74)
    spots = [tuple(line[int(u * (len(line) - 1))]) for u in shares]
    if ends:
        x, y = line[-1]
        below, beside = (x, y - 0.19), (x + wide + 0.08, y)
        spots = [below, beside] if abs(x - line[0][0]) < 1e-9 else [beside, below]
    boxes = [(x - wide, y - high, x + wide, y + high) for x, y in spots]
    overlap = [sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken) for a in boxes]
    best = int(np.argmin(overlap))
    taken.append(boxes[best])
    paper: dict[str, Any] = {"boxstyle": "round,pad=0.12", "facecolor": "white", "alpha": 0.0 if ends else 0.85, "lw": 0}
    x, y = spots[best]
    font: dict[str, Any] = {"fontsize": size, "fontweight": "bold", "parse_math": False, "zorder": 5, "gid": name}
    axes.text(x, y, text, ha="center", va="center", bbox=paper, **font)
