"""From two numbers a token to residuals: the arithmetic that every step of the derivation shares.

Each step says what its logits mean through two numbers: c = "beta times the token's part" and u = "the state's value",

    d_t   = c_t - r_t - gamma u_{t+1}                                        one-step residual, u = 0 at the end
    rho_t = sum_{k>=t} gamma^{k-t} d_k = u_t - sum_{k>=t} gamma^{k-t} [r_k - (c_k - u_k)]      (F2)
    rho^(n)_t = rho_t - gamma^n rho_{t+n}

where s_{t+1} is the next policy state along the row; rho^(n) is summed as its n terms, so nothing cancels. Actions are
first moved together, so time is the action's number and environment tokens in between cost nothing. Sums over time are
doubled log2(T) times: no loop over tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad, check_beta, check_gamma
from shiq_lab.stats import TokenStats

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, eq=False)
class Actions:
    """The actions of a batch, moved together.

    index    int[B, T]   column of the statistics (the position that scores the action); any value where not real
    real     bool[B, T]  False behind a row's last action
    segment  int[B, T]   which packed sequence the action is of, from 0; -1 behind the last
    turn     int[B, T]   like segment, but another number after every environment token in between
    """

    index: Tensor
    real: Tensor
    segment: Tensor
    turn: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Entries of x float[B, L-1] at the actions, 0 elsewhere: float[B, T]."""
        return torch.where(self.real, x.gather(1, self.index), 0.0)


def actions_of(batch: TokenBatch) -> Actions:
    """Where the actions are. Pure index work, no gradient."""
    mask = batch.completion_mask[:, 1:] == 1  # (B, L-1)
    count = mask.sum(1)
    T = int(count.max()) if mask.numel() else 0
    index = torch.argsort(~mask, dim=1, stable=True)[:, :T]
    real = torch.arange(T, device=mask.device) < count[:, None]
    label = torch.zeros_like(index) if batch.segment_ids is None else batch.segment_ids[:, 1:].gather(1, index) - 1
    gap = torch.zeros_like(real)
    gap[:, 1:] = (index[:, 1:] != index[:, :-1] + 1) | (label[:, 1:] != label[:, :-1])
    behind = torch.full_like(index, -1)
    return Actions(index, real, torch.where(real, label, behind), torch.where(real, gap.cumsum(1), behind))


def ahead(x: Tensor, steps: int, chain: Tensor) -> Tensor:
    """x_{t+steps} where that action is real and of the same chain, else 0; float[B, T]."""
    if steps >= x.shape[1]:
        return torch.zeros_like(x)
    same = (chain[:, steps:] == chain[:, :-steps]) & (chain[:, steps:] >= 0)
    return torch.nn.functional.pad(torch.where(same, x[:, steps:], 0.0), (0, steps))


def discounted_sum(x: Tensor, gamma: float, chain: Tensor, terms: int | None = None) -> Tensor:
    """sum over t <= k < t + terms of gamma^{k-t} x_k along each chain (terms=None: all of them).

    By doubling: the sum over 2^j terms makes the one over 2^(j+1), and the binary digits of `terms` say which to add.
    """
    terms = x.shape[1] if terms is None else min(terms, x.shape[1])
    block, size = x, 1  # sums over `size` terms
    total: Tensor | None = None
    done = 0
    while size <= terms:
        if terms & size:
            total = block if total is None else total + gamma**done * ahead(block, done, chain)
            done += size
        if 2 * size <= terms:
            block = block + gamma**size * ahead(block, size, chain)
        size *= 2
    return x if total is None else total


