"""The best strings of an automaton under any score a token: exact, lazily, loops included."""

import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP


def best_strings(mdp: TokenMDP, score: Floats, gamma: float = 1.0) -> Iterator[tuple[float, list[int]]]:
    """(total, tokens) from the highest total sum_t gamma^t score(s_t, a_t) down; t counts policy tokens.

    Search by the best total still possible, so each string comes out in its exact order. Yields nothing where a loop has a
    positive score (no best string exists). The automaton must have no horizon: use mdp.unroll().
    """
    discount = np.where(mdp.is_policy, gamma, 1.0)[:, None]
    score = np.where(mdp.allowed, score, -np.inf)
    ahead = np.zeros(mdp.n_states)
    for _ in range(mdp.n_states + 1):
        before, ahead = ahead, (score + discount * np.append(ahead, 0.0)[mdp.next_state]).max(1)
        if np.allclose(before, ahead, rtol=1e-15, atol=0):
            break
    else:
        if gamma == 1:
            return
    tie = itertools.count()
    heap = [(-ahead[mdp.start], next(tie), 0.0, 1.0, mdp.start, [])]  # type: ignore[var-annotated]
    while heap:
        _, _, total, weight, state, said = heapq.heappop(heap)
        if state < 0:
            yield total, said
            continue
        for token in np.flatnonzero(mdp.allowed[state]):
            follow = int(mdp.next_state[state, token])
            reached = total + weight * score[state, token]
            onward = weight * discount[state, 0]
            bound = reached + (onward * ahead[follow] if follow >= 0 else 0.0)
            heapq.heappush(heap, (-bound, next(tie), float(reached), float(onward), follow, [*said, int(token)]))
