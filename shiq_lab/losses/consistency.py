"""Path consistency with a value that the policy's logits do not carry: given, learned apart, or read off the first state.

    dro_loss         DRO-V     (R_b - V(x))^2 / 2              V of the prompt
    a_star_loss      A*-PO     (beta l - (R - V*(x)))^2        V* given, from samples of the reference
    reference_value            beta ln E_ref exp(R / beta)     that V*
    pcl_loss         PCL, Trust-PCL: ShiQ's residual with V of every state from a net of its own
    tbrm_loss        TBRM      rho_0^2 with V = beta lse(l)    the sequence loss without the shift

Values are passed as numbers and may carry gradient: whoever learns them differentiates the same loss.
"""

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad, check_beta
from shiq_lab.losses.residuals import Reduction, actions_of, check_arguments, reduce, residuals
from shiq_lab.losses.sequences import groups_of, place_of, reduce_rows, sequences_of
from shiq_lab.stats import TokenStats


def _per_row(name: str, x: Tensor | float, batch: TokenBatch, like: Tensor) -> Tensor:
    """A number a row, as a tensor of the batch's rows; one number stands for all."""
    value = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    if value.shape not in ((), batch.terminated.shape):
        raise bad(name, f"a number, or shape {tuple(batch.terminated.shape)}", f"shape {tuple(value.shape)}")
    return value.expand(batch.terminated.shape)


def dro_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, values: Tensor, gamma: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """DRO-V: (R(y) - beta l(y) - V(x))^2 / 2, one number a row.

    values float[B]: V of the row's prompt, with gradient if it is learned by the same loss. Needs single rows from anywhere;
    fixes the policy and V = v*(x), no level of the logits. A wrong V that is not learned keeps pi* on its own data alone.
    Source: arXiv 2405.19107.
    """
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    error = rows.regularised(beta) - _per_row("values", values, batch, rows.log_ratio)
    return reduce_rows(error**2 / 2, batch.weights, reduction)


def a_star_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, v_star: Tensor | float,
    gamma: float = 1.0, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """A*-PO: (beta l(y) - (R(y) - V*(x)))^2, one number a row; no gradient through V*.

    v_star float[B]: v* of the row's prompt, for instance from reference_value. Fixes the policy alone. With an exact V* in a
    deterministic world pi* is stationary under any behaviour, with a wrong one on its own data alone. Source: arXiv 2505.20686.
    """
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    advantage = rows.returns - _per_row("v_star", v_star, batch, rows.log_ratio).detach()
    return reduce_rows((beta * rows.log_ratio - advantage) ** 2, batch.weights, reduction)


def reference_value(batch: TokenBatch, *, beta: float, population: bool = False) -> Tensor:
    """A*-PO's first stage: V*(x) = beta ln E_{y ~ pi_ref(.|x)} exp(R(y) / beta), float[B], the same in all rows of a prompt.

    The rows are samples of the reference (population: a listing with its probabilities). It is v*(x) for gamma = 1 and a world
    that is deterministic after the first action, and for no other. Without overflow at any R / beta. Source: arXiv 2505.20686.
    """
    check_beta(beta)
    actions = actions_of(batch)
    returns = reduce(actions.of(batch.rewards[:, 1:]), batch, actions, "none")
    groups = groups_of(batch, returns.dtype, population=population)
    top = torch.full_like(groups.mass, -torch.inf)
    live = torch.where(groups.share > 0, returns, -torch.inf).reshape(-1)
    top = top.scatter_reduce(0, groups.index, live, "amax")[groups.index].reshape(returns.shape)
    top = torch.where(torch.isfinite(top), top, 0.0)
    return top + beta * torch.log(groups.mean(torch.exp(torch.where(groups.share > 0, returns - top, 0.0) / beta)))


def pcl_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, values: Tensor, gamma: float = 1.0,
    n_steps: int | None = None, stop_target: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """PCL / Trust-PCL: sum_t C_t^2 / 2, C_t = V(s_t) - gamma^n V(s_{t+n}) - sum_{t<=k<t+n} gamma^{k-t} [r_k - beta x_k].

    x_k = ln(pi / pi_ref)(a_k|s_k).
    values float[B, L]: values[:, i] is V of the state after token i, as logits[:, i] is; read where an action is scored and
    after the last token of a cut row. n_steps=None sums to the row's end; stop_target: no gradient through the V that is
    bootstrapped from. Fixes the policy and V = v* in every state, no level of the logits. pi* and v* are stationary under any
    behaviour in a deterministic world; with random replies so they are for n_steps=1 with stop_target, and whole rows keep
    pi* on its own data. With V = Dv of the logits (n_steps as there) it is shiq_loss / 2, "unified" PCL.
    Source: arXiv 1702.08892 (PCL), 1707.01891 (Trust-PCL: the reference in the place of the entropy).
    """
    check_arguments(policy_stats, ref_stats, batch, beta, gamma, n_steps)
    if not isinstance(values, Tensor) or values.shape != batch.input_ids.shape:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise bad("values", f"shape {tuple(batch.input_ids.shape)}, as input_ids", got)
    actions = actions_of(batch)
    ref = ref_stats.detach()
    log_ratio = policy_stats.token_logit - policy_stats.logsumexp - (ref.token_logit - ref.logsumexp)
    here = torch.where(batch.completion_mask[:, 1:] == 1, values[:, :-1], 0.0).to(log_ratio.dtype)
    last = batch.last_index()
    end = values.gather(1, last) if last.ndim == 2 else values.gather(1, last[:, None])[:, 0]
    end = torch.where(batch.terminated, 0.0, end).to(log_ratio.dtype)
    target = (here, end) if stop_target else None  # residuals() stops the gradient
    C = residuals(here + beta * log_ratio, here, end, batch, actions, gamma=gamma, n_steps=n_steps, target=target)
    return reduce(C**2 / 2, batch, actions, reduction)


def tbrm_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """TBRM: (beta lse(l)(s_0) - sum_k gamma^k [r_k - beta ln(pi / pi_ref)])^2, one number a row.

    One rollout, no value net: sequence_loss without the shift. So its zero is pi* with lse(l)(s_0) = v*(s_0) / beta, and not
    l*, whose level is v* / beta + lse(l_ref). A cut row bootstraps with gamma^T beta lse(l) at its end. Fixes the policy and
    that level, no inner one. Source: arXiv 2505.15311.
    """
    check_arguments(policy_stats, ref_stats, batch, beta, gamma, None)
    actions, ref = actions_of(batch), ref_stats.detach()
    value = beta * policy_stats.logsumexp
    token = beta * (policy_stats.token_logit - (ref.token_logit - ref.logsumexp))
    rho = residuals(token, value, beta * policy_stats.end_logsumexp, batch, actions, gamma=gamma, n_steps=None)
    return reduce(torch.where(place_of(actions) == 0, rho**2, 0.0), batch, actions, reduction)
