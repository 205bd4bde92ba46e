"""The order of an automaton and linear recursions over it: the machinery that every exact answer shares.

An automaton's successors form a graph. Peeling it level by level gives an order in which each state comes after all its
successors; what cannot be peeled are loops, kept together as blocks and solved as small dense systems.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


SHORT = 32  # numpy reduces short rows entry by entry; column by column is about 5 times faster
PIECE = 2**15  # entries of a table worked on at once: temporaries of that size stay in the cache


def row_max(x: Floats) -> Floats:
    """x.max(1), float[n]."""
    if x.shape[1] > SHORT:
        out: Floats = x.max(1)
        return out
    out = x[:, 0].copy()
    for column in x.T[1:]:
        np.maximum(out, column, out=out)
    return out


def row_sum(x: Floats) -> Floats:
    """x.sum(1), float[n]."""
    return x @ np.ones(x.shape[1])


@dataclass(frozen=True)
class Block:
    """States that can be computed together once all later states are known; `cyclic` ones depend on each other."""

    states: Ints
    cyclic: bool

    @property
    def index(self) -> slice | Ints:
        """The states as a slice where they are consecutive (numpy then copies nothing), else as they are."""
        first, last = int(self.states[0]), int(self.states[-1])
        consecutive = last - first + 1 == len(self.states) and bool((np.diff(self.states) == 1).all())
        return slice(first, last + 1) if consecutive else self.states

    def pieces(self, size: int) -> list[slice | Ints]:
        """`index` in pieces of at most `size` states."""
        index, size = self.index, max(1, size)
        if isinstance(index, slice):
            return [slice(i, min(i + size, index.stop)) for i in range(index.start, index.stop, size)]
        return [index[i : i + size] for i in range(0, len(index), size)]


def _peel(successors: Ints, n: int) -> list[Ints]:
    """Kahn's algorithm, a whole level at a time. successors int[n, K], -1 = none; returns levels, sources first."""
    indegree = np.bincount((successors + 1).ravel(), minlength=n + 1)[1:]
    frontier = np.flatnonzero(indegree == 0)
    levels: list[Ints] = []
    left = n
    while frontier.size:
        levels.append(frontier)
        left -= frontier.size
        indegree[frontier] = -1  # done
        children = successors[Block(frontier, False).index].ravel()
        if not left:
            break
        if children.size * 8 > n:  # a wide level: counting over all states is cheaper than sorting the children
            indegree -= np.bincount(children + 1, minlength=n + 1)[1:]
            frontier = np.flatnonzero(indegree == 0)
        else:
            children, count = np.unique(children[children >= 0], return_counts=True)
            indegree[children] -= count
            frontier = children[indegree[children] == 0]
    return levels


def _components(source: Ints, target: Ints, n: int) -> Ints:
    """Strongly connected components by colouring: int[n], equal labels = the same component.

    Every state takes the largest index that reaches it; the states that reach back to their colour's root, inside the
    colour, are the root's component. All colours at once, so the Python loop runs over graph diameter, not states.
    """
    label = np.full(n, -1, dtype=np.int64)
    while (label < 0).any():
        alive = label < 0
        inside = alive[source] & alive[target]
        source, target = source[inside], target[inside]
        color = np.where(alive, np.arange(n), -1)
        while True:
            before = color.copy()
            np.maximum.at(color, target, color[source])
            if (before == color).all():
                break
        member = alive & (color == np.arange(n))
        same = color[source] == color[target]
        back_source, back_target = source[same], target[same]
        while True:
            new = back_source[member[back_target] & ~member[back_source]]
            if not new.size:
                break
            member[new] = True
        label[member] = color[member]
    return label


def blocks(next_state: Ints, active: Bools | None = None) -> list[Block]:
    """Blocks of the graph s -> next_state[s, a], successors first; every state is in exactly one.

    -1 is no edge, nor is what `active` leaves out.
    """
    n = len(next_state)
    successors = next_state if active is None else np.where(active, next_state, -1)
    levels = _peel(successors, n)
    if sum(map(len, levels)) == n:
        return [Block(states, False) for states in reversed(levels)]
    source = np.repeat(np.arange(n), successors.shape[1])
    target = successors.ravel()
    source, target = source[target >= 0], target[target >= 0]
    _, component = np.unique(_components(source, target, n), return_inverse=True)
    size = np.bincount(component)
    cyclic = size > 1
    cyclic[component[source[source == target]]] = True  # a state that follows itself is a loop too
    outer = component[source] != component[target]
    edges = np.unique(np.stack([component[source[outer]], component[target[outer]]], 1), axis=0)
    members = np.split(np.argsort(component, kind="stable"), np.cumsum(size)[:-1])
    out = []
    for level in reversed(_peel(_edge_table(edges, len(size)), len(size))):
        plain = level[~cyclic[level]]
        if plain.size:
            out.append(Block(np.sort(np.concatenate([members[c] for c in plain])), False))
        out += [Block(members[c], True) for c in level[cyclic[level]]]
    return out


