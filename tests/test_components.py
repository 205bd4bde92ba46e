"""The component checks: right components of every style pass, the survey's bugs and further mutants are caught by name."""

import json
import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import pytest
import torch
from component_mutants import MUTANTS, Mutant

import shiq_lab
from shiq_lab.checks.bugs import accepted_components as right
from shiq_lab.checks.bugs.accepted_components import ACCEPTED, SINGLE_TURN
from shiq_lab.checks.bugs.components import BUGS, lookup, smoke_policy, smoke_statistics
from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.components import batches, groups, kl, policy, returns, statistics
from shiq_lab.checks.components.rows import EOS, PLAIN, TURNS, Rows
from shiq_lab.checks.components.subject import Component, changes, compare
from shiq_lab.checks.components.suite import COMPONENT_CHECKS, COMPONENT_KINDS, check_component, signature
from shiq_lab.checks.report import FAILED, PASSED, SKIPPED, WARNED, Measured, Report
from shiq_lab.checks.runner import SubjectError, run_check

torch.set_num_threads(1)
PAIRS = [(kind, function) for kind, functions in ACCEPTED.items() for function in functions]


def name_of(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


# ------------------------------------------------------------------------------------------------ right components
@pytest.mark.parametrize(("kind", "function"), PAIRS, ids=name_of)
def test_right_components_pass(kind: str, function: Callable[..., Any]) -> None:
    report = check_component(function, kind)
    assert report.passed and not report.failed, [r.message for r in report.results if r.status == FAILED]


def test_every_kind_has_two_accepted_styles() -> None:
    assert set(ACCEPTED) == set(COMPONENT_KINDS) and all(len(functions) >= 2 for functions in ACCEPTED.values())


@pytest.mark.parametrize("function", SINGLE_TURN["completion_mask"], ids=name_of)
def test_a_component_for_one_turn_says_so(function: Callable[..., Any]) -> None:
    """Undeclared it fails MT alone; declared, MT is skipped with the reason."""
    assert check_component(function, "completion_mask").failed == ["MT"]
    report = check_component(function, "completion_mask", multi_turn=False)
    assert report.passed and report["MT"].status == SKIPPED and report["MT"].reason == "declared: multi_turn=False"


def test_a_component_for_one_side_says_so() -> None:
    wrong = lookup("B11").wrong
    assert check_component(wrong, "score_readout").failed == ["PAD", "MT"]
    assert check_component(wrong, "score_readout", padding=("right",)).passed


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (right.group_loop, "group baseline: r - mean"),
        (right.group_view, "group baseline: r - mean / (std with correction 1 + 0.0001)"),
        (right.group_leave_one_out, "group baseline: r - leave-one-out mean"),
        (right.group_reshape_or_loop, "group baseline: r - mean / (std with correction 0 + 1e-06)"),
    ],
    ids=name_of,
)
def test_the_form_of_a_baseline_is_inferred_and_printed(function: Callable[..., Any], note: str) -> None:
    assert check_component(function, "group_baseline").notes == [note]


def test_estimators_value_and_gradient_are_inferred_apart() -> None:
    notes = {f.__name__: check_component(f, "kl_estimator").notes for f in ACCEPTED["kl_estimator"]}
    assert notes == {
        "k1": ["values of k1", "gradient of k1, 0 in expectation"],
        "k2": ["values of k2", "gradient of k2, that of KL(pi || ref)"],
        "k3": ["values of k3", "gradient of k3, that of KL(ref || pi)"],
        "k3_straight_through": ["values of k3", "gradient of k2, that of KL(pi || ref)"],
    }


