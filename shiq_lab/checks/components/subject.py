"""What component checks work on: the function under test, its cases, and how an answer is compared with the truth."""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.report import Check, Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.errors import bad

EPS = float(np.finfo(np.float64).eps)
Answer = Callable[[Any], Any]  # what a kind reads out of the returned object


@dataclass(frozen=True)
class Case:
    """One call and its truth: `expected` came by plain loops; only entries where `live` holds are compared.

    check      code of the check that it belongs to
    tolerance  absolute, with its reason where the case is made
    axes       names of the dimensions, for the place of the worst entry
    """

    check: str
    environment: str
    arguments: dict[str, Any]
    expected: Tensor
    tolerance: float
    live: Tensor | None = None
    what: str = "largest difference from the truth"
    axes: tuple[str, ...] = ("row", "position")
    warn_only: bool = False
    read: Answer | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of component: its signature, its cases, its checks.

    takes    {argument: shape and meaning}; a function gets those that it names, by keyword
    returns  what must come back
    first    the argument that is passed by position, whatever its name (collators, packers)
    skips    reasons why checks do not apply to this function, by code
    """

    name: str
    takes: dict[str, str]
    returns: str
    cases: Callable[["Component"], list[Case]]
    checks: tuple[Check, ...]
    first: str = ""
    skips: Callable[["Component"], dict[str, str]] = lambda component: {}

    def signature(self) -> str:
        """The documented signature, one argument a line."""
        lines = [f"{name:16} {meaning}" for name, meaning in self.takes.items()]
        return "\n".join([f"{self.name}(*, any of the following) -> {self.returns}", *lines])


@dataclass(eq=False)
class Component:
    """The function under test, what its author declared, and what was inferred (`notes`)."""

    function: Callable[..., Any]
    kind: Kind
    padding: tuple[str, ...] = ("right", "left")
    multi_turn: bool = True
    purpose: str = "value"
    notes: list[str] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)  # what was inferred, once

    def __post_init__(self) -> None:
        self.names = _names(self.function, self.kind)

    def takes(self, name: str) -> bool:
        """Does the function get this argument?"""
        return self.names is None or name in self.names

    @cached_property
    def cases(self) -> list[Case]:
        """What the kind calls it with."""
        return self.kind.cases(self)

    def given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Copies of the kind's arguments that the function names, so that no call can disturb another."""
        named = lambda name: name == self.kind.first or (name in self.kind.takes and self.takes(name))  # noqa: E731
        return {k: copy.deepcopy(v) for k, v in arguments.items() if named(k)}

    def invoke(self, given: dict[str, Any], place: str) -> Any:
        """The call itself; an exception is the subject's fault and becomes a plain verdict."""
        head = [given[self.kind.first]] if self.kind.first else []
        try:
            return self.function(*head, **{k: v for k, v in given.items() if k != self.kind.first})
        except Exception as error:
            text = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            raise SubjectError(f"{self.kind.name} on {place}: it raised {text}") from error

    def call(self, arguments: dict[str, Any], place: str) -> Any:
        """Its answer to those of the arguments that it names; an error of its own names the place."""
        return self.invoke(self.given(arguments), place)

    def measure(self, case: Case) -> Measured:
        """The function's answer to a case against its truth."""
        got = self.call(case.arguments, case.environment)
        got = case.read(got) if case.read else got
        return compare(
            got,
            case.expected,
            case.tolerance,
            case.environment,
            live=case.live,
            what=case.what,
            axes=case.axes,
            warn_only=case.warn_only,
        )


def _names(function: Callable[..., Any], kind: Kind) -> set[str] | None:
    """The arguments that a function names, None = all; a ValueError where it needs one that the kind does not offer."""
    if not callable(function):
        raise bad("function", "something that can be called", repr(function)[:80])
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if kind.first:
        parameters = parameters[1:]
    known = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for p in known:
        if p.default is p.empty and (p.name not in kind.takes or p.kind is p.POSITIONAL_ONLY):
            offered = ", ".join(kind.takes)
            raise bad("function", f"arguments of kind {kind.name!r} ({offered})", repr(p.name), "Wrap it in a function.")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in known}


def exact(numbers: Any) -> Tensor:
    """Numbers of Python as float64: torch's own default would round a truth to float32."""
    return torch.tensor(numbers, dtype=torch.float64)


