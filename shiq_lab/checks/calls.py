"""CALL, FD, MI, DT, PU, CF: the function itself: its slope, its masks, its precision, its purity, its options."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from shiq_lab.checks.comparing import same, spot
from shiq_lab.checks.fixtures import LOW, Inputs
from shiq_lab.checks.invariance import mixed
from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.subject import GLOBALS, NotALoss, Subject
from shiq_lab.checks.tolerances import DIFFERENCE, EPS, SAME


def called(subject: Subject) -> Iterator[Measured]:
    """CALL: a finite scalar with a finite gradient by the logits, on each kind of batch."""
    _, inputs = mixed(subject)
    out = subject.call(inputs)
    odd = (~torch.isfinite(out.grad)).sum()
    yield Measured("entries of the gradient that are not finite", float(odd), 0.0, out.grad.numel(), inputs.environment)
    others = {}
    if not subject.grouped:
        pair = subject.traits.kind == "preference"
        others["a single row"] = inputs.rows([0, len(inputs.batch) // 2] if pair else [len(inputs.batch) - 1])
    if subject.traits.empty_completions and subject.traits.kind != "preference":
        mask = inputs.batch.completion_mask.clone()
        mask[-1] = 0
        others["a row without any action"] = inputs.change(completion_mask=mask)
    for label, odd_one in others.items():
        found = subject.call(odd_one)
        odd = (~torch.isfinite(found.grad)).sum()
        what = f"{label}: entries of the gradient that are not finite"
        yield Measured(what, float(odd), 0.0, found.grad.numel(), inputs.environment)


def slope(subject: Subject) -> Iterator[Measured]:
    """FD: central differences of the value equal the gradient; and the gradient is not 0."""
    _, inputs = mixed(subject)
    out = subject.call(inputs)
    size = float(out.grad.abs().max())
    what = "largest gradient away from the optimum"
    hint = "Nothing trains: detached, computed under no_grad, or cancelled by its own baseline."
    yield Measured(what, size, 1e3 * subject.eps * subject.eps, out.grad.numel(), inputs.environment, at_least=True, hint=hint)
    if subject.traits.semi_gradient:
        return
    h = subject.eps ** (1 / 3)
    free = inputs.scored[..., None] & (inputs.logits > LOW / 2)
    generator = torch.Generator().manual_seed(0)
    for k in range(4):
        along = torch.where(free, torch.randn(inputs.logits.shape, generator=generator, dtype=torch.float64), 0.0)
        up, down = (subject.value(inputs.change(logits=inputs.logits + s * h * along)) for s in (1, -1))
        seen, told = (up - down) / (2 * h), float((out.grad * along).sum())
        unit = max(float(out.grad.norm()), abs(float(out.value)))
        detail = f"differences {seen:.6g}, gradient {told:.6g}"
        bound = DIFFERENCE * subject.eps ** (2 / 3)
        yield Measured(f"slope along direction {k}", abs(seen - told) / unit, bound, 1, inputs.environment, detail=detail)


def masks(subject: Subject) -> Iterator[Measured]:
    """MI: what stands where nothing may be read: finite garbage must not matter; NaN and inf should not (strict: must not)."""
    _, inputs = mixed(subject)
    want = subject.call(inputs)
    action = inputs.batch.completion_mask == 1
    wave = torch.cos(1.0 + torch.arange(action.numel()) * 2.3).reshape(action.shape)
    junk: list[tuple[str, Tensor | float]] = [
        ("finite garbage", 20.0 * wave),
        ("NaN", torch.nan),
        ("+inf", torch.inf),
        ("-inf", -torch.inf),
    ]
    for label, filler in junk:
        soft = label != "finite garbage"
        for name in ("logits", "ref_logits", "rewards", "behavior_logprobs", "values"):
            if name not in subject.names:
                continue
            large = 1.0 if soft or name != "behavior_logprobs" else 50.0  # a ratio of masked log-probs may overflow
            dirty, there = poisoned(inputs, name, large * filler)
            hint = f"Masked {name} enter: a mask is inverted, missing or a position off" if not soft else ""
            hint = hint or "mask * x lets NaN through (0 * NaN = NaN): use torch.where on both sides of the masked operation."
            yield from _untouched(subject, dirty, want, inputs, there, f"{label} in masked {name}", soft, hint)


def poisoned(inputs: Inputs, name: str, filler: Tensor | float) -> tuple[Inputs, Tensor]:
    """One tensor with filler wherever the contract says that it is not read, and bool[B, L] where that is."""
    if name in ("logits", "ref_logits"):
        there = ~inputs.scored
        fill = filler[..., None] if isinstance(filler, Tensor) else torch.tensor(filler, dtype=torch.float64)
        tensor = torch.where(there[..., None], fill, getattr(inputs, name))
        return inputs.change(**{name: tensor}), there
    there = inputs.batch.completion_mask == 0
    source = inputs.batch.rewards if name == "rewards" else getattr(inputs, name)
    return inputs.change(**{name: torch.where(there, filler, source)}), there


def _untouched(
    subject: Subject, dirty: Inputs, want: object, inputs: Inputs, there: Tensor, what: str, soft: bool, hint: str
) -> Iterator[Measured]:
    try:
        got = subject.call(dirty)
    except NotALoss as error:
        yield Measured(what, torch.nan, 0.0, 1, inputs.environment, detail=str(error), warn_only=soft, hint=hint)
        return
    masked, where = spot(torch.where(~inputs.scored[..., None], got.grad, 0.0).abs(), inputs)
    m = Measured(f"{what}: gradient in masked places", masked, 0.0, got.grad.numel(), inputs.environment, where)
    yield replace(m, warn_only=soft, hint=hint)
    for m in same(subject, got, want, inputs, what):  # type: ignore[arg-type]
        yield replace(m, warn_only=soft, hint=hint)


def precision(subject: Subject) -> Iterator[Measured]:
    """DT: in lower precision the gradient is the same to that precision; large levels and peaked logits do no harm."""
    _, inputs = mixed(subject)
    want = subject.call(inputs)
    size = float(want.grad.abs().max())
    for name in subject.dtypes or subject.traits.dtypes:
        dtype = getattr(torch, name)
        low = rounded(inputs, dtype)
        exact = subject.call(low)
        got = subject.call(low, dtype)
        gap, where = spot((got.grad - exact.grad).abs() / size, inputs)
        bound = SAME * max(EPS[name], subject.eps) * inputs.size
        yield Measured(f"gradient in {name} against float64", gap, bound, got.grad.numel(), inputs.environment, where)
    if subject.traits.readout == "shifted":
        up = inputs.change(logits=inputs.logits + 1e3, ref_logits=inputs.ref_logits + 1e3)
        yield from same(subject, subject.call(up), want, inputs, "logits of level 1000 in both", scale=1e3)
    peaked = inputs.change(logits=torch.where(inputs.logits > LOW / 2, 60 * inputs.logits, inputs.logits))
    odd = float((~torch.isfinite(subject.call(peaked).grad)).sum())
    yield Measured("peaked logits (60 times): entries that are not finite", odd, 0.0, want.grad.numel(), inputs.environment)


def rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Every float of the inputs rounded to dtype and put back, so that only the arithmetic differs."""
    low = lambda x: x.to(dtype).to(x.dtype)  # noqa: E731
    names = ("logits", "ref_logits", "behavior_logprobs", "values")
    out = inputs.change(rewards=low(inputs.batch.rewards), **{n: low(getattr(inputs, n)) for n in names})
    return out.change(beta=float(torch.tensor(inputs.beta)), gamma=float(torch.tensor(inputs.gamma)))


