"""The checks of a loss: each fails on its bug with this message, accepts right losses, and fails if it compared nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import plain_losses
import pytest
import torch
from torch import Tensor

import shiq_lab
from shiq_lab.checks import likes
from shiq_lab.checks.bugs import right_bellman, right_policy
from shiq_lab.checks.bugs.plant import plant
from shiq_lab.checks.fixed_point import identified
from shiq_lab.checks.fixtures import fixture
from shiq_lab.checks.loss import LOSS_CHECKS, TOO_COARSE, check_loss, lenient, make_subject
from shiq_lab.checks.report import FAILED, PASSED, SKIPPED, WARNED, Check, Measured
from shiq_lab.checks.runner import SubjectError, run_check, run_checks
from shiq_lab.checks.traits import Traits, declare

RIGHT = {"shiq": plain_losses.shiq, "reinforce": plain_losses.reinforce, "dpo": plain_losses.dpo}
TURNS = "two turns, gamma 0.8"

# check, loss, edits, arguments, the exact message up to the place
PLANTED: list[tuple[str, str, list[tuple[str, str]], dict[str, Any], str]] = [
    ("CALL", "shiq", [("total / len(input_ids)", "total / (completion_mask.sum(1) > 0).all()")], {},
     "the loss is inf (inputs in float64)"),
    ("FP", "shiq", [("rewards[b, i] -", "rewards[b, i - 1] -")], {},
     "gradient at the optimum: 1.02, expected at most 1.31e-13, over 1620 numbers (terminal reward, gamma 0.8, "
     "row 4 (<bos> x [a] [a] [a]), position 3, token 'a')"),
    ("MT", "shiq", [("ahead = rewards", "ahead = ahead if i == actions[-1] or completion_mask[b, i + 1] else gamma * ahead\n"
                     "            ahead = rewards")], {},
     "gradient at the optimum: 0.0672, expected at most 1.5e-13, over 3726 numbers (two turns, gamma 0.8, "
     "row 7 (<bos> x [a] [<eos>] y [a] [a]), position 2, token '<eos>')"),
    ("TE", "shiq", [("not terminated[b] and ", "False and ")], {},
     "cut rows: gradient at the optimum: 1.11, expected at most 1.47e-13, over 1152 numbers (long rows, "
     "row 13 (<bos> y x [a] [a] [a]), position 3, token 'a')"),
    ("IN", "dpo", [("pick(logits) - pick(ref_logits)", "pick(logits) - pick(2 * ref_logits)")], {},
     "gradient at model = reference, rewards 0: 0.953, expected at most 8.41e-14, over 5832 numbers (small, rewards 0, "
     "row 48 (<bos> x [a] [a] => x [b] [<eos>]), position 1, token '<eos>')"),
    ("CV", "shiq", [("return total", "return -total")], {},
     "most negative curvature at the optimum: 1.74, expected at most 7.33e-09, over 32 numbers (small, gamma 0.8)"),
    ("EG", "reinforce", [(").detach()", ")")], {},
     "expected gradient against that of -J: 0.51, expected at most 1e-13, over 261 numbers (random tool, gamma 0.8, "
     "state 6, token 0 ('a')); best factor 0.0368"),
    ("OR", "shiq", [("gamma * ahead\n", "gamma * ahead\n"
                     "            ahead = ahead if len(actions) < 3 else ahead.clamp(max=3)\n")],
     {"like": "shiq"},
     "each row's gradient against the reference loss: 1.05, expected at most 1.57e-13, over 810 numbers (two turns, "
     "row 0 (<bos> x [b] [a] => x [a] [<eos>]), position 2, token '<eos>')"),
    ("FD", "shiq", [("v = beta * level(i - 1)", "v = (beta * level(i - 1)).detach()")], {},
     "slope along direction 0: 0.0917, expected at most 7.33e-09, over 1 number (two turns, gamma 0.8); "
     "differences -1.04184, gradient -0.422515"),
    ("PAD", "shiq", [("return total / len(input_ids)", "return total / input_ids.numel()")], {},
     "padded on the right, 3 columns wider, pad id eos: gradient: 0.25, expected at most 1.57e-13, over 3726 numbers "
     "(two turns, gamma 0.8, row 29 (<bos> x [b] [a] => x [a] [c]), position 5, token 'a')"),
    ("BS", "shiq", [("return total / len(input_ids)", "return total**2")], {},
     "batch against its parts, reduction 'sum' (the nearest of sum, row and token means): 0.751, expected at most 1.2e-13, "
     "over 972 numbers (two turns, gamma 0.8)"),
    ("SC", "shiq", [("beta * ratio", "beta * beta * ratio")], {},
     "rewards and beta times 64: direction of the gradient: 0.836, expected at most 1.57e-13, over 3726 numbers "
        "(two turns, gamma 0.8, row 29 (<bos> x [b] [a] => x [a] [c]), position 5, token 'c'); best factor 2.519e+06"),
    ("SC", "dpo", [("logsigmoid(beta *", "logsigmoid(beta * beta *")], {},
     "beta times 2 against log-ratios times 2: 0.234, expected at most 3.55e-12, over 12 numbers (small, pair 7); "
     "best factor 1.123"),
    ("SH", "shiq", [("gamma * ahead\n", "gamma**2 * ahead\n")], {},
     "potential-based shaping: gradient: 0.0797, expected at most 1.57e-13, over 3726 numbers (two turns, gamma 0.8, "
     "row 29 (<bos> x [b] [a] => x [a] [c]), position 5, token 'a')"),
    ("VP", "shiq", [("beta * level(i - 1)", "beta * (level(i - 1) - 0.1 * torch.log(torch.tensor(logits.shape[-1])))")], {},
     "3 more columns at -inf: gradient: 0.00794, expected at most 1.57e-13, over 3726 numbers (two turns, gamma 0.8, "
     "row 32 (<bos> x [b] [a] => x [c] [c]), position 6, token 'c')"),
    ("DT", "shiq", [("logits[b, i].logsumexp(-1) -", "logits[b, i].exp().sum(-1).log() -")], {},
     "the loss is nan (inputs in float64)"),
    ("PU", "shiq", [("for b in range", "rewards += 1e-3\n    for b in range")], {},
     "inputs changed in place: 1, expected at most 0, over 7 numbers (two turns, gamma 0.8); changed: rewards"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "base", "edits", "arguments", "message"), PLANTED, ids=[f"{p[0]}-{p[1]}" for p in PLANTED])
def test_a_check_fails_on_its_bug_with_its_message(
    code: str, base: str, edits: list[tuple[str, str]], arguments: dict[str, Any], message: str
) -> None:
    report = check_loss(plant(RIGHT[base], *edits), only=[code], **arguments)
    result = report[code]
    assert result.status == FAILED and not report.passed
    assert result.message == message
    assert result.compared > 0 or "inputs in" in message


@pytest.mark.parametrize("name", RIGHT)
def test_right_losses_pass_every_check(name: str) -> None:
    report = check_loss(RIGHT[name], like="shiq" if name == "shiq" else None)
    assert report.passed, [r.message for r in report.results if r.status == FAILED]
    assert len(report.results) == len(LOSS_CHECKS)
    for result in report.results:
        assert result.status != PASSED or result.compared > 0
        assert result.status != SKIPPED or result.reason
        assert all(m.compared > 0 for m in result.measurements)
    assert any(note.startswith("reduction, inferred: mean over rows") for note in report.notes)


# What theory says is not stationary at pi*, and what else then fails; all other losses of the package pass everything.
MUST_FAIL = {
    "ipo": {"FP", "MT", "CV"},  # regresses the preference's probability
    "grpo": {"FP", "MT", "CV", "EG", "SC"},  # std, k3, own mean, length mean; std + eps does not scale
    "dr_grpo": {"FP", "MT", "CV", "EG"},  # k3 and the mean that includes oneself
}


@pytest.mark.parametrize("name", likes.LIKES)
def test_the_packages_own_losses_pass_or_fail_as_theory_says(name: str) -> None:
    report = check_loss(likes.lookup(name), like=name)
    assert set(report.failed) == MUST_FAIL.get(name, set()), [r.message for r in report.results if r.status == FAILED]


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda c: c.name)
def test_a_check_that_compares_nothing_has_failed(check: Check) -> None:
    """Every check goes through one runner, which calls an empty comparison a failure."""
    nothing = replace(check, run=lambda subject: iter(()))
    result = run_check(nothing, None)
    assert (result.status, result.message) == (FAILED, "nothing was compared")
    empty = replace(check, run=lambda subject: iter([Measured("gradient", 0.0, 1.0, 0, "one turn")]))
    result = run_check(empty, None)
    assert (result.status, result.message) == (FAILED, "gradient: nothing was compared on one turn")


def test_a_mean_over_the_padded_length_fits_no_reduction() -> None:
    padded = plant(plain_losses.shiq, ("return total / len(input_ids)", "return total / input_ids.numel()"))
    result = check_loss(padded, only=["BS"])["BS"]
    assert result.status == FAILED and "the nearest of sum, row and token means" in result.message


@pytest.mark.parametrize(
    ("denominator", "note"),
    [
        ("1", "reduction, inferred: sum"),
        ("len(input_ids)", "reduction, inferred: mean over rows (of each row's sum or mean)"),
        ("completion_mask.sum()", "reduction, inferred: token mean"),
    ],
)
def test_reductions_are_inferred(denominator: str, note: str) -> None:
    loss = plant(plain_losses.shiq, ("return total / len(input_ids)", f"return total / {denominator}"))
    report = check_loss(loss, only=["BS"], traits={"empty_completions": False})
    assert report.passed and report.notes == [note]


# ------------------------------------------------------------------------- what an attack on the suite had found
@pytest.mark.parametrize(
    ("code", "loss", "old", "new", "message"),
    [
        ("BS", right_bellman.shiq_weighted_sum, "(weights * (rho**2).sum(1))", "((rho**2).sum(1))", "rows weighted by"),
        ("BS", right_policy.agro, "torch.unique(group_ids)", "range(2)", "groups under other ids"),
        ("BS", right_policy.rloo, "total.detach(), group_ids)", "total.detach(), group_ids.clamp(max=1))", "groups"),
        ("FP", right_policy.actor_critic_joint, "(actor + 0.5 * critic)", "(actor - 0.5 * critic)", "pull on a state's value"),
        ("IN", right_policy.ppo, "behavior_logprobs[:, 1:]", "logp.detach()", "change of the gradient with other"),
        ("SC", plain_losses.shiq, "rewards[b, i] -", "rewards[b, i].clamp(-10, 10) -", "rewards and beta times 64"),
        ("SC", plain_losses.shiq, "total = logits", "beta = max(beta, 0.05)\n    total = logits", "rewards and beta times 0"),
        ("FP", plain_losses.dpo, "pick(logits) - ", "pick(logits).clamp(min=-12) - ", "gradient at"),
        ("FP", plain_losses.shiq, "beta * ratio", "beta * ratio.clamp(-10, 10)", "gradient at"),
        ("FP", plain_losses.shiq, "gamma * ahead\n", "(gamma if i < actions[0] + 4 else 1) * ahead\n", "grad"),
    ],
)  # fmt: skip
def test_what_once_slipped_through_is_caught(code: str, loss: Callable[..., Tensor], old: str, new: str, message: str) -> None:
    assert check_loss(loss, only=[code])[code].status == PASSED
    result = check_loss(plant(loss, (old, new)), only=[code])[code]
    assert result.status == FAILED and result.message.startswith(message), result.message


def test_slopes_that_are_not_finite_are_said_so() -> None:
    case = fixture("small")
    live = torch.from_numpy(case.mdp.allowed & case.mdp.is_policy[:, None])
    nothing = lambda table: torch.full((int(live.sum()),), torch.nan, dtype=torch.float64)  # noqa: E731
    subject = make_subject(plain_losses.shiq)
    (found,) = identified(subject, case, torch.from_numpy(case.optimum()), live, nothing)
    assert not found.holds and found.what == "slopes of the gradient at the optimum that are not finite"


def test_global_state_is_put_back_and_its_change_named() -> None:
    def careless(**arguments: Any) -> Tensor:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        return plain_losses.shiq(**{k: arguments[k] for k in ("logits", "ref_logits", *SHIQ)})

    state = torch.get_rng_state()
    result = check_loss(careless, only=["PU"])["PU"]
    assert torch.get_default_dtype() == torch.float32 and torch.equal(torch.get_rng_state(), state)
    assert result.message.startswith("global settings of torch changed: 1, expected at most 0, over 6 numbers (two turns")
    assert result.message.endswith("; changed: the default dtype")


def test_half_precision_inside_is_too_coarse_to_judge() -> None:
    def half(*, logits: Tensor, ref_logits: Tensor, **arguments: Any) -> Tensor:
        low = {"logits": logits.bfloat16(), "ref_logits": ref_logits.bfloat16()}
        return plain_losses.shiq(**low, **{k: arguments[k] for k in SHIQ})

    report = check_loss(half)
    assert report.failed == ["CALL"]
    assert report["CALL"].message == TOO_COARSE


def test_a_small_constant_is_no_rounding() -> None:
    loss = plant(plain_losses.dpo, ("x[:, :-1].log_softmax(-1).gather", "(x[:, :-1].softmax(-1) + 1e-8).log().gather"))
    assert check_loss(loss, only=["FP"])["FP"].status == FAILED


def test_a_loss_of_another_kind_is_told_so() -> None:
    notes = check_loss(plain_losses.reinforce, kind="bellman").notes
    assert notes[0] == (
        "the level of the logits does not enter this loss: perhaps its kind is not bellman but policy_only, on_policy or "
        "preference (--kind)"
    )
    notes = check_loss(likes.lookup("easy"), traits={"readout": "shifted"}).notes
    assert "the gradient does vanish at the optimum of readout='log_policy': declare it if it is meant" in notes


@pytest.mark.parametrize("name", ["shiq", "shifted", "easy", "sequence", "tbrm"])
def test_known_losses_are_recognised(name: str) -> None:
    assert f"row by row it is {name!r}, up to a factor" in check_loss(likes.lookup(name)).notes


def test_a_mean_over_a_rows_own_tokens_is_recognised() -> None:
    report = check_loss(right_bellman.shiq_row_means)
    assert "row by row it is 'shiq', over its number of actions" in report.notes
    assert "reduction, declared: mean of row means" in report.notes


def test_every_check_has_its_planted_bug_here() -> None:
    """PLANTED names each check of the table but four, whose bugs need options, packed rows, no effect or NaN: tests below."""
    assert {p[0] for p in PLANTED} | {"CF", "PK", "CS", "MI"} == {check.name for check in LOSS_CHECKS}


def test_a_check_that_breaks_says_so_and_the_others_go_on() -> None:
    def broken(subject: Any) -> Iterator[Measured]:
        raise RuntimeError("no such luck")
        yield

    fine = lambda subject: iter([Measured("gap", 0.0, 1.0, 1)])  # noqa: E731
    report = run_checks([Check("A", "a", broken, ""), Check("B", "b", fine, "")], None, name="loss", kind="bellman")
    assert report.failed == ["A"] and report["B"].status == PASSED
    assert report["A"].message == "the check itself could not finish (RuntimeError: no such luck): please report this"


# ------------------------------------------------------------------------------------------------------- masks
def masked_reward(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return plant(loss, ("    return total", "    total = total + 0 * (rewards * completion_mask).sum()\n    return total"))


def test_nan_in_masked_places_is_a_warning_and_under_strict_a_failure() -> None:
    loss = masked_reward(plain_losses.shiq)
    message = (
        "NaN in masked rewards: nan, expected at most 0, over 1 number (two turns, gamma 0.8); "
        "the loss is nan (inputs in float64)"
    )
    soft = check_loss(loss, only=["MI"])
    assert soft["MI"].status == WARNED and soft["MI"].message == message
    hard = check_loss(loss, only=["MI"], strict=True)
    assert hard["MI"].status == FAILED and hard["MI"].message == message


def test_finite_garbage_in_masked_places_is_a_failure() -> None:
    leak = "    total = total + rewards.sum() * logits[0, 0, 5]\n    return total"
    loss = plant(plain_losses.shiq, ("    return total", leak))
    result = check_loss(loss, only=["MI"])["MI"]
    assert result.status == FAILED
    assert result.message.startswith("finite garbage in masked logits: gradient in masked places: ")
    assert result.hint == "Masked logits enter: a mask is inverted, missing or a position off"


# ------------------------------------------------------------------------------------- options, packing, values
@declare(kind="preference")
def smoothed(*, smoothing: float = 0.1, **arguments: Any) -> Tensor:
    return plain_losses.dpo(**{k: v for k, v in arguments.items() if k in PLAIN}) * (1 - smoothing * 0)


PLAIN = ("logits", "ref_logits", "input_ids", "completion_mask", "beta")


def test_an_option_that_changes_nothing_is_named() -> None:
    result = check_loss(smoothed, only=["CF"], options={"smoothing": [0.0, 0.1]})["CF"]
    assert result.status == FAILED
    assert result.message.startswith("change from smoothing=0.0 to 0.1: 0, expected at least 1.49e-08")
    assert result.hint == "The option smoothing is not forwarded."


def test_packed_rows_that_are_read_as_one_row_are_caught() -> None:
    def forgets(*, segment_ids: Tensor | None = None, position_ids: Tensor | None = None, **arguments: Any) -> Tensor:
        ended = arguments["terminated"]
        arguments["terminated"] = ended if ended.ndim == 1 else ended[:, 0]
        return plain_losses.shiq(**{k: v for k, v in arguments.items() if k not in ("weights", "group_ids")})

    result = check_loss(forgets, only=["PK"])["PK"]
    assert result.status == FAILED and result.message.startswith("packed against unpacked gradient: ")
    assert check_loss(plain_losses.shiq, only=["PK"])["PK"].reason == "the loss does not name segment_ids"


def test_a_constant_that_the_loss_should_feel_and_does_not() -> None:
    loss = plant(plain_losses.shiq, ("v = beta * level(i - 1)", "v = 0.0 * level(i - 1)"))
    result = check_loss(loss, only=["CS"])["CS"]
    assert result.message.startswith("a constant added to the model before action 2: change of the gradient: ")
    assert result.hint == "The level of the logits does not enter, so v* is not learned."


def test_a_policy_loss_that_trains_its_critic_is_caught_unless_it_says_so() -> None:
    def with_critic(*, values: Tensor, completion_mask: Tensor, **arguments: Any) -> Tensor:
        loss = plain_losses.reinforce(completion_mask=completion_mask, **{k: arguments[k] for k in REINFORCE})
        return loss + (arguments["logits"][:, 0, 5] * torch.where(completion_mask == 1, values, 0.0).sum(1)).sum() * 0.1

    wrong = declare(kind="on_policy", discounted=True)(with_critic)
    result = check_loss(wrong, only=["PU"])["PU"]
    assert result.status == FAILED and result.message.startswith("gradient by values: ")
    assert check_loss(wrong, only=["PU"], traits={"trains_values": True}).passed


REINFORCE = ("logits", "ref_logits", "input_ids", "rewards", "beta", "gamma")


# -------------------------------------------------------------------------------------------- verdicts and notes
def returns(value: Any) -> Callable[..., Any]:
    def loss(*, logits: Tensor) -> Any:
        return value(logits) if callable(value) else value

    return loss


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (None, "the loss must return a scalar tensor, it returned NoneType (None)"),
        (1.5, "the loss must return a scalar tensor, it returned float (1.5)"),
        (lambda x: x.sum((1, 2)), "the loss must return a scalar, it returned shape (18,): reduce it, for instance by mean()"),
        (lambda x: x.sum() * torch.nan, "the loss is nan (inputs in float64)"),
        (lambda x: x.argmax(), "the loss must return a floating-point number, it returned torch.int64"),
        (
            lambda x: x.detach().sum(),
            "the loss has no gradient: nothing in it is connected to `logits` (detached, or computed under no_grad)",
        ),
    ],
)
def test_what_is_no_loss_gets_a_plain_verdict(value: Any, verdict: str) -> None:
    report = check_loss(returns(value))
    assert (report["CALL"].status, report["CALL"].message) == (FAILED, verdict)
    assert {r.status for r in report.results[1:]} == {SKIPPED} and not report.passed


def test_a_loss_that_raises_is_named_with_its_own_line() -> None:
    def broken(*, logits: Tensor) -> Tensor:
        return logits.sum() / [][0]

    with pytest.raises(
        SubjectError, match=r"^the loss raised IndexError: list index out of range \(.*test_check_loss.py:\d+, in broken\)$"
    ):
        check_loss(broken)


def test_an_expected_failure_carries_its_reason_and_must_fail() -> None:
    wrong = plant(plain_losses.shiq, ("return total", "return -total"))
    report = check_loss(wrong, only=["CV", "FP"], expect_fail={"CV": "written as an ascent"})
    assert report.passed and (report["CV"].status, report["CV"].reason) == ("expected failure", "written as an ascent")
    report = check_loss(plain_losses.shiq, only=["FP"], expect_fail={"FP": "a theory"})
    assert report.failed == ["FP"]
    assert report["FP"].message.startswith("expected to fail (a theory), but it passed: remove the expectation.")
    with pytest.raises(ValueError, match=r"expect_fail: expected names of checks \(FP\), got 'XX'"):
        check_loss(plain_losses.shiq, only=["FP"], expect_fail={"XX": "?"})


def test_a_loss_that_computes_in_float32_is_held_to_float32() -> None:
    def casts(*, logits: Tensor, ref_logits: Tensor, **arguments: Any) -> Tensor:
        return plain_losses.shiq(logits=logits.float(), ref_logits=ref_logits.float(), **{k: arguments[k] for k in SHIQ})

    report = check_loss(casts, only=["CALL", "FP", "TE", "BS"])
    assert report.passed
    assert "computes in float32 although its inputs are float64; tolerances are float32's" in report.notes


SHIQ = ("input_ids", "attention_mask", "completion_mask", "rewards", "terminated", "beta", "gamma")


def test_what_is_right_to_float32_alone_is_a_warning() -> None:
    loss = plant(plain_losses.shiq, ("gamma * ahead\n", "float(torch.tensor(gamma)) * ahead\n"))  # 0.8 in float32
    result = check_loss(loss, only=["FP"])["FP"]
    assert result.status == WARNED and 1e-13 < (result.measured or 0) < 1e-6
    subject = make_subject(loss)
    far = lenient(lambda s: iter([Measured("x", 1e-3, 1e-13, 1)]), subject)
    assert [m.warn_only for m in far] == [False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_loss(3), "loss: expected a function, got 3."),  # type: ignore[arg-type]
        (lambda: check_loss(plain_losses.shiq, "bell"), "kind: expected one of bellman, trajectory, "),
        (lambda: check_loss(plain_losses.shiq, like="shik"), "got 'shik'. Did you mean 'shiq'?"),
        (lambda: check_loss(plain_losses.shiq, only=["F"]), "only: expected names of checks: CALL, FP, "),
        (lambda: check_loss(plain_losses.shiq, dtypes=["int8"]), "dtypes: expected among float64, float32, bfloat16, float16"),
        (lambda: check_loss(plain_losses.shiq, device="x"), "device: expected a device that torch finds here, got 'x'"),
        (lambda: check_loss(plain_losses.shiq, traits={"semigradient": True}), "Did you mean 'semi_gradient'?"),
        (lambda: check_loss(lambda x, y: x), "keyword arguments among logits, "),
        (lambda: declare(readout="raw"), "readout: expected one of shifted, log_policy, got 'raw'."),
        (lambda: Traits(padding=3), "padding: expected some of 'right', 'left', got 3."),  # type: ignore[arg-type]
        (lambda: Traits(dtypes=("foo",)), "dtypes: expected some of 'float64', "),
        (lambda: Traits(padding=("middle",)), "padding: expected some of 'right', 'left', got ('middle',)."),
        (lambda: plant(plain_losses.shiq, ("nowhere", "")), "text that stands once in shiq, got 'nowhere', 0 times"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_public_names() -> None:
    assert shiq_lab.check_loss is check_loss


def test_the_report_is_json_whatever_was_measured() -> None:
    import json

    def wild(subject: Any) -> Iterator[Measured]:
        yield Measured("gap", float("nan"), 0.0, 1)
        yield Measured("gap", float("inf"), 0.0, 1)

    report = run_checks([Check("X", "x", wild, "hint")], None, name="loss", kind="bellman")
    data = json.loads(report.to_json())
    assert data["passed"] is False and data["results"][0]["measurements"][0]["value"] == "nan"


# ---------------------------------------------------------------------------------- what a newcomer stumbled over
class AsModule(torch.nn.Module):
    """A loss object, as torchtune and Liger write them."""

    def forward(self, *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, completion_mask: Tensor, beta: float) -> Tensor:
        return plain_losses.dpo(
            logits=logits, ref_logits=ref_logits, input_ids=input_ids, completion_mask=completion_mask, beta=beta
        )


def test_a_module_is_asked_for_its_forward() -> None:
    subject = make_subject(AsModule(), "preference")
    assert subject.names == {"logits", "ref_logits", "input_ids", "completion_mask", "beta"}
    assert check_loss(AsModule(), "preference", only=["FP", "SC"]).passed


def test_what_the_reference_raises_is_not_the_losss_fault() -> None:
    result = check_loss(plain_losses.reinforce, like="grpo", only=["OR"])["OR"]
    assert result.status == FAILED
    assert result.message.startswith("the reference loss (like grpo) cannot be compared here: the loss raised ValueError: ")


def test_an_assumed_kind_is_said_where_something_failed() -> None:
    undeclared = plant(plain_losses.dpo)
    undeclared.shiq_lab_traits = {}  # type: ignore[attr-defined]
    with pytest.raises(SubjectError, match=r"not enough values to unpack|must match"):
        check_loss(lambda **k: undeclared(**{n: k[n][:1] if n != "beta" else k[n] for n in PLAIN}))
    wrong = plant(plain_losses.shiq, ("return total", "return -total"))
    note = "no kind was declared, so bellman was assumed; the others: trajectory, policy_only, on_policy, preference"
    assert note in check_loss(wrong).notes
    assert note not in check_loss(wrong, "bellman").notes
    assert note not in check_loss(plain_losses.shiq).notes


def test_a_report_can_be_read() -> None:
    wrong = plant(plain_losses.shiq, ("return total", "return -total"))
    text = str(check_loss(wrong, only=["FP", "CV"])).splitlines()
    assert text[0] == "shiq (bellman): failed CV"
    assert text[1] == "  passed           FP       gradient zero at the exact optimum"
    assert text[-1] == "  usually: The optimum is a maximum or a saddle of the loss: a sign."


def test_one_name_of_a_check_may_be_a_string() -> None:
    assert [r.name for r in check_loss(plain_losses.shiq, only="FP").results] == ["FP"]