def residuals(
    c: Tensor,
    u: Tensor,
    u_end: Tensor,
    batch: TokenBatch,
    actions: Actions,
    *,
    gamma: float,
    n_steps: int | None,
    target: tuple[Tensor, Tensor] | None = None,
    cut_turns: bool = False,
) -> Tensor:
    """rho^(n) float[B, T] (n_steps=None: to the end of the row), 0 behind the last action.

    c, u         float[B, L-1]: the step's token part and state value
    u_end        float[B] (packed [B, N]): value after the last token, used where the row was cut
    target       (u, u_end) of a target network: what is bootstrapped from n steps on, and at a cut, without gradient
    cut_turns    end the sum where the environment speaks, with the next turn's value as a target without gradient (F11b),
                 be that the value of the row's next action or, where the row was cut after the reply, the one at its end
    """
    chain = actions.turn if cut_turns else actions.segment
    c, u = actions.of(c), actions.of(u)
    reward = actions.of(batch.rewards[:, 1:].to(c.dtype))
    at_end = target[1].detach() if target is not None else u_end
    at_end = torch.where(batch.terminated, 0.0, at_end)
    bootstrap = at_end.gather(1, actions.segment.clamp(min=0)) if at_end.ndim == 2 else at_end[:, None].expand_as(u)
    following = ahead(torch.ones_like(u), 1, actions.segment) > 0
    after = torch.where(following, ahead(u, 1, actions.segment), bootstrap)
    if cut_turns:
        same_turn = ahead(torch.ones_like(u), 1, actions.turn) > 0
        last = batch.last_index()
        last = last.gather(1, actions.segment.clamp(min=0)) if last.ndim == 2 else last[:, None]
        answered = torch.where(following, ~same_turn, actions.index + 1 < last)  # the environment speaks after this action
        after = torch.where(answered, after.detach(), after)
    rho = discounted_sum(torch.where(actions.real, c - reward - gamma * after, 0.0), gamma, chain, n_steps)
    if n_steps is not None and target is not None:
        rho = rho + gamma**n_steps * ahead(u - actions.of(target[0]).detach(), n_steps, chain)
    return rho


def reduce(per_token: Tensor, batch: TokenBatch, actions: Actions, reduction: Reduction) -> Tensor:
    """float[B, T] -> per sequence float[B] (packed: [B, N]) for "none", their weighted sum or weighted mean."""
    if reduction not in ("mean", "sum", "none"):
        raise bad("reduction", "'mean', 'sum' or 'none'", repr(reduction))
    rows = per_token.sum(1)
    if batch.segment_ids is not None:
        empty = torch.zeros(batch.terminated.shape, dtype=per_token.dtype, device=per_token.device)
        rows = empty.scatter_add(1, actions.segment.clamp(min=0), torch.where(actions.real, per_token, 0.0))
    if reduction == "none":
        return rows
    weights = batch.weights.to(rows.dtype)
    total = (weights * rows).sum()
    return total / weights.sum() if reduction == "mean" else total


def check_arguments(
    stats: TokenStats,
    ref: TokenStats,
    batch: TokenBatch,
    beta: float,
    gamma: float,
    n_steps: int | None,
    target: TokenStats | None = None,
) -> None:
    """ValueErrors for what silently trains the wrong thing: shapes that broadcast, beta, gamma and n_steps out of range."""
    if not isinstance(batch, TokenBatch):
        raise bad("batch", "a TokenBatch", type(batch).__name__)
    shape = (len(batch), batch.input_ids.shape[1] - 1)
    named = [("policy_stats", stats), ("ref_stats", ref)] + ([] if target is None else [("target_stats", target)])
    for name, x in named:
        if not isinstance(x, TokenStats):
            raise bad(name, "TokenStats", type(x).__name__, "TokenStats.from_logits(logits, batch) makes them.")
        for part in ("token_logit", "logsumexp"):
            if tuple(getattr(x, part).shape) != shape:
                raise bad(f"{name}.{part}", f"shape {shape}", f"shape {tuple(getattr(x, part).shape)}")
        if x.end_logsumexp.shape != batch.terminated.shape:
            expected = tuple(batch.terminated.shape)
            raise bad(f"{name}.end_logsumexp", f"shape {expected}, as terminated", f"shape {tuple(x.end_logsumexp.shape)}")
    check_beta(beta), check_gamma(gamma)
    if n_steps is not None and (isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1):
        raise bad("n_steps", "a whole number >= 1, or None for the whole row", repr(n_steps))
