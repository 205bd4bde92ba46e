"""Estimators of KL(pi || pi_ref) from the tokens taken, and what happens when they are differentiated.

With x = ln(pi / pi_ref)(a|s) of a token drawn from pi, each of these has (k2: nearly has) the right expectation,

    k1 = x        k2 = x^2 / 2        k3 = exp(-x) - 1 + x        (all 0 at pi = pi_ref)

and none of them the right gradient in general. Differentiated token by token, on-policy and at a fixed state:

    E d k1 = E[ d ln pi ]                 = 0
    E d k2 = E[ x d ln pi ]               = d KL(pi || pi_ref)(s)
    E d k3 = E[ (1 - pi_ref/pi) d ln pi ] = d KL(pi_ref || pi)(s): the other direction

So k1 in the loss does nothing, k3 pulls to another optimum, and k2 misses what a token does to the states after it: pi* is
kept by k2 alone, and only where a completion has a single token. The gradient of the discounted KL of whole rows is
E[ (sum_k gamma^k x_k) d ln pi(y) ], which `kl_score_loss` has. Sources: arXiv 2506.09477, 2510.01555.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad
from shiq_lab.losses.residuals import Reduction, reduce
from shiq_lab.losses.sequences import Sequences, reduce_rows, sequences_of
from shiq_lab.stats import TokenStats

Estimator = Literal["k1", "k2", "k3"]


def k1(log_ratio: Tensor) -> Tensor:
    """x: unbiased, negative at times; its mean gradient is 0."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """x^2 / 2: biased from third order on; its mean gradient is the KL's at a fixed state."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-x) - 1 + x: unbiased and never negative; its mean gradient is that of KL(pi_ref || pi)."""
    return torch.expm1(-log_ratio) + log_ratio


def k1_slope(log_ratio: Tensor) -> Tensor:
    """d k1 / d x = 1."""
    return torch.ones_like(log_ratio)


def k2_slope(log_ratio: Tensor) -> Tensor:
    """d k2 / d x = x."""
    return log_ratio


def k3_slope(log_ratio: Tensor) -> Tensor:
    """d k3 / d x = 1 - exp(-x) = 1 - pi_ref / pi."""
    return -torch.expm1(-log_ratio)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1_slope, "k2": k2_slope, "k3": k3_slope}


def estimator_of(name: str) -> Callable[[Tensor], Tensor]:
    """k1, k2 or k3 by name, else a ValueError."""
    if name not in ESTIMATORS:
        raise bad("kl", f"one of {', '.join(map(repr, ESTIMATORS))}", repr(name))
    return ESTIMATORS[name]


def discounted_kl(sequences: Sequences, batch: TokenBatch, estimator: str) -> Tensor:
    """sum_k gamma^k k(x_k) of every row, float[B] (packed: [B, N])."""
    values = estimator_of(estimator)(sequences.token_log_ratio)
    return reduce(torch.where(sequences.actions.real, sequences.discount * values, 0.0), batch, sequences.actions, "none")


def kl_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, estimator: Estimator = "k2", beta: float = 1.0,
    gamma: float = 1.0, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """beta sum_k gamma^k k(ln(pi / pi_ref)(a_k|s_k)), differentiated as it stands: the KL "in the loss"."""
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma, whole=False)
    return reduce_rows(beta * discounted_kl(rows, batch, estimator), batch.weights, reduction)


def kl_score_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float = 1.0, gamma: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """beta sg(l(y)) ln pi(y): on-policy its expected gradient is the gradient of the whole discounted KL.

    d E_pi[l] = E_pi[l d ln pi(y)] + E_pi[d l], and the second term is 0. Later states count, which k2 misses.
    """
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma, whole=False)
    return reduce_rows(beta * rows.log_ratio.detach() * rows.log_prob, batch.weights, reduction)
