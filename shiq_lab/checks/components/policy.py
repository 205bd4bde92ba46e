"""Component checks of a fused policy loss: clipped importance ratios on top of fused log-probabilities.

    loss of a token = -min(ratio A, clip(ratio, 1 - low, 1 + high) A) is_ratio,     ratio = exp(logp - old_logp)

is_ratio (trainer to sampler) carries no gradient. The truth is the closed form of statistics.py with the loss's own
derivative in front: -ratio A where the clip is inactive, 0 elsewhere.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.components.statistics import FUSED, OPTIONS, Problem, judged_as, problem
from shiq_lab.checks.components.subject import PURE, Case, Component, Kind, compare, exact
from shiq_lab.checks.report import Check, Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.graph import Floats

REDUCTIONS = ("sum", "token mean", "mean of row means", "row mean")
CLIP = (0.2, 0.3)


def _reduce(per_token: Floats, mask: Floats, name: str) -> Floats:
    """The weight of every token under a reduction times the token: sums to the loss."""
    B, tokens = len(mask), np.maximum(mask.sum(1, keepdims=True), 1)
    weight = {
        "sum": mask,
        "token mean": mask / mask.sum(),
        "mean of row means": mask / tokens / B,
        "row mean": mask / B,
    }[name]
    out: Floats = per_token * weight
    return out


@dataclass(frozen=True, eq=False)
class PolicyProblem:
    """A clipped policy loss on top of a Problem: -min(ratio A, clip(ratio) A) times the sampler's importance ratio."""

    base: Problem
    mask: Floats
    advantages: Floats  # [B]
    old_logprobs: Floats  # [B, L]
    is_ratio: Floats  # [B, L]

    def truth(self, reduction: str) -> tuple[float, dict[str, Floats]]:
        """(loss, gradients) in closed form: d(ratio A) = ratio A d(logp) where the clip is inactive, 0 elsewhere."""
        taken, level, _, _ = self.base.statistics()
        ratio, A = np.exp(taken - level - self.old_logprobs), self.advantages[:, None]
        clipped = np.clip(ratio, 1 - CLIP[0], 1 + CLIP[1])
        per_token = -np.minimum(ratio * A, clipped * A) * self.is_ratio
        slope = np.where(ratio * A <= clipped * A, -ratio * A, 0.0) * self.is_ratio
        weight = _reduce(slope, self.mask, reduction)
        return float(_reduce(per_token, self.mask, reduction).sum()), self.base.gradients(weight, -weight)

    def arguments(self) -> dict[str, Any]:
        """Everything but the logits that a policy loss may name."""
        tensor = torch.tensor
        return {
            "labels": tensor(self.base.labels),
            "mask": tensor(self.mask),
            "completion_mask": tensor(self.mask),
            "advantages": tensor(self.advantages),
            "old_logprobs": tensor(self.old_logprobs),
            "is_ratio": tensor(self.is_ratio),
            "clip_low": CLIP[0],
            "clip_high": CLIP[1],
            **self.base.options,
        }


def policy_problem(
    component: Component, seed: int, drift: float = 0.5, correction: bool = True, **options: Any
) -> PolicyProblem:
    """Rows of 7, 4, 1 and 0 actions; old log-probabilities `drift` away, ratios on both sides of both clips."""
    p = problem(component, (4, 7, 8, 13), seed=seed, **options)
    rng = np.random.default_rng([seed, 9])
    mask = np.array([[1.0] * n + [0.0] * (7 - n) for n in (7, 4, 1, 0)])
    taken, level, _, _ = p.statistics()
    old = taken - level + drift * rng.normal(size=mask.shape)
    is_ratio = np.exp(0.8 * rng.normal(size=mask.shape)) if correction and component.takes("is_ratio") else np.ones(mask.shape)
    name = p.name + (", ratio 1" if not drift else "") + ("" if correction else ", no sampler ratio")
    return PolicyProblem(replace(p, name=name), mask, np.array([1.3, -0.7, 0.4, 2.0]), old, is_ratio)


def _loss(component: Component, p: PolicyProblem, **changed: Any) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {k: x for k, x in p.base.tensors().items() if component.takes(k)}
    arguments = {**inputs, **p.arguments(), **changed}
    got = component.invoke({k: v for k, v in arguments.items() if component.takes(k)}, p.base.name)
    got = got[0] if isinstance(got, tuple) and got else got
    if not isinstance(got, Tensor) or got.numel() != 1 or not got.requires_grad:
        raise SubjectError(f"{p.base.name}: expected a scalar with gradient, got {type(got).__name__}")
    grads = torch.autograd.grad(got.sum(), list(inputs.values()), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs.values(), grads, strict=True)]
    return got.detach().sum(), dict(zip(inputs, filled, strict=True))


def infer_reduction(component: Component) -> str:
    """The reduction whose gradient fits best where nothing is optional and nothing is clipped."""
    if "reduction" not in component.seen:
        p = policy_problem(component, 0, drift=0.0, correction=False)
        _, grads = _loss(component, p)
        got = grads.get("hidden", grads.get("logits"))
        name = "hidden" if "hidden" in grads else "logits"
        gap = {r: float((got - torch.tensor(p.truth(r)[1][name])).abs().max()) for r in REDUCTIONS}  # type: ignore[operator]
        component.seen["reduction"] = min(gap, key=lambda r: gap[r] if math.isfinite(gap[r]) else math.inf)
        component.notes.append(f"reduction: {component.seen['reduction']}")
    found: str = component.seen["reduction"]
    return found


