"""What the pictures of automata show, as plain data: nodes, edges and turns with their exact values."""

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shiq_lab.bellman import Solution
from shiq_lab.enumeration import count_prefixes, count_trajectories, unfold
from shiq_lab.errors import at_least, bad
from shiq_lab.mdp import TokenMDP

Owner = Literal["policy", "environment", "end"]


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
