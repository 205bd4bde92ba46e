"""A GRPO-like loss object in torchtune's style, and its adapter: `shiq-lab check examples/torchtune_like.py:loss`.

With a leave-one-out baseline, no division by the standard deviation, and the KL inside the reward, its optimum is pi*.
"""

import torch
from torch import Tensor, nn

import shiq_lab


class GRPOSimpleLoss(nn.Module):
    """The stack's own object: policy gradient at ratio 1, a mean over every row's own tokens, then over rows."""

    def forward(self, pi_logprobs: Tensor, advantages: Tensor, padding_masks: Tensor) -> Tensor:
        """padding_masks is True where there is nothing to learn; advantages float[B]."""
        ratio = torch.exp(pi_logprobs - pi_logprobs.detach())
        per_token = torch.where(padding_masks, 0.0, -ratio * advantages[:, None])
        return (per_token.sum(1) / (~padding_masks).sum(1).clamp(min=1)).mean()


def grpo(
    logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor, scores: Tensor, group_ids: Tensor, beta: float
) -> Tensor:
    """What the recipe does around it: the sequence's KL in its reward, the mean of the others in its group as baseline."""
    live = completion_mask == 1
    kl = torch.where(live, logprobs - ref_logprobs, 0.0).detach().sum(1)
    score = scores - beta * kl
    same = (group_ids[:, None] == group_ids).to(score.dtype)
    others = same.sum(1) - 1
    baseline = (same @ score - score) / others.clamp(min=1)
    advantages = torch.where(others > 0, score - baseline, 0.0)
    return GRPOSimpleLoss()(logprobs, advantages, ~live)


loss = shiq_lab.from_logprobs(grpo, kind="on_policy", reduction="mean of row means")
