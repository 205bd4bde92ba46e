"""Component checks of token statistics: log-probabilities from hidden states times head, without the logits in memory.

The logits that a function must follow, in this order, each step only where the function names its argument:

    x = hidden @ head.T + bias,   x = logit_scale x,   x = c tanh(x / c) with c = soft_cap,   x = x / temperature.

Truths are closed forms in numpy's float64 from the inputs as the dtype rounded them; gradients by hand:

    d(token_logit) / dx = e_a,   d(logsumexp) / dx = softmax(x),   tanh' = 1 - tanh^2,
    d hidden = dx @ head,   d head = dx.T @ hidden,   d bias = sum of dx.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.components.subject import PURE, Case, Component, Kind, compare
from shiq_lab.checks.report import Check, Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.graph import Bools, Floats, Ints

OPTIONS = {"temperature": (1.0, 0.7), "logit_scale": (1.0, 0.25), "soft_cap": (None, 3.0)}
STEP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one call, float64 in numpy; `dtype` is what they are handed over in, already rounded to it."""

    name: str
    hidden: Floats  # [B, L, D], or the logits [B, L, V] for functions that take these
    head: Floats  # [V, D]
    bias: Floats  # [V]
    labels: Ints  # [B, L]
    dtype: torch.dtype
    from_logits: bool
    options: dict[str, Any]

    @property
    def raw(self) -> Floats:
        """Logits before scale, cap and temperature, [B, L, V]."""
        out: Floats = self.hidden if self.from_logits else self.hidden @ self.head.T + self.bias
        return out

    def logits(self) -> tuple[Floats, Floats]:
        """(final logits, their derivative by the raw ones), [B, L, V]."""
        scale, cap = self.options.get("logit_scale", 1.0), self.options.get("soft_cap")
        heat = self.options.get("temperature", 1.0)
        x = self.raw * scale
        slope = np.full(x.shape, scale / heat)
        if cap is not None:
            bent = np.tanh(x / cap)
            x, slope = cap * bent, slope * (1 - bent**2)
        return x / heat, slope

    def statistics(self) -> tuple[Floats, Floats, Floats, Floats]:
        """(token_logit, logsumexp, softmax, slope)."""
        x, slope = self.logits()
        top = x.max(-1, keepdims=True)
        weight = np.exp(x - top)
        total = weight.sum(-1, keepdims=True)
        taken = np.take_along_axis(x, self.labels[..., None], -1)[..., 0]
        return taken, (top + np.log(total))[..., 0], weight / total, slope

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable inputs."""
        make = lambda x: torch.tensor(x).to(self.dtype).requires_grad_()  # noqa: E731
        if self.from_logits:
            return {"logits": make(self.hidden)}
        return {"hidden": make(self.hidden), "head": make(self.head), "bias": make(self.bias)}

    def gradients(self, weight_taken: Floats, weight_level: Floats) -> dict[str, Floats]:
        """Of sum(weight_taken token_logit + weight_level logsumexp) by each input."""
        _, _, softmax, slope = self.statistics()
        dx = weight_level[..., None] * softmax
        np.put_along_axis(
            dx, self.labels[..., None], np.take_along_axis(dx, self.labels[..., None], -1) + weight_taken[..., None], -1
        )
        dx = dx * slope
        if self.from_logits:
            return {"logits": dx}
        flat, hidden = dx.reshape(-1, dx.shape[-1]), self.hidden.reshape(-1, self.hidden.shape[-1])
        return {"hidden": dx @ self.head, "head": flat.T @ hidden, "bias": flat.sum(0)}

    def value_bound(self) -> float:
        """Rounding of a statistic: a dot product of D terms, then about eight operations on numbers of the logits' size.

        Half precision rounds each of these once however it sums, so D does not enter there.
        """
        size = (
            np.abs(self.hidden).max()
            if self.from_logits
            else (np.abs(self.hidden) @ np.abs(self.head).T + np.abs(self.bias)).max()
        )
        heat, scale = self.options.get("temperature", 1.0), self.options.get("logit_scale", 1.0)
        terms = 1 if self.from_logits or self.dtype == torch.bfloat16 else self.head.shape[1]
        biggest = max(1.0, scale) * size / min(1.0, heat) + math.log(self.raw.shape[-1])
        return STEP[self.dtype] * (terms + 8) * float(biggest + 1)

    def gradient_bound(self, weights: float) -> float:
        """Rounding of a gradient: softmax errs relatively by the error of the logits, and a sum over tokens adds up."""
        relative = 2 * min(1.0, self.value_bound()) + STEP[self.dtype] * (8 + self.labels.size)
        slope = max(1.0, self.options.get("logit_scale", 1.0)) / min(1.0, self.options.get("temperature", 1.0))
        size = 1.0 if self.from_logits else max(1.0, float(np.abs(self.head).max()), float(np.abs(self.hidden).max()))
        return float(relative * weights * slope * size * 2)


def problem(
    component: Component,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float64,
    size: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A random problem of shape (B, L, D, V); `size` scales the logits."""
    B, L, D, V = shape
    rng = np.random.default_rng([seed, B, L, D, V])
    rounded = lambda x: torch.tensor(x).to(dtype).double().numpy()  # noqa: E731
    from_logits = component.takes("logits") and not component.takes("hidden")
    hidden = rounded(size * rng.normal(size=(B, L, V if from_logits else D)) * 2)
    head = rounded(rng.normal(size=(V, D)) / math.sqrt(D))
    bias = rounded(rng.normal(size=V)) if component.takes("bias") else np.zeros(V)
    kept = {k: v for k, v in options.items() if component.takes(k)}
    name = f"[B {B}, L {L}, D {D}, V {V}], {str(dtype)[6:]}"
    name += "".join(f", {k} {v}" for k, v in kept.items()) + (f", logits of size {size:g}" if size != 1 else "")
    return Problem(name, hidden, head, bias, rng.integers(0, V, size=(B, L)), dtype, from_logits, kept)


