"""ShiQ and the steps that lead to it, each a named loss of the same two numbers a token.

    naive_loss          step 0   q = beta l, one step; sampling needs two models
    easy_sampling_loss  step 1   beta g = q + beta ln pi_ref, one step; wrong level at a pretrained start
    shifted_loss        step 2   the logits shifted by v_ref, one step; rewards travel one token a sweep
    shiq_loss           step 3   multi-step: this is ShiQ (arXiv 2505.11081); n_steps=1 is step 2
    sequence_loss                rho_0 alone: fixes the policy and the level at the start, not q
    semi_gradient_loss  F11a     gradient through one place only: l* stays stationary in random worlds
    turn_cut_loss       F11b     multi-step inside a turn, bootstrap where the world answers
    shiq_gradient       F3       the gradient of shiq_loss in closed form, without autograd

All take (policy_stats, ref_stats, batch, *, beta, gamma=1.0, reduction="mean"): sum over actions of rho^2 in a row, then the
weighted mean of rows; reduction="none" gives the float a sequence. Only policy_stats carry gradient.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad
from shiq_lab.losses import steps
from shiq_lab.losses.residuals import Actions, Reduction, actions_of, ahead, check_arguments, discounted_sum, reduce, residuals
from shiq_lab.stats import TokenStats

Step = Callable[..., tuple[Tensor, Tensor]]


def _pieces(step: Step, stats: TokenStats, ref: TokenStats, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c, u, u after the last token) of a step, from the statistics of model and reference."""
    if step is steps.naive and (stats.joint_logsumexp is None or stats.end_joint_logsumexp is None):
        raise bad(
            "policy_stats", "joint_logsumexp for the naive step", "None", "Pass ref_logits= or ref_table= when making them."
        )
    ref = ref.detach()
    zero = torch.zeros_like(stats.end_logsumexp)
    joint = stats.logsumexp if stats.joint_logsumexp is None else stats.joint_logsumexp
    end_joint = zero if stats.end_joint_logsumexp is None else stats.end_joint_logsumexp
    c, u = step(stats.token_logit, stats.logsumexp, ref.token_logit, ref.logsumexp, joint, beta)
    _, u_end = step(zero, stats.end_logsumexp, zero, ref.end_logsumexp, end_joint, beta)
    return c, u, u_end


def residuals_of(
    step: Step,
    stats: TokenStats,
    ref: TokenStats,
    batch: TokenBatch,
    beta: float,
    gamma: float,
    n_steps: int | None,
    target_stats: TokenStats | None = None,
    **options: Any,
) -> tuple[Tensor, Actions]:
    """(rho^(n) float[B, T], where the actions are): the residuals that the losses below square."""
    check_arguments(stats, ref, batch, beta, gamma, n_steps, target_stats)
    actions = actions_of(batch)
    target = None if target_stats is None else _pieces(step, target_stats, ref, beta)[1:]
    c, u, u_end = _pieces(step, stats, ref, beta)
    rho = residuals(c, u, u_end, batch, actions, gamma=gamma, n_steps=n_steps, target=target, **options)
    return rho, actions


def naive_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    n_steps: int | None = 1, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """Step 0, logits as Q-values: sum_t (beta l - r - gamma beta ln sum_a pi_ref exp l(s', a))^2.

    Its zero has q* = beta l, so softmax(l) is not pi*: sampling needs pi_ref exp(l). Needs joint statistics.
    """
    rho, actions = residuals_of(steps.naive, policy_stats, ref_stats, batch, beta, gamma, n_steps)
    return reduce(rho**2, batch, actions, reduction)


def easy_sampling_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    n_steps: int | None = 1, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """Step 1: sum_t (beta g - r - beta ln pi_ref - gamma beta lse(g)(s'))^2.

    Its zero has pi* = softmax(g), but l_ref violates it even at r = 0 unless lse(l_ref) = 0 in every state.
    """
    rho, actions = residuals_of(steps.easy, policy_stats, ref_stats, batch, beta, gamma, n_steps)
    return reduce(rho**2, batch, actions, reduction)


def shifted_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    target_stats: TokenStats | None = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """Step 2: sum_t d_t^2 with d_t = beta (l - l_ref)(s_t, a_t) - r_t - gamma Dv(s_{t+1}); shiq_loss with n_steps=1."""
    return shiq_loss(
        policy_stats, ref_stats, batch, beta=beta, gamma=gamma, n_steps=1, target_stats=target_stats, reduction=reduction
    )


