"""The loss under test: what it asks for, a guarded call, its gradient, the precision that it really computes in."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.fixtures import Fixture, Inputs, fixture
from shiq_lab.checks.loading import blame
from shiq_lab.checks.runner import SubjectError
from shiq_lab.checks.timelimit import TimedOut, time_limit
from shiq_lab.checks.tolerances import EPS
from shiq_lab.checks.traits import Traits, signature_of
from shiq_lab.errors import bad

ALWAYS = (
    "logits", "ref_logits", "input_ids", "attention_mask", "completion_mask", "rewards", "terminated", "beta", "gamma",
)  # fmt: skip
EXTRAS = ("weights", "group_ids", "behavior_logprobs", "values", "segment_ids", "position_ids")
FLOATS = ("logits", "ref_logits", "rewards", "weights", "behavior_logprobs", "values")


class NotALoss(SubjectError):
    """The function ran and returned something that is no loss."""


@dataclass(frozen=True, eq=False)
class Called:
    """What one call gave: the value, and the gradients by the logits and by other tensors that were asked for."""

    value: Tensor
    grad: Tensor  # (B, L, V)
    others: dict[str, Tensor | None] = field(default_factory=dict)


@dataclass(eq=False)
class Subject:
    """A loss with its traits; `like` is a reference loss, `options` maps keyword arguments to the values to tell apart."""

    loss: Callable[..., Tensor]
    name: str
    traits: Traits
    like: "Subject | None" = None
    options: dict[str, list[Any]] = field(default_factory=dict)
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    disturbed: set[str] = field(default_factory=set)  # what of torch's global state the loss changed
    seconds: float | None = None  # time limit of one call, of the backward pass too

    @cached_property
    def names(self) -> frozenset[str]:
        """The contract's arguments that the loss takes; a ValueError where it needs others."""
        try:
            parameters = signature_of(self.loss).parameters.values()
        except (TypeError, ValueError):
            return frozenset(ALWAYS)
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            return frozenset(ALWAYS) | {p.name for p in parameters if p.name in EXTRAS}
        known = (*ALWAYS, *EXTRAS)
        for p in parameters:
            positional = p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)
            if positional or (p.default is p.empty and p.name not in known and p.name not in self.options):
                remedy = "Adapt it with shiq_lab.from_logprobs, from_response_logprobs or from_stats, or give it a default."
                raise bad(self.name, f"keyword arguments among {', '.join(known)}", f"argument {p.name!r}", remedy)
        found = frozenset(p.name for p in parameters if p.name in known)
        if "logits" not in found:
            raise bad(self.name, "a loss that takes `logits`", f"arguments {', '.join(p.name for p in parameters) or '()'}")
        return found

    @property
    def gammas(self) -> tuple[float, ...]:
        """The discounts to check with: 1 alone where the loss declares that it has none."""
        return (1.0, 0.8) if self.traits.discounted else (1.0,)

    @property
    def grouped(self) -> bool:
        """Rows of one prompt belong together: the loss asks for group_ids, or has no other way to a baseline."""
        return self.traits.kind in ("policy_only", "on_policy") and "group_ids" in self.names

    def arguments(self, inputs: Inputs, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Any]:
        """The keyword arguments of one call: fresh copies, logits with gradient."""
        b = inputs.batch
        rewards = b.rewards if self.traits.per_token_reward else _at_last_action(b.rewards, b.completion_mask)
        every = {
            "logits": inputs.logits, "ref_logits": inputs.ref_logits, "input_ids": b.input_ids, "terminated": b.terminated,
            "attention_mask": b.attention_mask, "completion_mask": b.completion_mask, "rewards": rewards, "weights": b.weights,
            "group_ids": b.group_ids, "behavior_logprobs": inputs.behavior_logprobs, "values": inputs.values,
            "segment_ids": b.segment_ids, "position_ids": b.position_ids,
        }  # fmt: skip
        tensors = {}
        for name in every.keys() & self.names:
            value = every[name]
            if isinstance(value, Tensor):
                value = value.detach().to(self.device, dtype if value.is_floating_point() else value.dtype, copy=True)
            if value is not None or name not in ("segment_ids", "position_ids"):
                tensors[name] = value
        numbers: dict[str, Any] = {name: getattr(inputs, name) for name in ("beta", "gamma") if name in self.names}
        chosen = {name: values[0] for name, values in self.options.items()}
        return {**tensors, **numbers, **chosen, **options}

    def raw(self, arguments: dict[str, Any]) -> Any:
        """The plain call; what the user's code raises becomes a verdict that names the user's own line."""
        try:
            with undisturbed(self.disturbed):
                return self.loss(**arguments)
        except TimedOut as late:
            raise SubjectError(str(late)) from None
        except Exception as error:
            raise SubjectError(f"the loss raised {blame(error, self.loss)}") from None

    def call(self, inputs: Inputs, dtype: torch.dtype = torch.float64, watch: tuple[str, ...] = (), **options: Any) -> Called:
        """Value and gradient on one batch; NotALoss where the result is none."""
        arguments = self.arguments(inputs, dtype, **options)
        leaves = {name: arguments[name].requires_grad_() for name in ("logits", *watch) if name in arguments}
        out = self.raw(arguments)
        acted = bool((inputs.batch.completion_mask == 1).any())  # without any action there is nothing to learn from
        _check_output(out, dtype, gradient=acted)
        if not out.requires_grad:
            return Called(out.detach().to("cpu", torch.float64).reshape(()), torch.zeros_like(inputs.logits))
        try:
            with time_limit(f"the backward pass of {self.name}", self.seconds):
                grads: tuple[Tensor | None, ...] = torch.autograd.grad(out, list(leaves.values()), allow_unused=True)
        except TimedOut as late:
            raise SubjectError(str(late)) from None
        except Exception as error:
            raise NotALoss(f"the backward pass of the loss raised {blame(error, self.loss)}") from None
        found = dict(zip(leaves, grads, strict=True))
        grad = found.pop("logits")
        grad = torch.zeros_like(arguments["logits"]) if grad is None else grad
        back = torch.float64
        return Called(out.detach().to("cpu", back).reshape(()), grad.detach().to("cpu", back), found)

    def value(self, inputs: Inputs, **options: Any) -> float:
        """The value alone."""
        out = self.raw(self.arguments(inputs, **options))
        _check_output(out, torch.float64, gradient=False)
        return float(out)

    @cached_property
    def eps(self) -> float:
        """The rounding of the arithmetic that the loss uses: coarser than float64's if rounding its inputs changes nothing."""
        # The level of the logits makes the value depend on every digit; fixture "small" is the cheapest call.
        inputs = self.plain(fixture("small"))
        exact = self.call(inputs)
        for name in ("bfloat16", "float16", "float32"):
            lower = self.call(_rounded(inputs, getattr(torch, name)))
            if torch.equal(lower.grad, exact.grad) and torch.equal(lower.value, exact.value):
                self.notes.append(f"computes in {name} although its inputs are float64; tolerances are {name}'s")
                return EPS[name]
        return EPS["float64"]

    def plain(self, case: Fixture, table: Any = None) -> Inputs:
        """A fixture's whole listing at a random table (default), as this kind of loss wants it."""
        return arrange(self, case, case.perturbed(1) if table is None else table)


