"""OR: a loss against a reference loss, value and gradient, at random parameters off the data's policy."""

from collections.abc import Iterator

import numpy as np
import torch

from shiq_lab.checks.comparing import proportional, spot
from shiq_lab.checks.fixtures import Inputs, fixtures
from shiq_lab.checks.invariance import units
from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.checks.subject import Called, Subject, arrange
from shiq_lab.checks.tolerances import SAME


def oracle(subject: Subject) -> Iterator[Measured]:
    """OR: the gradient of every row (pair, group) equals the reference loss's up to one positive factor, and so the value.

    The factor may be the same for all rows, or one over the number of actions (a mean over a row's own tokens). The
    behaviour is another policy than the model's, far enough for ratios to be clipped.
    """
    if subject.like is None:
        raise Skip("no reference loss given (like)")
    names = ("one turn", "two turns") if subject.traits.multi_turn else ("one turn", "terminal reward")
    for case in fixtures(names, subject.gammas):
        for seed in (1, 2):
            table = case.perturbed(seed)
            batch = case.cut_rows() if subject.traits.cut_rows else case.listing
            if subject.traits.kind == "preference":
                batch = batch.select(case.some(10))
            inputs = arrange(subject, case, table, batch)
            other = case.inputs(table, batch, behavior=case.policy(case.perturbed(seed + 20)), values=case.own_values(table))
            if subject.traits.kind in ("on_policy", "policy_only") and len(other.batch) == len(inputs.batch):
                inputs = inputs.change(behavior_logprobs=other.behavior_logprobs, values=other.values)
            yield from unit_by_unit(subject, subject.like, inputs)


def reference(like: Subject, inputs: Inputs) -> Called:
    """The reference loss's call; what it raises is not the user's loss's doing."""
    try:
        return like.call(inputs)
    except SubjectError as error:
        raise SubjectError(f"the reference loss ({like.name}) cannot be compared here: {error}") from None


def unit_by_unit(subject: Subject, like: Subject, inputs: Inputs) -> Iterator[Measured]:
    """Each unit's direction, then whether the factors and the values fit together."""
    parts = units(subject, inputs)
    parts = [parts[i] for i in np.unique(np.linspace(0, len(parts) - 1, 10).round().astype(int))]
    bound = SAME * max(subject.eps, like.eps) * inputs.size
    factors, counts, worst, compared = [], [], (0.0, ""), 0
    got_values, want_values = [], []
    biggest = float(reference(like, inputs).grad.abs().max()) / len(inputs.batch)
    for part in parts:
        alone = inputs.rows(part)
        got, want = subject.call(alone), reference(like, alone)
        if float(want.grad.abs().max()) <= 1e-9 * biggest and float(got.grad.abs().max()) <= 1e-9 * biggest:
            continue  # a row without any action
        gaps, factor = proportional(got.grad, want.grad)
        compared += gaps.numel()
        worst = max(worst, spot(gaps if factor > 0 else torch.full_like(gaps, torch.inf), alone), key=lambda x: x[0])
        factors.append(factor)
        counts.append(float(alone.batch.completion_mask.sum()))
        got_values.append(float(got.value))
        want_values.append(float(want.value))
    yield Measured("each row's gradient against the reference loss", worst[0], bound, compared, inputs.environment, worst[1])
    if not factors:
        return
    k, n = torch.tensor(factors, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    fits = {"one factor for all": k, "one over the number of actions": k * n, "the number of actions": k / n}
    spread = {name: float((x.max() - x.min()) / x.abs().max()) for name, x in fits.items()}
    best = min(spread, key=lambda name: spread[name])
    detail = f"nearest: {best}; factors from {float(k.min()):.4g} to {float(k.max()):.4g}"
    yield Measured("factor of the gradient from row to row", spread[best], bound, len(k), inputs.environment, detail=detail)
    if not (subject.traits.semi_gradient or like.traits.semi_gradient):
        v, w = torch.tensor(got_values, dtype=torch.float64), k * torch.tensor(want_values, dtype=torch.float64)
        gap, where = spot((v - w).abs() / v.abs().max().clamp(min=1e-300), axes=("unit",))
        yield Measured("values against the reference loss, by the same factor", gap, bound, len(k), inputs.environment, where)
