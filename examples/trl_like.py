"""A DPO loss in the signature of TRL's trainers, and its adapter: `shiq-lab check examples/trl_like.py:loss`."""

import torch
from torch import Tensor

import shiq_lab


def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The stack's own function: sums of log-probs a sequence in, losses and rewards a pair out."""
    logratios = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps).detach()
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps).detach()
    return -torch.nn.functional.logsigmoid(beta * logratios), chosen_rewards, rejected_rewards


def from_token_logprobs(logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor, beta: float) -> Tensor:
    """What the trainer does around it: mask, sum over the completion, split into chosen and rejected."""
    total, ref_total = (torch.where(completion_mask == 1, x, 0.0).sum(1) for x in (logprobs, ref_logprobs))
    losses, _, _ = dpo_loss(*total.chunk(2), *ref_total.chunk(2), beta)
    return losses.mean()


loss = shiq_lab.from_logprobs(from_token_logprobs, kind="preference")
