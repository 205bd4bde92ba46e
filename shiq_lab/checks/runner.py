"""Runs a suite: every check on one subject, the worst measurement of each as its result."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shiq_lab.checks.report import EXPECTED, FAILED, PASSED, SKIPPED, WARNED, Check, Measured, Report, Result, Skip
from shiq_lab.errors import bad


class SubjectError(Exception):
    """What the thing under test did wrong: raised, hung, returned what is no loss. The text is the verdict."""


def run_checks(
    checks: Iterable[Check],
    subject: Any,
    *,
    name: str,
    kind: str,
    expect_fail: Mapping[str, str] | None = None,
    strict: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """All checks on the subject. expect_fail maps a check's name to the reason why it must fail: then a pass is a failure."""
    checks = list(checks)
    expect_fail = dict(expect_fail or {})
    known = [check.name for check in checks]
    for code in expect_fail:
        if code not in known:
            raise bad("expect_fail", f"names of checks ({', '.join(known)})", repr(code))
    report = Report(name, kind)
    begin = time.perf_counter()
    for check in checks:
        result = run_check(check, subject, expect_fail.get(check.name), strict)
        report.results.append(result)
        if on_result is not None:
            on_result(result)
    object.__setattr__(report, "seconds", time.perf_counter() - begin)
    report.notes.extend(getattr(subject, "notes", []))
    return report


def run_check(check: Check, subject: Any, expected: str | None = None, strict: bool = False) -> Result:
    """One check's result."""
    begin = time.perf_counter()
    measured: list[Measured] = []
    try:
        measured.extend(check.run(subject))
        status, message, worst = _verdict(measured, strict)
    except Skip as skip:
        return Result(check.name, check.title, SKIPPED, reason=str(skip), seconds=time.perf_counter() - begin)
    except SubjectError as error:
        status, message, worst = FAILED, str(error), None
    except Exception as error:  # the other checks still have something to say
        text = " ".join(str(error).split())
        status, worst = FAILED, None
        message = f"the check itself could not finish ({type(error).__name__}: {text}): please report this"
    reason = ""
    if expected is not None:
        reason = expected
        if status == FAILED:
            status = EXPECTED
        else:
            status, message = FAILED, f"expected to fail ({expected}), but it {status}: remove the expectation. {message}"
    return Result(
        name=check.name,
        title=check.title,
        status=status,
        measured=worst.value if worst else None,
        tolerance=worst.tolerance if worst else None,
        at_least=worst.at_least if worst else False,
        environment=worst.environment if worst else "",
        where=worst.where if worst else "",
        compared=sum(m.compared for m in measured),
        message=message,
        hint=(worst.hint or check.hint) if worst else "",
        reason=reason,
        seconds=time.perf_counter() - begin,
        measurements=tuple(measured),
    )


def _verdict(measured: list[Measured], strict: bool) -> tuple[str, str, Measured | None]:
    """The status, its sentence, and the worst measurement: the worst failure, else the worst warning, else the closest pass."""
    if not measured:
        return FAILED, "nothing was compared", None
    worst = lambda those: max(those, key=lambda m: m.badness)  # noqa: E731
    hard = [m for m in measured if not m.holds and (strict or not m.warn_only)]
    soft = [m for m in measured if not m.holds]
    for status, those in ((FAILED, hard), (WARNED, soft), (PASSED, measured)):
        if those:
            found = worst(those)
            return status, found.sentence(), found
    raise AssertionError  # the last list is never empty
