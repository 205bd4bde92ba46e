"""RandomWalk: the shortest way through a random graph, against the clock. See `random_walk`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, names, stream
from shiq_lab.mdp import TokenMDP

GOAL = 0


def random_walk(n_nodes: int = 21, degree: int = 3, horizon: int = 10, seed: int = 0) -> TokenMDP:
    """RandomWalk: walk from a random node to the goal in as few steps as possible, and in at most `horizon`.

    Tests       a horizon on a graph with loops: the optimum depends on the tokens already spent
    Actions     n0, n1, ...: a successor of the node where the walk stands
    Start       a beginning-of-sequence token, then any node but the goal, uniformly
    Rewards     -1 a step
    End         at the goal n0, or after horizon steps
    Closed form gamma = 1: exp(v* / beta) is a power of one matrix, see `random_walk_values`; beta -> 0: v* = -distance
    """
    n_nodes, degree = at_least("n_nodes", n_nodes, 2, 200), at_least("degree", degree, 1, 200)
    horizon = at_least("horizon", horizon, 1, 1000)
    graph = random_graph(n_nodes, degree, seed)

    def row(node: int) -> Row:
        if node < 0:
            starts = [n for n in range(n_nodes) if n != GOAL]
            return Row(next={n: n for n in starts}, probs=dict.fromkeys(starts, 1 / len(starts)))
        return Row(
            next={n: END if n == GOAL else n for n in graph[node]},
            reward=dict.fromkeys(graph[node], -1.0),
        )

    mdp = from_states(-1, row, n_nodes + 1, horizon=horizon, tokens=[*names("n", n_nodes), BOS], name="RandomWalk")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def random_graph(n_nodes: int = 21, degree: int = 3, seed: int = 0) -> list[tuple[int, ...]]:
    """The successors of every node (none of the goal): one edge of a random tree to the goal, up to degree - 1 more."""
    rng = stream(seed)
    graph: list[tuple[int, ...]] = [()] * n_nodes
    placed = [GOAL]
    for node in (int(n) for n in rng.permutation(n_nodes) if n != GOAL):
        others = [n for n in range(n_nodes) if n != node]
        more = rng.choice(others, size=min(degree, len(others)) - 1, replace=False)
        graph[node] = tuple(sorted({placed[rng.integers(len(placed))], *more.tolist()}))
        placed.append(node)  # every node has a way to one placed before it, so to the goal
    return graph


def random_walk_values(ref: NDArray[np.float64], horizon: int, beta: float) -> NDArray[np.float64]:
    """v* float[horizon, n_nodes] at gamma = 1, by tokens spent; ref float[n_nodes, n_nodes], the reference's probabilities.

    z_t = A z_{t+1} = A^{horizon - t} 1, A = ref exp(-1/beta) with A(goal, goal) = 1; v*_t = beta ln z_t.
    """
    A = ref * np.exp(-1 / beta)
    A[GOAL] = 0.0
    A[GOAL, GOAL] = 1.0
    ones = np.ones(len(ref))
    return beta * np.log([np.linalg.matrix_power(A, horizon - t) @ ones for t in range(horizon)])
