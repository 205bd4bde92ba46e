"""Sampling rows from an automaton: all rows at once, one token a step."""

import numpy as np
import torch

from shiq_lab.batch import TokenBatch, cut, pad
from shiq_lab.errors import at_least, bad
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP, check_mdp, real_array

ROWS_NEVER_END = 100_000  # tokens; a sampler that is still going here was given a policy that does not stop


def require_prompt(mdp: TokenMDP) -> None:
    """Rows need an environment root, since nothing scores a row's first token."""
    check_mdp(mdp)
    if mdp.is_policy[mdp.start]:
        raise bad("mdp", "an environment state at the start", f"policy state {mdp.start}", "Add one: mdp.with_prompt(token).")


def with_environment(name: str, mdp: TokenMDP, log_policy: Floats) -> Floats:
    """A policy's table float[S, V] or [T, S, V] with the environment's own rows put in; ValueErrors for what is no policy."""
    table = real_array(name, log_policy)
    if table.ndim not in (2, 3) or table.shape[-2:] != mdp.next_state.shape:
        raise bad(name, f"shape {mdp.next_state.shape}, or [T, S, V]", f"shape {table.shape}")
    table = np.where(mdp.is_policy[:, None], table, mdp.ref_log_policy)
    total = np.where(mdp.allowed, np.exp(np.minimum(table, 700)), 0.0).sum(-1)
    wrong = ~(np.abs(total - 1) <= 1e-6)  # float32 log-softmax over 49,152 tokens stays below this; NaN does not
    if wrong.any():
        where = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        got = f"a sum of {total[where]:.9g} in {mdp.place(int(where[-1]))}"
        raise bad(name, "rows whose exponentials over allowed tokens sum to 1", got)
    return table


def sample(
    mdp: TokenMDP, log_policy: Floats, n: int, *, rng: np.random.Generator | int, max_tokens: int | None = None
) -> TokenBatch:
    """n rows of a policy float[S, V] (or float[T, S, V]); rows longer than max_tokens are cut in a policy state.

    rng is a numpy Generator or a seed; the same seed gives the same rows.
    """
    require_prompt(mdp)
    n, most = at_least("n", n, 1), ROWS_NEVER_END if max_tokens is None else at_least("max_tokens", max_tokens, 1)
    if not isinstance(rng, np.random.Generator):
        rng = np.random.default_rng(at_least("rng", rng, 0, "Give a seed or a numpy Generator."))
    chance = np.where(mdp.allowed, np.exp(with_environment("log_policy", mdp, log_policy)), 0.0)
    ladder = np.cumsum(chance, -1)
    ladder /= ladder[..., -1:]
    state, spent = np.full(n, mdp.start), np.zeros(n, dtype=np.int64)
    columns: list[tuple[np.ndarray, ...]] = []
    while (state >= 0).any() and len(columns) < most:
        live = state >= 0
        rows = ladder[state] if ladder.ndim == 2 else ladder[np.minimum(spent, len(ladder) - 1), state]
        token = (rows > rng.random(n)[:, None]).argmax(1)
        acted = live & mdp.is_policy[state]
        spent += acted
        follow = np.where(live, mdp.next_state[state, token], -1)
        if mdp.horizon is not None:
            follow[acted & (spent >= mdp.horizon)] = -1
        columns.append((np.where(live, token, 0), live, acted, np.where(acted, mdp.reward[state, token], 0.0), follow))
        state = follow
    if max_tokens is None and (state >= 0).any():
        raise bad("log_policy", "a policy whose episodes end", f"rows longer than {ROWS_NEVER_END}", "Give max_tokens.")
    if ((state >= 0) & ~mdp.is_policy[state] & (spent == 0)).any():
        raise bad("max_tokens", "at least the length of every prompt", repr(max_tokens), "A cut row ends in a policy state.")
    ids, real, action, reward, states = (np.stack(column, 1) for column in zip(*columns, strict=True))
    batch = TokenBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        completion_mask=torch.from_numpy(action.astype(np.int64)),
        rewards=torch.from_numpy(reward),
        terminated=torch.from_numpy(state < 0),
        group_ids=prompt_groups(ids, action),
        states=torch.from_numpy(states),
    )
    return trim_replies(batch, (state >= 0) & ~mdp.is_policy[state])


def trim_replies(batch: TokenBatch, inside: np.ndarray) -> TokenBatch:
    """Rows (bool[B]) that were left where the environment would speak go back to the position before their last action."""
    if inside.any():
        real = batch.attention_mask.sum(1)
        batch = cut(batch, torch.where(torch.from_numpy(inside), real - 1, real))
    return pad(batch)


def prompt_groups(ids: np.ndarray, action: np.ndarray) -> torch.Tensor:
    """int[B]: rows with the same tokens before the first action share a number."""
    prompt = np.where(np.cumsum(action, 1) == 0, ids, -1)
    _, group = np.unique(prompt, axis=0, return_inverse=True)
    return torch.from_numpy(group.reshape(-1).astype(np.int64))
