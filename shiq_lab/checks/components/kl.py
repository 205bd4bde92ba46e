"""Component checks of KL estimators: per-token values, expectation and gradient; and the mean that KTO subtracts.

With d = ln pi(a) - ln ref(a) and a ~ pi, summed exactly over the vocabulary:

    k1 = d                  E k1 = KL(pi || ref)                    E grad k1 = 0
    k2 = d^2 / 2            |E k2 - KL| <= max|d|^3 e^{max|d|} / 6  E grad k2 = grad KL(pi || ref) = pi (d - KL)
    k3 = exp(-d) - 1 + d    E k3 = KL(pi || ref)                    E grad k3 = grad KL(ref || pi) = pi - ref

Value and gradient are inferred apart, because they may be of different estimators (a straight-through k3 with k2's gradient).
Source: Schulman, "Approximating KL divergence" (2020); 2506.09477, 2510.01555.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.components.masks import Made, only
from shiq_lab.checks.components.returns import NUMBERS, POISONS
from shiq_lab.checks.components.rows import Rows, build_cases, no_turns, strata
from shiq_lab.checks.components.subject import EPS, PURE, Case, Component, Kind, as_tensor, check_cases, compare, exact
from shiq_lab.checks.report import Check, Measured, Skip
from shiq_lab.checks.runner import SubjectError

FORMULAS: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}
# log-ratios stay below 5 (exp below 150): a few operations on numbers of that size
ROUNDING = 64 * EPS * 150


def _policies(scale: float) -> tuple[Tensor, Tensor]:
    """Logits of four policies over six tokens, and log-probabilities of their references; float64 [4, 6]."""
    rng = np.random.default_rng(21)
    logits = torch.from_numpy(rng.normal(size=(4, 6)))
    return logits, (logits + scale * torch.from_numpy(rng.normal(size=(4, 6)))).log_softmax(-1)


def _call(component: Component, logp: Tensor, ref: Tensor, place: str) -> Tensor:
    """k of every token of the vocabulary; each row is a state, its columns are all the tokens."""
    ones = torch.ones(logp.shape, dtype=torch.int64)
    arguments = {"logprobs": logp, "ref_logprobs": ref, "mask": ones, "completion_mask": ones, "attention_mask": ones}
    if logp.requires_grad:  # copies would cut the graph
        arguments = {k: v for k, v in arguments.items() if component.takes(k)}
        got = component.invoke(arguments, place)
    else:
        got = component.call(arguments, place)
    if not isinstance(got, Tensor) or got.shape != logp.shape:
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise SubjectError(f"{place}: expected one number a token, shape {tuple(logp.shape)}, got {shape}")
    return got


def infer_value(component: Component) -> str:
    """Which estimator the values are nearest to."""
    if "value" not in component.seen:
        logits, ref = _policies(0.7)
        logp = logits.log_softmax(-1)
        got = as_tensor(_call(component, logp, ref, "four policies"), "four policies")
        gap = {k: (got - (logp - ref).apply_(f)).abs().max().item() for k, f in FORMULAS.items()}
        component.seen["value"] = min(gap, key=lambda k: gap[k] if math.isfinite(gap[k]) else math.inf)
        component.notes.append(f"values of {component.seen['value']}")
    name: str = component.seen["value"]
    return name


def _tokens(component: Component, rows: Rows) -> Made:
    rng = np.random.default_rng(22)
    logp, ref = torch.from_numpy(-rng.exponential(size=(2, len(rows.talks), rows.width)))
    formula = FORMULAS[infer_value(component)]
    expected = torch.zeros_like(logp)
    for b, places in enumerate(rows.actions):
        for i in places:
            expected[b, i] = formula(logp[b, i].item() - ref[b, i].item())
    live = rows.completion_mask == 1
    yield {"logprobs": logp, "ref_logprobs": ref, "mask": rows.completion_mask}, expected, live, ROUNDING


def _kl_cases(component: Component) -> list[Case]:
    cases = build_cases(component, lambda rows: _tokens(component, rows))
    for code, name, rows in strata(component):
        if code in ("PAD", "MT"):
            for label, poison, soft in POISONS:
                for arguments, expected, live, tolerance in _tokens(component, rows):
                    for target in ("logprobs", "ref_logprobs"):
                        spoilt = {**rows.common(), **arguments}
                        spoilt[target] = torch.where(rows.completion_mask == 0, poison, arguments[target])
                        place = f"{name}, {label} in {target} off actions"
                        cases.append(Case("MI", place, spoilt, expected, tolerance, live, warn_only=soft))
    return cases


def run_expectation(component: Component) -> Iterator[Measured]:
    """Values in expectation, summed over the vocabulary, against the exact KL."""
    kind = infer_value(component)
    for scale in (1.0, 0.03):
        logits, ref = _policies(scale)
        logp = logits.log_softmax(-1)
        place = f"log-ratios of size {scale:g}"
        got = (logp.exp() * as_tensor(_call(component, logp, ref, place), place)).sum(-1)
        truth = exact([_exact_kl(p, q) for p, q in zip(logp.tolist(), ref.tolist(), strict=True)])
        worst = float((logp - ref).abs().max())
        tolerance = worst**3 * math.exp(worst) / 6 if kind == "k2" else ROUNDING
        yield compare(got, truth, tolerance, place, what=f"expectation of {kind} against KL(pi || ref)", axes=("state",))


def _exact_kl(logp: list[float], ref: list[float]) -> float:
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(logp, ref, strict=True))


def _gradients(logits: Tensor, ref: Tensor) -> dict[str, Tensor]:
    """The expected gradients in closed form, [4, 6]."""
    pi = logits.softmax(-1)
    d = pi.log() - ref
    return {
        "k1": torch.zeros_like(pi),
        "k2": pi * (d - (pi * d).sum(-1, keepdim=True)),
        "k3": pi - ref.exp(),
    }


def run_gradient(component: Component) -> Iterator[Measured]:
    """The expected gradient of the estimator as a loss, under samples of the current policy."""
    logits, ref = _policies(0.7)
    place = "four policies, all tokens of the vocabulary"
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    loss = (logp.exp().detach() * _call(component, logp, ref, place)).sum()
    if not loss.requires_grad:
        if component.purpose == "loss":
            raise SubjectError(f"{place}: it has no gradient, but purpose='loss' was declared (computed under no_grad?)")
        raise Skip("the values carry no gradient: right for a KL in the reward")
    (got,) = torch.autograd.grad(loss, leaf)
    truths = _gradients(logits, ref)
    gap = {k: (got - g).abs().max().item() for k, g in truths.items()}
    near = min(gap, key=lambda k: gap[k] if math.isfinite(gap[k]) else math.inf)
    means = {"k1": "k1, 0 in expectation", "k2": "k2, that of KL(pi || ref)", "k3": "k3, that of KL(ref || pi)"}
    component.notes.append(f"gradient of {means[near]}")
    target = "k2" if component.purpose == "loss" else near
    yield compare(
        got, truths[target], ROUNDING, place, what=f"expected gradient against {means[target]}", axes=("state", "token")
    )


def run_at_reference(component: Component) -> Iterator[Measured]:
    """Model = reference: 0 for every token."""
    logits, _ = _policies(1.0)
    logp = logits.log_softmax(-1)
    got = _call(component, logp, logp.clone(), "model = reference")
    yield compare(got, torch.zeros_like(logp), 0.0, "model = reference", axes=("state", "token"))


HALF = "The sign of the log-ratio, or a KL of the wrong direction."
KL_ESTIMATOR = Kind(
    "kl_estimator",
    {
        **only("attention_mask", "completion_mask"),
        "logprobs": "float[B, L]; of the model, for the tokens taken (requires grad where gradients are asked for)",
        "ref_logprobs": "float[B, L]; of the reference",
        "mask": NUMBERS["mask"],
    },
    "float[B, L]: k1, k2 or k3 of each token; value and gradient are inferred; read on the mask",
    _kl_cases,
    (
        check_cases("OR", "k1, k2 or k3, token by token", HALF),
        check_cases("TE", "the same for ended and cut rows", HALF),
        check_cases("PAD", "the same on either padding side, any width", "Tokens of a row are mixed."),
        check_cases("MT", "the same with observation tokens in between", "Tokens of a row are mixed."),
        check_cases("MI", "what stands off actions does not matter", "A mean over all columns is subtracted or added."),
        check_cases("BS", "the same for a row alone and in another order", "Rows are mixed."),
        Check("EG", "expectation over the vocabulary against the exact KL", run_expectation, HALF),
        Check(
            "EG-gradient",
            "expected gradient over the vocabulary",
            run_gradient,
            "As a loss, k1 has no mean gradient and k3 that of the reverse KL; k2 has that of KL(pi || ref).",
        ),
        Check("IN", "0 where model = reference", run_at_reference, "A constant is missing, such as the -1 of k3."),
        PURE,
    ),
    skips=no_turns,
)


# --------------------------------------------------------------------------------------------------- kl baseline
def _baseline_cases(component: Component) -> list[Case]:
    rng = np.random.default_rng(6)
    rows = [float(x) for x in rng.normal(size=6) + 1.5]
    refs = [float(x) for x in rng.normal(size=6) * 0.3]
    splits = {
        "one micro-batch": [6],
        "equal micro-batches": [2, 2, 2],
        "unequal micro-batches": [1, 3, 2],
        "the last one small": [5, 1],
    }
    cases = []
    for order in (1, -1):
        for name, sizes in splits.items():
            a, b = rows[::order], refs[::order]
            cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
            part = lambda x, cuts=cuts: [exact(x[i:j]) for i, j in itertools.pairwise(cuts)]  # noqa: E731
            mean = math.fsum(x - y for x, y in zip(rows, refs, strict=True)) / 6
            place = name + (", rows in reverse order" if order < 0 else "")
            code = "OR" if len(sizes) == 1 else "BS"
            expected = exact(max(0.0, mean))
            cases.append(Case(code, place, {"logprobs": part(a), "ref_logprobs": part(b)}, expected, 64 * EPS * 5, axes=()))
    return cases


def run_clamped(component: Component) -> Iterator[Measured]:
    """A negative estimate becomes 0 (or is left as it is): the sign is right, and nothing is averaged after the clamp."""
    low = [exact([2.0, 1.0]), exact([-7.0])]  # the first part's mean is above 0, and so is one row's
    zero = [torch.zeros_like(x) for x in low]
    got = as_tensor(component.call({"logprobs": low, "ref_logprobs": zero}, "a negative mean"), "a negative mean")
    near = min((0.0, -4 / 3), key=lambda x: abs(x - got.sum().item()))
    component.notes.append(f"a negative KL estimate is {'clamped at 0' if near == 0 else 'left as it is'}")
    yield compare(got, exact(near), 64 * EPS * 5, "a negative mean", axes=())
    same = [exact([0.7, -0.2])]
    got = component.call({"logprobs": same, "ref_logprobs": same}, "model = reference")
    yield compare(got, torch.tensor(0.0), 0.0, "model = reference", axes=())


KL_BASELINE = Kind(
    "kl_baseline",
    {
        "logprobs": "a list of float[B_i], a micro-batch each: sequence log-probabilities of the model",
        "ref_logprobs": "the same of the reference",
    },
    "a scalar: the mean of logprobs - ref_logprobs over all rows of all micro-batches, clamped at 0 or not (KTO's z0)",
    _baseline_cases,
    (
        check_cases("OR", "the mean over the rows", "Wrong sign or denominator."),
        check_cases(
            "BS",
            "the same however rows are split and ordered",
            "The last micro-batch overwrites the others, or a mean of means.",
        ),
        Check("IN", "0 where model = reference; a negative mean is clamped as a whole", run_clamped, "Clamped part by part."),
        PURE,
    ),
)
KINDS = (KL_ESTIMATOR, KL_BASELINE)