def compare_policy(component: Component, p: PolicyProblem, **changed: Any) -> Iterator[Measured]:
    """Loss and gradient of one policy problem."""
    loss, truths = p.truth(infer_reduction(component))
    got, grads = _loss(component, p, **changed)
    p = replace(p, base=judged_as(p.base, got.dtype))
    size = 1 + float(np.abs(p.advantages).max() * p.is_ratio.max() * 4)
    yield compare(
        got, exact(loss), 28 * size * p.base.value_bound(), p.base.name, what="the loss against the plain one", axes=()
    )
    for name, grad in grads.items():
        axes = {"head": ("token", "feature"), "bias": ("token",)}.get(name, ("row", "position", "feature"))
        bound = p.base.gradient_bound(28 * size)
        yield compare(grad, torch.tensor(truths[name]), bound, p.base.name, what=f"its gradient by {name}", axes=axes)


def run_policy(component: Component) -> Iterator[Measured]:
    """Value and gradient on two draws."""
    for seed in (0, 1):
        yield from compare_policy(component, policy_problem(component, seed, correction=False))


def run_sampler_ratio(component: Component) -> Iterator[Measured]:
    """The importance ratio between sampler and trainer multiplies each token's loss and carries no gradient."""
    if not component.takes("is_ratio"):
        raise Skip("it names no is_ratio")
    for seed in (0, 1):
        yield from compare_policy(component, policy_problem(component, seed))


def run_policy_options(component: Component) -> Iterator[Measured]:
    """Value and gradient under every option that it names, one by one and all together."""
    named = {k: v[1] for k, v in OPTIONS.items() if component.takes(k)}
    if not named:
        raise Skip(f"it names none of {', '.join(OPTIONS)}")
    for options in [{k: v} for k, v in named.items()] + [named]:
        yield from compare_policy(component, policy_problem(component, 2, size=2.0, correction=False, **options))


def run_ratio_one(component: Component) -> Iterator[Measured]:
    """Old log-probabilities of the very same model: ratio 1, so the loss is -A and nothing is clipped, whatever the options."""
    named = {k: v[1] for k, v in OPTIONS.items() if component.takes(k)}
    for options in ({}, named) if named else ({},):
        yield from compare_policy(component, policy_problem(component, 3, drift=0.0, correction=False, size=2.0, **options))


def run_policy_garbage(component: Component) -> Iterator[Measured]:
    """Old log-probabilities and ratios off the mask: finite garbage fails, NaN and inf warn."""
    for label, poison, soft in (("-1000", -1e3, False), ("NaN", math.nan, True), ("inf", math.inf, True)):
        p = policy_problem(component, 1)
        for name in ("old_logprobs", "is_ratio"):
            if component.takes(name):
                spoilt = torch.tensor(np.where(p.mask == 1, getattr(p, name), poison))
                place = replace(p, base=replace(p.base, name=f"{p.base.name}, {label} in {name} off the mask"))
                yield from (replace(m, warn_only=soft) for m in compare_policy(component, place, **{name: spoilt}))


def run_policy_chunks(component: Component) -> Iterator[Measured]:
    """The same in chunks of one token, of three, and in one chunk."""
    if not component.takes("chunk_size"):
        raise Skip("it names no chunk_size")
    for chunk in (1, 3, 1000):
        p = policy_problem(component, 1)
        yield from compare_policy(
            component, replace(p, base=replace(p.base, name=f"{p.base.name}, chunk_size {chunk}")), chunk_size=chunk
        )


def _policy_cases(component: Component) -> list[Case]:
    p = policy_problem(component, 0)
    arguments = {**{k: x.detach() for k, x in p.base.tensors().items()}, **p.arguments()}
    return [Case("PU", p.base.name, arguments, torch.zeros(1), 0.0)]


FUSED_POLICY_LOSS = Kind(
    "fused_policy_loss",
    {
        "logits": "float[B, L, V], for functions that take no hidden states",
        **FUSED,
        "mask": "{0, 1}[B, L]; 1 = chosen by the policy (completion_mask is the same)",
        "completion_mask": "the same",
        "advantages": "float[B]",
        "old_logprobs": "float[B, L]; off the mask anything",
        "is_ratio": "float[B, L]; importance ratio of trainer to sampler, multiplies each token's loss",
        "clip_low": f"float, {CLIP[0]}: ratios are clipped at 1 - clip_low",
        "clip_high": f"float, {CLIP[1]}: ratios are clipped at 1 + clip_high",
    },
    "a scalar: -min(ratio A, clip(ratio) A) is_ratio over actions; the reduction is inferred (" + ", ".join(REDUCTIONS) + ")",
    _policy_cases,
    (
        Check("OR", "loss and gradient against the closed form", run_policy, "A wrong clip, ratio, mask or denominator."),
        Check(
            "IN",
            "ratio 1 at the old policy, with every option on",
            run_ratio_one,
            "Old log-probs follow other options than the fused path.",
        ),
        Check(
            "CF",
            "temperature, logit scale and soft cap act",
            run_policy_options,
            "An option is dropped or wrong in the fused path.",
        ),
        Check("CF-ratio", "the sampler's importance ratio acts", run_sampler_ratio, "The ratio is dropped in the fused path."),
        Check("MI", "what stands off the mask does not matter", run_policy_garbage, "exp of a masked log-ratio times 0."),
        Check("BS", "the same for every chunk size", run_policy_chunks, "A mean of the chunks' means."),
        PURE,
    ),
)
KINDS = (FUSED_POLICY_LOSS,)
