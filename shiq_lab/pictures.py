"""Pictures that teach: the prefix tree with its exact values, the automaton with its turns, a row of tokens with its credit.

Every picture is drawn from plain data that a function of its own computes (`tree_graph`, `automaton_graph`, `credit_of`), and
each number on it carries a gid ("v-3", "q-5", "D-2"), so that what a reader sees can be compared with the truth.
"""

import functools
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import Solution
from shiq_lab.enumeration import count_prefixes, count_trajectories, unfold
from shiq_lab.errors import at_least, bad
from shiq_lab.graph import Floats
from shiq_lab.losses import steps
from shiq_lab.losses.shiq import residuals_of, shiq_gradient
from shiq_lab.mdp import TokenMDP
from shiq_lab.plotting import GREY, INK, PALETTE, figure, style
from shiq_lab.stats import TokenStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Owner = Literal["policy", "environment", "end"]
Point = tuple[float, float]

FILL = {"policy": "#D8EAF6", "environment": "#FCE9C4", "end": INK}
EDGE = {"policy": PALETTE["blue"], "environment": "#B87A00"}  # the palette's orange, darkened: 3.5 to 1 on white
RADIUS = 0.21  # of a state, in inches, as all lengths below
ROW = 0.44  # between two leaves of a tree
STEP = {"policy": 1.62, "environment": 1.12}  # between two depths of a tree, by who speaks there
BEND = 0.34  # the curved part of a tree's edge
COLUMN, LANE = 1.45, 1.05  # between two columns and two rows of an automaton
STUB = 0.47  # from a state to the dot of an end beside it


# --------------------------------------------------------------------------------------------------------- the data
@dataclass(frozen=True)
class Node:
    """A state as drawn: `state` of the automaton (-1: an end) after `spent` policy tokens; `column` counts from the start."""

    owner: Owner
    state: int
    spent: int
    column: int
    v: float


@dataclass(frozen=True)
class Edge:
    """Tokens that lead from one node to another (numbers in the list of nodes).

    q       one a token, q*(s, a); of an environment's token: v* of what follows
    policy  pi* of all these tokens together; of the environment's: their probability
    ref     the same under pi_ref
    """

    source: int
    target: int
    tokens: tuple[int, ...]
    q: tuple[float, ...]
    policy: float
    ref: float


