"""What a model's logits mean at each step of the derivation: one small function a step, of tensors of any shape.

Each returns (c, u), the token's part and the state's value that `residuals.py` puts together. They are the only place where
the steps differ, so a row of tokens and a whole table of states use the same three lines.
"""

from torch import Tensor


def naive(
    logit: Tensor, level: Tensor, ref_logit: Tensor, ref_level: Tensor, joint: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Step 0, q = beta l: c = beta l, u = beta ln sum_a pi_ref exp(l). Sampling needs pi_ref exp(l), two models."""
    return beta * logit, beta * (joint - ref_level)


def easy(
    logit: Tensor, level: Tensor, ref_logit: Tensor, ref_level: Tensor, joint: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Step 1, beta g = q + beta ln pi_ref: c = beta (g - ln pi_ref), u = beta lse(g). Now pi = softmax(g)."""
    return beta * (logit - (ref_logit - ref_level)), beta * level


def shifted(
    logit: Tensor, level: Tensor, ref_logit: Tensor, ref_level: Tensor, joint: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Step 2, beta l = beta g + v_ref: c = beta (l - l_ref), u = beta (lse(l) - lse(l_ref)) = Dv. Zero at l = l_ref."""
    return beta * (logit - ref_logit), beta * (level - ref_level)
