"""Reference losses by name, for `like=`: the package's own losses in the contract's form, with their traits."""

import difflib
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.checks.adapters import from_stats
from shiq_lab.errors import bad
from shiq_lab.losses import consistency, contrastive, policy_gradient, preference
from shiq_lab.losses import shiq as ours
from shiq_lab.stats import TokenStats

Loss = Callable[..., Tensor]


def with_options(loss: Loss, **options: Any) -> Loss:
    """The loss with some keywords fixed, under its own signature."""

    @wraps(loss)
    def fixed(*args: Any, **kw: Any) -> Tensor:
        return loss(*args, **options, **kw)

    return fixed


def dro(policy: TokenStats, ref: TokenStats, batch: TokenBatch, *, beta: float, gamma: float, values: Tensor) -> Tensor:
    """DRO-V with the value of every row's first action as its V."""
    return consistency.dro_loss(policy, ref, batch, beta=beta, gamma=gamma, values=_at_first(values, batch))


def a_star(policy: TokenStats, ref: TokenStats, batch: TokenBatch, *, beta: float, gamma: float, values: Tensor) -> Tensor:
    """A*-PO with the value of every row's first action as its V*."""
    return consistency.a_star_loss(policy, ref, batch, beta=beta, gamma=gamma, v_star=_at_first(values, batch))


def pcl(policy: TokenStats, ref: TokenStats, batch: TokenBatch, *, beta: float, gamma: float, values: Tensor) -> Tensor:
    """PCL; the contract's values[:, i] belong to the state before token i, pcl_loss's to the state after it."""
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return consistency.pcl_loss(policy, ref, batch, beta=beta, gamma=gamma, values=after)


def _at_first(values: Tensor, batch: TokenBatch) -> Tensor:
    first = (batch.completion_mask == 1).long().argmax(1, keepdim=True)
    acted = (batch.completion_mask == 1).any(1)
    return torch.where(acted, values.gather(1, first)[:, 0], 0.0)


policy_only = partial(from_stats, kind="policy_only", discounted=True)
on_policy = partial(from_stats, kind="on_policy", discounted=True)
semi = {"semi_gradient": True}
grpo = policy_gradient.grpo_loss

LIKES: dict[str, Callable[[], Loss]] = {
    "shiq": partial(from_stats, ours.shiq_loss),
    "shifted": lambda: from_stats(with_options(ours.shiq_loss, n_steps=1)),
    "easy": partial(from_stats, ours.easy_sampling_loss, readout="log_policy"),
    "sequence": partial(from_stats, ours.sequence_loss, kind="trajectory"),
    "semi_gradient": partial(from_stats, ours.semi_gradient_loss, **semi, random_world=True),
    "turn_cut": partial(from_stats, ours.turn_cut_loss, **semi, random_world=True),
    "tbrm": partial(from_stats, consistency.tbrm_loss, kind="trajectory", readout="log_policy"),
    "dro": partial(policy_only, dro, packing=False, trains_values=True),
    "a_star": partial(policy_only, a_star, packing=False),
    "pcl": partial(policy_only, pcl, trains_values=True),
    "agro": partial(policy_only, contrastive.agro_loss, grouped=True),
    "rloo": partial(policy_only, policy_gradient.rloo_loss, grouped=True, **semi),
    "reinforce": partial(on_policy, policy_gradient.reinforce_loss),
    "grpo": partial(on_policy, grpo, grouped=True),
    "dr_grpo": lambda: on_policy(with_options(grpo, std=False, length_mean=False), grouped=True),
    "dpo": partial(from_stats, preference.dpo_loss, kind="preference", discounted=True),
    "ipo": partial(from_stats, preference.ipo_loss, kind="preference", discounted=True),
}


def lookup(name: str) -> Loss:
    """The reference loss of that name; an unknown one is a ValueError that suggests the nearest."""
    if name not in LIKES:
        near = difflib.get_close_matches(name, LIKES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Or pass a function in the contract's form."
        raise bad("like", f"one of {', '.join(LIKES)}", repr(name), hint)
    return LIKES[name]()