@contextmanager
def undisturbed(changed: set[str]) -> Iterator[None]:
    """Puts torch's global state back as it was, random numbers too; names what differed in `changed`."""
    kept = {name: get() for name, (get, _) in GLOBALS.items()}
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        for name, (get, put) in GLOBALS.items():
            if get() != kept[name]:
                changed.add(name)
                put(kept[name])
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


GLOBALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
}


def arrange(subject: Subject, case: Fixture, table: Any, batch: Any = None) -> Inputs:
    """A fixture's rows at a table: behaviour and values by kind; pairs with their Bradley-Terry weights for preferences."""
    kind = subject.traits.kind
    on = kind == "on_policy"
    batch = case.listing if batch is None else batch
    inputs = case.inputs(
        table,
        batch,
        behavior=case.policy(table) if on else None,
        values=case.own_values(table) if on else None,
    )
    inputs = inputs.change(weights=torch.ones_like(batch.weights))
    if not subject.traits.empty_completions:
        inputs = inputs.rows((inputs.batch.completion_mask.sum(1) > 0).nonzero()[:, 0])
    return pairs(inputs) if kind == "preference" else inputs


def pairs(inputs: Inputs) -> Inputs:
    """Pairs of rows of one prompt, both orders of each: first half chosen, second half rejected.

    Each row meets the two before and the two after it among its prompt's rows: a connected graph, so the policy is fixed by
    them, and few enough for losses that loop over pairs.
    pair_weights holds sigma(R(chosen) - R(rejected)) of discounted returns, the Bradley-Terry probability of that order.
    """
    same = inputs.batch.group_ids[:, None] == inputs.batch.group_ids
    place = torch.where(same, torch.arange(len(same)), -1)
    rank, size = (same & (place < torch.arange(len(same))[:, None])).sum(1), same.sum(1)
    apart = (rank[None, :] - rank[:, None]) % size[:, None]
    near = (apart > 0) & ((apart <= 2) | (apart >= size[:, None] - 2))
    first, second = (same & near).nonzero().T
    action = inputs.batch.completion_mask == 1
    time = (action.cumsum(1) - 1).clamp(min=0).double()
    total = torch.where(action, inputs.gamma**time * inputs.batch.rewards, 0.0).sum(1)
    weights = torch.sigmoid(total[first] - total[second])
    reverse = torch.argsort(second * len(same) + first)  # the pairs are sorted by (first, second)
    halves = inputs.rows(torch.cat([first, second]))
    return halves.change(pair_weights=torch.cat([weights, weights]), reverse=reverse)


def _at_last_action(rewards: Tensor, completion_mask: Tensor) -> Tensor:
    """Each row's sum, on its last action."""
    position = torch.arange(rewards.shape[1])
    last = torch.where(completion_mask == 1, position, -1).amax(1)
    return torch.where(position == last[:, None], rewards.sum(1, keepdim=True), 0.0)


def _rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    lower = lambda x: x.to(dtype).to(x.dtype)  # noqa: E731
    return inputs.change(logits=lower(inputs.logits), ref_logits=lower(inputs.ref_logits))


def _check_output(out: Any, dtype: torch.dtype, *, gradient: bool = True) -> None:
    """NotALoss, in plain words, for anything that is not a finite scalar tensor with a gradient."""
    if not isinstance(out, Tensor):
        raise NotALoss(f"the loss must return a scalar tensor, it returned {type(out).__name__} ({str(out)[:60]})")
    if out.numel() != 1 or out.ndim > 0:
        raise NotALoss(
            f"the loss must return a scalar, it returned shape {tuple(out.shape)}: reduce it, for instance by mean()"
        )
    if not out.is_floating_point():
        raise NotALoss(f"the loss must return a floating-point number, it returned {out.dtype}")
    if not torch.isfinite(out):
        raise NotALoss(f"the loss is {out.item()} (inputs in {str(dtype).removeprefix('torch.')})")
    if gradient and not out.requires_grad:
        raise NotALoss("the loss has no gradient: nothing in it is connected to `logits` (detached, or computed under no_grad)")