def shiq_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    n_steps: int | None = None, target_stats: TokenStats | None = None, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """ShiQ: sum_t rho_t^2, rho_t = Dv(s_t) - sum_{k>=t} gamma^{k-t} [r_k - beta ln(pi / pi_ref)(a_k|s_k)].

    n_steps=None sums to the row's end; n bootstraps with gamma^n Dv(s_{t+n}); a cut row bootstraps at its end. At l = l_ref
    rho_t is minus the reward-to-go (F4). target_stats: where bootstrapped values come from instead, without gradient.
    Exact only where the world is deterministic after the first action (F9). Raises ValueError for shapes that do not match,
    beta <= 0, gamma outside (0, 1], n_steps < 1. Source: arXiv 2505.11081.
    """
    rho, actions = residuals_of(steps.shifted, policy_stats, ref_stats, batch, beta, gamma, n_steps, target_stats)
    return reduce(rho**2, batch, actions, reduction)


def sequence_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """rho_0^2 of every sequence: a metric of rank one; fixes pi* and the level at the start, not the inner levels (F5)."""
    rho, actions = residuals_of(steps.shifted, policy_stats, ref_stats, batch, beta, gamma, None)
    later = torch.zeros_like(actions.real)
    later[:, 1:] = actions.segment[:, 1:] == actions.segment[:, :-1]
    return reduce(torch.where(later, 0.0, rho**2), batch, actions, reduction)


def semi_gradient_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    through: Literal["token", "value"] = "token", reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """The value of shiq_loss with gradient only through beta l(s_t, a_t) ("token") or only through Dv(s_t) ("value").

    E[rho_t | s_t, a_t] = 0 at l*, so l* is stationary under any behaviour even where replies are random (F11a), as long as
    rows are not cut.
    """
    if through not in ("token", "value"):
        raise bad("through", "'token' or 'value'", repr(through))
    rho, actions = residuals_of(steps.shifted, policy_stats, ref_stats, batch, beta, gamma, None)
    c, u, _ = _pieces(steps.shifted, policy_stats, ref_stats, beta)
    live = actions.of(c if through == "token" else u)
    return reduce((live - (live - rho).detach()) ** 2, batch, actions, reduction)


def turn_cut_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """rho_t summed inside a turn, with full gradient, plus gamma^n Dv of the next turn's first state, without gradient (F11b).

    A turn ends where environment tokens stand between two actions. Given the turn, rho has mean zero at l*: stationary in
    random worlds under any behaviour. With a single turn it is shiq_loss.
    """
    rho, actions = residuals_of(steps.shifted, policy_stats, ref_stats, batch, beta, gamma, None, cut_turns=True)
    return reduce(rho**2, batch, actions, reduction)


def shiq_gradient(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    n_steps: int | None = None,
) -> TokenStats:  # fmt: skip
    """F3: the gradient of every row's shiq_loss (summed, unweighted) by the statistics, in closed form.

        d / d token_logit_k = 2 beta D_k,   d / d logsumexp_k = -2 beta gamma D_{k-1},
        D_k = rho_k + gamma D_{k-1} - gamma^n rho_{k-n} = sum over the last n tokens j <= k of gamma^{k-j} rho_j

    and -2 beta gamma D_{T-1} by the log-sum-exp after a cut row. So d / d l(s_k, .) = 2 beta [D_k e_{a_k} - gamma D_{k-1} pi].
    Returned in a TokenStats of the same shapes; the second road to what autograd finds.
    """
    with torch.no_grad():
        rho, actions = residuals_of(steps.shifted, policy_stats, ref_stats, batch, beta, gamma, n_steps)
        backwards = actions.segment.flip(1)
        D = discounted_sum(rho.flip(1), gamma, backwards, n_steps)
        before = ahead(D, 1, backwards).flip(1)  # D_{k-1}
        D = D.flip(1)
        empty = torch.zeros_like(policy_stats.token_logit, dtype=D.dtype)
        put = lambda x: empty.scatter_add(1, actions.index, torch.where(actions.real, x, 0.0))  # noqa: E731
        last = actions.real & (ahead(torch.ones_like(D), 1, actions.segment) == 0)
        at_end = torch.zeros(
            len(batch), policy_stats.end_logsumexp.reshape(len(batch), -1).shape[1], dtype=D.dtype, device=D.device
        )
        at_end = at_end.scatter_add(1, actions.segment.clamp(min=0), torch.where(last, D, 0.0)).reshape(batch.terminated.shape)
        return TokenStats(
            token_logit=2 * beta * put(D),
            logsumexp=-2 * beta * gamma * put(before),
            end_logsumexp=torch.where(batch.terminated, 0.0, -2 * beta * gamma * at_end),
        )