def as_tensor(value: Any, place: str) -> Tensor:
    """What a component returned as dense float64 numbers."""
    try:
        tensor = value.detach().to_dense() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise SubjectError(f"{place}: expected numbers, got {type(value).__name__}") from None
    if tensor.is_complex():
        raise SubjectError(f"{place}: expected real numbers, got {tensor.dtype}")
    return tensor.double()


def compare(
    got: Any,
    expected: Tensor,
    tolerance: float,
    environment: str,
    *,
    live: Tensor | None = None,
    what: str = "largest difference from the truth",
    axes: tuple[str, ...] = ("row", "position"),
    warn_only: bool = False,
) -> Measured:
    """The largest deviation over the live entries, and where it sits. Equal infinities agree; NaN misses every bound."""
    got, expected = as_tensor(got, environment), expected.double()
    if got.shape != expected.shape:
        shapes = f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        raise SubjectError(f"{environment}: it returned {shapes}")
    live = torch.ones_like(expected, dtype=torch.bool) if live is None else live
    apart = torch.where(got == expected, 0.0, (got - expected).abs())
    apart = torch.where(live, apart, 0.0)
    compared = int(live.sum())
    if not compared:
        return Measured(what, 0.0, tolerance, 0, environment, warn_only=warn_only)
    flat = int(torch.where(apart.isnan(), torch.inf, apart).argmax())
    place = np.unravel_index(flat, expected.shape) if expected.ndim else ()
    where = ", ".join(f"{name} {int(i)}" for name, i in zip(axes, place, strict=False))
    detail = f"got {got.reshape(-1)[flat].item():.6g}, expected {expected.reshape(-1)[flat].item():.6g}"
    worst = apart.reshape(-1)[flat].item()
    return Measured(what, worst, tolerance, compared, environment, where, warn_only=warn_only, detail=detail if worst else "")


# ------------------------------------------------------------------------------------------------ checks of cases
def run_cases(code: str, component: Component) -> Iterator[Measured]:
    """Every case of one code."""
    reason = component.kind.skips(component).get(code)
    if reason:
        raise Skip(reason)
    for case in component.cases:
        if case.check == code:
            yield component.measure(case)


def check_cases(code: str, title: str, hint: str) -> Check:
    """The check that runs a kind's cases of one code."""
    return Check(code, title, partial(run_cases, code), hint)


def leaves(value: Any) -> list[Tensor]:
    """Every tensor and number in nested lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value.detach().to_dense()]
    if isinstance(value, dict):
        return [x for v in value.values() for x in leaves(v)]
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in leaves(v)]
    if is_dataclass(value) and not isinstance(value, type):
        return [x for f in fields(value) for x in leaves(getattr(value, f.name))]
    return [torch.as_tensor(np.asarray(value))] if isinstance(value, (bool, int, float, np.ndarray, np.generic)) else []


def changes(one: Any, two: Any) -> tuple[int, int]:
    """(how many numbers differ, how many there are) between two nested values; a change of shape counts every number."""
    a, b = leaves(one), leaves(two)
    total = max(1, sum(x.numel() for x in a))
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return total, total
    apart = [(x != y) & ~((x != x) & (y != y)) for x, y in zip(a, b, strict=True)]
    return sum(int(x.sum()) for x in apart), total


def run_pure(component: Component) -> Iterator[Measured]:
    """Two calls with the same objects give the same answer and leave their arguments alone."""
    cases = {case.environment: case for case in component.cases if not case.warn_only}
    for case in list(cases.values())[:4]:
        given = component.given(case.arguments)
        before = copy.deepcopy(given)
        first = copy.deepcopy(detached(component.invoke(given, case.environment)))
        second = component.invoke(given, case.environment)
        count, total = changes(before, given)
        yield Measured("numbers in its own arguments that a call changed", count, 0, total, case.environment)
        count, total = changes(first, detached(second))
        yield Measured("numbers that differ between two equal calls", count, 0, total, case.environment)


def detached(value: Any) -> list[Tensor]:
    """The numbers of an answer, free of any graph."""
    return [x.clone() for x in leaves(value)]


PURE = Check("PU", "two calls agree and change no argument", run_pure, "An in-place operation on an argument, or hidden state.")
