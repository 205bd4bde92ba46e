"""Every trajectory and its exact probability: the second road, which shares no recursion with bellman.py."""

import numpy as np
import torch

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import at_least, bad
from shiq_lab.graph import Floats, blocks
from shiq_lab.mdp import TokenMDP
from shiq_lab.sampling import prompt_groups, require_prompt, with_environment


def count_trajectories(mdp: TokenMDP) -> int | None:
    """How many different token strings the automaton can say, exactly; None = infinitely many."""
    table = mdp
    if mdp.horizon is not None:
        table = mdp.unroll()
    live = table.reachable
    count = np.array([0] * table.n_states + [1], dtype=object)
    for block in blocks(table.next_state, table.allowed & live[:, None]):
        if block.cyclic:
            return None
        rows = block.states
        count[rows] = np.where(table.allowed[rows], count[table.next_state[rows]], 0).sum(1)
    return int(count[table.start])


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
