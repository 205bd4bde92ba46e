"""The prefix tree with its exact values, drawn from left to right."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shiq_lab.bellman import Solution
from shiq_lab.pictures.drawing import (
    EDGE,
    FOOT,
    HEAD,
    RADIUS,
    Point,
    canvas,
    draw_state,
    inches,
    legend,
    line_width,
    number,
    places_of,
    share,
    spell,
    title_of,
)
from shiq_lab.pictures.graphs import Edge, Graph, tree_graph
from shiq_lab.plotting import GREY, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.44  # between two leaves of a tree
BEND = 0.34  # the curved part of a tree's edge


def _branch_texts(solution: Solution, graph: Graph, edge: Edge) -> tuple[str, str, str]:
    """(token, q*, probability) as a tree's edge says them; the environment's edges leave out q*, which the next state shows."""
    token = spell(solution.mdp.show(edge.tokens[0]))
    if graph.nodes[edge.source].owner == "environment":
        return token, "", f"P {share(edge.policy)}"
    return token, f"q* {number(edge.q[0], places_of(graph))}", f"π* {share(edge.policy)} ({share(edge.ref)})"


@style()
def tree_figure(solution: Solution, *, max_states: int = 40, title: str = "") -> "Figure":
    """The prefix tree from left to right: v* in every state; on every edge the token, q*, pi* and pi_ref.

    Line widths are pi* (out of the environment's squares its own probability P, and no q*: what follows shows its v*). With a
    horizon the values are those after the policy tokens already said. Raises ValueError, with the exact size, for a tree of
    more than max_states states and ends.
    """
    graph = tree_graph(solution, max_states=max_states)
    texts = [_branch_texts(solution, graph, edge) for edge in graph.edges]
    places = tree_places(graph, texts)
    width = max(max(x for x, _ in places) + 0.25, 5.6)
    height = FOOT + HEAD + max(y for _, y in places) + 0.25
    left = (width - max(x for x, _ in places) - 0.25) / 2
    page, axes = canvas(width, height)
    at = [(x + left, height - HEAD - y) for x, y in places]
    for i, node in enumerate(graph.nodes):
        draw_state(axes, node, at[i], str(i), places_of(graph))
    for i, edge in enumerate(graph.edges):
        alone = sum(other.source == edge.source for other in graph.edges) == 1
        _draw_branch(axes, graph, i, at[edge.source], at[edge.target], texts[i], alone)
    axes.text(0.12, height - 0.12, title or title_of(solution, "prefix tree"), va="top", fontsize=10)
    legend(axes, {n.owner for n in graph.nodes}, "in a state: v*     on an edge: token, q*, π* (π of the reference)")
    return page


def tree_places(graph: Graph, texts: Sequence[tuple[str, str, str]]) -> list[Point]:
    """(x from the left, y from the top) of every node in inches: leaves a row each, parents between first and last child.

    Columns stand as far apart as the texts (token, q*, probability) of the edges between them are wide.
    """
    children: dict[int, list[int]] = {}
    wide: dict[int, float] = {}
    for edge, (token, q, chance) in zip(graph.edges, texts, strict=True):
        children.setdefault(edge.source, []).append(edge.target)
        line = inches(token, 7.5, "bold") + (0.1 + inches(q, 7) if q else 0.0)
        column = graph.nodes[edge.source].column
        wide[column] = max(wide.get(column, 0.0), line, inches(chance, 6.6))
    x = [RADIUS + 0.15]
    for column in sorted(wide):
        x.append(x[-1] + 2 * RADIUS + BEND + 0.1 + wide[column])
    y: dict[int, float] = {}
    row = 0
    stack = [(0, False)]
    while stack:
        node, opened = stack.pop()
        below = children.get(node, [])
        if not below:
            y[node] = (row + 0.5) * ROW
            row += 1
        elif opened:
            y[node] = (y[below[0]] + y[below[-1]]) / 2
        else:
            stack += [(node, True), *((child, False) for child in reversed(below))]
    return [(x[n.column], y[i]) for i, n in enumerate(graph.nodes)]


def _draw_branch(
    axes: "Axes", graph: Graph, i: int, start: Point, end: Point, texts: tuple[str, str, str], alone: bool
) -> None:
    """A curve out of the parent, then a level stretch with the token and q* above it and the probability below."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    edge = graph.edges[i]
    (x0, y0), (x1, y1) = start, end
    bend = x0 + RADIUS + BEND
    inside = x0 + 0.5 * RADIUS  # hidden under the parent
    middle = (inside + bend) / 2
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    path = Path([(inside, y0), (middle, y0), (middle, y1), (bend, y1), (x1, y1)], codes)
    color = EDGE[graph.nodes[edge.source].owner]
    axes.add_patch(PathPatch(path, fill=False, lw=line_width(edge.policy), edgecolor=color, zorder=2, gid=f"edge-{i}"))
    away = 0.03 + line_width(edge.policy) / 144  # half the line, in inches
    left = x0 + RADIUS + 0.08 if alone else bend + 0.02
    right = x1 - (0.08 if graph.nodes[edge.target].owner == "end" else RADIUS + 0.04)
    token, q, chance = texts
    axes.text(
        left, y1 + away, token, va="bottom", fontsize=7.5, fontweight="bold", parse_math=False, gid=f"token-{i}", zorder=5
    )
    if q:
        axes.text(right, y1 + away, q, va="bottom", ha="right", fontsize=7, gid=f"q-{i}", zorder=5)
    axes.text(left, y1 - away, chance, va="top", fontsize=6.6, color=GREY, gid=f"pi-{i}", zorder=5)
