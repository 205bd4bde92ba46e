"""Behaviour policies as tables of log-probabilities, float[S, V]: what data are made with. Environment rows are its own."""

import numpy as np
from numpy.typing import ArrayLike

from shiq_lab.errors import bad
from shiq_lab.graph import Bools, Floats, blocks
from shiq_lab.mdp import TokenMDP


def reference_policy(mdp: TokenMDP) -> Floats:
    """pi_ref itself."""
    return mdp.ref_log_policy


def uniform_policy(mdp: TokenMDP) -> Floats:
    """Every allowed token alike."""
    uniform = np.where(mdp.allowed, -np.log(mdp.allowed.sum(1, keepdims=True)), -np.inf)
    return np.where(mdp.is_policy[:, None], uniform, mdp.ref_log_policy)


def softmax_policy(mdp: TokenMDP, logits: ArrayLike) -> Floats:
    """softmax(logits) over the allowed tokens: the policy of any table, the current model's among them."""
    rows = np.where(mdp.allowed, np.asarray(logits, dtype=np.float64), -np.inf)
    rows = rows - rows.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    return np.where(mdp.is_policy[:, None], rows, mdp.ref_log_policy)


def mixture(first: Floats, second: Floats, weight: float) -> Floats:
    """In every state (1 - weight) of the first policy and `weight` of the second."""
    if not 0 <= weight <= 1:
        raise bad("weight", "a number from 0 to 1", repr(weight))
    with np.errstate(divide="ignore"):
        return np.logaddexp(first + np.log1p(-weight), second + np.log(weight))


def on_path(mdp: TokenMDP, log_policy: Floats, leave: float) -> Floats:
    """The likeliest token of `log_policy` with probability 1 - leave, the other allowed tokens share the rest.

    With leave = 1 / T, data on a string of T tokens stay on it with probability near 1/e and still try every exit.
    """
    if not 0 < leave < 1:
        raise bad("leave", "a probability between 0 and 1", repr(leave))
    best = np.zeros(mdp.next_state.shape, dtype=bool)
    best[np.arange(mdp.n_states), np.where(mdp.allowed, log_policy, -np.inf).argmax(1)] = True
    others = np.maximum(mdp.allowed.sum(1, keepdims=True) - 1, 1)
    single = mdp.allowed.sum(1, keepdims=True) == 1
    chance = np.where(best, np.where(single, 1.0, 1 - leave), np.where(mdp.allowed, leave / others, 0.0))
    with np.errstate(divide="ignore"):
        return np.where(mdp.is_policy[:, None], np.log(chance), mdp.ref_log_policy)


def covering(mdp: TokenMDP) -> Floats:
    """A behaviour that visits every reachable state often: each successor by how many states lie beyond it.

    mu(s' | s) is proportional to the number of states reachable from s' (the end counts 1), shared evenly by the tokens that
    lead to s'. On a full tree this visits the leaves evenly; on a needle it stays on the path with probability near 2/3.
    """
    beyond = np.append(_descendants(mdp).sum(1), 1).astype(np.float64)
    follow = np.where(mdp.allowed, mdp.next_state, -2)
    twins = (follow[:, :, None] == follow[:, None, :]).sum(2)
    chance = np.where(mdp.allowed, beyond[mdp.next_state] / twins, 0.0)
    chance /= chance.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.where(mdp.is_policy[:, None], np.log(chance), mdp.ref_log_policy)


def _descendants(mdp: TokenMDP) -> Bools:
    """bool[S, S]: is the second state reachable from the first (every state from itself)?"""
    S, V = mdp.next_state.shape
    seen = np.zeros((S + 1, S), dtype=bool)
    for block in blocks(mdp.next_state, mdp.allowed):
        rows = block.states
        if block.cyclic:
            seen[np.ix_(rows, rows)] = True
        else:
            seen[rows, rows] = True
        for token in range(V):
            seen[rows] |= seen[mdp.next_state[rows, token]]
        if block.cyclic:
            seen[rows] = seen[rows].any(0)
    return seen[:-1]
