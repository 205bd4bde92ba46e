"""Contrastive regressions: rows of one prompt must agree in R_b = R - beta l, so no value is needed.

    copg_loss        CoPG on pairs in the contract's layout
    copg_pairs_loss  CoPG over all pairs of a listing
    agro_loss        AGRO: the variance of R_b within a group (half of CoPG's expectation)

At pi* of a deterministic world R_b is v*(prompt) for every row: both are zero, whatever made the data. With random replies
the gradient at pi* vanishes on data of pi* alone. They fix the policy alone.
"""

from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.losses.residuals import Reduction
from shiq_lab.losses.sequences import all_pairs, groups_of, halves, reduce_rows, sequences_of
from shiq_lab.stats import TokenStats


def copg_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    across_prompts: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """CoPG: (R_b(y) - R_b(y'))^2 of row i of the first half and row i of the second, one number a pair.

    Needs two answers to one prompt, in any order, from anywhere. Pairs of two prompts are a ValueError unless across_prompts:
    v* differs between them, so pi* is then stationary on its own data alone. Source: arXiv 2406.19185.
    """
    pairs = halves(batch, same_group=not across_prompts)
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    return reduce_rows(pairs.difference(rows.regularised(beta)) ** 2, pairs.weight, reduction)


def copg_pairs_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    across_prompts: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """The expectation of copg_loss over two independent answers of a listing."""
    pairs = all_pairs(batch, same_group=not across_prompts)
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    return reduce_rows(pairs.difference(rows.regularised(beta)) ** 2, pairs.weight, reduction)


def agro_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    population: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """AGRO: Var R_b within a group, divided by G - 1; every row counts its group's variance.

    Needs groups of at least two rows (batch.group_ids), else a ValueError; `population`: rows are a listing whose weights
    are probabilities, and the variance is the exact one. Source: arXiv 2503.19612.
    """
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma)
    value = rows.regularised(beta)
    groups = groups_of(batch, value.dtype, population=population, least=2)
    return reduce_rows(groups.variance(value), batch.weights, reduction)
