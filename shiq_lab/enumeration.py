"""Every trajectory and its exact probability: the second road, which shares no recursion with bellman.py."""

from dataclasses import replace

import numpy as np
import torch

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import at_least, bad
from shiq_lab.graph import Floats, Ints, blocks
from shiq_lab.mdp import TokenMDP
from shiq_lab.sampling import prompt_groups, require_prompt, with_environment


def count_trajectories(mdp: TokenMDP) -> int | None:
    """How many different token strings the automaton can say, exactly; None = infinitely many."""
    return _count(mdp, inner=0, end=1)


def count_prefixes(mdp: TokenMDP) -> int | None:
    """How many strings, the empty one included, after which the automaton goes on; None = infinitely many."""
    return _count(mdp, inner=1, end=0)


def _count(mdp: TokenMDP, inner: int, end: int) -> int | None:
    """Sum over the nodes of the prefix tree, in whole numbers of any size: `inner` where it goes on, `end` where it ends."""
    table = mdp if mdp.horizon is None else mdp.unroll()
    count = np.array([0] * table.n_states + [end], dtype=object)
    for block in blocks(table.next_state, table.allowed & table.reachable[:, None]):
        if block.cyclic:
            return None
        rows = block.states
        count[rows] = inner + np.where(table.allowed[rows], count[table.next_state[rows]], 0).sum(1)
    return int(count[table.start])


def unfold(mdp: TokenMDP, max_states: int = 100_000) -> tuple[TokenMDP, Ints]:
    """The automaton's prefix tree, a state for every string that it can go on from; and the state int[S] each one came from.

    A model sees all that was said, so its logits may differ wherever prefixes do: this is the automaton that they are a table
    of. States come in order of length (0 is the empty string), with a horizon from mdp.unroll(); values are the automaton's.
    Raises ValueError, with the exact number, where there are more than max_states ("infinitely many" on loops).
    """
    total, max_states = count_prefixes(mdp), at_least("max_states", max_states, 1)
    if total is None or total > max_states:
        size = "infinitely many" if total is None else str(total)
        raise bad("max_states", f"at least the number of prefixes, {size}", max_states, "Take smaller parameters or a horizon.")
    flat = mdp if mdp.horizon is None else mdp.unroll()
    levels, follow = [np.array([flat.start])], []
    known = 1
    while levels[-1].size:
        here = levels[-1]
        after = np.where(flat.allowed[here], flat.next_state[here], -1)  # (states of this length, V)
        on = after >= 0
        number = np.full(after.shape, -1)
        number[on] = known + np.arange(on.sum())
        known += int(on.sum())
        follow.append(number)
        levels.append(after[on])
    origin = np.concatenate(levels)
    tree = replace(
        flat, next_state=np.concatenate(follow), reward=flat.reward[origin], ref_logits=flat.ref_logits[origin],
        is_policy=flat.is_policy[origin], start=0,
    )  # fmt: skip
    return tree, origin


def enumerate_trajectories(mdp: TokenMDP, max_trajectories: int = 1_000_000, *, behavior: Floats | None = None) -> TokenBatch:
    """All trajectories as rows whose weights are their exact probabilities under `behavior` (default: the reference).

    behavior is float[S, V] (or float[T, S, V]) log-probabilities; strings of probability 0 under it are left out. Raises
    ValueError, with the exact count, where there are more than max_trajectories strings ("infinite" on loops).
    """
    require_prompt(mdp)
    max_trajectories = at_least("max_trajectories", max_trajectories, 1)
    total = count_trajectories(mdp)
    if total is None or total > max_trajectories:
        size = "infinitely many" if total is None else str(total)
        raise bad("max_trajectories", f"at least the number of strings, {size}", max_trajectories, "Sample instead.")
    tables = mdp.ref_log_policy if behavior is None else with_environment("behavior", mdp, behavior)
    state, logp, spent = np.array([mdp.start]), np.zeros(1), np.zeros(1, dtype=np.int64)
    history = np.zeros((1, 0, 4))  # token, is it an action, reward, state after it
    done: list[tuple[Floats, Floats]] = []
    while state.size:
        table = tables[state] if tables.ndim == 2 else tables[np.minimum(spent, len(tables) - 1), state]
        row, token = np.nonzero(mdp.allowed[state] & (table > -np.inf))  # one new row an edge
        here, acted = state[row], mdp.is_policy[state[row]]
        logp, spent = logp[row] + table[row, token], spent[row] + acted
        follow = mdp.next_state[here, token].copy()
        if mdp.horizon is not None:
            follow[acted & (spent >= mdp.horizon)] = -1
        said = np.stack([token, acted, np.where(acted, mdp.reward[here, token], 0.0), follow], 1)
        history = np.concatenate([history[row], said[:, None]], 1)
        ended = follow < 0
        done.append((history[ended], logp[ended]))
        state, logp, spent, history = follow[~ended], logp[~ended], spent[~ended], history[~ended]
    return _collect(done)


def _collect(done: list[tuple[Floats, Floats]]) -> TokenBatch:
    """Right-padded rows, in order of length, then of tokens."""
    width = max(rows.shape[1] for rows, _ in done)
    blank = np.array([0.0, 0.0, 0.0, -1.0])
    padded = [np.concatenate([rows, np.tile(blank, (len(rows), width - rows.shape[1], 1))], 1) for rows, _ in done]
    real = np.concatenate([np.tile(np.arange(width) < rows.shape[1], (len(rows), 1)) for rows, _ in done])
    table = np.concatenate(padded)
    ids, action = table[..., 0].astype(np.int64), table[..., 1].astype(np.int64)
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        completion_mask=torch.from_numpy(action),
        rewards=torch.from_numpy(table[..., 2].copy()),
        terminated=torch.ones(len(table), dtype=torch.bool),
        weights=torch.from_numpy(np.exp(np.concatenate([logp for _, logp in done]))),
        group_ids=prompt_groups(ids, action),
        states=torch.from_numpy(table[..., 3].astype(np.int64)),
    )
