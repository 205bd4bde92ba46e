"""`@parametrize_with_checks([loss, ...])`: one pytest test for every loss and check. Nothing has to be registered.

    from shiq_lab import parametrize_with_checks

    @parametrize_with_checks([my_loss, other_loss], expect_fail={"PAD": "known, issue 12"})
    def test_losses(loss, check):
        check(loss)

pytest is imported when the decorator is used, not before.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from shiq_lab.checks import timelimit
from shiq_lab.checks.adapters import from_logprobs
from shiq_lab.checks.loading import file_of, name_of
from shiq_lab.checks.loss import LOSS_CHECKS, check_loss, make_subject, select
from shiq_lab.checks.report import FAILED, SKIPPED, WARNED, Check, Result
from shiq_lab.checks.runner import SubjectError
from shiq_lab.errors import bad

Loss = Callable[..., Any]
Reasons = Mapping[str, str] | Callable[[Loss], Mapping[str, str]]


class CheckFailed(AssertionError):
    """A check failed; the text stands alone."""


class ConformanceWarning(UserWarning):
    """A check's finding that is no failure unless strict=True."""


class BoundCheck:
    """One check, to be called on a loss inside a test: returns its result, or fails, skips or warns as pytest wants it."""

    def __init__(self, check: Check, time_limit: float | None, arguments: Mapping[str, Any]) -> None:
        self.name, self.title = check.name, check.title
        self.time_limit, self.arguments = time_limit, dict(arguments)

    def __repr__(self) -> str:
        return f"<check {self.name}: {self.title}>"

    def __call__(self, loss: Loss) -> Result:
        __tracebackhide__ = True  # the suite's frames are not the user's business
        watched = timelimit.limited(loss, self.time_limit)
        verdict, result = "", None
        try:
            report = check_loss(watched, only=[self.name], time_limit=None, **self.arguments)
            result = next(r for r in report.results if r.name == self.name)
        except (SubjectError, timelimit.TimedOut) as error:
            verdict = str(error)
        if result is None:
            raise SubjectError(verdict)
        return _as_pytest(result)


def _as_pytest(result: Result) -> Result:
    __tracebackhide__ = True
    import pytest

    if result.status == SKIPPED and result.reason == "CALL failed":  # skipped for a fault, not for want of application
        raise CheckFailed(f"{result.name}, {result.title}: the loss returns no loss, see CALL")
    if result.status == SKIPPED:
        pytest.skip(result.reason)
    if result.status == FAILED:
        hint = f"\nUsually: {result.hint}" if result.hint else ""
        raise CheckFailed(f"{result.name}, {result.title}: {result.message}{hint}")
    if result.status == WARNED:
        warnings.warn(ConformanceWarning(f"{result.name}, {result.title}: {result.message}"), stacklevel=3)
    return result


def parametrize_with_checks(
    losses: Iterable[Loss],
    *,
    expect_fail: Reasons | None = None,
    only: Iterable[str] | None = None,
    time_limit: float | None = timelimit.DEFAULT,
    **arguments: Any,
) -> Any:
    """A decorator for `test(loss, check)`, in which `check(loss)` is to be called; ids are LOSS-CHECK, or
    FILE.py:LOSS-CHECK for namesakes.

    losses       functions in the contract's form, see check_loss
    expect_fail  {check: reason}, for all losses, or a function of the loss: strict xfail, so that a pass fails
    only         names of checks
    time_limit   seconds for one call of a loss; what hangs in compiled code only the command line can end
    arguments    kind, like, options, traits, strict, device, dtypes of check_loss

    A check that does not apply is skipped with its reason; a warning is a ConformanceWarning. Raises ValueError for an
    unknown check or argument, no loss at all, or a loss that does not take the contract's arguments.
    """
    try:
        import pytest
    except ModuleNotFoundError:
        raise ImportError("parametrize_with_checks needs pytest: pip install pytest") from None

    losses = list(losses) if isinstance(losses, Iterable) else losses
    if not isinstance(losses, list) or not losses or not all(callable(loss) for loss in losses):
        raise bad("losses", "a list of functions", repr(losses)[:80])
    allowed = ("kind", "like", "options", "traits", "strict", "device", "dtypes")
    for name in arguments:
        if name not in allowed:
            raise bad(
                "parametrize_with_checks", f"arguments among {', '.join(allowed)}, only, expect_fail, time_limit", repr(name)
            )
    checks = select(only)
    for loss in losses:  # a wrong kind or signature is a fault of the test file: said when it is collected
        make_subject(loss, **{k: v for k, v in arguments.items() if k != "strict"})
    cases = list(_cases(losses, checks, expect_fail, time_limit, arguments))
    return pytest.mark.parametrize(("loss", "check"), cases)


def _cases(
    losses: list[Loss], checks: list[Check], expect_fail: Reasons | None, time_limit: float | None, arguments: Mapping[str, Any]
) -> Iterator[Any]:  # fmt: skip
    import pytest

    known = [check.name for check in LOSS_CHECKS]
    for loss, label in zip(losses, _labels(losses), strict=True):
        reasons = dict(expect_fail(loss) if callable(expect_fail) else expect_fail or {})
        for code in reasons:
            if code not in known:
                raise bad("expect_fail", f"names of checks: {', '.join(known)}", repr(code))
        for check in checks:
            reason = reasons.get(check.name)
            marks = [] if reason is None else [pytest.mark.xfail(strict=True, reason=reason, raises=CheckFailed)]
            yield pytest.param(loss, BoundCheck(check, time_limit, arguments), marks=marks, id=f"{label}-{check.name}")


def _labels(losses: list[Loss]) -> list[str]:
    """NAME; where two losses share it FILE.py:NAME, then FOLDER/FILE.py:NAME; numbered where even these are the same."""
    names = plain = [name_of(loss) for loss in losses]
    for depth in (1, 2):
        longer = [_placed(loss, name, depth) for loss, name in zip(losses, plain, strict=True)]
        names = [n if names.count(n) == 1 else more for n, more in zip(names, longer, strict=True)]
    return [n if names.count(n) == 1 else f"{n}{names[: i + 1].count(n)}" for i, n in enumerate(names)]


def _placed(loss: Loss, name: str, depth: int) -> str:
    """With the last parts of its file's path; an adapted loss has no file of its own."""
    file = file_of(loss)
    if file is None or file == file_of(from_logprobs):
        return name
    return f"{'/'.join(file.parts[-depth:])}:{name}"