def purity(subject: Subject) -> Iterator[Measured]:
    """PU: the same call twice gives the same; inputs stay as they were; no gradient reaches what is not trained."""
    _, inputs = mixed(subject)
    first = subject.call(inputs)
    state = torch.get_rng_state()
    torch.manual_seed(12345)
    again = subject.call(inputs)
    torch.set_rng_state(state)
    gap, where = spot((again.grad - first.grad).abs(), inputs)
    hint = "Dropout or another random draw, or state kept between calls."
    yield Measured("the same call twice: gradient", gap, 0.0, first.grad.numel(), inputs.environment, where, hint=hint)
    yield Measured("the same call twice: value", float(abs(again.value - first.value)), 0.0, 1, inputs.environment, hint=hint)
    given = subject.arguments(inputs)
    kept = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    subject.raw(given)
    changed = [k for k, v in kept.items() if not torch.equal(v, given[k])]
    detail = f"changed: {', '.join(changed)}" if changed else ""
    left = sorted(subject.disturbed)
    seen = f"changed: {', '.join(left)}" if left else ""
    yield Measured("global settings of torch changed", float(len(left)), 0.0, len(GLOBALS), inputs.environment, detail=seen)
    yield Measured("inputs changed in place", float(len(changed)), 0.0, len(kept), inputs.environment, detail=detail)
    watch = ("values",) if "values" in subject.names and not subject.traits.trains_values else ()
    for name, grad in subject.call(inputs, watch=watch).others.items():
        worst = 0.0 if grad is None else float(torch.nan_to_num(grad, nan=torch.inf).abs().max())
        hint = f"The loss trains {name}: detach it, or declare trains_values=True for a joint critic loss."
        yield Measured(f"gradient by {name}", worst, 0.0, inputs.batch.input_ids.numel(), inputs.environment, hint=hint)


def options(subject: Subject) -> Iterator[Measured]:
    """CF: every value of every option gives another loss than every other value of it."""
    if not subject.options:
        raise Skip("no options given")
    _, inputs = mixed(subject)
    for name, values in subject.options.items():
        grads = [subject.call(inputs, **{name: value}) for value in values]
        for (a, one), (b, two) in itertools.combinations(zip(values, grads, strict=True), 2):
            size = max(float(one.grad.abs().max()), abs(float(one.value)), 1e-300)
            gap = max(float((one.grad - two.grad).abs().max()), abs(float(one.value - two.value))) / size
            what = f"change from {name}={a!r} to {b!r}"
            hint = f"The option {name} is not forwarded."
            yield Measured(what, gap, subject.eps**0.5, one.grad.numel(), inputs.environment, at_least=True, hint=hint)