def test_as_a_loss_only_the_gradient_of_the_kl_will_do() -> None:
    """NeMo-RL#2506 and its kind: k1 as a loss has no mean gradient, k3 has another KL's."""
    passed = {f.__name__: check_component(f, "kl_estimator", purpose="loss").passed for f in ACCEPTED["kl_estimator"]}
    assert passed == {"k1": False, "k2": True, "k3": False, "k3_straight_through": True}

    def frozen(*, logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
        return 0.5 * (logprobs - ref_logprobs).detach().square()

    assert check_component(frozen, "kl_estimator")["EG-gradient"].status == SKIPPED
    assert "no gradient" in check_component(frozen, "kl_estimator", purpose="loss")["EG-gradient"].message


def test_advantages_without_a_bootstrap_are_compared_on_ended_rows() -> None:
    """Many GAEs take every row as ended; that is said, and credit across observations is still checked."""
    report = check_component(right.gae_all_ended, "gae")
    assert report.passed and report["MI"].status == WARNED and "rows that ended alone are compared" in report.notes[0]
    assert report["TE"].status == SKIPPED
    assert report["TE"].reason == "names neither terminated, truncated nor next_value: cut rows were not asked about"
    decayed = plant(right.gae_all_ended, ("carry = m * step + (1 - m) * carry", "carry = m * step + (1 - m) * lam * carry"))
    assert check_component(decayed, "gae").failed == ["MT", "MI"]


def test_targets_that_cannot_tell_cut_rows_skip_that_check() -> None:
    """The same for n-step targets; one name of the three is enough to be asked."""
    bare = lambda *, values, rewards, mask, gamma, n: right.n_step_loop(  # noqa: E731
        values=values, rewards=rewards, mask=mask, gamma=gamma, n=n,
        terminated=torch.ones(len(mask), dtype=torch.bool), next_value=torch.zeros(len(mask)),
    )  # fmt: skip
    report = check_component(bare, "n_step")
    assert report.passed and report["TE"].status == SKIPPED and report["OR"].status == PASSED
    assert check_component(right.n_step_loop, "n_step")["TE"].status == PASSED
    assert check_component(right.to_go_loop, "reward_to_go")["TE"].status == PASSED


def test_float32_inside_is_a_legitimate_choice() -> None:
    """A fused path that casts to float32 and says so by its dtype is judged in float32, in value and gradient."""

    def upcast(*, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logp = (hidden.float() @ head.float().T).log_softmax(-1)
        return logp.gather(-1, labels[..., None])[..., 0]

    assert check_component(upcast, "token_statistics").passed
    disguised = lambda *, hidden, head, labels: upcast(hidden=hidden, head=head, labels=labels).double()  # noqa: E731
    assert check_component(disguised, "token_statistics").failed == ["OR", "DT-large"]


# --------------------------------------------------------------------------------------------- the survey's bugs
CAUGHT = {
    "A6": ["OR", "TE", "PAD", "MT", "BS"],
    "B7": ["OR", "TE", "PAD", "MT", "MI", "BS"],
    "B10": ["TE", "PAD", "MT"],
    "B11": ["PAD", "MT"],
    "B16": ["OR", "TE", "PAD", "MT", "BS"],
    "C6": ["MT"],
    "D3": ["TE", "PAD", "MT", "BS"],
    "E17": ["BS"],
    "H1": ["GR", "BS"],
    "H3": ["GR", "IN", "BS"],
    "H4": ["GR", "IN", "BS"],
    "H5": ["GR", "IN"],
    "H7": ["GR", "IN"],
    "H8": ["BS"],
    "J2": ["CF-ratio", "MI", "BS"],
    "J3": ["IN", "CF"],
    "J4": ["CF"],
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_the_bugs_are_caught(bug: Bug) -> None:
    """By exactly these checks; the accepted original passes the same suite."""
    report = bug.suite(bug.wrong)
    assert report.failed == CAUGHT[bug.id]
    for name in report.failed:
        result = report[name]
        assert result.message and result.environment and result.hint and result.compared > 0
    assert bug.suite(bug.right).passed


def test_all_rows_are_planted_once() -> None:
    assert [bug.id for bug in BUGS] == list(CAUGHT)
    with pytest.raises(ValueError, match=r"^id: expected one of A6, .*, got 'Z9'\.$"):
        lookup("Z9")


def test_the_naive_test_sees_none_of_the_fused_bugs() -> None:
    fused = [bug for bug in BUGS if bug.smoke is not None]
    assert [bug.id for bug in fused] == ["J2", "J3", "J4"]
    assert all(bug.smoke(bug.wrong) and bug.smoke(bug.right) for bug in fused if bug.smoke)


@pytest.mark.parametrize(
    ("smoke", "function"), [(smoke_statistics, right.statistics_chunked), (smoke_policy, right.policy_loss_fused)]
)
def test_the_naive_test_can_fail(smoke: Callable[[Any], bool], function: Callable[..., Any]) -> None:
    def no_gradient(**arguments: Any) -> Any:
        out = function(**arguments)
        return tuple(x * 0 for x in out) if isinstance(out, tuple) else out * 0

    def lost(**arguments: Any) -> Any:
        out = function(**arguments)
        return tuple(x * math.nan for x in out) if isinstance(out, tuple) else out * math.nan

    assert not smoke(no_gradient) and not smoke(lost)


# -------------------------------------------------------------------------------------------------------- mutants
def run_mutant(mutant: Mutant) -> Report:
    kind, _, function, edits, _ = mutant
    return check_component(plant(function, *edits), kind)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0]}: {m[1]}")
def test_mutants_are_caught(mutant: Mutant) -> None:
    failed = run_mutant(mutant).failed
    assert set(mutant[4].split()) <= set(failed), failed


def test_a_chunk_that_is_lost_inside_a_fused_loss() -> None:
    only_whole = ("level.append(x.logsumexp(1))", "level.append(x.logsumexp(1) * (len(h) == len(flat)))")
    wrong = plant(right.policy_loss_fused, statistics_chunked=plant(right.statistics_chunked, only_whole))
    assert "BS" in check_component(wrong, "fused_policy_loss").failed


# ----------------------------------------------------------------------------------------------------- PU, crashes
def touched(value: Any) -> bool:
    """Adds 1 to the first floating-point or integer tensor found, in place; appends to the first list."""
    if isinstance(value, torch.Tensor) and value.dtype != torch.bool and value.numel():
        with torch.no_grad():
            value += 1
        return True
    if isinstance(value, dict):
        return any(touched(x) for x in value.values())
    if isinstance(value, list) and value:
        if isinstance(value[0], (int, float)):
            value[0] += 1
            return True
        return any(touched(x) for x in value)
    return hasattr(value, "input_ids") and touched(value.input_ids)


FIRST = [(kind, functions[0]) for kind, functions in ACCEPTED.items()]


@pytest.mark.parametrize(("kind", "function"), FIRST, ids=name_of)
def test_changed_arguments_and_hidden_state_are_caught(kind: str, function: Callable[..., Any]) -> None:
    @wraps(function)
    def changing(*args: Any, **arguments: Any) -> Any:
        out = function(*args, **arguments)
        assert any(touched(x) for x in (*args, *arguments.values()))
        return out

    calls: list[int] = []

    @wraps(function)
    def drifting(*args: Any, **arguments: Any) -> Any:
        calls.append(0)
        out = function(*args, **arguments)
        return out + len(calls) if isinstance(out, torch.Tensor) and out.dtype != torch.bool else {"calls": len(calls)}

    component = Component(changing, COMPONENT_KINDS[kind])
    pure = next(check for check in COMPONENT_CHECKS[kind] if check.name == "PU")
    assert run_check(pure, component).status == FAILED
    assert "that differ between two equal calls" in run_check(pure, Component(drifting, COMPONENT_KINDS[kind])).message
    assert run_check(pure, Component(function, COMPONENT_KINDS[kind])).status == PASSED


@pytest.mark.parametrize(("kind", "function"), FIRST, ids=name_of)
def test_what_raises_or_returns_nonsense_is_a_failure_not_a_traceback(kind: str, function: Callable[..., Any]) -> None:
    @wraps(function)
    def raising(*args: Any, **arguments: Any) -> Any:
        raise IndexError("index 7 is out of bounds\nand more")

    def returning(value: Any) -> Callable[..., Any]:
        return wraps(function)(lambda *args, **arguments: value)

    nonsense = [None, True, "text", [], (), {}, [None], [1, [2]], {"input_ids": 3}, object()]
    nonsense += [torch.zeros(1, 1, 1, 1), torch.zeros(3, 0), torch.tensor(1j), torch.eye(2).to_sparse()]
    for wrong in (raising, *map(returning, nonsense)):
        report = check_component(wrong, kind)
        comparing = [r for r in report.results if r.name != "PU" and r.status != SKIPPED]
        assert not report.passed and comparing and {r.status for r in comparing} == {FAILED}, report.results
    message = check_component(raising, kind).results[0].message
    assert message.startswith(f"{kind} on ") and message.endswith("it raised IndexError: index 7 is out of bounds")


def test_nan_misses_every_bound() -> None:
    nan = lambda *, roles: torch.full(roles.shape, math.nan)  # noqa: E731
    report = check_component(nan, "completion_mask")
    assert report.failed[:5] == ["OR", "TE", "PAD", "MT", "BS"] and math.isnan(report["OR"].measured or 0.0)


def test_nan_in_masked_places_warns_and_fails_under_strict() -> None:
    """mask * x turns masked NaN into NaN: a warning, as the caller may never put any there."""
    careless = plant(right.whiten_masked, ("clean = torch.where(live, x, 0.0)", "clean = x * mask"))
    report = check_component(careless, "whitening")
    assert report.passed and report["MI"].status == WARNED
    assert check_component(careless, "whitening", strict=True).failed == ["MI"]


def test_expected_failures() -> None:
    wrong = lookup("C6").wrong
    report = check_component(wrong, "response_length", expect_fail={"MT": "spans are wanted here"})
    assert report.passed and report["MT"].reason == "spans are wanted here"
    assert check_component(right.length_by_sum, "response_length", expect_fail={"MT": "no longer true"}).failed == ["MT"]


# ------------------------------------------------------------------------------------------- user errors, messages
def test_a_message_stands_alone() -> None:
    result = check_component(lookup("C6").wrong, "response_length")["MT"]
    assert result.message == (
        "largest difference from the truth: 3, expected at most 0, over 5 numbers "
        "(two turns with observation tokens, right padding, row 0); got 8, expected 5"
    )
    assert result.hint == "The length is the span from first to last action, not mask.sum()."


def test_bad_calls_are_named() -> None:
    with pytest.raises(ValueError, match=r"^kind: expected one of completion_mask, .* got 'gea'\. Did you mean 'gae'\?$"):
        check_component(right.gae_loop, "gea")
    with pytest.raises(
        ValueError, match=r"^function: expected arguments of kind 'gae' \(.*\), got 'roles'\. Wrap it in a function\.$"
    ):
        check_component(right.mask_from_roles, "gae")
    with pytest.raises(ValueError, match=r"^function: expected something that can be called, got 3\.$"):
        check_component(3, "gae")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^padding: expected a tuple of 'right', 'left' or both, got 'left'\.$"):
        check_component(right.gae_loop, "gae", padding="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^purpose: expected 'value' or 'loss', got 'reward'\.$"):
        check_component(right.k1, "kl_estimator", purpose="reward")
    with pytest.raises(ValueError, match=r"^expect_fail: expected names of checks \(OR, TE"):
        check_component(right.gae_loop, "gae", expect_fail={"XX": "why"})


@pytest.mark.parametrize("kind", COMPONENT_KINDS)
def test_signatures_name_every_argument(kind: str) -> None:
    text = shiq_lab.component_signature(kind)
    assert text == signature(kind) and kind in (check_component.__doc__ or "")
    assert text.startswith(f"{kind}(*") and all(f"\n{name} " in text for name in COMPONENT_KINDS[kind].takes)


def test_a_report_is_json() -> None:
    data = json.loads(check_component(lookup("B11").wrong, "score_readout", name="my reader").to_json())
    assert data["subject"] == "my reader" and data["kind"] == "score_readout" and data["passed"] is False
    assert next(r for r in data["results"] if r["name"] == "PAD")["where"].startswith("row ")


def test_functions_with_open_arguments_get_everything() -> None:
    seen: set[str] = set()

    def greedy(**arguments: Any) -> torch.Tensor:
        seen.update(arguments)
        return right.mask_from_roles(roles=arguments["roles"])

    assert check_component(greedy, "completion_mask").passed
    assert seen == set(COMPONENT_KINDS["completion_mask"].takes), "every offered argument is passed, and no other"


# ------------------------------------------------------------------------------------------------ nothing compared
CASED = [(kind, check) for kind, checks in COMPONENT_CHECKS.items() for check in checks if isinstance(check.run, partial)]


@pytest.mark.parametrize(
    ("kind", "check"), [(k, c) for k, c in CASED if c.run.func.__name__ == "run_cases"], ids=lambda x: getattr(x, "name", x)
)  # type: ignore[attr-defined]
def test_a_check_without_cases_fails(kind: str, check: Any) -> None:
    component = Component(ACCEPTED[kind][0], COMPONENT_KINDS[kind])
    component.__dict__["cases"] = []
    assert (run_check(check, component).status, run_check(check, component).message) == (FAILED, "nothing was compared")


@pytest.mark.parametrize(
    ("module", "patch", "kind", "codes"),
    [
        (groups, {"LAYOUTS": ()}, "group_baseline", "GR IN"),
        (groups, {"_aligned": lambda *a: iter(())}, "micro_batches", "BS"),
        (statistics, {"compare_problem": lambda *a: iter(())}, "token_statistics", "OR BS CF DT DT-large"),
        (policy, {"compare_policy": lambda *a, **k: iter(())}, "fused_policy_loss", "OR IN CF CF-ratio MI BS"),
        (batches, {"_compare_batch": lambda *a, **k: iter(())}, "collator", "OR TE MT BS"),
        (batches, {"_settings": lambda *a: iter(())}, "packing", "OR PK EG"),
        (returns, {"EXTRAS": dict.fromkeys(("gae", "n_step", "reward_to_go"), ())}, "gae", "EG"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_check_without_fixtures_fails(
    module: Any, patch: dict[str, Any], kind: str, codes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in patch.items():
        monkeypatch.setattr(module, name, value)
    report = check_component(ACCEPTED[kind][-1], kind)
    assert [report[code].message for code in codes.split()] == ["nothing was compared"] * len(codes.split())


def test_comparing_no_entry_is_no_pass() -> None:
    none = compare(torch.zeros(2, 2), torch.zeros(2, 2), 1.0, "here", live=torch.zeros(2, 2, dtype=torch.bool))
    assert not none.holds and none.sentence() == "largest difference from the truth: nothing was compared on here"


# ------------------------------------------------------------------------------------------- truths by other roads
def test_comparison_of_special_numbers() -> None:
    inf, nan = math.inf, math.nan
    assert compare([1.0, inf, -inf], torch.tensor([1.0, inf, -inf]), 0.0, "x").holds
    for got in ([1.0, nan, -inf], [1.0, -inf, -inf], [1.0, inf, 3.0]):
        measured = compare(got, torch.tensor([1.0, inf, -inf]), 1e9, "x", axes=("row",))
        assert not measured.holds and measured.where in ("row 1", "row 2")
    with pytest.raises(SubjectError, match=r"x: it returned shape \(2,\), expected \(3,\)"):
        compare([1.0, 2.0], torch.zeros(3), 0.0, "x")
    assert changes([1, 2.0, {"a": torch.tensor([1.0, nan])}], [1, 2.0, {"a": torch.tensor([1.0, nan])}]) == (0, 4)
    assert changes(torch.zeros(3), torch.zeros(2)) == (3, 3)


def test_layouts_by_hand() -> None:
    """One row of the fixture written out: a prompt of 4, two actions, three observation tokens, three actions; left padding."""
    rows = Rows((TURNS[0], PLAIN[1]), "left", EOS, extra=1)
    assert rows.input_ids.tolist() == [[EOS, 3, 5, 7, 2, 4, 2, 9, 9, 8, 6, 5, 2], [EOS] * 11 + [8, 2]]
    assert rows.completion_mask.tolist() == [[0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1], [0] * 12 + [1]]
    assert rows.attention_mask.tolist() == [[0] + [1] * 12, [0] * 11 + [1, 1]]
    assert rows.actions == [[5, 6, 10, 11, 12], [12]] and rows.last_real == [12, 12]


def test_advantage_truths_by_hand() -> None:
    """Two actions, r = (1, 2), V = (3, 4), gamma = lambda = 1/2.

    Ended: delta_1 = 2 - 4 = -2, delta_0 = 1 + 4/2 - 3 = 0, A = (0 - 2/4, -2). Cut with V' = 8: delta_1 = 2 + 4 - 4 = 2.
    Two-step target at 0: 1 + 2/2 + V'/4 = 2 + 2.
    """
    gae, n_step = returns.gae_truth, returns.n_step_truth
    assert gae([1.0, 2.0], [3.0, 4.0], None, 0.5, 0.5) == [-0.5, -2.0]
    assert gae([1.0, 2.0], [3.0, 4.0], 8.0, 0.5, 0.5) == [0.5, 2.0]
    assert n_step([1.0, 2.0], [3.0, 4.0], 8.0, 0.5, 2) == [4.0, 6.0] == n_step([1.0, 2.0], [3.0, 4.0], 8.0, 0.5, 9)
    assert n_step([1.0, 2.0], [3.0, 4.0], 8.0, 0.5, 1) == [3.0, 6.0]
    assert returns.to_go_truth([1.0, 2.0], [], None, 0.5) == [2.0, 2.0]


def test_kl_gradients_in_closed_form_are_those_of_the_exact_kl() -> None:
    """Autograd through the sum over the vocabulary; k1's zero is the sum of pi grad ln pi."""
    logits, ref = kl._policies(0.7)
    truths = kl._gradients(logits, ref)
    for name, divergence in (
        ("k2", lambda logp: (logp.exp() * (logp - ref)).sum()),
        ("k3", lambda logp: (ref.exp() * (ref - logp)).sum()),
        ("k1", lambda logp: (logp.exp().detach() * logp).sum()),
    ):
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(divergence(leaf.log_softmax(-1)), leaf)
        assert (grad - truths[name]).abs().max() <= 1e-14, name  # a few roundings of numbers below 5


@pytest.mark.parametrize("reduction", policy.REDUCTIONS)
def test_gradients_in_closed_form_are_autograds(reduction: str) -> None:
    """The hand-written chain of scale, cap, temperature, log-softmax and clip against autograd of the plain formula."""
    component = Component(right.policy_loss_fused, COMPONENT_KINDS["fused_policy_loss"])
    p = policy.policy_problem(component, 5, temperature=0.7, logit_scale=0.25, soft_cap=3.0, size=2.0)
    value, grads = p.truth(reduction)
    hidden, head = (torch.tensor(x).requires_grad_() for x in (p.base.hidden, p.base.head))
    x = 3.0 * torch.tanh((hidden @ head.T) * 0.25 / 3.0) / 0.7
    logp = x.log_softmax(-1).gather(-1, torch.tensor(p.base.labels)[..., None])[..., 0]
    ratio, A = (logp - torch.tensor(p.old_logprobs)).exp(), torch.tensor(p.advantages)[:, None]
    loss = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.3) * A) * torch.tensor(p.is_ratio)
    mask = torch.tensor(p.mask)
    per_row = (loss * mask).sum(1) / mask.sum(1).clamp(min=1)
    total = {
        "sum": (loss * mask).sum(),
        "token mean": (loss * mask).sum() / mask.sum(),
        "mean of row means": per_row.mean(),
        "row mean": (loss * mask).sum() / len(mask),
    }[reduction]
    assert abs(total.item() - value) <= 1e-14 * 28 * 10  # 28 tokens, losses below 10
    for name, leaf in (("hidden", hidden), ("head", head)):
        (grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert (grad - torch.tensor(grads[name])).abs().max() <= 1e-14 * 28 * 10, name


def test_both_sides_of_both_clips_are_in_the_fixture() -> None:
    """Clipped above with A > 0, below with A < 0, and each unclipped: else a wrong clip would pass."""
    component = Component(right.policy_loss_fused, COMPONENT_KINDS["fused_policy_loss"])
    seen = set()
    for seed in (0, 1):
        p = policy.policy_problem(component, seed)
        taken, level, _, _ = p.base.statistics()
        ratio = np.exp(taken - level - p.old_logprobs)
        side = np.where(ratio > 1.3, "high", np.where(ratio < 0.8, "low", "inside"))
        seen |= {
            (s, a > 0) for row, a, m in zip(side, p.advantages, p.mask, strict=True) for s, on in zip(row, m, strict=True) if on
        }
    assert seen == {(s, up) for s in ("high", "low", "inside") for up in (True, False)}


def test_group_truth_by_hand() -> None:
    """Rewards (1, 2, 6): mean 3, leave-one-out means 4, 3.5, 1.5; variance 14/3 over G and 7 over G - 1."""
    form = groups.Form
    assert form().of([1.0, 2.0, 6.0]) == [-2.0, -1.0, 3.0]
    assert form(leave_one_out=True).of([1.0, 2.0, 6.0]) == [-3.0, -1.5, 4.5]
    assert form(correction=1).of([1.0, 2.0, 6.0]) == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5], rel=1e-15)
    assert form(correction=0).of([0.0, 2.0]) == [-1.0, 1.0] and form().of([5.0]) == [0.0]


def test_the_dialogue_is_random_where_it_must_be() -> None:
    """Several prompts and replies, and rows that the cut really cuts: else the conditional means would test little."""
    batch, solved = returns.dialogue()
    assert float(batch.weights.sum()) == pytest.approx(1.0, abs=1e-12) and len(batch.group_ids.unique()) == 2
    halves = returns.cut(batch, returns._last_action(batch))
    assert not halves.terminated.any() and (halves.completion_mask.sum(1) == batch.completion_mask.sum(1) - 1).all()
    assert np.isfinite(solved.v).all() and abs(solved.objective) > 0.01


def test_every_check_is_failed_by_something() -> None:
    """The matrix, computed: no check of any kind is there for show. (PU: the test above, for every kind.)"""
    caught = {
        (kind, name) for bug in BUGS for report in [bug.suite(bug.wrong)] for kind in [report.kind] for name in report.failed
    }
    caught |= {(mutant[0], name) for mutant in MUTANTS for name in mutant[4].split()}  # asserted one by one above
    missing = {(k, c.name) for k, checks in COMPONENT_CHECKS.items() for c in checks if c.name != "PU"} - caught
    assert not missing


def test_measured_sentences_carry_what_was_seen() -> None:
    found = compare([1.0, 2.5], torch.tensor([1.0, 2.0]), 0.1, "two rows", axes=("row",))
    assert isinstance(found, Measured) and found.sentence() == (
        "largest difference from the truth: 0.5, expected at most 0.1, over 2 numbers (two rows, row 1); got 2.5, expected 2"
    )
