"""The best strings of an automaton under any score a token: exact, lazily, loops included."""

import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP

MOST_LOOKS = 200_000  # partial strings looked at before the search says that no further best string exists


def best_strings(mdp: TokenMDP, score: Floats, gamma: float = 1.0) -> Iterator[tuple[float, list[int]]]:
    """(total, tokens) from the highest total sum_t gamma^t score(s_t, a_t) down; t counts policy tokens.

    Search by the best total still possible, so each string comes out in its exact order. Ends where no best string exists:
    in a loop of positive score, or, with gamma < 1, where going on is always worth more than ending. The automaton must
    have no horizon: use mdp.unroll().
    """
    discount = np.where(mdp.is_policy, gamma, 1.0)[:, None]
    score = np.where(mdp.allowed, score, -np.inf)
    ahead = np.full(mdp.n_states, -np.inf)  # the best total of strings that end, after ever more tokens
    rounds = mdp.n_states if gamma == 1 else MOST_LOOKS  # gamma = 1: later gains come from loops of positive score alone
    for _ in range(rounds + 1):
        before, ahead = ahead, (score + discount * np.append(ahead, 0.0)[mdp.next_state]).max(1)
        if (ahead <= before + 1e-15 * np.abs(before, where=np.isfinite(before), out=np.zeros(mdp.n_states))).all():
            break
    else:
        return
    tie = itertools.count()
    heap = [(-ahead[mdp.start], next(tie), 0.0, 1.0, mdp.start, [])]  # type: ignore[var-annotated]
    for _ in range(MOST_LOOKS):
        if not heap:
            return
        _, _, total, weight, state, said = heapq.heappop(heap)
        if state < 0:
            yield total, said
            continue
        for token in np.flatnonzero(mdp.allowed[state]):
            follow = int(mdp.next_state[state, token])
            reached = total + weight * score[state, token]
            onward = weight * discount[state, 0]
            bound = reached + (onward * ahead[follow] if follow >= 0 else 0.0)
            if bound == -np.inf:  # never ends
                continue
            heapq.heappush(heap, (-bound, next(tie), float(reached), float(onward), follow, [*said, int(token)]))