# ----------------------------------------------------------------------------------------------- token statistics
def _answer(component: Component, p: Problem, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"token_logit", "logsumexp"} or {"logprob"} float[B, L], as the function returns a pair or one tensor."""
    arguments = {**inputs, "labels": torch.tensor(p.labels), **p.options}
    got = component.invoke({k: v for k, v in arguments.items() if component.takes(k)}, p.name)
    if isinstance(got, (tuple, list)) and len(got) == 2:
        named = {"token_logit": got[0], "logsumexp": got[1]}
    elif isinstance(got, Tensor):
        named = {"logprob": got}
    else:
        raise SubjectError(f"{p.name}: expected (token_logit, logsumexp) or log-probabilities, got {type(got).__name__}")
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.shape != p.labels.shape:
            raise SubjectError(
                f"{p.name}: expected {name} of shape {p.labels.shape}, got {getattr(x, 'shape', type(x).__name__)}"
            )
    return named


def judged_as(p: Problem, got: torch.dtype) -> Problem:
    """The problem with the coarser of its own precision and the answer's: computing in float32 is a legitimate choice."""
    return replace(p, dtype=got) if STEP.get(got, 0.0) > STEP[p.dtype] else p


def compare_problem(component: Component, p: Problem) -> Iterator[Measured]:
    """Value and gradient of one problem."""
    inputs = p.tensors()
    got = _answer(component, p, inputs)
    p = judged_as(p, next(iter(got.values())).dtype)
    taken, level, _, _ = p.statistics()
    truth = {"token_logit": taken, "logsumexp": level, "logprob": taken - level}
    for name, x in got.items():
        yield compare(x, torch.tensor(truth[name]), p.value_bound(), p.name, what=f"{name} against the plain one")
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(2, *p.labels.shape))
    if "logprob" in got:
        two = -one
    loss = sum((torch.tensor(w) * x.double()).sum() for w, x in zip((one, two), got.values(), strict=False))
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise SubjectError(f"{p.name}: the statistics carry no gradient")
    used = {k: x for k, x in inputs.items() if component.takes(k)}
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    bound = p.gradient_bound(float(np.abs(one).sum() + np.abs(two).sum()) / math.sqrt(p.labels.size))
    for (name, x), grad in zip(used.items(), grads, strict=True):
        grad = torch.zeros_like(x) if grad is None else grad
        axes = {"head": ("token", "feature"), "bias": ("token",)}.get(name, ("row", "position", "feature"))
        yield compare(grad, torch.tensor(p.gradients(one, two)[name]), bound, p.name, what=f"gradient by {name}", axes=axes)


SHAPES = ((1, 1, 3, 5), (2, 7, 8, 13), (3, 5, 16, 33), (1, 17, 5, 101), (2, 3, 1, 2))


def run_shapes(component: Component) -> Iterator[Measured]:
    """Values and gradients over odd shapes."""
    for shape in SHAPES:
        yield from compare_problem(component, problem(component, shape))


def run_chunks(component: Component) -> Iterator[Measured]:
    """Chunks of one token, of a size that divides nothing, and larger than everything."""
    if not component.takes("chunk_size"):
        raise Skip("it names no chunk_size")
    for shape in SHAPES[:3]:
        for chunk in (1, 3, 4, 1000):
            p = problem(component, shape)
            yield from compare_problem(
                component, replace(p, name=f"{p.name}, chunk_size {chunk}", options={"chunk_size": chunk})
            )


