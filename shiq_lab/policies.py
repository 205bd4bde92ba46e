"""Behaviour policies as tables of log-probabilities, float[S, V]: what data are made with. Environment rows are its own."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from shiq_lab.errors import bad, is_real
from shiq_lab.graph import Bools, Floats, blocks, reaches
from shiq_lab.mdp import TokenMDP, check_mdp, real_array


def check_log_policy(mdp: TokenMDP, log_policy: ArrayLike, argument: str = "log_policy") -> Floats:
    """A policy's table with the environment's own rows put in; ValueErrors for wrong shapes, NaN, rows that do not sum to 1."""
    check_mdp(mdp)
    table = real_array(argument, log_policy)
    S, V = mdp.next_state.shape
    shapes = [(S, V)] + ([(mdp.horizon, S, V)] if mdp.horizon else [])
    if table.shape not in shapes:
        raise bad(argument, f"shape {' or '.join(map(str, shapes))}", f"shape {table.shape}")
    table = np.where(mdp.is_policy[:, None], table, mdp.ref_log_policy)
    if np.isnan(table).any():
        *layer, state, token = np.unravel_index(int(np.argmax(np.isnan(table))), table.shape)
        raise bad(argument, "log-probabilities", f"NaN at {mdp.place(int(state), int(token))}{_layer(layer)}")
    with np.errstate(over="ignore"):
        total = np.exp(table).sum(-1)
    wrong = np.abs(total - 1) > 1e-6  # float32 log-softmax over 49,152 tokens stays below this
    if wrong.any():
        where = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        got = f"a sum of {total[where]:.9g} in {mdp.place(int(where[-1]))}{_layer(where[:-1])}"
        raise bad(argument, "rows whose exponentials sum to 1", got, "policies.softmax_policy(mdp, logits) makes such rows.")
    return table


def check_ends(mdp: TokenMDP, table: Floats, argument: str = "log_policy") -> None:
    """A ValueError where a policy float[S, V] never ends from some state."""
    chance = np.where(mdp.allowed, np.exp(table), 0.0)
    over = np.logical_or.reduce((mdp.next_state < 0) & (chance > 0), axis=1)
    leaves = reaches(mdp.next_state, chance > 0, over)
    if not leaves.all():
        raise bad(argument, "a policy whose episodes end", f"one that never ends from {mdp.place(int(np.argmin(leaves)))}")


def _layer(index: Sequence[np.intp]) -> str:
    """Which of T tables a message means."""
    return f" at t = {index[0]}" if index else ""


def reference_policy(mdp: TokenMDP) -> Floats:
    """pi_ref itself."""
    return mdp.ref_log_policy


def uniform_policy(mdp: TokenMDP) -> Floats:
    """Every allowed token alike."""
    uniform = np.where(mdp.allowed, -np.log(mdp.allowed.sum(1, keepdims=True)), -np.inf)
    return np.where(mdp.is_policy[:, None], uniform, mdp.ref_log_policy)


def softmax_policy(mdp: TokenMDP, logits: ArrayLike) -> Floats:
    """softmax(logits) over the allowed tokens: the policy of any table, the current model's among them."""
    rows = np.where(mdp.allowed, real_array("logits", logits, mdp.next_state.shape), -np.inf)
    rows = np.where(mdp.is_policy[:, None], rows, mdp.ref_logits)
    top = rows.max(1, keepdims=True)
    if not np.isfinite(top).all():
        state = int(np.argmin(np.isfinite(top)))
        got = f"a largest one of {top[state, 0]} in {mdp.place(state)}"
        raise bad("logits", "a finite largest logit over the allowed tokens of every policy state", got)
    rows = rows - top
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    return np.where(mdp.is_policy[:, None], rows, mdp.ref_log_policy)


def mixture(first: Floats, second: Floats, weight: float) -> Floats:
    """In every state (1 - weight) of the first policy and `weight` of the second."""
    if np.shape(first) != np.shape(second):
        raise bad("second", f"shape {np.shape(first)}, as first", f"shape {np.shape(second)}")
    if not is_real(weight) or not 0 <= weight <= 1:
        raise bad("weight", "a number from 0 to 1", repr(weight))
    with np.errstate(divide="ignore"):
        return np.logaddexp(first + np.log1p(-weight), second + np.log(weight))


def on_path(mdp: TokenMDP, log_policy: Floats, leave: float) -> Floats:
    """The likeliest token of `log_policy` with probability 1 - leave, the other allowed tokens share the rest.

    With leave = 1 / T, data on a string of T tokens stay on it with probability near 1/e and still try every exit.
    """
    if not is_real(leave) or not 0 < leave < 1:
        raise bad("leave", "a probability between 0 and 1", repr(leave))
    log_policy = check_log_policy(mdp, log_policy)
    if log_policy.ndim == 3:
        raise bad("log_policy", f"shape {mdp.next_state.shape}", f"shape {log_policy.shape}", "Unroll the automaton first.")
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
    state, token = np.nonzero(mdp.allowed)
    follow = mdp.next_state[state, token]
    _, pair, twins = np.unique(state * (mdp.n_states + 1) + follow, return_inverse=True, return_counts=True)
    chance = np.zeros(mdp.next_state.shape)
    chance[state, token] = beyond[follow] / twins[pair]
    chance /= chance.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.where(mdp.is_policy[:, None], np.log(chance), mdp.ref_log_policy)


def _descendants(mdp: TokenMDP) -> Bools:
    """bool[S, S]: is the second state reachable from the first (every state from itself)?"""
    S, V = mdp.next_state.shape
    seen = np.zeros((S + 1, S), dtype=bool)
    for block in blocks(mdp.next_state):
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