@dataclass(frozen=True)
class Graph:
    """What a picture shows; nodes[0] is the start. `bands` are (first column, last column, label), in order."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    bands: tuple[tuple[int, int, str], ...] = ()


class _Tables:
    """q*, ln pi* and v* after t policy tokens, each computed once."""

    def __init__(self, solution: Solution) -> None:
        self.solution = solution
        self.q = functools.cache(solution.q)
        self.log_policy = functools.cache(solution.log_policy)

    def node(self, state: int, spent: int, column: int) -> Node:
        owner: Owner = "policy" if self.solution.mdp.is_policy[state] else "environment"
        return Node(owner, state, spent, column, float(self.solution.v(spent)[state]))

    def edge(self, source: int, target: int, tokens: Sequence[int], state: int, spent: int) -> Edge:
        take = list(tokens)
        q = self.q(spent)[state, take]
        chance = np.exp(self.log_policy(spent)[state, take]).sum()
        ref = np.exp(self.solution.mdp.ref_log_policy[state, take]).sum()
        return Edge(source, target, tuple(int(a) for a in take), tuple(q.tolist()), float(chance), float(ref))


def _check_solution(solution: object) -> Solution:
    if not isinstance(solution, Solution):
        raise bad("solution", "a Solution", repr(solution)[:80], "shiq_lab.solve(mdp, beta=...) makes one.")
    return solution


def tree_graph(solution: Solution, *, max_states: int = 40) -> Graph:
    """The prefix tree: a node for every string that can be said, an edge for every token; values are those of the automaton.

    With a horizon a node's values are v*(s), q*(s, a) after as many policy tokens as its string holds. Raises ValueError, with
    the exact size, where there are more than max_states states and ends.
    """
    mdp, most = _check_solution(solution).mdp, at_least("max_states", max_states, 1)
    inner, ends = count_prefixes(mdp), count_trajectories(mdp)
    size = None if inner is None or ends is None else inner + ends
    if size is None or size > most:
        expected = f"at least the tree's {'infinitely many' if size is None else size} states and ends"
        raise bad("max_states", expected, most, "Take smaller parameters, or a shorter horizon.")
    tree, origin = unfold(mdp, most)
    tables = _Tables(solution)
    spent, state = (origin // mdp.n_states).tolist(), (origin % mdp.n_states).tolist()
    depth = [0] * tree.n_states
    last: list[Node] = []
    edges = []
    for here in range(tree.n_states):  # in order of length, so that a parent comes before its children
        for token in np.flatnonzero(tree.allowed[here]).tolist():
            target = int(tree.next_state[here, token])
            if target < 0:
                target = tree.n_states + len(last)
                last.append(Node("end", -1, spent[here] + int(tree.is_policy[here]), depth[here] + 1, 0.0))
            else:
                depth[target] = depth[here] + 1
            edges.append(tables.edge(here, target, [token], state[here], spent[here]))
    nodes = [tables.node(state[i], spent[i], depth[i]) for i in range(tree.n_states)]
    return Graph((*nodes, *last), tuple(edges))


def automaton_graph(solution: Solution, *, t: int = 0, max_states: int = 40) -> Graph:
    """The reachable states in columns by turn and by distance inside the turn; tokens with the same successor share an edge.

    A turn is a run of states of one owner; a state reached in several ways stands where the fewest turns, then the fewest
    tokens, lead. Each state that can end has an end of its own. t: policy tokens already spent, where a horizon makes values
    depend on it. Raises ValueError for more than max_states states.
    """
    mdp, most = _check_solution(solution).mdp, at_least("max_states", max_states, 1)
    size = int(mdp.reachable.sum())
    if size > most:
        remedy = "Take smaller parameters."
        raise bad("max_states", f"at least the automaton's {size} reachable states", most, remedy)
    place = _turns(mdp)
    order = sorted(place, key=lambda s: (place[s], s))
    column = {p: i for i, p in enumerate(sorted(set(place.values())))}
    number = {s: i for i, s in enumerate(order)}
    tables = _Tables(solution)
    nodes = [tables.node(s, t, column[place[s]]) for s in order]
    edges = []
    for s in order:
        for target in np.unique(mdp.next_state[s][mdp.allowed[s]])[::-1].tolist():  # the end, -1, comes last
            tokens = np.flatnonzero(mdp.allowed[s] & (mdp.next_state[s] == target)).tolist()
            if target < 0:
                nodes.append(Node("end", -1, t + int(mdp.is_policy[s]), column[place[s]] + 1, 0.0))
            edges.append(tables.edge(number[s], number[target] if target >= 0 else len(nodes) - 1, tokens, s, t))
    return Graph(tuple(nodes), tuple(edges), _bands(mdp, place, column))


def _turns(mdp: TokenMDP) -> dict[int, tuple[int, int]]:
    """{reachable state: (turn, tokens said in it)}, both the least: Dijkstra over pairs, whose order every step keeps."""
    place: dict[int, tuple[int, int]] = {}
    heap = [((0, 0), mdp.start)]
    while heap:
        (turn, said), s = heapq.heappop(heap)
        if s in place:
            continue
        place[s] = (turn, said)
        for target in np.unique(mdp.next_state[s][mdp.allowed[s]]).tolist():
            if target >= 0 and target not in place:
                same = mdp.is_policy[s] == mdp.is_policy[target]
                heapq.heappush(heap, ((turn, said + 1) if same else (turn + 1, 0), target))
    return place


def _bands(
    mdp: TokenMDP, place: dict[int, tuple[int, int]], column: dict[tuple[int, int], int]
) -> tuple[tuple[int, int, str], ...]:
    """Each turn's columns and name; owners alternate from turn to turn."""
    policy = bool(mdp.is_policy[mdp.start])
    turns = sorted({turn for turn, _ in place.values()})
    actions = sum((turn % 2 == 0) == policy for turn in turns)
    bands = []
    for turn in turns:
        columns = [i for (other, _), i in column.items() if other == turn]
        if (turn % 2 == 0) == policy:
            name = f"turn {turn // 2 + 1}: policy" if actions > 1 else "policy"
        else:
            name = "prompt" if turn == 0 else "tool replies"
        bands.append((min(columns), max(columns), name))
    return tuple(bands)


