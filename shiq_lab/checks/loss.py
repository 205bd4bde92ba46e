"""check_loss: does this loss have the right fixed point? The table of its checks, and the call."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiq_lab.checks import against, calls, fixed_point, invariance, likes
from shiq_lab.checks.report import FAILED, SKIPPED, Check, Measured, Report, Result
from shiq_lab.checks.runner import SubjectError, run_checks
from shiq_lab.checks.subject import NotALoss, Subject
from shiq_lab.checks.timelimit import DEFAULT, limited
from shiq_lab.checks.tolerances import EPS
from shiq_lab.checks.traits import traits_of
from shiq_lab.errors import bad

LOSS_CHECKS: tuple[Check, ...] = (
    Check("CALL", "a finite scalar with a finite gradient", calls.called, "A division by a count of 0, 0 * inf, or ln 0."),
    Check("FP", "gradient zero at the exact optimum", fixed_point.fixed_point,
          "A wrong shift, mask, sign, discount, log-sum-exp, reference or normalisation: it trains another policy."),
    Check("MT", "the same over turns with observation tokens", fixed_point.multi_turn,
          "Observation tokens enter the loss, the discount or the KL, or credit stops at them."),
    Check("TE", "cut rows bootstrap, ended rows do not", fixed_point.endings,
          "The bootstrap is missing, misplaced, applied to ended rows, or taken from the next row."),
    Check("IN", "model = reference is where it starts from 0", fixed_point.at_reference,
          "Model and reference go through different code: another shift, mask, temperature or reference."),
    Check("CV", "descent from the reference finds the optimum", fixed_point.convergence,
          "A sign, a term without gradient, or logits that the loss leaves free."),
    Check("EG", "expected gradient is that of the objective", fixed_point.policy_gradient,
          "A biased estimator: a KL term without its score part, a baseline that depends on the action, a clipped ratio."),
    Check("OR", "equal to a reference loss at random parameters", against.oracle,
          "Another loss: a dropped term, another clip, another normalisation, a stopped gradient."),
    Check("FD", "the gradient is the slope of the value", calls.slope,
          "Part of the loss is detached or under no_grad; declare semi_gradient=True where it is meant."),
    Check("PAD", "side, width and ids of padding", invariance.padding,
          "Padding is counted or scored: a mean over the padded length, positions from the left, ids != pad as a mask."),
    Check("MI", "masked places do not matter", calls.masks, "A mask is inverted, missing, or a position off."),
    Check("BS", "order of rows, and a batch from its parts", invariance.batches,
          "Rows influence each other, or the denominator belongs to another batch."),
    Check("PK", "packed rows equal separate rows", invariance.packing, "A shift or a sum runs across a boundary."),
    Check("SC", "scale of rewards and beta", invariance.scaling, "beta is applied twice or not to all, or there is a clip."),
    Check("SH", "potential-based shaping", invariance.shaping, "Credit a step early or late, or a wrong discount."),
    Check("CS", "constants added to logits", invariance.constant_shift,
          "Raw logits where log-probs are meant, or log-probs where the level carries v*."),
    Check("VP", "forbidden and padded vocabulary", invariance.vocabulary,
          "A mean over the vocabulary, or 0 * (-inf) in an entropy or KL."),
    Check("DT", "precision and large logits", calls.precision, "exp without subtracting the maximum, or half-precision sums."),
    Check("PU", "the same twice, inputs untouched", calls.purity, "Dropout, an in-place change, or a gradient into a critic."),
    Check("CF", "every option changes the result", calls.options, "The option is not forwarded."),
)  # fmt: skip


FLOAT32 = "Off by float32's rounding: something in the loss is float32, say gamma ** arange, or a small constant is added."
TOO_COARSE = "the loss computes in half precision whatever its inputs are: too coarse to tell right from wrong. Use float32."
LEVEL = 1e-9  # a level that moves the gradient by less than this does not enter
HALF = 1e-4  # coarser arithmetic than this cannot be told from a bug


def check_loss(
    loss: Callable[..., Tensor],
    kind: str | None = None,
    *,
    like: str | Callable[..., Tensor] | None = None,
    options: Mapping[str, Iterable[Any]] | None = None,
    traits: Mapping[str, Any] | None = None,
    expect_fail: Mapping[str, str] | None = None,
    only: Iterable[str] | None = None,
    strict: bool = False,
    device: str = "cpu",
    dtypes: Iterable[str] | None = None,
    name: str | None = None,
    time_limit: float | None = DEFAULT,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Run every check that applies to a loss of this kind (default: what it declares, else "bellman").

    loss        in the contract's form; see `adapters` for others
    kind        bellman, trajectory, policy_only, on_policy or preference
    like        a reference loss, by name ("shiq", "dpo", ...) or as a function: adds OR
    options     {argument: values}: every value must give another loss; the first is used elsewhere
    traits      what the loss declares of itself, see `traits.Traits`; on top of its own @declare
    expect_fail {check: reason}; such a check must fail
    only        names of checks to run
    strict      warnings (NaN and inf in masked places) are failures
    dtypes      lower precisions to run, for instance ("float32", "bfloat16")
    time_limit  seconds for one call of the loss; a hang inside compiled code is ended by the command line alone

    Raises SubjectError where the loss cannot be called at all; ValueError for bad arguments.
    """
    subject = make_subject(loss, kind, like=like, options=options, traits=traits, device=device, dtypes=dtypes, name=name)
    if time_limit:
        subject.loss, subject.seconds = limited(subject.loss, time_limit), time_limit
    chosen = select(only)
    kind_given, kind = kind is not None, subject.traits.kind
    try:
        verdict = TOO_COARSE if subject.eps > HALF else ""
    except NotALoss as error:
        verdict = str(error)
    if verdict:
        return _no_loss(chosen, subject, verdict, on_result)
    checks = [replace(check, run=partial(lenient, check.run)) for check in chosen]
    report = run_checks(
        checks, subject, name=subject.name, kind=kind, expect_fail=expect_fail, strict=strict, on_result=on_result
    )
    if only is None:
        declared = kind_given or "kind" in (traits or {}) or "kind" in getattr(loss, "shiq_lab_traits", {})
        report.notes[:0] = advice(subject, report, assumed=not declared)
    return report


