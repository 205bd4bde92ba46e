"""Policy gradients: the value of these losses means nothing, their gradient is what counts.

    reinforce_loss  -sg(R_b - b) ln pi(y), the KL in the reward; or an estimator k1, k2, k3 of it in the loss
    rloo_loss       b = the mean of the group's other rows
    grpo_loss       clipped ratios, (R - mean) / std, beta k3 in the loss; each of these an option
    topr_loss       no KL: weight 1 on good rows, a truncated importance weight on bad ones
    sft_loss        -ln pi(y)

d J = E_pi[ R_b d ln pi(y) ] for any discount, the score undiscounted. Rows drawn from pi itself are taken for granted; what
becomes of each on other data is in the fixed-point table. All of them fix the policy alone.
"""

from typing import Literal

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad
from shiq_lab.losses.kl import discounted_kl
from shiq_lab.losses.residuals import Reduction, reduce
from shiq_lab.losses.sequences import Sequences, groups_of, reduce_rows, sequences_of
from shiq_lab.stats import TokenStats

Penalty = Literal["reward", "score", "k1", "k2", "k3"]


def _penalty(rows: Sequences, batch: TokenBatch, kl: str, beta: float) -> Tensor:
    """What the KL adds to the loss of every row, float[B]; "reward" adds nothing here, it is in the advantage."""
    if kl == "reward":
        return torch.zeros_like(rows.returns)
    if kl == "score":
        return beta * rows.log_ratio.detach() * rows.log_prob
    return beta * discounted_kl(rows, batch, kl)


def reinforce_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    baseline: Tensor | float = 0.0, kl: Penalty = "reward", reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """REINFORCE: -sg(R_b(y) - b) ln pi(y), one number a row.

    baseline float[B] or a number. kl="reward": R_b = R - beta l, the true gradient of J on-policy. "k1", "k2", "k3": R in its
    place and beta sum_k gamma^k k(ln(pi / pi_ref)) in the loss; "score": R, and the KL's true gradient in the loss.
    pi* is stationary on its own data; on other data only for b = v*(x), in a deterministic world. k1 does nothing, k3 moves
    pi*, k2 keeps it where a completion has one token. Source: Williams 1992; arXiv 2510.01555 for the estimators.
    """
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    base = torch.as_tensor(baseline, dtype=rows.returns.dtype, device=rows.returns.device)
    if base.shape not in ((), batch.terminated.shape):
        raise bad("baseline", f"a number, or shape {tuple(batch.terminated.shape)}", f"shape {tuple(base.shape)}")
    paid = rows.regularised(beta) if kl == "reward" else rows.returns
    loss = _penalty(rows, batch, kl, beta) - (paid - base).detach() * rows.log_prob
    return reduce_rows(loss, batch.weights, reduction)


def rloo_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    population: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """RLOO: -sg(R_b(y_i) - mean_{j != i} R_b(y_j)) ln pi(y_i), over the rows of a group.

    Needs groups of at least two rows, else a ValueError; `population`: rows are a listing whose weights are probabilities,
    and the baseline is the expected one. In a deterministic world pi* is stationary under any behaviour, since R_b is then
    the same in all rows; with random replies on its own data alone. Source: arXiv 2402.14740.
    """
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    paid = rows.regularised(beta).detach()
    groups = groups_of(batch, paid.dtype, population=population, least=2)
    return reduce_rows(-(paid - groups.others(paid)) * rows.log_prob, batch.weights, reduction)


