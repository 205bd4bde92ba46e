"""A policy loss in the signature of verl's and OpenRLHF's, and its adapter: `shiq-lab check examples/verl_like.py:loss`."""

import torch
from torch import Tensor

import shiq_lab


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask == 1, x, 0.0).sum() / mask.sum().clamp(min=1)


def compute_policy_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float = 0.2
) -> Tensor:
    """The stack's own function: the clipped surrogate over the tokens of right-padded responses, a token mean."""
    ratio = torch.exp(torch.where(response_mask == 1, log_prob - old_log_prob, 0.0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return masked_mean(torch.maximum(plain, clipped), response_mask)


def outcome(
    log_prob: Tensor, ref_log_prob: Tensor, old_log_prob: Tensor, response_mask: Tensor, rewards: Tensor, beta: float
) -> Tensor:
    """What the trainer does around it: the KL in the reward, the rest of the row as every token's advantage."""
    live = response_mask == 1
    paid = torch.where(live, rewards - beta * (log_prob - ref_log_prob).detach(), 0.0)
    advantages = paid.flip(1).cumsum(1).flip(1)
    return compute_policy_loss(old_log_prob, log_prob, advantages, response_mask)


loss = shiq_lab.from_response_logprobs(
    outcome,
    {"log_prob": "logprobs", "ref_log_prob": "ref_logprobs", "old_log_prob": "old_logprobs"},
    kind="on_policy",
    reduction="token mean",
)
