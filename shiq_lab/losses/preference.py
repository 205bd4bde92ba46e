"""Preference losses: of two answers to one prompt, which is better. First half of the rows chosen, second half rejected.

    dpo_loss, ipo_loss              pairs as they come, in the contract's layout
    dpo_pairs_loss, ipo_pairs_loss  the population: all pairs of a listing, labelled by Bradley and Terry's model of R

They see log-ratios of whole rows and nothing else: no level, and no value of any state. Both regress l(y) - l(y'), which at
pi* of a deterministic world is (R(y) - R(y')) / beta. With random replies it is not (luck is in R and not in l), so no
preference loss keeps pi* there, on-policy or off.
"""

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad
from shiq_lab.losses.residuals import Reduction
from shiq_lab.losses.sequences import Pairs, all_pairs, halves, reduce_rows, sequences_of
from shiq_lab.stats import TokenStats


def bradley_terry(difference: Tensor) -> Tensor:
    """P(the first answer is preferred) = sigma(R(y) - R(y')), for any shape of R(y) - R(y')."""
    return torch.sigmoid(difference)


def _logistic(margin: Tensor, label: Tensor) -> Tensor:
    """-label ln sigma(margin) - (1 - label) ln sigma(-margin), without overflow."""
    softplus = torch.nn.functional.softplus
    return label * softplus(-margin) + (1 - label) * softplus(margin)


def _label(chosen_probability: Tensor | float, margin: Tensor) -> Tensor:
    label = torch.as_tensor(chosen_probability, dtype=margin.dtype, device=margin.device)
    if label.shape not in ((), margin.shape):
        raise bad("chosen_probability", f"a number, or shape {tuple(margin.shape)}", f"shape {tuple(label.shape)}")
    if not bool(((label >= 0) & (label <= 1)).all()):
        raise bad("chosen_probability", "probabilities from 0 to 1", f"{label.min().item()} to {label.max().item()}")
    return label


def dpo_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    chosen_probability: Tensor | float = 1.0, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """DPO: -p ln sigma(beta (l(y+) - l(y-))) - (1 - p) ln sigma(-beta (l(y+) - l(y-))), one number a pair.

    chosen_probability float[N] or a number: p, the probability that the chosen answer is really preferred; 1 is plain DPO,
    1 - epsilon is label smoothing. Needs pairs of one prompt. Fixes the policy alone. pi* is stationary under any behaviour
    if the world is deterministic and labels are drawn from Bradley and Terry's model of R; hard labels push margins to
    infinity. beta -> 0: half the log-ratio's difference, whatever R says. ValueError for an odd number of rows, or pairs of
    two prompts. Source: arXiv 2305.18290.
    """
    pairs = halves(batch)
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma, whole=False)
    margin = beta * pairs.difference(rows.log_ratio)
    return reduce_rows(_logistic(margin, _label(chosen_probability, margin)), pairs.weight, reduction)


def ipo_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    chosen_probability: Tensor | float = 1.0, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """IPO: p (h - 1/(2 beta))^2 + (1 - p) (h + 1/(2 beta))^2, h = l(y+) - l(y-), one number a pair.

    Needs pairs of one prompt; fixes a policy alone, but not pi*: h = (2p - 1) / (2 beta) regresses the preference
    probability, not R. Source: arXiv 2310.12036.
    """
    pairs = halves(batch)
    rows = sequences_of(policy_stats, ref_stats, batch, beta, gamma, whole=False)
    h = pairs.difference(rows.log_ratio)
    return reduce_rows(_regression(h, _label(chosen_probability, h), beta), pairs.weight, reduction)


def _regression(h: Tensor, label: Tensor, beta: float) -> Tensor:
    goal = 1 / (2 * beta)
    return label * (h - goal) ** 2 + (1 - label) * (h + goal) ** 2


def _labelled(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, beta: float, gamma: float, hard_labels: bool
) -> tuple[Pairs, Tensor, Tensor]:
    """All pairs of a listing, the differences of their log-ratios, and P(the first is preferred)."""
    rows, pairs = sequences_of(policy_stats, ref_stats, batch, beta, gamma), all_pairs(batch)
    better = pairs.difference(rows.returns)
    label = (1 + torch.sign(better)) / 2 if hard_labels else bradley_terry(better)
    return pairs, pairs.difference(rows.log_ratio), label


def dpo_pairs_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    hard_labels: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """The expectation of dpo_loss over two independent answers of a listing and their label, in one expression.

    hard_labels: the higher return always wins (a tie counts half); then no finite policy is stationary.
    """
    pairs, h, label = _labelled(policy_stats, ref_stats, batch, beta, gamma, hard_labels)
    return reduce_rows(_logistic(beta * h, label), pairs.weight, reduction)


def ipo_pairs_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0,
    hard_labels: bool = False, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """The expectation of ipo_loss over two independent answers of a listing and their label."""
    pairs, h, label = _labelled(policy_stats, ref_stats, batch, beta, gamma, hard_labels)
    return reduce_rows(_regression(h, label, beta), pairs.weight, reduction)