def grpo_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    behavior_logprobs: Tensor | None = None, std: bool = True, kl: Penalty = "k3", leave_one_out: bool = False,
    length_mean: bool = True, clip: float = 0.2, eps: float = 1e-4, population: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """GRPO: -(1/|y|) sum_k [ min(w_k A, clip(w_k, 1 - c, 1 + c) A) - beta k3(ln(pi / pi_ref)(a_k)) ], w_k = pi / behaviour.

    A = (R - mean) / (std + eps) over the rows of the group. behavior_logprobs float[B, L]: ln of the behaviour's probability
    of input_ids[:, i]; None: rows of the current policy, w = 1.
    std=False and length_mean=False are the "Dr. GRPO" form; leave_one_out leaves a row out of its own baseline; kl as in
    reinforce_loss ("reward" puts it in A); `population`: rows are a listing whose weights are probabilities.
    pi* is not stationary, on-policy either: std rescales R and not beta, k3 is another divergence's gradient, the mean over G
    rows with oneself makes beta effectively beta G / (G - 1), and the mean over tokens favours short rows. With all four
    undone (kl="score") it is. Source: arXiv 2402.03300, 2503.20783.
    """
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    paid = (rows.regularised(beta) if kl == "reward" else rows.returns).detach()
    groups = groups_of(batch, paid.dtype, population=population, least=2 if leave_one_out or std else 1)
    advantage = paid - (groups.others(paid) if leave_one_out else groups.mean(paid))
    if std:
        advantage = advantage / (groups.variance(paid).sqrt() + eps)
    now = rows.token_log_prob
    ratio = torch.exp(now - (now.detach() if behavior_logprobs is None else _behavior(behavior_logprobs, batch, rows)))
    spread = advantage if advantage.ndim == 2 else advantage[:, None]
    spread = spread.gather(1, rows.actions.segment.clamp(min=0)) if advantage.ndim == 2 else spread
    gain = torch.minimum(ratio * spread, ratio.clamp(1 - clip, 1 + clip) * spread)
    loss = _penalty(rows, batch, kl, beta) - reduce(torch.where(rows.actions.real, gain, 0.0), batch, rows.actions, "none")
    return reduce_rows(loss / rows.length.clamp(min=1) if length_mean else loss, batch.weights, reduction)


def _behavior(behavior_logprobs: Tensor, batch: TokenBatch, rows: Sequences) -> Tensor:
    """The behaviour's log-probabilities at the actions, float[B, T], without gradient."""
    if not isinstance(behavior_logprobs, Tensor) or behavior_logprobs.shape != batch.input_ids.shape:
        got = f"shape {tuple(behavior_logprobs.shape)}" if isinstance(behavior_logprobs, Tensor) else repr(behavior_logprobs)
        raise bad("behavior_logprobs", f"shape {tuple(batch.input_ids.shape)}, as input_ids", got)
    return rows.actions.of(behavior_logprobs[:, 1:].to(rows.log_prob.dtype)).detach()


def topr_loss(
    policy_stats: TokenStats, batch: TokenBatch, *, behavior_logprobs: Tensor, gamma: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """TOPR: -sg(w R(y)) ln pi(y), w = 1 where R(y) >= 0 and min(pi(y) / behaviour(y), 1) elsewhere; one number a row.

    behavior_logprobs float[B, L]: ln of the behaviour's probability of input_ids[:, i]. No KL and no reference, so pi* is
    stationary nowhere: it goes for the highest return. Source: arXiv 2503.14286.
    """
    rows = sequences_of(policy_stats, policy_stats, batch, 1.0, gamma)
    behavior = reduce(_behavior(behavior_logprobs, batch, rows), batch, rows.actions, "none")
    weight = torch.where(rows.returns >= 0, 1.0, torch.exp((rows.log_prob - behavior).clamp(max=0)))
    return reduce_rows(-(weight * rows.returns).detach() * rows.log_prob, batch.weights, reduction)


def sft_loss(policy_stats: TokenStats, batch: TokenBatch, *, reduction: Reduction = "mean") -> Tensor:
    """SFT: -ln pi(y), one number a row: the cross-entropy summed over the row's actions.

    Its optimum is the behaviour; pi* is stationary on its own data alone, and if the data follow the policy nothing is fixed
    at all. Cut rows count what they have.
    """
    rows = sequences_of(policy_stats, policy_stats, batch, 1.0, 1.0, whole=False)
    return reduce_rows(-rows.log_prob, batch.weights, reduction)