def advice(subject: Subject, report: Report, assumed: bool = False) -> list[str]:
    """What the results together say: that the loss is probably of another kind, or which known loss it is."""
    kind, out = subject.traits.kind, []
    if assumed and report.failed:
        out.append("no kind was declared, so bellman was assumed; the others: trajectory, policy_only, on_policy, preference")
    cs = next((r for r in report.results if r.name == "CS"), None)
    level = [m for m in cs.measurements if m.at_least] if cs else []
    if any(m.value < LEVEL for m in level):
        kinds = "policy_only, on_policy or preference"
        out.append(f"the level of the logits does not enter this loss: perhaps its kind is not {kind} but {kinds} (--kind)")
    if kind in ("bellman", "trajectory") and "FP" in report.failed:
        other = "log_policy" if subject.traits.readout == "shifted" else "shifted"
        twin = replace(subject, traits=replace(subject.traits, readout=other), notes=[])
        if all(m.holds for m in fixed_point.stationary(twin, ("one turn",))):
            out.append(f"the gradient does vanish at the optimum of readout={other!r}: declare it if it is meant")
    if report.passed and kind in ("bellman", "trajectory") and subject.like is None:
        out.append(recognised(subject))
    return out


def recognised(subject: Subject) -> str:
    """Which of the package's losses of this kind it equals row by row, up to the mean inside a row."""
    for name in likes.LIKES:
        other = likes.lookup(name)
        theirs = traits_of(other)
        if (theirs.kind, theirs.readout) == (subject.traits.kind, subject.traits.readout):
            twin = replace(subject, like=Subject(other, name, theirs), notes=[])
            found = list(against.oracle(twin))
            if all(m.holds for m in found):
                shares = [m for m in found if "one over the number of actions" in m.detail]
                return f"row by row it is {name!r}, " + ("over its number of actions" if shares else "up to a factor")
    return "row by row it equals none of the package's losses, though it shares their optimum: compare with --like if it should"


def lenient(run: Callable[[Subject], Iterator[Measured]], subject: Subject) -> Iterator[Measured]:
    """What misses the bound of float64 but not that of float32 is a warning: a constant or a mask of the loss is float32."""
    coarser = EPS["float32"] / subject.eps / 50  # a float32 constant is one rounding, not the bound's sum of them
    for m in run(subject):
        rounding = 0 < m.tolerance < 1e-9 and not m.at_least and not m.holds and m.value <= m.tolerance * coarser
        yield replace(m, warn_only=True, hint=FLOAT32) if rounding else m


def make_subject(
    loss: Callable[..., Tensor],
    kind: str | None = None,
    *,
    like: str | Callable[..., Tensor] | None = None,
    options: Mapping[str, Iterable[Any]] | None = None,
    traits: Mapping[str, Any] | None = None,
    device: str = "cpu",
    dtypes: Iterable[str] | None = None,
    name: str | None = None,
) -> Subject:
    """The loss with its traits and its reference loss, every argument checked."""
    if not callable(loss):
        raise bad("loss", "a function", repr(loss)[:80])
    own = traits_of(loss, **{"kind": kind, **(traits or {})})
    reference = None
    if like is not None:
        other = likes.lookup(like) if isinstance(like, str) else like
        if not callable(other):
            raise bad("like", "a name or a function", repr(like)[:80])
        theirs = replace(own, semi_gradient=traits_of(other, kind=own.kind).semi_gradient)
        reference = Subject(other, f"like {like if isinstance(like, str) else _name(other)}", theirs, device=device)
    lower = tuple(dtypes or ())
    for dtype in lower:
        if dtype not in EPS:
            raise bad("dtypes", f"among {', '.join(EPS)}", repr(dtype))
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise bad("device", "a device that torch finds here", repr(device), str(error).splitlines()[0]) from None
    values = {k: list(v) for k, v in (options or {}).items()}
    subject = Subject(loss, name or _name(loss), own, reference, values, device, lower)
    _ = subject.names
    return subject


def select(only: Iterable[str] | None) -> list[Check]:
    """The checks of these names, in the table's order; all of them for None."""
    if only is None:
        return list(LOSS_CHECKS)
    wanted, known = [only] if isinstance(only, str) else list(only), [check.name for check in LOSS_CHECKS]
    for code in wanted:
        if code not in known:
            raise bad("only", f"names of checks: {', '.join(known)}", repr(code))
    return [check for check in LOSS_CHECKS if check.name in wanted]


def _no_loss(checks: list[Check], subject: Subject, verdict: str, on_result: Callable[[Result], None] | None) -> Report:
    """What came back is no loss: CALL says so, the rest is skipped."""
    call = LOSS_CHECKS[0]
    results = [Result(call.name, call.title, FAILED, message=verdict)]
    results += [Result(c.name, c.title, SKIPPED, reason="CALL failed") for c in checks if c.name != call.name]
    for result in results:
        if on_result is not None:
            on_result(result)
    return Report(subject.name, subject.traits.kind, results)


def _name(loss: Callable[..., Any]) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))


__all__ = ["LOSS_CHECKS", "SubjectError", "check_loss", "make_subject", "select"]
