"""Losses as a user would write them, the subjects of the suite's own tests; bugs are planted into them by editing a line."""

import torch
from torch import Tensor

from shiq_lab.checks.traits import declare


def shiq(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, rewards: Tensor,
    terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The ShiQ loss by plain loops: sum over rows and actions of rho_t^2, over the number of rows."""
    total = logits.new_zeros(())
    for b in range(len(input_ids)):
        real = attention_mask[b].nonzero()[:, 0]
        actions = completion_mask[b].nonzero()[:, 0]
        level = lambda i, b=b: logits[b, i].logsumexp(-1) - ref_logits[b, i].logsumexp(-1)  # noqa: E731
        ahead = logits.new_zeros(())
        if not terminated[b] and len(actions):
            ahead = beta * level(real[-1])
        for i in reversed(actions):
            token = input_ids[b, i]
            v = beta * level(i - 1)
            ratio = logits[b, i - 1].log_softmax(-1)[token] - ref_logits[b, i - 1].log_softmax(-1)[token]
            ahead = rewards[b, i] - beta * ratio + gamma * ahead
            total = total + (v - ahead) ** 2
    return total / len(input_ids)


@declare(kind="on_policy", discounted=True)
def reinforce(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, completion_mask: Tensor, rewards: Tensor, beta: float,
    gamma: float,
) -> Tensor:  # fmt: skip
    """REINFORCE with the KL in the reward: every action's log-prob times the discounted sum of what follows it."""
    chosen = completion_mask == 1
    pick = lambda x: x[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]  # noqa: E731
    logp, ref = (torch.nn.functional.pad(pick(x), (1, 0)) for x in (logits, ref_logits))
    time = (chosen.cumsum(1) - 1).clamp(min=0).to(logits.dtype)  # an int exponent would give float32
    paid = torch.where(chosen, gamma**time * (rewards - beta * (logp - ref)), 0.0).detach()
    to_go = paid.flip(1).cumsum(1).flip(1)
    return -(torch.where(chosen, logp * to_go, 0.0)).sum() / len(input_ids)


@declare(kind="preference")
def dpo(*, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, completion_mask: Tensor, beta: float) -> Tensor:
    """DPO: -ln sigma(beta (l+ - l-)), the mean over pairs; the first half of the rows are the chosen."""
    chosen = completion_mask[:, 1:] == 1
    pick = lambda x: x[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]  # noqa: E731
    ratio = torch.where(chosen, pick(logits) - pick(ref_logits), 0.0).sum(1)
    good, poor = ratio.chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (good - poor)).mean()