def run_dtypes(component: Component) -> Iterator[Measured]:
    """The same in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[:4]:
            yield from compare_problem(component, problem(component, shape, dtype=dtype))


def run_large(component: Component) -> Iterator[Measured]:
    """Logits of size 1e4: exp of them overflows, their log-sum-exp does not."""
    for dtype in (torch.float64, torch.float32):
        yield from compare_problem(component, problem(component, (2, 5, 8, 13), dtype=dtype, size=5e3))


def run_options(component: Component) -> Iterator[Measured]:
    """Each option that the function names, alone and all together, in value and gradient."""
    named = {k: v for k, v in OPTIONS.items() if component.takes(k)}
    if not named:
        raise Skip(f"it names none of {', '.join(OPTIONS)}")
    settings: list[dict[str, Any]] = [{k: v[1]} for k, v in named.items()] + [
        {k: v[1] for k, v in named.items()},
        {k: v[0] for k, v in named.items()},
    ]
    for options in settings:
        yield from compare_problem(component, problem(component, (2, 7, 8, 13), size=2.0, **options))


def run_masked_vocabulary(component: Component) -> Iterator[Measured]:
    """Columns of -inf (padded or forbidden tokens): no NaN in value or gradient, and none of their mass."""
    if not (component.takes("logits") or component.takes("bias")) or (
        component.takes("hidden") and not component.takes("bias")
    ):
        raise Skip("it names neither logits nor bias, so that no column can be -inf")
    p = problem(component, (2, 7, 8, 13))
    dead = np.arange(13) % 4 == 3
    labels = np.where(dead[p.labels], 0, p.labels)
    spot: Bools = np.broadcast_to(dead, p.raw.shape)
    forbidden = replace(p, name=f"{p.name}, every fourth column -inf", labels=labels)
    if p.from_logits:
        forbidden = replace(forbidden, hidden=np.where(spot, -np.inf, p.hidden))
    else:
        forbidden = replace(forbidden, bias=np.where(dead, -np.inf, p.bias))
    finite = _without_columns(forbidden, dead)
    inputs = forbidden.tensors()
    got = _answer(component, forbidden, inputs)
    taken, level, _, _ = finite.statistics()
    truth = {"token_logit": taken, "logsumexp": level, "logprob": taken - level}
    for name, x in got.items():
        yield compare(x, torch.tensor(truth[name]), finite.value_bound(), forbidden.name, what=f"{name} against the plain one")
    used = {k: x for k, x in inputs.items() if component.takes(k)}
    grads = torch.autograd.grad(sum(x.sum() for x in got.values()), list(used.values()))  # type: ignore[arg-type]
    ones = np.ones(p.labels.shape)
    for (name, _), grad in zip(used.items(), grads, strict=True):
        truth_grad = finite.gradients(ones, -ones if "logprob" in got else ones)[name]
        full = np.zeros(grad.shape)
        if name == "hidden":
            full = truth_grad
        elif name == "logits":
            full[..., ~dead] = truth_grad
        else:
            full[~dead] = truth_grad
        bound = finite.gradient_bound(2.0 * p.labels.size)
        yield compare(
            grad, torch.tensor(full), bound, forbidden.name, what=f"gradient by {name}", axes=("row", "position", "feature")
        )


def _without_columns(p: Problem, dead: Bools) -> Problem:
    """The same problem over the allowed tokens alone."""
    number = np.cumsum(~dead) - 1
    labels = number[p.labels]
    if p.from_logits:
        return replace(p, hidden=p.hidden[..., ~dead], labels=labels)
    return replace(p, head=p.head[~dead], bias=p.bias[~dead], labels=labels)


def _statistics_cases(component: Component) -> list[Case]:
    p = problem(component, (2, 7, 8, 13))
    arguments = {**{k: x.detach() for k, x in p.tensors().items()}, "labels": torch.tensor(p.labels)}
    return [Case("PU", p.name, arguments, torch.zeros(1), 0.0)]


FUSED = {
    "hidden": "float[B, L, D]; the state that scores labels[:, i]",
    "head": "float[V, D]",
    "bias": "float[V] of the head; may hold -inf",
    "labels": "int[B, L]; the token taken, already shifted",
    "temperature": "float; logits are divided by it, last",
    "logit_scale": "float; logits are multiplied by it, first",
    "soft_cap": "float c or None; logits become c tanh(x / c)",
    "chunk_size": "int; tokens worked on at once",
}
TOKEN_STATISTICS = Kind(
    "token_statistics",
    {"logits": "float[B, L, V], for functions that take no hidden states; may hold -inf", **FUSED},
    "(token_logit, logsumexp) or log-probabilities, float[B, L], with gradient",
    _statistics_cases,
    (
        Check(
            "OR", "value and gradient against the closed form, odd shapes", run_shapes, "A shift, a transpose, a missing term."
        ),
        Check("BS", "the same for every chunk size", run_chunks, "The last chunk, or sums that are overwritten, not added."),
        Check(
            "CF",
            "temperature, logit scale and soft cap act, in value and gradient",
            run_options,
            "An option is dropped or wrong in the fused path.",
        ),
        Check(
            "DT",
            "float32 and bfloat16 within their rounding",
            run_dtypes,
            "Sums in half precision, or a cast in the wrong place.",
        ),
        Check("DT-large", "logits of size 1e4", run_large, "exp without the largest logit taken out."),
        Check("VP", "columns of -inf", run_masked_vocabulary, "0 times -inf, or -inf minus -inf."),
        PURE,
    ),
)
KINDS = (TOKEN_STATISTICS,)
