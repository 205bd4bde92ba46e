"""Pictures that teach: the prefix tree with its exact values, the automaton with its turns, a row of tokens with its credit.

Every picture is drawn from plain data that a function of its own computes (`tree_graph`, `automaton_graph`, `credit_of`), and
each number on it carries a gid ("v-3", "q-5", "D-2"), so that what a reader sees can be compared with the truth.
"""

import functools
import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

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
Box = tuple[float, float, float, float]  # left, bottom, right, top

FILL = {"policy": "#D8EAF6", "environment": "#FCE9C4", "end": INK}
EDGE = {"policy": PALETTE["blue"], "environment": "#B87A00"}  # the palette's orange, darkened: 3.5 to 1 on white
RADIUS = 0.21  # of a state, in inches, as all lengths below
ROW = 0.44  # between two leaves of a tree
BEND = 0.34  # the curved part of a tree's edge
COLUMN, LANE = 1.45, (0.62, 1.05)  # between two columns of an automaton; inside one, where little or more stands between
MOST_BEND = 1.2  # of an arc's control point: twice what the arc bows out
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


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A page whose coordinates are inches, so that every length above is what a reader sees."""
    page = figure(figsize=(width, height), layout="none")
    axes = page.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return page, axes


def _draw_state(axes: "Axes", node: Node, at: Point, name: str, places: int) -> None:
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


def _width(chance: float) -> float:
    """Points: proportional to the probability, with a hair line left of what is never said."""
    return 0.4 + 4.4 * chance


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
        handlelength=1.4, columnspacing=1.1, handletextpad=0.7, borderaxespad=0.4,
    )  # fmt: skip
    box.set_zorder(6)


FOOT, HEAD = 0.62, 0.42  # of a page: the legend's lines, the title


@functools.cache
def _inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text is printed."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", weight=weight)
    return float(TextPath((0, 0), text.replace("$", "S"), size=size, prop=font).get_extents().x1) / 72


def _title(solution: Solution, what: str, t: int = 0) -> str:
    """'Bandit, prefix tree (beta = 0.5, gamma = 1)'."""
    name = f"{solution.mdp.name}, {what}" if solution.mdp.name else what.capitalize()
    limit = "" if solution.mdp.horizon is None else f", horizon {solution.mdp.horizon}"
    spent = f", {t} policy token{'s' * (t != 1)} spent" if t else ""
    return f"{name}{limit}{spent} (β = {solution.beta:g}, γ = {solution.gamma:g})"


def _places_of(graph: Graph) -> int:
    return decimals([n.v for n in graph.nodes] + [q for e in graph.edges for q in e.q])


def _branch_texts(solution: Solution, graph: Graph, edge: Edge) -> tuple[str, str, str]:
    """(token, q*, probability) as a tree's edge says them; the environment's edges leave out q*, which the next state shows."""
    token = spell(solution.mdp.show(edge.tokens[0]))
    if graph.nodes[edge.source].owner == "environment":
        return token, "", f"P {share(edge.policy)}"
    return token, f"q* {number(edge.q[0], _places_of(graph))}", f"π* {share(edge.policy)} ({share(edge.ref)})"


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
    page, axes = _canvas(width, height)
    at = [(x + left, height - HEAD - y) for x, y in places]
    for i, node in enumerate(graph.nodes):
        _draw_state(axes, node, at[i], str(i), _places_of(graph))
    for i, edge in enumerate(graph.edges):
        alone = sum(other.source == edge.source for other in graph.edges) == 1
        _draw_branch(axes, graph, i, at[edge.source], at[edge.target], texts[i], alone)
    axes.text(0.12, height - 0.12, title or _title(solution, "prefix tree"), va="top", fontsize=10)
    _legend(axes, {n.owner for n in graph.nodes}, "in a state: v*     on an edge: token, q*, π* (π of the reference)")
    return page


def tree_places(graph: Graph, texts: Sequence[tuple[str, str, str]]) -> list[Point]:
    """(x from the left, y from the top) of every node in inches: leaves a row each, parents between first and last child.

    Columns stand as far apart as the texts (token, q*, probability) of the edges between them are wide.
    """
    children: dict[int, list[int]] = {}
    wide: dict[int, float] = {}
    for edge, (token, q, chance) in zip(graph.edges, texts, strict=True):
        children.setdefault(edge.source, []).append(edge.target)
        line = _inches(token, 7.5, "bold") + (0.1 + _inches(q, 7) if q else 0.0)
        column = graph.nodes[edge.source].column
        wide[column] = max(wide.get(column, 0.0), line, _inches(chance, 6.6))
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
    axes.add_patch(PathPatch(path, fill=False, lw=_width(edge.policy), edgecolor=color, zorder=2, gid=f"edge-{i}"))
    away = 0.03 + _width(edge.policy) / 144  # half the line, in inches
    left = x0 + RADIUS + 0.08 if alone else bend + 0.02
    right = x1 - (0.08 if graph.nodes[edge.target].owner == "end" else RADIUS + 0.04)
    token, q, chance = texts
    axes.text(
        left, y1 + away, token, va="bottom", fontsize=7.5, fontweight="bold", parse_math=False, gid=f"token-{i}", zorder=5
    )
    if q:
        axes.text(right, y1 + away, q, va="bottom", ha="right", fontsize=7, gid=f"q-{i}", zorder=5)
    axes.text(left, y1 - away, chance, va="top", fontsize=6.6, color=GREY, gid=f"pi-{i}", zorder=5)


# --------------------------------------------------------------------------------------------------- the automaton
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
    page, axes = _canvas(width, height)
    left, top = 0.12 + COLUMN / 2 + (width - needed) / 2, height - HEAD - 0.5 - above
    at = [(left + x, top - y) for x, y in places]
    _draw_bands(axes, graph, at, height, left + right)
    for i, node in enumerate(graph.nodes):
        _draw_state(axes, node, at[i], str(i), _places_of(graph))
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in at]
    for i in sorted(range(len(graph.edges)), key=lambda i: graph.nodes[graph.edges[i].target].owner != "end"):
        _draw_arrow(axes, graph, i, at, texts[i], taken)
    axes.text(0.12, height - 0.12, title or _title(solution, "automaton", t), va="top", fontsize=10)
    notes = "in a state: v*     on an edge: the tokens that lead along it; its width: π* (the environment's: P)"
    _legend(axes, {n.owner for n in graph.nodes}, notes)
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
        wide = _inches(text, 7.2, "bold")
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
    lw = _width(edge.policy)
    arrow = FancyArrowPatch(
        path=path, arrowstyle="-" if ends else "-|>", mutation_scale=5 + 1.1 * lw, lw=lw, shrinkA=0, shrinkB=0, zorder=2,
        color=EDGE[graph.nodes[edge.source].owner], joinstyle="miter", capstyle="butt", gid=f"edge-{i}",
    )  # fmt: skip
    axes.add_patch(arrow)
    _place_text(axes, text, line[outside], f"token-{i}", taken, ends)


def _place_text(axes: "Axes", text: str, line: Floats, name: str, taken: list[Box], ends: bool) -> None:
    """On the line at the first share of its length where the text covers no other; beside or below the dot of an end."""
    size = 7.2
    wide, high = _inches(text, size, "bold") / 2 + 0.03, 0.075
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


# --------------------------------------------------------------------------------------------------- the trajectory
Kind = Literal["prompt", "policy", "tool reply", "padding"]
SHADE = {"prompt": FILL["environment"], "policy": FILL["policy"], "tool reply": "#F6CE85", "padding": "#F2F2F2"}


@dataclass(frozen=True)
class Credit:
    """One row of a batch, token by token; NaN where the policy did not act. All float[L].

    kind       who said the token
    reward     r_t
    log_ratio  beta ln(pi / pi_ref) of the token
    rho        ShiQ's residual, F2: what the token and all that follows leave unexplained
    D          F3: D_k = rho_k + gamma D_{k-1} (- gamma^n rho_{k-n}), so that d(loss) / d token_logit_k = 2 beta D_k
    cut        position of the last token where the row was cut, else None
    """

    ids: tuple[int, ...]
    kind: tuple[Kind, ...]
    reward: Floats
    log_ratio: Floats
    rho: Floats
    D: Floats
    cut: int | None


def credit_of(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, row: int = 0, *, beta: float, gamma: float = 1.0,
    n_steps: int | None = None,
) -> Credit:  # fmt: skip
    """r, beta ln(pi / pi_ref), rho and D of one row. Raises ValueError for packed rows and for a row that is not there."""
    rho, actions = residuals_of(steps.shifted, policy_stats, ref_stats, batch, beta, gamma, n_steps)
    if batch.segment_ids is not None:
        raise bad("batch", "rows that are not packed", "packed rows", "Draw the rows before packing.")
    if at_least("row", row, 0) >= len(batch):
        raise bad("row", f"a row from 0 to {len(batch) - 1}", repr(row))
    gradient = shiq_gradient(policy_stats, ref_stats, batch, beta=beta, gamma=gamma, n_steps=n_steps).token_logit / (2 * beta)
    placed = torch.zeros_like(gradient).scatter_add(1, actions.index, torch.where(actions.real, rho.detach(), 0.0).to(gradient))
    ratio = (policy_stats.token_logit - policy_stats.logsumexp) - (ref_stats.token_logit - ref_stats.logsumexp)
    acts = (batch.completion_mask[row] == 1).numpy(force=True)
    real = (batch.attention_mask[row] == 1).numpy(force=True)

    def aligned(x: torch.Tensor) -> Floats:
        """Column i of the statistics belongs to token i + 1."""
        values = np.append(np.nan, x[row].detach().double().numpy(force=True))
        return np.where(acts, values, np.nan)

    spoken = np.cumsum(acts) > 0
    kind: list[Kind] = [
        "padding" if not r else "policy" if a else "tool reply" if s else "prompt"
        for r, a, s in zip(real, acts, spoken, strict=True)
    ]
    return Credit(
        tuple(batch.input_ids[row].tolist()),
        tuple(kind),
        np.where(acts, batch.rewards[row].detach().double().numpy(force=True), np.nan),
        aligned(beta * ratio),
        aligned(placed),
        aligned(gradient),
        None if bool(batch.terminated[row]) else int(np.flatnonzero(real)[-1]) if real.any() else None,
    )


CELL, PANEL, MARGIN = 0.62, 0.92, 1.95  # a token's width, a panel's height, room for the panels' names


@style()
def trajectory_figure(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, row: int = 0, *, beta: float, gamma: float = 1.0,
    tokens: Sequence[str] | None = None, n_steps: int | None = None, max_tokens: int = 32, title: str = "",
) -> "Figure":  # fmt: skip
    """One row of tokens, and under each action its reward, beta ln(pi / pi_ref), rho_t and D_k: how credit travels.

    rho gathers what follows a token (F2), D carries it on to the later ones (F3): the gradient of the row's loss by the
    token's logit is 2 beta D_k. tokens: the vocabulary's strings, else ids are shown. Raises ValueError for packed rows, a row
    that is not there, or one of more than max_tokens.
    """
    data = credit_of(policy_stats, ref_stats, batch, row, beta=beta, gamma=gamma, n_steps=n_steps)
    L = len(data.ids)
    if at_least("max_tokens", max_tokens, 1) < L:
        raise bad(
            "max_tokens",
            f"at least the row's {L} tokens, padding included",
            max_tokens,
            "Cut the batch, or draw a shorter row.",
        )
    panels = _panels(data, n_steps)
    width, height = max(MARGIN + CELL * L + 0.3, 5.6), HEAD + 0.75 + PANEL * len(panels) + 0.42
    page = figure(figsize=(width, height), layout="none")
    inches = lambda x, y, w, h: (x / width, y / height, w / width, h / height)  # noqa: E731
    boxes = page.add_axes(inches(MARGIN, height - HEAD - 0.7, CELL * L, 0.62))
    _draw_tokens(boxes, data, tokens)
    for i, (name, label, note, values, color) in enumerate(panels):
        bottom = height - HEAD - 0.75 - PANEL * (i + 1)
        axes = page.add_axes(inches(MARGIN, bottom, CELL * L, PANEL - 0.1))
        _draw_panel(axes, data, name, values, color)
        middle = bottom + (PANEL - 0.1) / 2
        page.text(0.14 / width, (middle + 0.08) / height, label, va="bottom", fontsize=9)
        page.text(0.14 / width, (middle + 0.02) / height, note, va="top", fontsize=7, color=GREY, linespacing=1.5)
    page.text(0.14 / width, (height - HEAD - 0.46) / height, "token", va="center", fontsize=9)
    page.text(0.14 / width, (height - HEAD - 0.56) / height, "below, all in units of reward", va="top", fontsize=7, color=GREY)
    said = "" if n_steps is None else f", n = {n_steps}"
    page.text(
        0.14 / width,
        1 - 0.12 / height,
        title or f"One row under ShiQ (β = {beta:g}, γ = {gamma:g}{said})",
        va="top",
        fontsize=10,
    )
    _kinds_legend(page, data)
    return page


def _panels(data: Credit, n_steps: int | None) -> list[tuple[str, str, str, Floats, str]]:
    """(name, label, what it says, values, colour) from top to bottom."""
    left, right = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
    gathered = r"$= d_t + \gamma \rho_{t+1}$" if n_steps is None else r"$= d_t + \ldots + \gamma^{n-1} d_{t+n-1}$"
    carried = r"$= \rho_k + \gamma D_{k-1}$" + ("" if n_steps is None else r"$\,-\,\gamma^n \rho_{k-n}$")
    return [
        ("r", "reward $r_t$", "paid on the token", data.reward, PALETTE["green"]),
        (
            "ratio",
            r"$\beta\,\ln(\pi / \pi_{\mathrm{ref}})$",
            "the price of leaving the reference",
            data.log_ratio,
            PALETTE["pink"],
        ),
        ("rho", r"residual $\rho_t$", f"{gathered}\n{left} gathers what follows", data.rho, PALETTE["blue"]),
        ("D", "credit $D_k$", f"{carried}\n{right} carries it on", data.D, PALETTE["vermilion"]),
    ]


def _draw_tokens(axes: "Axes", data: Credit, tokens: Sequence[str] | None) -> None:
    """A box a token, shaded by who said it; a scissors line where the row was cut."""
    from matplotlib.patches import Rectangle

    axes.set(xlim=(-0.5, len(data.ids) - 0.5), ylim=(0, 1))
    axes.set_axis_off()
    for i, (token, kind) in enumerate(zip(data.ids, data.kind, strict=True)):
        line = PALETTE["blue"] if kind == "policy" else "#999999"
        axes.add_patch(
            Rectangle(
                (i - 0.45, 0.12), 0.9, 0.56, facecolor=SHADE[kind], edgecolor=line, lw=1.0, gid=f"{kind.replace(' ', '-')}-{i}"
            )
        )
        known = tokens is not None and 0 <= token < len(tokens)
        said = "" if kind == "padding" else spell(tokens[token] if tokens is not None and known else str(token), 7)
        size = 8.5 if len(said) <= 5 else 7
        axes.text(i, 0.4, said, ha="center", va="center", fontsize=size, fontweight="bold", parse_math=False, gid=f"token-{i}")
        axes.text(i, 0.98, str(i), ha="center", va="top", fontsize=6.5, color=GREY)
    if data.cut is not None:
        axes.plot([data.cut + 0.5] * 2, [0.0, 0.8], color=INK, lw=1.2, ls=(0, (2, 1.5)), clip_on=False)


def _draw_panel(axes: "Axes", data: Credit, name: str, values: Floats, color: str) -> None:
    """A bar an action with its number at the tip; columns without an action are shaded as their token is."""
    L = len(data.ids)
    known = values[~np.isnan(values)]
    top = max(float(np.abs(known).max(initial=0.0)), 1e-12)
    places = decimals(known.tolist())
    low, high = min(float(known.min(initial=0.0)), 0.0), max(float(known.max(initial=0.0)), 0.0)
    span = max(high - low, 0.25 * top)
    axes.set(xlim=(-0.5, L - 0.5), ylim=(low - (0.42 if low < 0 else 0.12) * span, high + (0.42 if high > 0 else 0.3) * span))
    for i, kind in enumerate(data.kind):
        if kind != "policy":
            axes.axvspan(i - 0.5, i + 0.5, color=SHADE[kind], alpha=0.5, lw=0, zorder=0)
    axes.axhline(0, color=GREY, lw=0.7, zorder=1)
    for i in np.flatnonzero(~np.isnan(values)).tolist():
        value = float(values[i])
        axes.bar(i, value, width=0.52, color=color, zorder=2)
        up = value >= 0
        axes.annotate(
            number(value, places), (i, value), xytext=(0, 1.5 if up else -1.5), textcoords="offset points", ha="center",
            va="bottom" if up else "top", fontsize=7, gid=f"{name}-{i}", zorder=3,
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _kinds_legend(page: "Figure", data: Credit) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [k for k in SHADE if k in data.kind]
    handles: list[Any] = [Patch(facecolor=SHADE[k], edgecolor="#999999", lw=0.8, label=k) for k in kinds]
    if data.cut is not None:
        handles.append(Line2D([], [], color=INK, lw=1.2, ls=(0, (2, 1.5)), label="the row is cut here"))
    page.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=7.5, handlelength=1.4, columnspacing=1.4)