# ------------------------------------------------------------------------------------------------------ the drawing
def number(x: float) -> str:
    """Two decimals, or three digits where these would say nothing; with a real minus sign."""
    said = f"{x:.2f}" if x == 0 or 0.01 <= abs(x) < 1000 else f"{x:.2g}"
    said = "0.00" if said == "-0.00" else said
    return said.replace("-", "\N{MINUS SIGN}")


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


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A page whose coordinates are inches, so that every length above is what a reader sees."""
    page = figure(figsize=(width, height), layout="none")
    axes = page.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return page, axes


def _draw_state(axes: "Axes", node: Node, at: Point, name: str) -> None:
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
    said = number(node.v)
    size = 7.5 if len(said) <= 5 else 6.2
    axes.text(*at, said, ha="center", va="center_baseline", fontsize=size, zorder=5, gid=f"v-{name}")


def _width(chance: float) -> float:
    """Points: proportional to the probability, with a hair line left of what is never said."""
    return 0.4 + 5.0 * chance


def _legend(axes: "Axes", owners: Iterable[str], notes: str) -> None:
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
    handles += [Line2D([], [], color=EDGE["policy"], lw=_width(p), label=f"π* = {p:g}") for p in (0.1, 0.5, 1.0)]
    box = axes.legend(
        handles=handles, title=notes, loc="lower center", ncols=len(handles), fontsize=7.5, title_fontsize=7.5,
        handlelength=1.4, columnspacing=1.1, handletextpad=0.5, borderaxespad=0.4,
    )  # fmt: skip
    box.set_zorder(6)


FOOT, HEAD = 0.62, 0.42  # of a page: the legend's lines, the title


@style()
def tree_figure(solution: Solution, *, max_states: int = 40, title: str = "") -> "Figure":
    """The prefix tree from left to right: v* in every state; on every edge the token, q*, pi* and pi_ref.

    Line widths are pi* (in the environment's squares its own probability P, and no q*: what follows shows its v*). With a
    horizon the values are those after the policy tokens already said. Raises ValueError, with the exact size, for a tree of
    more than max_states states and ends.
    """
    graph = tree_graph(solution, max_states=max_states)
    places = tree_places(graph)
    width = max(max(x for x, _ in places) + 0.35, 5.6)
    height = FOOT + HEAD + max(y for _, y in places) + 0.1
    page, axes = _canvas(width, height)
    at = [(x, height - HEAD - y) for x, y in places]
    for i, node in enumerate(graph.nodes):
        _draw_state(axes, node, at[i], str(i))
    for i, edge in enumerate(graph.edges):
        _draw_branch(axes, solution.mdp, graph, i, at[edge.source], at[edge.target])
    axes.text(0.12, height - 0.1, title or _title(solution, "prefix tree"), va="top", fontsize=10)
    _legend(axes, {n.owner for n in graph.nodes}, "in a state: v*     on an edge: token, q*, π* (π of the reference)")
    return page


def _title(solution: Solution, what: str) -> str:
    """'Bandit, prefix tree: beta = 0.5, gamma = 1'."""
    name = f"{solution.mdp.name}, {what}" if solution.mdp.name else what.capitalize()
    limit = "" if solution.mdp.horizon is None else f", horizon {solution.mdp.horizon}"
    return f"{name}{limit} (β = {solution.beta:g}, γ = {solution.gamma:g})"


def tree_places(graph: Graph) -> list[Point]:
    """(x from the left, y from the top) of every node in inches: leaves a row each, parents between first and last child."""
    children: dict[int, list[int]] = {}
    for edge in graph.edges:
        children.setdefault(edge.source, []).append(edge.target)
    speaker = {n.column: n.owner for n in graph.nodes if n.owner != "end"}
    for n in graph.nodes:
        if n.owner == "policy":  # where both speak at one depth, there is room for the policy's longer text
            speaker[n.column] = "policy"
    x = [RADIUS + 0.15]
    for column in sorted(speaker):
        x.append(x[-1] + STEP[speaker[column]])
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


def _draw_branch(axes: "Axes", mdp: TokenMDP, graph: Graph, i: int, start: Point, end: Point) -> None:
    """A curve out of the parent, then a level stretch with the token and q* above it and pi* below."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    edge = graph.edges[i]
    owner = graph.nodes[edge.source].owner
    (x0, y0), (x1, y1) = start, end
    bend = x0 + RADIUS + BEND
    inside = x0 + 0.5 * RADIUS  # hidden under the parent
    curve = [(inside, y0), (inside + 0.6 * (bend - inside), y0), (bend - 0.5 * (bend - inside), y1), (bend, y1), (x1, y1)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    line = PathPatch(Path(curve, codes), fill=False, lw=_width(edge.policy), edgecolor=EDGE[owner], capstyle="butt", zorder=2)
    line.set_gid(f"edge-{i}")
    axes.add_patch(line)
    above, below = y1 + 0.035 + _width(edge.policy) / 144, y1 - 0.03 - _width(edge.policy) / 144
    right = x1 - (0.08 if graph.nodes[edge.target].owner == "end" else RADIUS + 0.04)
    left = bend + 0.02
    token = spell(mdp.show(edge.tokens[0]))
    bold: dict[str, Any] = {"fontsize": 7.5, "fontweight": "bold", "parse_math": False}
    axes.text(left, above, token, va="bottom", gid=f"token-{i}", zorder=5, **bold)
    small: dict[str, Any] = {"fontsize": 7, "zorder": 5}
    if owner == "policy":
        axes.text(right, above, f"q* {number(edge.q[0])}", va="bottom", ha="right", gid=f"q-{i}", **small)
        chance = f"π* {number(edge.policy)} ({number(edge.ref)})"
    else:
        chance = f"P {number(edge.policy)}"
    axes.text(left, below, chance, va="top", gid=f"pi-{i}", **{**small, "color": GREY, "fontsize": 6.6})
