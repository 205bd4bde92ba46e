"""What a table can be trained with: a line a method. The command line, the selftest and the tests read this table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from shiq_lab.errors import unknown
from shiq_lab.losses import shiq, steps


@dataclass(frozen=True)
class Method:
    """A loss, and what it says of the logits.

    loss     the function of (policy_stats, ref_stats, batch, *, beta, gamma)
    step     what its logits mean (losses/steps.py): gives the read-out of q and v
    n_steps  tokens before it bootstraps, None = to the end of the row
    form     "square": a sum of squares in every part of rho; "first": of rho_0 alone; "semi", "turns": the forms of F11
    """

    loss: Callable[..., Tensor]
    step: shiq.Step
    n_steps: int | None = None
    form: Literal["square", "first", "semi", "turns"] = "square"


METHODS: dict[str, Method] = {
    "naive": Method(shiq.naive_loss, steps.naive, n_steps=1),
    "easy": Method(shiq.easy_sampling_loss, steps.easy, n_steps=1),
    "shifted": Method(shiq.shifted_loss, steps.shifted, n_steps=1),
    "shiq": Method(shiq.shiq_loss, steps.shifted),
    "sequence": Method(shiq.sequence_loss, steps.shifted, form="first"),
    "semi-gradient": Method(shiq.semi_gradient_loss, steps.shifted, form="semi"),
    "turn-cut": Method(shiq.turn_cut_loss, steps.shifted, form="turns"),
}


def lookup(name: str) -> Method:
    """The table's entry; an unknown name is a ValueError that suggests the nearest one."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    raise unknown("loss", "a method", name, METHODS)