def _edge_table(edges: Ints, n: int) -> Ints:
    """Edges (source, target), sorted by source, as a padded table int[n, widest row]."""
    if not len(edges):
        return np.full((n, 1), -1, dtype=np.int64)
    degree = np.bincount(edges[:, 0], minlength=n)
    first = np.cumsum(degree) - degree
    table = np.full((n, int(degree.max())), -1, dtype=np.int64)
    table[edges[:, 0], np.arange(len(edges)) - first[edges[:, 0]]] = edges[:, 1]
    return table


def reaches(next_state: Ints, active: Bools, goal: Bools) -> Bools:
    """bool[S]: can the state get into `goal` (or is it there) along active edges? Loops over path length only."""
    reached = np.append(goal, False)
    while True:
        step = reached[:-1] | (reached[next_state] & active).any(1)
        if (step == reached[:-1]).all():
            return step
        reached[:-1] = step


def reachable_from(start: int, next_state: Ints, active: Bools) -> Bools:
    """bool[S]: the states that the active edges lead to from `start`, itself included."""
    seen = np.zeros(len(next_state), dtype=bool)
    frontier = np.array([start])
    while frontier.size:
        seen[frontier] = True
        follow = next_state[frontier][active[frontier]]
        follow = follow[follow >= 0]
        frontier = np.unique(follow[~seen[follow]])
    return seen


class Recursion:
    """Solves x(s) = c(s) + sum_a W(s, a) x(next(s, a)), x(end) = 0, and its transpose, exactly and in linear time.

    weights float[S, V]; only entries that are not 0 are edges. Blocks without loops are one vectorised sweep; a loop of
    n states is a dense n x n system. Discounted values are `solve`, discounted occupancies `solve_transpose`.
    Raises numpy.linalg.LinAlgError where a loop's system is singular.
    """

    def __init__(self, next_state: Ints, weights: Floats) -> None:
        self.next_state, self.weights = next_state, weights
        self.blocks = blocks(next_state, weights != 0)
        self._index = [block.index for block in self.blocks]
        self._inverse = [self._loop_inverse(block) if block.cyclic else None for block in self.blocks]

    def _loop_inverse(self, block: Block) -> Floats:
        matrix = loop_matrix(self.next_state, self.weights, block.states)
        inverse: Floats = np.linalg.inv(np.eye(len(block.states)) - matrix).astype(np.float64, copy=False)
        return inverse

    def _pull(self, x: Floats, index: slice | Ints) -> Floats:
        return np.einsum("sv,svk->sk", self.weights[index], x[self.next_state[index]])

    def solve(self, c: Floats) -> Floats:
        """c float[S] or [S, K] -> x of the same shape."""
        x = np.zeros((len(c) + 1, int(np.prod(c.shape[1:]))))
        rhs = c.reshape(len(c), -1)
        for index, inverse in zip(self._index, self._inverse, strict=True):
            value = rhs[index] + self._pull(x, index)  # a loop's own states still hold 0 here
            if inverse is None:
                x[index] = value
            else:
                x[index] = inverse @ value
                x[index] += inverse @ (rhs[index] + self._pull(x, index) - x[index])  # one step of refinement
        return x[:-1].reshape(c.shape)

    def solve_transpose(self, c: Floats) -> Floats:
        """y(s') = c(s') + sum over (s, a) with next(s, a) = s' of W(s, a) y(s); c float[S]."""
        y = np.append(c.astype(np.float64), 0.0)
        for block, index, inverse in zip(reversed(self.blocks), self._index[::-1], self._inverse[::-1], strict=True):
            follow, weight = self.next_state[index], self.weights[index]
            if inverse is not None:
                y[index] = inverse.T @ y[index]
                inside = np.zeros(len(y), dtype=bool)
                inside[block.states] = True
                weight = np.where(inside[follow], 0.0, weight)
            flow = (weight * y[:-1][index][:, None]).ravel()
            if flow.size * 8 > len(y):
                y += np.bincount(follow.ravel() % len(y), weights=flow, minlength=len(y))
            else:
                np.add.at(y, follow.ravel(), flow)
            y[-1] = 0.0
        return y[:-1]


def loop_matrix(next_state: Ints, weights: Floats, states: Ints) -> Floats:
    """The weights between the given states alone, float[n, n]."""
    n = len(states)
    local = np.full(len(next_state) + 1, -1)
    local[states] = np.arange(n)
    column = local[next_state[states]]
    row = np.broadcast_to(np.arange(n)[:, None], column.shape)
    keep = (column >= 0) & (next_state[states] >= 0)
    flat: Floats = np.bincount((row * n + column)[keep], weights=weights[states][keep], minlength=n * n).astype(np.float64)
    return flat.reshape(n, n)
